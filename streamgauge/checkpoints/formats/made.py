"""What a format makes of the parts of a matrix."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


# What safetensors calls torch's dtypes.
SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class Made:
    """A matrix as the model's Linear has it, (out, in).

    dtype: what the file holds it in, in words. rounding: how far rounding to that can have moved
    it, relative to its norm (`streamgauge.numerics.grids`).
    """

    values: "torch.Tensor"
    dtype: str
    rounding: float


def plain(values: "torch.Tensor") -> Made:
    """A matrix that is stored as it is, beside scales of something else."""
    kind = str(values.dtype).removeprefix("torch.")
    return Made(values, SAFETENSORS.get(kind, kind), 0.0)
