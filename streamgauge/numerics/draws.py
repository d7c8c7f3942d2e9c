"""What hypothesis draws for the laws that a forward pass can break: sequences of tokens, and what
each law made of them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

NO_NUMBER = 1e30  # a ratio that is none, as something in it is not finite
# By law: what its ratio is the ratio of, to what rounding explains.
LAWS = {
    "additivity": "error of the sum",
    "contribution_bound": "change of norm beyond the contributions",
    "causality": "change of the stream by later tokens",
    "scale_blindness": "change of a sublayer's output by scale and shift",
    "neurons": "change of the stream by another order of the hidden neurons",
    "heads": "change of the stream by another order of the heads",
    "value_basis": "change of the stream by another basis within the heads",
    "batch": "change of the last stream by other rows beside it",
    "cache": "change of the last stream by a cache of keys and values",
    "attention_implementation": "change of the last stream by another implementation of attention",
}
NAMES = {  # of the files of laws that are called otherwise here
    "neurons_have_no_order": "neurons",
    "heads_have_no_order": "heads",
    "value_basis_is_free": "value_basis",
    "rows_are_apart": "batch",
    "cache_changes_nothing": "cache",
    "any_attention_kernel": "attention_implementation",
}
TWINS = ("neurons", "heads", "value_basis")  # the same function in other weights


@dataclass(frozen=True)
class Draw:
    """One drawn sequence.

    kept: how many of its tokens, from the first, another text shares, and a cache is filled with.
    twin: which of TWINS is tried on it, with permutations of this seed.
    """

    ids: tuple[int, ...]
    kept: int
    twin: str
    seed: int

    def other(self, vocabulary: int) -> list[int]:
        """Another text that begins as this one does and has none of its later tokens."""
        return [*self.ids[: self.kept], *((i + 1) % vocabulary for i in self.ids[self.kept :])]

    def said(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"ids": list(self.ids), "kept": self.kept, "twin": self.twin, "seed": self.seed}


@dataclass(frozen=True)
class HeadDraw:
    """A head of a layer, and what it is given: so many Gaussian vectors of a seed, or, where that
    is 0, an orthonormal basis of it.
    """

    layer: int
    head: int
    samples: int
    seed: int


def worst(ratios: np.ndarray) -> tuple[float, int]:
    """The largest of ratios (n_draws, n_layers), and the first layer that has one above 1, or where
    the largest is; -1 stands for draws that a law was not asked of.
    """
    by_layer = ratios.max(0)
    beyond = np.flatnonzero(by_layer > 1)
    return float(by_layer.max()), int(beyond[0] if len(beyond) else by_layer.argmax())


def broken(arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """The laws that some draw breaks, and the first that does."""
    return {
        name: int((ratios > 1).any(1).argmax())
        for name, ratios in arrays.items()
        if (ratios > 1).any()
    }
