"""A section for a model's card: what was asserted of its weights, and beside what baseline."""

import re
import shlex
from collections import Counter
from typing import Any

from .summary import text

Row = dict[str, Any]
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SEVERAL = {
    "theorem": "theorems",
    "phenomenon": "phenomena",
    "reference": "references",
    "regression": "regressions",
}
# What model cards call a model that was made from another, by the beginning of the verdict.
RELATIONS = {
    "a quantisation of it": "quantized",
    "the same model trained further": "finetune",
}


def card(rows: list[Row]) -> str:
    """Markdown of every model of an audit; where the baseline tells, with the metadata that a card
    has at its head.
    """
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    head = _metadata(rows) if len(by_model) == 1 else []
    return "\n".join([*head, *(_of(model, own) for model, own in by_model.items())])


def _of(model: str, rows: list[Row]) -> str:
    first, count = rows[0], Counter(row["outcome"] for row in rows)
    asserted = Counter(row["kind"] for row in rows if row["outcome"] == "pass")
    kinds = ", ".join(f"{n} {kind if n == 1 else SEVERAL[kind]}" for kind, n in asserted.items())
    bad = count["fail"] + count["error"]
    lines = [f"## Audited with streamgauge: {text(model)}", ""]
    lines += [
        f"{count['pass']} laws hold ({kinds}), {bad} fail or could not be measured, "
        f"{count['unusual']} values are unusual among real models, {count['not_applicable']} laws "
        "do not apply.",
        "",
    ]
    lines += [f"- {text(r['law'])}: {text(r['reason'])}" for r in rows if r["outcome"] == "fail"]
    verdict = _verdict(rows)
    lines += [f"- beside its baseline: {text(verdict['of'])}"] if verdict else []
    if first["weights_sha256"]:
        lines.append(f"- sha256 of the weights: {text(first['weights_sha256'])}")
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    if first["arithmetic"]:
        lines.append(f"- measured in {text(first['arithmetic'])} with {text(versions or '?')}")
    return "\n".join(lines) + "\n"


def _verdict(rows: list[Row]) -> Row | None:
    """The row that says what a model is to its baseline, where there is one."""
    return next((row for row in rows if row["law"] == "regression/verdict" and row["of"]), None)


def _metadata(rows: list[Row]) -> list[str]:
    """The front matter that says what a model was made from, where the verdict tells it."""
    row = _verdict(rows)
    relation = row and next((v for k, v in RELATIONS.items() if row["of"].startswith(k)), None)
    if not row or not relation:
        return []
    try:
        words = shlex.split(row["reproduce"])
    except ValueError:  # quotes that somebody else left open
        words = []
    named = words[words.index("--baseline") + 1] if "--baseline" in words[:-1] else ""
    # A folder's path is nothing that a card's reader could open.
    said = [f"base_model: {named}"] if REPOSITORY.fullmatch(named) else []
    return ["---", *said, f"base_model_relation: {relation}", "---", ""]
