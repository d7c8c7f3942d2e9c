"""GPTQ: codes of 2, 3, 4 or 8 bits packed along the input, a scale and a zero for each group of
inputs: W = scale · (code - zero).

Unpacked here: the library that made it needs another torch than streamgauge runs with, and a
compiler. tests/ holds it against that library's numbers.
"""

import re
from typing import TYPE_CHECKING, Any

from streamgauge.checkpoints.formats.made import Made
from streamgauge.numerics.grids import even_grid

if TYPE_CHECKING:
    import torch

NAME = "GPTQ"
LIBRARY = PACKAGE = "torch"
BASES = {"qweight"}
# The method moves what it has not rounded yet to make up for what it has: twice as far as rounding
# to the nearest is how far it is taken to go.
MARGIN = 2.0


def split(name: str) -> tuple[str, str] | None:
    """The matrix that a tensor is a part of, and which part."""
    found = re.fullmatch(r"(.+)\.(qweight|qzeros|scales|g_idx)", name)
    return (f"{found.group(1)}.weight", found.group(2)) if found else None


def weight(module: str, parts: "dict[str, torch.Tensor]", said: dict[str, Any], _: Any) -> Made:
    """The matrix. Raises ValueError for parts that do not fit together."""
    import torch

    bits, version = said["bits"], said.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2") or said.get("dynamic"):
        raise ValueError(f"format {version}, settings by module: {bool(said.get('dynamic'))}")
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"codes of {bits} bits")
    codes = unpack(parts["qweight"].T, bits)  # out, in
    zeros = _zeros(parts["qzeros"], bits, version == "gptq").T  # out, groups
    scales = parts["scales"].float().T
    size = int(said["group_size"])
    groups = parts.get("g_idx")
    if groups is None:
        wanted = -(-codes.shape[1] // size) if size > 0 else 1
        if wanted != scales.shape[1]:
            raise ValueError(f"{scales.shape[1]} scales for each output, not {wanted}")
        groups = torch.arange(codes.shape[1]) // (size if size > 0 else codes.shape[1])
    groups = groups.long()
    if int(groups.max()) >= scales.shape[1] or int(groups.min()) < 0:
        raise ValueError(
            f"inputs of groups {int(groups.min())} to {int(groups.max())}, but {scales.shape[1]} "
            "scales"
        )
    values = scales[:, groups] * (codes - zeros[:, groups])
    block = size if size > 0 else values.shape[1]
    together = values[:, torch.argsort(groups, stable=True)]  # a group's inputs side by side
    return Made(values, f"{NAME} {bits} bit", even_grid(together.numpy(), bits, block, MARGIN))


def _zeros(words: "torch.Tensor", bits: int, first_version: bool) -> "torch.Tensor":
    """The zeros in each row of words; the format's first version stores them less one.

    It takes one from all zeros of a word at once, so that a zero of 0 borrows from the next.
    """
    if not first_version:
        return unpack(words, bits)
    if bits == 3:  # where words do not hold whole zeros
        return (unpack(words, bits) + 1) & (2**bits - 1)
    ones = sum(1 << place for place in range(0, 32, bits))
    return unpack(words.long() + ones, bits)


def unpack(words: "torch.Tensor", bits: int) -> "torch.Tensor":
    """The codes in each row of 32-bit words, (rows, 32 / bits · words): lowest bits first, across
    words where bits do not divide 32.
    """
    import torch

    rows = words.shape[0]
    stream = (words.to(torch.int64) & 0xFFFFFFFF).reshape(rows, -1, bits if bits == 3 else 1)
    found = []
    for start in range(0, stream.shape[2] * 32, bits):
        word, offset = divmod(start, 32)
        code = stream[:, :, word] >> offset
        if offset + bits > 32:
            code = code | stream[:, :, word + 1] << (32 - offset)
        found.append(code & (2**bits - 1))
    return torch.stack(found, -1).reshape(rows, -1)
