"""bitsandbytes: NF4 and FP4 with a largest number for each block, and LLM.int8 with one a row."""

import re
from typing import TYPE_CHECKING, Any

from streamgauge.checkpoints.formats.made import Made
from streamgauge.numerics.grids import even_grid

if TYPE_CHECKING:
    import torch

NAME = "bitsandbytes"
LIBRARY = PACKAGE = "bitsandbytes"
BASES = {"weight"}
PARTS = r"absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4)"
COARSE = 2  # bits: no gap of either code is wider than those of an even one of so many


def split(name: str) -> tuple[str, str] | None:
    """The matrix that a tensor is a part of, and which part."""
    found = re.fullmatch(rf"(.+\.weight)\.({PARTS})", name)
    if found:
        return found.group(1), found.group(2)
    found = re.fullmatch(r"(.+)\.(weight|SCB|weight_format)", name)
    return (f"{found.group(1)}.weight", found.group(2)) if found else None


def weight(module: str, parts: "dict[str, torch.Tensor]", said: Any, _: Any) -> Made:
    """The matrix."""
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

    packed = parts.pop("weight")
    if "SCB" in parts:
        values = int8_vectorwise_dequant(packed, parts["SCB"].float())
        return Made(values, "LLM.int8", even_grid(values.numpy(), 8, values.shape[1]))
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    state.dtype = torch.float32  # its own is what the model computes in
    values = dequantize_4bit(packed, state)
    rounding = even_grid(values.reshape(1, -1).numpy(), COARSE, state.blocksize)
    return Made(values, str(state.quant_type).upper(), rounding)
