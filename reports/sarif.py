"""Verdicts as SARIF, which code hosts show beside a pull request.

Source: OASIS, Static Analysis Results Interchange Format 2.1.0.
"""

import re
from typing import Any

Row = dict[str, Any]
LEVELS = {"fail": "error", "error": "error", "unusual": "warning", "known_failure": "note"}
SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)


def sarif(rows: list[Row]) -> dict[str, Any]:
    """One run: laws are its rules, what does not hold its results."""
    laws = {row["law"]: row for row in rows}
    places = {law: n for n, law in enumerate(laws)}
    driver = {"name": "streamgauge", "rules": [_rule(row) for row in laws.values()]}
    results = [_result(row, places[row["law"]]) for row in rows if row["outcome"] in LEVELS]
    run = {"tool": {"driver": driver}, "results": results}
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(row: Row) -> dict[str, Any]:
    return {
        "id": row["law"],
        "shortDescription": {"text": row["claim"]},
        "properties": {"kind": row["kind"]},
    }


def _result(row: Row, rule: int) -> dict[str, Any]:
    place = {
        # The law's own file: a checkpoint has no lines that could be pointed at.
        "physicalLocation": {"artifactLocation": {"uri": _file(row["law"])}},
        "logicalLocations": [{"fullyQualifiedName": row["model"], "kind": "module"}],
    }
    result = {
        "ruleId": row["law"],
        "ruleIndex": rule,
        "level": LEVELS[row["outcome"]],
        "message": {"text": _plain(f"{row['reason']}\nReproduce with: {row['reproduce']}")},
        "locations": [place],
        "partialFingerprints": {"lawAndModel/v1": f"{row['law']}|{row['model']}"},
    }
    if row["outcome"] == "known_failure":
        known = {"kind": "external", "justification": row["reason"]}
        result["suppressions"] = [known]
    return result


def _plain(text: str) -> str:
    """Without links, which messages may hold: SARIF 2.1.0, §3.11.6."""
    return re.sub(r"([\[\]\\])", r"\\\1", text)


def _file(law: str) -> str:
    folder, _, name = law.partition("/")
    return f"invariants/{folder}/test_{name}.py"
