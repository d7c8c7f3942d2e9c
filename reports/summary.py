"""summary.md: what a CI job shows of an audit."""

from typing import Any

Row = dict[str, Any]
COLUMNS = ("pass", "fail", "error", "known_failure", "not_applicable")
TITLES = ("holds", "fails", "not measured", "fails as known", "not applicable")


def summary(rows: list[Row]) -> str:
    """Counts by model, then each failure with its source and the command that reproduces it."""
    lines = [
        "# streamgauge",
        "",
        f"| model | {' | '.join(TITLES)} |",
        f"|---|{'---:|' * len(TITLES)}",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        counts = [
            sum(row["model"] == model and row["outcome"] == outcome for row in rows)
            for outcome in COLUMNS
        ]
        lines.append(f"| {_text(model)} | {' | '.join(map(str, counts))} |")
    for row in rows:
        if row["outcome"] in ("fail", "error"):
            what = "fails" if row["outcome"] == "fail" else "could not be measured"
            lines += [
                "",
                f"## {row['law']} {what} on {_text(row['model'])}",
                "",
                _text(row["reason"]),
                "",
            ]
            lines += [f"Source: {_text(row['source'])}", ""] if row["source"] else []
            lines += ["Reproduce with:", "", f"    {_line(row['reproduce'])}"]
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())


def _text(text: str) -> str:
    """Names and reasons come from checkpoints:

    one line, and nothing that Markdown or HTML would act on.
    """
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!&" else c for c in _line(text))
