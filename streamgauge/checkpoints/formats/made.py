"""What a format makes of the parts of a matrix."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Made:
    """A matrix as the model's Linear has it, (out, in).

    dtype: what the file holds it in, in words. rounding: how far rounding to that can have moved
    it, relative to its norm (`streamgauge.numerics.grids`).
    """

    values: "torch.Tensor"
    dtype: str
    rounding: float
