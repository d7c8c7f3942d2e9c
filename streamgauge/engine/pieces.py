"""Large tensors read piece by piece, in fp64: rows, sketches, norms."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from streamgauge.numerics.sketches import SKETCHES, signs

if TYPE_CHECKING:
    import torch


NUMBERS = 2**17  # of a tensor are taken to fp64 at once


def pieces(tensor: "torch.Tensor") -> "Iterator[tuple[slice, torch.Tensor]]":
    """A matrix's or a batch of matrices' rows in fp64, which ones and what they hold, in parts that
    stay in a core's cache.
    """
    rows = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor
    size = max(1, NUMBERS * rows.shape[-2] // max(1, rows.numel()))
    for start in range(0, rows.shape[-2], size):
        own = slice(start, start + size)
        yield own, rows[..., own, :].double()


def sketch(tensor: "torch.Tensor") -> "torch.Tensor":
    """Sketches of a tensor's last two axes, (…, SKETCHES), in fp64. A vector counts as a row."""
    import torch

    rows = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor
    left = torch.as_tensor(signs(rows.shape[-2], 0), device=rows.device).double()
    right = torch.as_tensor(signs(rows.shape[-1], 1), device=rows.device).double()
    total = torch.zeros((*rows.shape[:-2], SKETCHES), dtype=torch.float64, device=rows.device)
    for own, piece in pieces(rows):
        total += (piece @ right.T * left[:, own].T).sum(-2)
    return total


def frobenius_norm(tensor: "torch.Tensor") -> float:
    """The root of the sum of squares in fp64; finite only where every number is."""
    flat = (piece.reshape(-1) for _, piece in pieces(tensor))
    return math.sqrt(sum(float(part @ part) for part in flat))


RUN = 256  # equal numbers, at an address that this divides, by which a run of them is found
FEW_RUNS = 4  # more of them in one tensor are its structure


def runs(tensor: "torch.Tensor") -> list[tuple[int, int]]:
    """Stretches of RUN to 2 RUN or more equal numbers that are no whole rows: where each starts,
    and how many numbers it has.

    A page of a file that was not written leaves one; rows of zeros, as of pruned neurons and unused
    tokens, and columns that are padded, which leave one a row, are a model's own.
    """
    flat, width = tensor.reshape(-1), tensor.shape[-1]
    count = flat.numel() // RUN
    blocks = flat[: count * RUN].view(count, RUN)
    # The first, a middle and the last number tell nearly all blocks off.
    likely = (blocks[:, 0] == blocks[:, -1]) & (blocks[:, 0] == blocks[:, RUN // 2])
    found: list[tuple[int, int]] = []
    for block in likely.nonzero()[:, 0].tolist():
        inside = bool(found) and sum(found[-1]) > block * RUN
        if inside or not (blocks[block] == blocks[block, 0]).all():
            continue
        found.append(_extent(flat, block * RUN))
        if len(found) > 8 * FEW_RUNS:
            return []  # whole rows, or the like of them
    found = [(at, size) for at, size in found if at % width or size % width]
    return found if len(found) <= FEW_RUNS else []


def _extent(flat: "torch.Tensor", at: int) -> tuple[int, int]:
    """Where the stretch of equal numbers around one starts, and how many it has."""
    value, first, last = flat[at], at, at
    while first > 0:
        part = flat[max(0, first - RUN) : first] != value
        others = part.nonzero()
        if len(others):
            first -= len(part) - 1 - int(others[-1])
            break
        first -= len(part)
    while last < flat.numel():
        others = (flat[last : last + RUN] != value).nonzero()
        if len(others):
            last += int(others[0])
            break
        last += len(flat[last : last + RUN])
    return first, last - first
