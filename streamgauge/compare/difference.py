"""One quantity of two records: what it was, what it is, and what is allowed."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from streamgauge.compare.relations import Relation

LISTED = 50  # differences of a kind that a page lists


FALSE_ALARMS = 1e-3  # of a whole comparison


@dataclass(frozen=True)
class Difference:
    """One quantity of two records. part: `attn`, `mlp`, `norm`, `embed` or another word for where
    it is, in which layer, head.

    size: the relative difference, by which it is judged; allowed: what rounding explains of it;
    says: what happened to it; relation: the same of a whole tensor.
    """

    name: str
    part: str
    size: float
    allowed: float
    says: str
    layer: int | None = None
    head: int | None = None
    relation: Relation | None = None

    @property
    def excess(self) -> float:
        """Size over what is allowed; NaN, which nothing allows, counts as infinite."""
        if np.isnan(self.size):
            return float("inf")
        return self.size / self.allowed if self.allowed else float("inf") if self.size else 0.0

    @property
    def where(self) -> str:
        """Layer, sublayer, head and quantity in words."""
        layer = [] if self.layer is None else [f"layer {self.layer}"]
        head = [] if self.head is None else [f"head {self.head}"]
        return " ".join([*layer, self.part, *head, self.name])

    def __str__(self) -> str:
        return f"{self.where}: {self.says}"


def beyond(found: list[Difference]) -> list[Difference]:
    """The differences that exceed what is allowed, largest first."""
    return sorted(
        (one for one in found if one.excess > 1),
        key=lambda one: (-min(one.excess, 1e300), one.where),
    )


def summary(found: list[Difference], listed: int = 3) -> str:
    """What differs, largest first, and how much was compared."""
    differing = beyond(found)
    if not differing:
        return f"{len(found):,} compared"
    where = "" if nearest_layers(differing) == "no layer" else f", {nearest_layers(differing)}"
    more = f"; {len(differing) - listed:,} more" if len(differing) > listed else ""
    return (
        f"{len(differing):,} of {len(found):,} differ{where}: "
        f"{'; '.join(map(str, differing[:listed]))}{more}"
    )


def verdict(found: list[Difference]) -> dict[str, Any]:
    """What a law says of a kind: the arguments of `check`, but for the band. value: the largest
    excess.
    """
    details = list(map(str, beyond(found)[:LISTED]))
    value = max(one.excess for one in found)
    return {
        "value": value,
        "what": "largest difference over what is allowed",
        "of": summary(found),
        "details": details,
    }


def nearest_layers(found: list[Difference]) -> str:
    """The layers of some differences, in words: `layer 3`, `layers 3 to 7`, or `no layer`."""
    layers = sorted({one.layer for one in found if one.layer is not None})
    if not layers:
        return "no layer"
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
