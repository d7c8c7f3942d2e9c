"""Two configurations, entry by entry."""

import math
from typing import Any

from streamgauge.compare.difference import Difference
from streamgauge.compare.rounding import FP32
from streamgauge.errors import NotApplicable
from streamgauge.record import Record


def compare_config(old: Record, new: Record) -> list[Difference]:
    """Entries of the two configurations, two levels deep.

    Raises NotApplicable where a record holds none.
    """
    before, after = (record.metadata.get("config") for record in (old, new))
    if before is None or after is None:
        raise NotApplicable("a record holds no configuration")
    before, after = _flat(before, after), _flat(after, before)
    unread = {n for record in (old, new) for n in record.metadata.get("undeclared", [])}
    found = []
    for name in sorted(set(before) | set(after)):
        one, other = before.get(name), after.get(name)
        says = f"{_short(one)} in the baseline, now {_short(other)}"
        # An entry that only one has and no model of this kind declares changes no function.
        idle = name in unread and (one is None or other is None)
        size = 0.0 if _same(one, other) or idle else 1.0
        found.append(Difference(name, "config", size, 0.5, says))
    return found


def _flat(entries: dict[str, Any], beside: dict[str, Any]) -> dict[str, Any]:
    """Entries, and those within an entry that is a table on both sides, as `rope_parameters.x`."""
    found: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(value, dict) and isinstance(beside.get(name), dict):
            found |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            found[name] = value
    return found


def _same(one: Any, other: Any) -> bool:
    """Equal, but for numbers that a format keeps in fp32."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=FP32)
    return bool(one == other)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
