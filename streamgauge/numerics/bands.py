"""A band: where a value must lie for a law to hold, and who says so."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Band:
    """Open interval with its source; a missing bound is None.

    over: the layers, ends included, that a law which looks at a window is asked to look at. layers:
    those that it did look at, as it says itself; None for a law about none in particular.
    unclaimed: why no source claims the law of this model, where none does; its value is then noted
    and nothing asserted.
    """

    low: float | None
    high: float | None
    source: str
    over: tuple[int, int] | None = None
    layers: tuple[int, int] | None = None
    unclaimed: str | None = None

    def __contains__(self, value: float) -> bool:
        return self.margin(value) > 0

    @property
    def window(self) -> tuple[int, int]:
        """The layers to look at, which bands of the catalogue name.

        Raises ValueError for a band that names none.
        """
        if self.over is None:
            raise ValueError(f"the band {self} names no layers")
        return self.over

    def margin(self, value: float) -> float:
        """Distance to the nearer bound, positive inside; infinitely far outside for NaN, infinity
        or a bound that is NaN.
        """
        if not math.isfinite(value):
            return -math.inf
        distances = [value - self.low] if self.low is not None else []
        distances += [self.high - value] if self.high is not None else []
        return -math.inf if any(map(math.isnan, distances)) else min(distances, default=math.inf)

    def __str__(self) -> str:
        if self.unclaimed:
            return self.unclaimed
        if self.low is None:
            return f"below {self.high:.4g}"
        if self.high is None:
            return f"above {self.low:.4g}"
        return f"{self.low:.4g} to {self.high:.4g}"


def below(high: float, source: str) -> Band:
    """What a law that states its own bound allows: an error up to what its source derives."""
    return Band(None, float(high), source)


def between(low: float, high: float, source: str) -> Band:
    """What a law that states its own bounds allows: a value between two of them."""
    return Band(float(low), float(high), source)


def default_window(n_layers: int) -> tuple[int, int]:
    """10% to 85% of the depth, where published models grow steadily: neither the first blocks nor
    the last.
    """
    return math.ceil(0.1 * n_layers), math.floor(0.85 * n_layers)
