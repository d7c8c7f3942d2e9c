"""Rows and figures as one compact text that a page carries: each string once, columns instead of
rows, deflated.
"""

import base64
import json
import math
import zlib
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
# Of these a row holds the number of a text.
TEXTS = (
    "model", "law", "kind", "outcome", "reason", "what", "unit", "of", "claim", "source",
    "reproduce",
)  # fmt: skip
PLAIN = ("value", "band", "layers")
CARRIED = 5_000_000  # bytes of curves on one page
LISTED = 12  # values of one law that the page lists


def deflated(value: Any) -> str:
    """JSON, deflated (zlib), in base64: what a page may hold wherever a checkpoint's name stands in
    it.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def inflated(text: str) -> Any:
    """What `deflated` was given."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


class Texts:
    """Strings by number, each of them once; None is -1."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, text: str | None) -> int:
        """The number of a text, a new one where it was not there."""
        if text is None:
            return -1
        if text not in self._numbers:
            self._numbers[text] = len(self.all)
            self.all.append(text)
        return self._numbers[text]


def packed_rows(rows: Iterable[Row], strips: Iterable[Any]) -> dict[str, Any]:
    """Columns of rows by name: numbers of texts, and what is no text as it is. strips: where each
    row's value lies beside its band.
    """
    texts, rows = Texts(), list(rows)
    columns: dict[str, list[Any]] = {
        name: [texts.number(row[name]) for row in rows] for name in TEXTS
    }
    columns |= {name: [row[name] for row in rows] for name in PLAIN}
    columns["details"] = [[texts.number(line) for line in row["details"]] for row in rows]
    columns["count"] = [len(row["values"]) for row in rows]
    columns["values"] = [_values(row, texts) for row in rows]
    columns["real"] = [_population(row) for row in rows]
    columns["strip"] = [
        place and [place["mark"], place["low"], place["high"], place["kind"] == "band"]
        for place in strips
    ]
    columns["changed"] = [int(bool(row.get("changed"))) for row in rows]
    return {"texts": texts.all, "columns": columns}


def _values(row: Row, texts: Texts) -> list[Any]:
    """What the law checked, where that is more than the value itself and few enough to list."""
    if not 1 < len(row["values"]) <= LISTED:
        return []
    return [
        [
            texts.number(one["what"]),
            one["value"],
            texts.number(one["unit"]),
            texts.number(one["of"]),
        ]
        for one in row["values"]
    ]


def _population(row: Row) -> list[Any] | None:
    known = row.get("population")
    return known and [known["models"], known["low"], known["high"]]


def packed_figures(figures: Iterable[tuple[str, list[Any]]]) -> dict[str, Any]:
    """Figures by model: what they have in common once, and each model's numbers deflated on their
    own, so that a page opens none but those that are looked at. Models behind the first CARRIED
    bytes have none: null.
    """
    texts, carried = Texts(), 0
    models: dict[str, Any] = {}
    for model, drawn in figures:
        series: list[list[Any]] = []
        frames = [
            texts.number(json.dumps(_frame(one, series), sort_keys=True, allow_nan=False))
            for one in drawn
        ]
        packed = deflated(series)
        carried += len(packed) if drawn else 0
        models[model] = [frames, packed] if carried <= CARRIED else None
    return {"frames": texts.all, "models": models}


def _frame(value: Any, series: list[list[Any]]) -> Any:
    """The same with every list of numbers taken out, by the order of names; {"$": 0} stands for
    the next of them.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None  # which JSON has no word for
    if isinstance(value, dict):
        return {name: _frame(value[name], series) for name in sorted(value)}
    if not isinstance(value, list):
        return value
    if len(value) > 2 and all(one is None or isinstance(one, int | float) for one in value):
        series.append(value)
        return {"$": 0}
    return [_frame(one, series) for one in value]
