"""What a format makes of the parts of a matrix."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamgauge.errors import CheckpointError

if TYPE_CHECKING:
    import torch


# What safetensors calls torch's dtypes.
SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
SAFETENSORS |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


@dataclass(frozen=True)
class Made:
    """A matrix as the model's Linear has it, (out, in).

    dtype: what the file holds it in, in words. rounding: how far rounding to that can have moved
    it, relative to its norm (`streamgauge.numerics.grids`).
    """

    values: "torch.Tensor"
    dtype: str
    rounding: float


def unscaled(name: str, dtype: str) -> CheckpointError:
    """FP8 numbers whose scales are not there."""
    return CheckpointError(
        f"{name} holds FP8 numbers ({dtype}) and no scales lie beside it: copy the checkpoint "
        "again, with its weight_scale_inv or weight_scale."
    )


def plain(values: "torch.Tensor") -> Made:
    """A matrix that is stored as it is, beside scales of something else."""
    kind = str(values.dtype).removeprefix("torch.")
    return Made(values, SAFETENSORS.get(kind, kind), 0.0)
