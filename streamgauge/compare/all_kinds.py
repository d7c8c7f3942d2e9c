"""Every comparison of two records, and a table of them."""

from collections.abc import Callable, Collection

from streamgauge.compare.activations import compare_activations
from streamgauge.compare.config import compare_config
from streamgauge.compare.difference import Difference, beyond, nearest_layers
from streamgauge.compare.findings import place_of
from streamgauge.compare.norms import compare_norms
from streamgauge.compare.predictions import compare_predictions
from streamgauge.compare.weights import compare_weights
from streamgauge.errors import NotApplicable, NotMeasured
from streamgauge.record import Record


def differences(old: Record, new: Record) -> dict[str, list[Difference]]:
    """Every comparison of two records, within what is allowed or not: config, weights, norms,
    activations, predictions.

    A kind that cannot be compared is missing. Raises NotApplicable where nothing can be.
    """
    found: dict[str, list[Difference]] = {}
    for kind, compare in KINDS.items():
        try:
            found[kind] = compare(old, new)
        except (NotApplicable, NotMeasured):
            continue
    if not found:
        raise NotApplicable("the two records have nothing in common that can be compared")
    return found


KINDS: dict[str, Callable[[Record, Record], list[Difference]]] = {
    "config": compare_config,
    "weights": compare_weights,
    "norms": compare_norms,
    "activations": compare_activations,
    "predictions": compare_predictions,
}


def table(
    found: dict[str, list[Difference]], listed: int | None, without: Collection[str] = ()
) -> tuple[list[str], bool]:
    """All comparisons as lines for a terminal, the largest of each kind first, and whether anything
    differs. listed: how many of a kind, all where None; where 0, the first of the forward pass
    stands in the kind's own line. without: kinds that are told elsewhere.
    """
    lines: list[str] = []
    for kind, compared in found.items():
        if kind in without:
            continue
        differing = beyond(compared)
        where = (
            f", {nearest_layers(differing)}"
            if differing and nearest_layers(differing) != "no layer"
            else ""
        )
        most = "" if differing else _most(compared)
        if differing and listed == 0:
            first = min(differing, key=lambda one: place_of(one.layer, one.part, one.name))
            most = f"; first {first}"
        lines.append(f"{kind}: {len(differing):,} of {len(compared):,} differ{where}{most}")
        shown = differing if listed is None else differing[:listed]
        width = max((len(one.where) for one in shown), default=0)
        lines += [
            f"  {one.where:<{width}}  {one.says}  ({one.excess:,.1f}× what is allowed)"
            for one in shown
        ]
        if listed and len(shown) < len(differing):
            lines.append(f"  {len(differing) - len(shown):,} more; --all prints them")
    missing = [kind for kind in KINDS if kind not in found]
    if missing:
        lines.append(f"not compared, for want of data in one of the two: {', '.join(missing)}")
    return lines, any(beyond(compared) for compared in found.values())


def _most(compared: list[Difference]) -> str:
    """What differs most of what rounding explains, in words; nothing where all is the same."""
    most = max(compared, key=lambda one: one.excess)
    if not most.excess:
        return ""
    return f"; the most: {most} ({most.excess:.2g}× what is allowed)"
