"""Rows and records to report.html and summary.md; a pure function of the files."""

import itertools
import json
import math
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from .across import horizon_and_growth
from .figures import figures
from .summary import summary

Row = dict[str, Any]
ORDER = ("fail", "error", "unusual", "known_failure", "pass", "not_applicable")
WORDS = {
    "pass": "holds", "fail": "fails", "error": "not measured", "known_failure": "fails as known",
    "unusual": "unusual", "not_applicable": "not applicable",
}  # fmt: skip
ANSWERS = (
    "attention/hard_coded_growth",
    "mlp/hard_coded_growth",
    "attention/gain_share",
    "mlp/gain_share",
)
NEEDED = {"model", "law", "kind", "outcome", "reason", "value", "values", "band", "claim"}
STEEP = 20.0  # times the smallest number that the largest of a strip is on a logarithmic scale
LISTED = 12  # values of one law that its row of the table lists
ACROSS = ""  # the model of a figure that is about all of them
SIGNS = {
    "pass": "✓", "fail": "✗", "error": "!", "unusual": "≠", "known_failure": "~",
    "not_applicable": "–",
}  # fmt: skip
FEW = 6  # models up to which laws are the rows of the matrix
GROUPS = (  # of a model's laws: a title, and which rows it is about
    ("Fail, or could not be measured", lambda row: row["outcome"] in ("fail", "error")),
    ("Unusual: outside the range of real models", lambda row: row["outcome"] == "unusual"),
    ("Fail as known", lambda row: row["outcome"] == "known_failure"),
    ("Hold", lambda row: row["outcome"] == "pass"),
    ("Measured, and claimed by no source of such a model", lambda row: row["value"] is not None),
    ("Do not speak of this model", lambda row: True),
)


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files, each with the path of its record made whole; a model's second run is
    numbered. Raises KeyError, TypeError or ValueError for a file of anything else.
    """
    rows: list[Row] = []
    for path in paths:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        taken = {row["model"] for row in rows}
        for row in found:
            if row["model"] in taken:
                row["model"] = next(
                    name
                    for n in itertools.count(2)
                    if (name := f"{row['model']} (run {n})") not in taken
                )
            missing = NEEDED - row.keys()
            if missing:
                raise KeyError(min(missing))
            for name in row.keys() - {"record", "baseline"}:
                row[name] = _shown(row[name])
            for name in ("record", "baseline"):
                row[name] = str(path.parent / row[name]) if row[name] else None
        rows += found
    return rows


def _shown(value: Any) -> Any:
    """The same without what would act on a terminal or turn a line round, which names of
    checkpoints may hold.
    """
    if isinstance(value, str):
        return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in value)
    if isinstance(value, list):
        return [_shown(one) for one in value]
    return {k: _shown(v) for k, v in value.items()} if isinstance(value, dict) else value


def render(rows: Iterable[Path], folder: Path) -> None:
    """Write report.html, summary.md and badge.svg into a folder, from rows.jsonl files."""
    write(read_rows(rows), folder)


def write(read: list[Row], folder: Path) -> None:
    """Write the same from rows that were read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(page(read), encoding="utf-8")
    (folder / "summary.md").write_text(summary(read), encoding="utf-8")
    (folder / "badge.svg").write_text(badge(read), encoding="utf-8")


def badge(rows: list[Row]) -> str:
    """A small picture for a README: how many laws hold, or how many do not."""
    count = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ORDER}
    bad = count["fail"] + count["error"]
    says, colour = (
        (f"{bad} of {bad + count['pass']} fail", "#c62828")
        if bad
        else (f"{count['pass']} laws hold", "#2e7d32")
    )
    return str(_environment().get_template("badge.svg").render(says=says, colour=colour))


def page(rows: list[Row]) -> str:
    """One HTML file that needs no network."""
    environment = _environment()
    environment.filters |= {"number": number, "strip": strip, "grouped": grouped}
    environment.globals |= {
        "words": WORDS,
        "signs": SIGNS,
        "plotly": _plotly(),
        "source_of": _source,
        "answers": ANSWERS,
        "LISTED": LISTED,
        "FEW": FEW,
    }
    models = list(dict.fromkeys(row["model"] for row in rows))
    answered = {row["model"] for row in rows if row["law"] in ANSWERS and row["value"] is not None}
    across = horizon_and_growth(rows)
    drawn = {model: figures([row for row in rows if row["model"] == model]) for model in models}
    made = environment.get_template("report.html").render(
        rows=sorted(rows, key=lambda row: ORDER.index(row["outcome"])),
        troubles=[row for row in rows if row["outcome"] in ("fail", "error")],
        unusual=[row for row in rows if row["outcome"] == "unusual"],
        models=models,
        answered=answered,
        ACROSS=ACROSS,
        laws=sorted({row["law"] for row in rows}),
        kinds=sorted({row["kind"] for row in rows}),
        cells={(row["model"], row["law"]): row for row in rows},
        counts={outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ORDER},
        across=across,
        figures=drawn | ({ACROSS: [across]} if across else {}),
    )
    return str(made)


def grouped(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """A model's rows by what became of them, each group by law."""
    found: dict[str, list[Row]] = {title: [] for title, _ in GROUPS}
    for row in sorted(rows, key=lambda row: str(row["law"])):
        found[next(title for title, fits in GROUPS if fits(row))].append(row)
    return [(title, group) for title, group in found.items() if group]


def strip(row: Row) -> dict[str, Any] | None:
    """Where a value lies beside its band, or beside the range of real models where it has none: the
    mark and the ends of the box as percentages of the width, and what that says in words.

    An open end of a band reaches to the edge. The scale is logarithmic where the numbers are
    positive and of different sizes. None where there is nothing to be beside.
    """
    value, band, known = row["value"], row["band"], row.get("population")
    if row["outcome"] == "unusual":
        band = None  # which it keeps
    if value is None or not (band or known):
        return None
    low, high = band if band else (known["low"], known["high"]) if known else (None, None)
    given = [end for end in (value, low, high) if end is not None]
    steep = min(given) > 0 and max(given) > STEEP * min(given)
    places = {end: math.log(end) if steep else end for end in given}
    first, last = min(places.values()), max(places.values())
    room = (last - first) / 4 or 1.0

    def place(end: float | None, edge: float) -> float:
        if end is None:
            return edge
        return round(100 * (places[end] - first + room) / (last - first + 2 * room), 1)

    of = f"{known['models']} real models" if known and not band else "band"
    ends = [number(end) if end is not None else "open" for end in (low, high)]
    return {
        "mark": place(value, 0),
        "low": place(low, 0),
        "high": place(high, 100),
        "says": f"{number(value)}; {of} {ends[0]} to {ends[1]}",
        "kind": "band" if band else "range",
    }


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader(__package__, "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def number(value: float | None) -> str:
    """Four significant digits."""
    return "" if value is None else f"{value:.4g}"


@cache
def _plotly() -> str:
    """The charting library as it comes with its Python package."""
    return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def _source(name: str) -> str:
    return (files(__package__) / "page" / name).read_text(encoding="utf-8")
