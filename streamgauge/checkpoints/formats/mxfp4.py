"""MXFP4, as gpt-oss stores its experts: two 4-bit floats a byte, an exponent for each 32."""

import re
from typing import TYPE_CHECKING, Any

from streamgauge.checkpoints.formats.made import Made

if TYPE_CHECKING:
    import torch

NAME = "MXFP4"
LIBRARY = PACKAGE = "transformers"
BASES = {"blocks"}
# Numbers of one bit of mantissa are a quarter apart at most, and those beyond the largest, 6 of 8,
# are cut by a quarter; relative to what comes out, a third.
ROUNDING = 1 / 3


def split(name: str) -> tuple[str, str] | None:
    """The stack of matrices that a tensor is a part of, and which part."""
    found = re.fullmatch(r"(.+)_(blocks|scales)", name)
    return (found.group(1), found.group(2)) if found else None


def weight(module: str, parts: "dict[str, torch.Tensor]", said: Any, _: Any) -> Made:
    """The stack, as the model has it."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    values = convert_moe_packed_tensors(parts["blocks"], parts["scales"], dtype=torch.float32)
    return Made(values, NAME, ROUNDING)
