"""Rows and records to report.html and summary.md; a pure function of the files."""

import itertools
import json
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from .across import horizon_and_growth
from .figures import figures
from .summary import summary

Row = dict[str, Any]
ORDER = ("fail", "error", "known_failure", "pass", "not_applicable")
WORDS = {
    "pass": "holds", "fail": "fails", "error": "not measured", "known_failure": "fails as known",
    "not_applicable": "not applicable",
}  # fmt: skip
ANSWERS = (
    "attention/hard_coded_growth",
    "mlp/hard_coded_growth",
    "attention/gain_share",
    "mlp/gain_share",
)
NEEDED = {"model", "law", "kind", "outcome", "reason", "value", "values", "band", "claim"}
LISTED = 12  # values of one law that its row of the table lists
ACROSS = ""  # the model of a figure that is about all of them
SIGNS = {"pass": "✓", "fail": "✗", "error": "!", "known_failure": "~", "not_applicable": "–"}


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
            for name in ("record", "baseline"):
                row[name] = str(path.parent / row[name]) if row[name] else None
        rows += found
    return rows


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
    environment.filters["number"] = number
    environment.globals |= {
        "words": WORDS,
        "signs": SIGNS,
        "plotly": _plotly(),
        "source_of": _source,
        "answers": ANSWERS,
        "LISTED": LISTED,
    }
    models = list(dict.fromkeys(row["model"] for row in rows))
    answered = {row["model"] for row in rows if row["law"] in ANSWERS and row["value"] is not None}
    across = horizon_and_growth(rows)
    drawn = {model: figures([row for row in rows if row["model"] == model]) for model in models}
    made = environment.get_template("report.html").render(
        rows=sorted(rows, key=lambda row: ORDER.index(row["outcome"])),
        troubles=[row for row in rows if row["outcome"] in ("fail", "error")],
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
