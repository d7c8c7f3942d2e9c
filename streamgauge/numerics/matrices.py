"""A checkpoint's own matrices, read with numpy alone by the places that its record notes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.errors import CheckpointError, NotApplicable
from streamgauge.numerics.convention import expand_heads, fold_reading, fold_writing

if TYPE_CHECKING:
    from streamgauge.record import Record


@dataclass(frozen=True)
class Matrices:
    """W_V and W_O of a checkpoint by layer, in the convention, fp64.

    read: from a tensor's name to what the files hold under it. record: of these very weights, which
    notes where the matrices lie.
    """

    read: Callable[[str], np.ndarray]
    record: "Record"

    @property
    def centres(self) -> bool:
        """Whether the norms before the weights subtract the mean."""
        return bool(self.record.metadata["centres"])

    @property
    def layers(self) -> list[int]:
        """The layers that have them. Raises as `Record.array` does where none has."""
        self.record.partial("weights/W_OV_frobenius")
        places = self._places("W_O")
        return [layer for layer, place in enumerate(places) if place is not None]

    def W_V(self, layer: int) -> np.ndarray:
        """Shape (n_heads, d_model, d_head); grouped heads are repeated."""
        n_heads = self._places("W_O")[layer]["shape"][0]
        gain = self.record.array("weights/ln1_gain")[layer]
        W_V = self._read("W_V", layer).astype(np.float64)
        return expand_heads(fold_reading(W_V, gain, self.centres), n_heads)

    def W_O(self, layer: int) -> np.ndarray:
        """Shape (n_heads, d_head, d_model)."""
        W_O = self._read("W_O", layer).astype(np.float64)
        return self._multiplier(layer) * fold_writing(W_O, self.centres)

    def n_heads(self, layer: int) -> int:
        """How many heads a layer has."""
        return int(self._places("W_O")[layer]["shape"][0])

    def head(self, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """W_V, (d_model, d_head), and W_O, (d_head, d_model), of one head."""
        V, O = self._read("W_V", layer), self._read("W_O", layer)  # noqa: E741
        gain = self.record.array("weights/ln1_gain")[layer]
        W_V = fold_reading(V[head * len(V) // len(O)].astype(np.float64), gain, self.centres)
        W_O = fold_writing(O[head].astype(np.float64), self.centres)
        return W_V, self._multiplier(layer) * W_O

    def squared_sizes(self, layer: int) -> np.ndarray:
        """‖W_V‖²‖W_O‖², (n_heads,), before centring, at most.

        Rounding of squared norms of W_OV is relative to it.
        """
        V, O = (  # noqa: E741
            self.record.partial(f"weights/{name}_raw")[layer].astype(float)
            for name in ("W_V", "W_O")
        )
        V, O = V[~np.isnan(V)], O[~np.isnan(O)]  # noqa: E741
        gain = np.abs(self.record.array("weights/ln1_gain")[layer]).max()
        sizes: np.ndarray = (
            gain * self._multiplier(layer) * np.repeat(V, len(O) // len(V)) * O
        ) ** 2
        return sizes

    def _multiplier(self, layer: int) -> float:
        said = self.record.metadata.get("residual_multiplier", 1.0)
        return float(said[layer] if isinstance(said, list) else said)

    def _places(self, name: str) -> list[Any]:
        places: list[Any] | None = self.record.metadata["matrices"].get(name)
        if not places:
            raise NotApplicable(
                f"{name} of this architecture is not a plain view of a tensor in the file"
            )
        return places

    def _read(self, name: str, layer: int) -> np.ndarray:
        place = self._places(name)[layer]
        if place is None:
            raise NotApplicable(f"layer {layer} has no {name} by head")
        view = strided(self.read(place["tensor"]), place)
        if view is None:
            raise CheckpointError(
                f"the checkpoint and its record disagree on {place['tensor']}; measure again."
            )
        return view


def strided(array: np.ndarray, place: dict[str, Any]) -> np.ndarray | None:
    """The view that a place describes, or None where it would reach outside the array."""
    flat = np.ascontiguousarray(array).reshape(-1)
    steps = zip(place["shape"], place["strides"], strict=True)
    last = place["offset"] + sum((n - 1) * step for n, step in steps)
    if min(place["strides"]) < 0 or place["offset"] < 0 or last >= flat.size:
        return None
    strides = [step * flat.itemsize for step in place["strides"]]
    beginning = flat[place["offset"] :]
    return np.lib.stride_tricks.as_strided(beginning, place["shape"], strides, writeable=False)
