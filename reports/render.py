"""Rows and records to report.html and summary.md; a pure function of the files."""

import base64
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from .across import against_properties, horizon_and_growth
from .card import card
from .figures import figures
from .packed import deflated, packed_figures, packed_rows
from .sarif import sarif
from .summary import summary
from .trajectories import trajectories

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
SIGNS = {
    "pass": "✓", "fail": "✗", "error": "!", "unusual": "≠", "known_failure": "~",
    "not_applicable": "–",
}  # fmt: skip
FEW = 6  # models up to which laws are the rows of the matrix
GROUPS = (  # of a model's laws, in this order; the page says which row is of which
    "Fail, or could not be measured",
    "Unusual: outside the range of real models",
    "Fail as known",
    "Hold",
    "Measured, and claimed by no source of such a model",
    "Do not speak of this model",
)


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The rows of all files, each with the path of its record made whole; a model's second run is
    numbered. Raises KeyError, TypeError or ValueError for a file of anything else.
    """
    rows: list[Row] = []
    last: dict[tuple[str, str], str] = {}  # outcomes of the run before
    names: dict[str, int] = Counter()
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [_made_whole(json.loads(line), path.parent) for line in lines]
        names.update({row["model"] for row in found})
        for row in found:
            verdict = row["model"], row["law"]
            row["changed"] = last.get(verdict, row["outcome"]) != row["outcome"]
            last[verdict] = row["outcome"]
            run = names[row["model"]]
            row["model"] += f" (run {run})" if run > 1 else ""
        rows += found
    return rows


def _made_whole(row: Row, folder: Path) -> Row:
    """A row of a file in a folder, fit to be shown."""
    missing = NEEDED - row.keys()
    if missing:
        raise KeyError(min(missing))
    shown = {name: _shown(value) for name, value in row.items()}
    for name in ("record", "baseline"):
        shown[name] = str(folder / row[name]) if row[name] else None
    return shown


def _shown(value: Any) -> Any:
    """The same without what would act on a terminal or turn a line round, which names of
    checkpoints may hold.
    """
    if isinstance(value, str):
        if value.isprintable():
            return value
        return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in value)
    if isinstance(value, list):
        return [_shown(one) for one in value]
    return {k: _shown(v) for k, v in value.items()} if isinstance(value, dict) else value


def render(rows: Iterable[Path], folder: Path) -> None:
    """Write report.html, summary.md, card.md, report.sarif and badge.svg into a folder, from
    rows.jsonl files.
    """
    write(read_rows(rows), folder)


def write(read: list[Row], folder: Path) -> None:
    """Write the same from rows that were read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(page(read), encoding="utf-8")
    (folder / "summary.md").write_text(summary(read), encoding="utf-8")
    (folder / "badge.svg").write_text(badge(read), encoding="utf-8")
    (folder / "card.md").write_text(card(read), encoding="utf-8")
    (folder / "report.sarif").write_text(json.dumps(sarif(read), indent=1), encoding="utf-8")


def badge(rows: list[Row]) -> str:
    """A small picture for a README: how many laws hold, or how many do not."""
    count = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ORDER}
    bad = count["fail"] + count["error"]
    says, colour = (
        (f"{bad} of {bad + count['pass']} fail", "#c62828")
        if bad
        else (f"{count['pass']} laws hold", "#2e7d32")
    )
    return str(environment().get_template("badge.svg").render(says=says, colour=colour))


def page(rows: list[Row]) -> str:
    """One HTML file that needs no network: rows and figures lie in it deflated, and it draws what
    is looked at.
    """
    templates = environment()
    templates.globals |= {"words": WORDS, "source_of": source_of}
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    counts = Counter(row["outcome"] for row in rows)
    counted = {outcome: counts[outcome] for outcome in ORDER}
    compared = horizon_and_growth(rows)
    across = ([compared] if compared else []) + against_properties(rows) + trajectories(rows)
    carried = packed_rows(rows, (strip(row) for row in rows)) | {
        "models": [_about(model, own[0]) for model, own in by_model.items()],
        "counts": counted,
        "across": across,
        "constants": {
            "words": WORDS, "signs": SIGNS, "answers": ANSWERS, "few": FEW, "groups": GROUPS,
        },
    }  # fmt: skip
    # Models that fail first, as a page holds no more than so many curves.
    failing = {row["model"] for row in rows if row["outcome"] in ("fail", "error")}
    drawn = ((m, figures(by_model[m])) for m in sorted(by_model, key=lambda m: m not in failing))
    made = templates.get_template("report.html").render(
        models=by_model,
        counts=counted,
        rows=deflated(carried),
        figures=deflated(packed_figures(drawn)),
        plotly=_plotly(),
    )
    return str(made)


def _about(model: str, row: Row) -> dict[str, Any]:
    """What the page says of a model as a whole, by any of its rows."""
    facts = [f"revision {row['revision']}"] if row["revision"] else []
    facts += [f"weights {row['weights_sha256'][:16]}…"] if row["weights_sha256"] else []
    if row["stored_dtype"]:
        facts.append(f"stored as {row['stored_dtype']}, arithmetic {row['arithmetic']}")
    facts += [row["convention"]] if row["convention"] else []
    facts += [f"{name} {version}" for name, version in row["versions"].items()]
    cost = row["cost"]
    parts = sorted(cost["seconds_by_part"].items(), key=lambda one: -one[1]) if cost else []
    return {
        "name": model,
        "facts": " · ".join(facts),
        "cost": cost
        and {
            "seconds": cost["seconds"],
            "peak": cost["peak_private_bytes"],
            "read": cost["read_bytes"],
            "parts": [[part.replace("_", " "), seconds] for part, seconds in parts],
        },
    }


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


def environment() -> Any:
    """Where the pages' templates are; what they are given is escaped."""
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
    """The charting library as it comes with its Python package, deflated."""
    source = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    return base64.b64encode(zlib.compress(source, 9)).decode()


def source_of(name: str) -> str:
    """The text of a file of the page."""
    return (files(__package__) / "page" / name).read_text(encoding="utf-8")
