"""A checkpoint's own matrices, read with numpy alone by the places that its record notes."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from streamgauge.checkpoint import Checkpoint, read_tensor, tensor_names
from streamgauge.convention import expand_heads, fold_reading, fold_writing
from streamgauge.errors import CheckpointError, NotApplicable
from streamgauge.record import Record
from streamgauge.weights import strided


@dataclass(frozen=True)
class Matrices:
    """W_V and W_O of a checkpoint by layer, in the convention, fp64."""

    checkpoint: Checkpoint
    record: Record

    @property
    def centres(self) -> bool:
        """Whether the norms before the weights subtract the mean."""
        return bool(self.record.metadata["centres"])

    @property
    def _multiplier(self) -> float:
        return float(self.record.metadata.get("residual_multiplier", 1.0))

    @cached_property
    def _files(self) -> dict[str, Path]:
        return tensor_names(self.checkpoint)

    def W_V(self, layer: int) -> np.ndarray:
        """Shape (n_heads, d_model, d_head); grouped heads are repeated."""
        n_heads = self.record.array("weights/W_OV_frobenius").shape[1]
        gain = self.record.array("weights/ln1_gain")[layer]
        return expand_heads(fold_reading(self._read("W_V", layer), gain, self.centres), n_heads)

    def W_O(self, layer: int) -> np.ndarray:
        """Shape (n_heads, d_head, d_model)."""
        return self._multiplier * fold_writing(self._read("W_O", layer), self.centres)

    def squared_sizes(self) -> np.ndarray:
        """‖W_V‖²‖W_O‖², (n_layers, n_heads), before centring, at most: rounding of squared norms of W_OV is relative to it."""
        V, O = (self.record.array(f"weights/{name}_raw").astype(float) for name in ("W_V", "W_O"))  # noqa: E741
        gains = np.abs(self.record.array("weights/ln1_gain")).max(1, keepdims=True)
        sizes: np.ndarray = (gains * self._multiplier * np.repeat(V, O.shape[1] // V.shape[1], axis=1) * O) ** 2
        return sizes

    def _read(self, name: str, layer: int) -> np.ndarray:
        places = self.record.metadata["matrices"].get(name)
        if not places:
            raise NotApplicable(f"{name} of this architecture is not a plain view of a tensor in the file")
        place = places[layer]
        view = strided(read_tensor(self._files[place["tensor"]], place["tensor"]), place)
        if view is None:
            raise CheckpointError(f"{self.checkpoint.folder} and its record disagree on {place['tensor']}; measure again.")
        return view.astype(np.float64)
