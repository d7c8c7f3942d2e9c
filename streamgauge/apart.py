"""Where two checkpoints part: hypothesis draws sequences of tokens, and makes one on which the two
differ by more than rounding explains as short and as simple as it can be.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from streamgauge.checkpoints.files import Checkpoint
from streamgauge.compare.rounding import FP32
from streamgauge.engine.blockwise import Batch, Blockwise
from streamgauge.engine.clean_runs import token_losses
from streamgauge.engine.layout import probe_layout
from streamgauge.engine.load import context_length, load_model
from streamgauge.errors import PromptError
from streamgauge.groups.rounding import NOISE, Noise, log_norms
from streamgauge.strategies import smallest, token_sequences

if TYPE_CHECKING:
    import torch

NOISES = 6  # runs of the old checkpoint that say what rounding does to a sequence
# By how much the two may differ beyond the largest of these. All seven alike, Gaussian and of one
# degree of freedom, as for a single token: 4 sequences and layers in a million do.
ROOM = 10
LONGEST = 2048  # tokens of a sequence, where the context has them
SHRINKS = 100  # sequences that are tried to make one that was drawn simpler
SINGLES = 64  # tokens of a sequence that are tried alone
ODD_ROWS = 4096  # tokens whose rows differ that are drawn more often


@dataclass(frozen=True)
class Parting:
    """A sequence of tokens on which the two part: from which layer's output on (-1: from the
    embedding; None: in the losses alone), and by how many times what rounding explains.
    """

    tokens: tuple[int, ...]
    layer: int | None
    ratio: float

    def __str__(self) -> str:
        count = len(self.tokens)
        on = f"the single token {self.tokens[0]}" if count == 1 else f"{count:,} tokens"
        if count > 1 and len(set(self.tokens)) == 1:
            on = f"token {self.tokens[0]}, {count:,} times"
        where = "in the losses alone"
        if self.layer is not None:
            where = (
                f"from layer {self.layer}'s output on"
                if self.layer >= 0
                else "from the embedding on"
            )
        times = f"{self.ratio:.3g}" if np.isfinite(self.ratio) else "infinitely many"
        return f"the two part on {on}, {where} ({times} times what rounding explains)"


class Pair:
    """Two checkpoints that read the same tokens, side by side."""

    def __init__(self, old: Checkpoint, new: Checkpoint, unit: float, device: str = "cpu") -> None:
        self.old, self.new = (Blockwise(load_model(c, device).mapped) for c in (old, new))
        self.layouts = [probe_layout(model) for model in (self.old, self.new)]
        arithmetic = np.sqrt(self.layouts[0].d_model) * FP32
        self.size = float(np.hypot(unit, arithmetic))  # of what rounding does to a weight
        self.vocabulary = min(self.old.vocabulary, self.new.vocabulary)
        self.context = min(
            context_length(model.mapped.model.config) for model in (self.old, self.new)
        )

    def compare(self, tokens: Sequence[int]) -> np.ndarray:
        """How far the two are apart on a sequence, over what rounding explains: (n_layers + 2,), of
        the stream from the embedding on, and of the losses.
        """
        (clean,), (other,) = (self._run(side, tokens, [None]) for side in (0, 1))
        apart = _apart(clean, other)
        if not apart.any():
            return apart
        noisy = self._run(0, tokens, [Noise(draw) for draw in range(NOISES)])
        explained = np.max([_apart(clean, run) for run in noisy], 0) / NOISE * self.size
        ratios = np.where(apart == 0, 0, apart / (ROOM * explained + 8 * FP32))
        return np.asarray(np.where(np.isnan(ratios), np.inf, ratios))

    def _run(
        self, side: int, tokens: Sequence[int], noises: "Sequence[Noise | None]"
    ) -> list[list[np.ndarray]]:
        """Log norms of the stream, layer by layer, and losses: one list a noise."""
        import torch

        model, layout = (self.old, self.new)[side], self.layouts[side]

        def read(x: "torch.Tensor") -> np.ndarray:
            return np.asarray(log_norms(layout, x).cpu().numpy())

        with torch.no_grad():
            batches: list[Batch] = []
            with model.mapped.changes() as use:
                for noise in noises:
                    use(noise)
                    batches.append(model.enter([list(tokens)]))
            found = [[read(batch.stream)] for batch in batches]
            for layer in range(model.n_layers):
                path = model.paths[layer]
                with model.held(layer), model.mapped.changes(path) as use:
                    for batch, noise, own in zip(batches, noises, found, strict=True):
                        use(noise)
                        own.append(read(model.step(batch, layer)))
            with model.mapped.changes() as use:
                for batch, noise, own in zip(batches, noises, found, strict=True):
                    use(noise)
                    own.append(np.asarray(token_losses(model, batch.ids, batch.stream)[0]))
        return found

    def odd_tokens(self) -> list[int]:
        """Tokens whose rows of the embedding differ; none where most do, or widths do."""
        tables = [model.mapped.stored[model.mapped.embedding] for model in (self.old, self.new)]
        if tables[0].shape[1:] != tables[1].shape[1:]:
            return []
        rows = min(map(len, tables))
        differ = (tables[0][:rows] != tables[1][:rows]).any(1).nonzero()[:, 0].tolist()
        return differ[:ODD_ROWS] if len(differ) <= rows // 2 else []


def _apart(one: list[np.ndarray], other: list[np.ndarray]) -> np.ndarray:
    """Root mean square over tokens of each layer's change of log norm, and of the losses'."""
    return np.array(
        [np.sqrt(np.mean((b - a) ** 2)) if len(a) else 0.0 for a, b in zip(one, other, strict=True)]
    )


def parting(pair: Pair, tokens: Sequence[int]) -> Parting | None:
    """Where the two part on a sequence, None where they do not.

    Raises PromptError for tokens that they cannot read.
    """
    if not all(0 <= n < pair.vocabulary for n in tokens) or not 0 < len(tokens) <= pair.context:
        raise PromptError(
            f"both read up to {pair.context} tokens with ids below {pair.vocabulary}; give "
            "--tokens that they can read."
        )
    ratios = pair.compare(tokens)
    beyond = np.flatnonzero(ratios > 1)
    if not len(beyond):
        return None
    first = int(beyond[0])
    layer = None if first == len(ratios) - 1 else first - 1
    return Parting(tuple(tokens), layer, float(ratios.max()))


def search(
    pair: Pair, texts: Sequence[Sequence[int]], draws: int, first: Sequence[Sequence[int]] = ()
) -> Parting | None:
    """The simplest sequence that was drawn on which the two part, None where they never did.

    first: examples of earlier comparisons, which are tried before anything is drawn; then the
    longest text.
    """
    long = [n for text in texts for n in text][: min(pair.context, LONGEST)]
    given = [
        ids
        for ids in first
        if 0 < len(ids) <= pair.context and min(ids) >= 0 and max(ids) < pair.vocabulary
    ]
    known = next((ids for ids in [*given, long] if ids and parting(pair, ids)), None)
    drawn = token_sequences(pair.vocabulary, pair.context, pair.odd_tokens(), texts, draws)
    seen: dict[tuple[int, ...], bool] = {}

    def part(ids: tuple[int, ...]) -> bool:
        # What was seen is said again, or hypothesis would take the last of the budget for chance.
        if ids not in seen:
            seen[ids] = len(seen) < draws + SHRINKS and parting(pair, ids) is not None
        return seen[ids]

    found = smallest(drawn.map(lambda draw: draw.ids), part, draws)
    return None if found is None and known is None else _shorter(pair, found or known or ())


def _shorter(pair: Pair, tokens: Sequence[int]) -> Parting | None:
    """A single token of a sequence on which the two part, else its shortest stretch: what was
    drawn as a whole is not made smaller by its tokens.
    """
    for token in list(dict.fromkeys(tokens))[:SINGLES]:
        if found := parting(pair, [token]):
            return found

    def shortest(most: int, part: Callable[[int], Sequence[int]]) -> Sequence[int]:
        low, high = 0, most  # they part on the part of `high` tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if parting(pair, part(middle)) else (middle, high)
        return part(high)

    first = shortest(len(tokens), lambda length: tokens[:length])
    return parting(pair, shortest(len(first), lambda length: first[len(first) - length :]))
