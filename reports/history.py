"""index.html of a folder of runs: when each was, what it found, and which verdicts are others than
in the run of the same model before it.
"""

import json
import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .render import ORDER, SIGNS, WORDS, environment, source_of

Row = dict[str, Any]


def index(folder: Path) -> int:
    """Write index.html over all rows.jsonl beneath a folder. Returns how many there are.

    Raises KeyError, TypeError or ValueError for a file of anything else.
    """
    paths = sorted(folder.rglob("rows.jsonl"), key=lambda path: (path.stat().st_mtime, path))
    before: dict[str, dict[str, Row]] = {}  # the last rows of each model, by law
    runs = []
    for path in paths:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        models: dict[str, dict[str, Row]] = {}
        for row in rows:
            models.setdefault(row["model"], {})[row["law"]] = row
        changes = [
            change
            for model, own in models.items()
            for change in _changes(model, before.get(model, {}), own)
        ]
        before |= models
        runs.append(_run(path, folder, rows, list(models), changes))
    page = environment().get_template("history.html")
    text = page.render(runs=runs[::-1], order=ORDER, words=WORDS, source_of=source_of)
    (folder / "index.html").write_text(text, encoding="utf-8")
    return len(runs)


def _run(
    path: Path, folder: Path, rows: list[Row], models: list[str], changes: list[dict[str, str]]
) -> dict[str, Any]:
    """What the index says of one run."""
    report = path.with_name("report.html")
    when = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return {
        "name": os.path.relpath(path.parent, folder),
        "report": os.path.relpath(report, folder) if report.is_file() else None,
        "when": when.strftime("%Y-%m-%d %H:%M UTC"),
        "models": models,
        "counts": Counter(row["outcome"] for row in rows),
        "changes": changes,
    }


def _changes(model: str, old: dict[str, Row], new: dict[str, Row]) -> list[dict[str, str]]:
    """The laws of a model whose outcome is another now, the worst first."""
    found = [
        {
            "model": model,
            "law": law,
            "was": f"{SIGNS[old[law]['outcome']]} {WORDS[old[law]['outcome']]}",
            "outcome": row["outcome"],
            "now": f"{SIGNS[row['outcome']]} {WORDS[row['outcome']]}",
            "reason": row["reason"] or "",
        }
        for law, row in new.items()
        if law in old and old[law]["outcome"] != row["outcome"]
    ]
    return sorted(found, key=lambda one: ORDER.index(one["outcome"]))
