"""summary.md: what a CI job shows of an audit."""

from collections import Counter
from typing import Any

Row = dict[str, Any]
KINDS = ("theorem", "regression", "reference", "phenomenon")
COLUMNS = ("pass", "fail", "error", "unusual", "known_failure", "not_applicable")
TITLES = ("holds", "fails", "not measured", "unusual", "fails as known", "not applicable")


def summary(rows: list[Row]) -> str:
    """Counts by model, then each failure with its source and the command that reproduces it."""
    lines = [
        "# streamgauge",
        "",
        f"| model | {' | '.join(TITLES)} |",
        f"|---|{'---:|' * len(TITLES)}",
    ]
    by_model: dict[str, Counter[str]] = {}
    for row in rows:
        by_model.setdefault(row["model"], Counter())[row["outcome"]] += 1
    for model, counts in by_model.items():
        cells = " | ".join(str(counts[outcome]) for outcome in COLUMNS)
        lines.append(f"| {text(model)} | {cells} |")
    for row in sorted((row for row in rows if row["outcome"] == "fail"), key=_rank):
        lines += _failure(row)
    odd = [row for row in rows if row["outcome"] == "unusual"]
    lines += ["", "## Unusual, which is no failure", ""] if odd else []
    lines += [f"- {text(row['model'])}, {row['law']}: {text(row['reason'])}" for row in odd]
    for (model, reason), laws in _unmeasured(rows).items():
        named = laws[0] if len(laws) == 1 else f"{len(laws)} laws"
        lines += ["", f"## {named} could not be measured on {text(model)}", "", text(reason)]
    return "\n".join(lines) + "\n"


def _rank(row: Row) -> tuple[int, bool]:
    """Theorems before regressions, the verdict on a baseline before its parts, findings last."""
    kind = KINDS.index(row["kind"]) if row.get("kind") in KINDS else len(KINDS)
    return kind, row["law"] != "regression/verdict"


def _failure(row: Row) -> list[str]:
    lines = ["", f"## {row['law']} fails on {text(row['model'])}", "", text(row["reason"]), ""]
    lines += [f"Source: {text(row['source'])}", ""] if row["source"] else []
    return [*lines, "Reproduce with:", "", f"    {_line(row['reproduce'])}"]


def _unmeasured(rows: list[Row]) -> dict[tuple[str, str], list[str]]:
    """Laws by model and the reason for which they could not be measured: a cause is said once."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["outcome"] == "error":
            found.setdefault((row["model"], row["reason"]), []).append(row["law"])
    return found


def _line(text: str) -> str:
    return " ".join(text.split())


def text(text: str) -> str:
    """Names and reasons come from checkpoints: one line, and nothing that Markdown or HTML would
    act on.
    """
    escaped = "".join(f"\\{c}" if c in "\\`*_[]<>|#!&" else c for c in _line(text))
    return escaped.replace("@", "@\u200b")  # a name in a comment calls nobody
