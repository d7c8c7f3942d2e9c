"""FP8 numbers with a scale for each block, each row, or the whole matrix: W = q · scale."""

import re
from typing import TYPE_CHECKING, Any

from streamgauge.checkpoints.formats.made import SAFETENSORS, Made, plain, unscaled
from streamgauge.errors import CheckpointError
from streamgauge.numerics.grids import float_grid

if TYPE_CHECKING:
    import torch

NAME = "FP8"
LIBRARY = PACKAGE = "torch"  # has the numbers; the format is no more than a product
BASES = {""}
BLOCK = (128, 128)  # where the configuration names none
MANTISSA = {"float8_e4m3fn": 3, "float8_e5m2": 2}
SMALLEST = {"float8_e4m3fn": 2.0**-9, "float8_e5m2": 2.0**-16}


def split(name: str) -> tuple[str, str] | None:
    """The matrix that a tensor of the files is a part of, and which part: numbers ("") or scales.

    Scales of activations are parts that nothing needs.
    """
    found = re.fullmatch(r"(.+)\.(activation_scale|input_scale)", name)
    if found:
        return f"{found.group(1)}.weight", found.group(2)
    found = re.fullmatch(r"(.+?)(_scale_inv|_scale)", name)
    return (found.group(1), "scale") if found else (name, "")


def weight(module: str, parts: "dict[str, torch.Tensor]", said: dict[str, Any], _: Any) -> Made:
    """The matrix, or a stack of them. Raises CheckpointError for scales that are not its own."""
    import torch

    numbers, scale = parts[""], _plain(parts.get("scale"))
    kind = str(numbers.dtype).removeprefix("torch.")
    if kind not in MANTISSA or scale is None:
        if numbers.element_size() > 1:
            return plain(numbers)
        raise unscaled(module, SAFETENSORS.get(kind, kind))
    rows, columns = numbers.shape[-2:]
    high, wide = said.get("weight_block_size") or BLOCK
    if scale.dim() >= 2 and tuple(scale.shape[-2:]) == (-(-rows // high), -(-columns // wide)):
        scale = scale.repeat_interleave(high, -2)[..., :rows, :]
        scale = scale.repeat_interleave(wide, -1)[..., :columns]
    elif scale.numel() == rows and numbers.dim() == 2:
        scale = scale.reshape(rows, 1)
    elif scale.numel() == 1:
        scale = scale.reshape(())
    else:
        raise CheckpointError(
            f"{module} has {rows} × {columns} numbers and scales of shape {list(scale.shape)}, "
            f"which are neither one for each block of {high} × {wide}, nor one for each row, nor a "
            "single one."
        )
    values = numbers.float() * scale
    half_steps = torch.broadcast_to(scale, values.shape) * SMALLEST[kind] / 2
    smallest = float(half_steps.square().mean().sqrt())
    return Made(values, SAFETENSORS[kind], float_grid(values.numpy(), MANTISSA[kind], smallest))


def _plain(scale: "torch.Tensor | None") -> "torch.Tensor | None":
    """Scales as numbers: powers of two may be stored as their exponents."""
    import torch

    if scale is None:
        return None
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
