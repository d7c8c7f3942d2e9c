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
