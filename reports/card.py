"""A section for a model's card: what was asserted of its weights, and beside what baseline."""

import json
import shlex
from collections import Counter
from typing import Any

from .summary import text

Row = dict[str, Any]
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
    return "\n".join(_of(model, own) for model, own in by_model.items())


def _of(model: str, rows: list[Row]) -> str:
    first, count = rows[0], Counter(row["outcome"] for row in rows)
    asserted = Counter(row["kind"] for row in rows if row["outcome"] == "pass")
    kinds = ", ".join(f"{n} {kind if n == 1 else SEVERAL[kind]}" for kind, n in asserted.items())
    bad = count["fail"] + count["error"]
    lines = _metadata(rows)
    lines += [f"## Audited with streamgauge: {text(model)}", ""]
    lines += [
        f"{count['pass']} laws hold ({kinds}), {bad} fail or could not be measured, "
        f"{count['unusual']} values are unusual among real models, {count['not_applicable']} laws "
        "do not apply.",
        "",
    ]
    lines += [f"- {text(r['law'])}: {text(r['reason'])}" for r in rows if r["outcome"] == "fail"]
    lines += _verdict(rows)
    if first["weights_sha256"]:
        lines.append(f"- sha256 of the weights: `{first['weights_sha256']}`")
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines.append(f"- measured in {first['arithmetic'] or 'no arithmetic'} with {versions or '?'}")
    return "\n".join(lines) + "\n"


def _verdict(rows: list[Row]) -> list[str]:
    row = next((row for row in rows if row["law"] == "regression/verdict" and row["of"]), None)
    return [f"- beside its baseline: {text(row['of'])}"] if row else []


def _metadata(rows: list[Row]) -> list[str]:
    """The front matter that says what a model was made from, where the verdict tells it."""
    row = next((row for row in rows if row["law"] == "regression/verdict" and row["of"]), None)
    relation = row and next((v for k, v in RELATIONS.items() if row["of"].startswith(k)), None)
    if not row or not relation:
        return []
    words = shlex.split(row["reproduce"])
    named = words[words.index("--baseline") + 1] if "--baseline" in words else ""
    # JSON's strings are YAML's.
    said = [f"base_model: {json.dumps(named)}"] if named else []
    return ["---", *said, f"base_model_relation: {relation}", "---", ""]
