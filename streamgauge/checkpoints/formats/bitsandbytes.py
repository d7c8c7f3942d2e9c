"""bitsandbytes: NF4 and FP4 with a largest number for each block, and LLM.int8 with one a row."""

import math
import re
from typing import TYPE_CHECKING, Any

from streamgauge.checkpoints.formats.made import Made
from streamgauge.numerics.grids import even_grid, uneven_grid

if TYPE_CHECKING:
    import torch

NAME = "bitsandbytes"
LIBRARY = PACKAGE = "bitsandbytes"
BASES = {"weight"}
PARTS = r"absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4)"


def split(name: str) -> tuple[str, str] | None:
    """The matrix that a tensor is a part of, and which part."""
    found = re.fullmatch(rf"(.+\.weight)\.({PARTS})", name)
    if found:
        return found.group(1), found.group(2)
    found = re.fullmatch(r"(.+)\.(weight|SCB|weight_format)", name)
    return (f"{found.group(1)}.weight", found.group(2)) if found else None


def _refuse_short(packed: "torch.Tensor", state: Any) -> None:
    """Raise ValueError for parts that are shorter than what the library's kernels, which do not
    look, would read of them.
    """
    numbers, inner = math.prod(state.shape), state.state2
    scales = [(state.absmax, -(-numbers // state.blocksize)), (state.code, 16)]
    if state.nested:
        scales += [
            (inner.absmax, -(-state.absmax.numel() // inner.blocksize)),
            (inner.code, 256),
        ]
    wrong = [part for part, wanted in scales if part.numel() != wanted]
    if wrong or min(state.shape) < 1 or 2 * packed.nbytes != numbers + numbers % 2:
        raise ValueError(f"a matrix of {numbers} numbers, and parts of other lengths")


def weight(module: str, parts: "dict[str, torch.Tensor]", said: Any, _: Any) -> Made:
    """The matrix."""
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

    packed = parts.pop("weight")
    if "SCB" in parts:
        if packed.dim() != 2 or parts["SCB"].numel() != packed.shape[0]:
            raise ValueError("a scale for each row is missing")
        values = int8_vectorwise_dequant(packed, parts["SCB"].float())
        return Made(values, "LLM.int8", even_grid(values.numpy(), 8, values.shape[1]))
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    _refuse_short(packed, state)
    state.dtype = torch.float32  # its own is what the model computes in
    values = dequantize_4bit(packed, state)
    rounding = uneven_grid(values.reshape(1, -1).numpy(), state.code.tolist(), state.blocksize)
    return Made(values, str(state.quant_type).upper(), rounding)
