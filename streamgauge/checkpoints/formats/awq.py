"""AWQ: codes of 4 bits packed along the output, eight a word in an order of its own, a scale and a
zero for each group of inputs: W = scale · (code - zero).

Unpacked here, as GPTQ is, for the same reason.
"""

import re
from typing import TYPE_CHECKING, Any

from streamgauge.checkpoints.formats.gptq import unpack
from streamgauge.checkpoints.formats.made import Made
from streamgauge.numerics.grids import even_grid

if TYPE_CHECKING:
    import torch

NAME = "AWQ"
LIBRARY = PACKAGE = "torch"
BASES = {"qweight"}
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where the eight outputs of a word lie in it


def split(name: str) -> tuple[str, str] | None:
    """The matrix that a tensor is a part of, and which part."""
    found = re.fullmatch(r"(.+)\.(qweight|qzeros|scales)", name)
    return (f"{found.group(1)}.weight", found.group(2)) if found else None


def weight(module: str, parts: "dict[str, torch.Tensor]", said: dict[str, Any], _: Any) -> Made:
    """The matrix. Raises ValueError for a layout of another version."""
    layout = str(said.get("version", "gemm")).lower()
    bits = int(said.get("bits", said.get("w_bit", 4)))
    if layout != "gemm" or bits != 4:
        raise ValueError(f"version {layout}, {bits} bits: only gemm, 4 bits, can be read")
    codes, zeros = (_in_order(unpack(parts[part], bits)) for part in ("qweight", "qzeros"))
    scales = parts["scales"].float()  # groups, out
    size = codes.shape[0] // scales.shape[0]
    if size * scales.shape[0] != codes.shape[0]:
        raise ValueError(f"{codes.shape[0]} inputs in {scales.shape[0]} groups")
    wide = [part.repeat_interleave(size, 0) for part in (scales, zeros)]
    values = (wide[0] * (codes - wide[1])).T.contiguous()
    return Made(values, f"{NAME} {bits} bit", even_grid(values.numpy(), bits, size))


def _in_order(codes: "torch.Tensor") -> "torch.Tensor":
    return codes.reshape(codes.shape[0], -1, 8)[:, :, ORDER].reshape(codes.shape)
