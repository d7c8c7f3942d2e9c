"""Where verdicts travel: a statement about weight files, SARIF, and a section of a model's card."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reports.card import card
from reports.sarif import sarif
from streamgauge.__main__ import main
from tests import models
from tests.conftest import Audit
from tests.faults import Files

HOSTILE = "<img src=x>|`](x)\n# no"


@pytest.fixture
def audited(audit: Callable[..., Audit], tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A checkpoint in two files and the rows of its audit."""
    folder = tmp_path / "model"
    models.random_model("llama").save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder, audit("--model", folder, "-k", "additivity or growth_rate or integrity").rows


def test_a_statement_is_about_the_files_that_were_audited(
    audited: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from google.protobuf.json_format import ParseDict
    from in_toto_attestation.predicates.test_result.v0.test_result_pb2 import TestResult
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    folder, rows = audited
    path = tmp_path / "report" / "rows.jsonl"
    assert main(["attest", str(folder), str(path)]) == 0
    said = json.loads(capfd.readouterr().out)
    Statement.copy_from_pb(ParseDict(said, statement_pb2.Statement())).validate()
    ParseDict(said["predicate"], TestResult())
    assert said["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    for subject in said["subject"]:
        content = (folder / subject["name"]).read_bytes()
        assert subject["digest"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert len(said["subject"]) == len(list(folder.glob("*.safetensors")))
    passed = [row["law"] for row in rows if row["outcome"] == "pass"]
    assert said["predicate"]["passedTests"] == passed and passed
    # Held to it, the files are what was audited.
    (folder / "audit.intoto.jsonl").write_text(json.dumps(said))
    audit_again = ["measure", str(folder), "--verify", "-o", str(tmp_path / "again.safetensors")]
    assert main(audit_again) == 0
    files = Files(models.save(models.random_model("llama"), tmp_path / "other"))
    files["W_O"] = files["W_O"] * 2
    changed = files.write(tmp_path / "changed")
    assert main(["attest", str(changed), str(path)]) != 0
    assert "is not about the weights in" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("outcomes", "result"),
    [
        ({"additivity": "fail"}, "FAILED"),
        ({"additivity": "unusual"}, "WARNED"),
        ({}, "PASSED"),
        (dict.fromkeys(("additivity", "growth_rate", "integrity"), "not_applicable"), "FAILED"),
    ],
)
def test_a_statement_says_the_worst(
    outcomes: dict[str, str],
    result: str,
    audited: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Where nothing was asserted nothing has passed."""
    folder, rows = audited
    for row in rows:
        row["outcome"] = outcomes.get(row["law"].split("/")[1], "pass")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["attest", str(folder), str(path)]) == 0
    assert json.loads(capfd.readouterr().out)["predicate"]["result"] == result


def test_rows_that_are_none_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = models.save(models.random_model("llama"), tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("[1]\n")
    for path in (tmp_path / "rows.jsonl", tmp_path / "none.jsonl"):
        assert main(["attest", str(folder), str(path)]) != 0
        assert "is not the rows.jsonl of an audit" in capfd.readouterr().err


def test_sarif_is_read_by_others(audited: Any, tmp_path: Path) -> None:
    from sarif_pydantic import Sarif

    _, rows = audited
    odd = {"fail": "error", "error": "error", "unusual": "warning", "known_failure": "note"}
    spoilt = [rows[0] | {"outcome": outcome, "reason": HOSTILE} for outcome in odd]
    said = sarif(rows + spoilt)
    read = Sarif.model_validate(said).runs[0]
    assert [result.level.value for result in read.results] == list(odd.values())
    assert {rule.id for rule in read.tool.driver.rules} == {row["law"] for row in rows}
    assert read.results[0].message.text.startswith("<img src=x>|`\\](x)")
    own = json.loads((tmp_path / "report" / "report.sarif").read_text())
    assert own["version"] == "2.1.0" and own["runs"][0]["results"] == []


def test_a_card_says_what_was_asserted_and_of_what_it_was_made(
    audit: Callable[..., Audit], tmp_path: Path
) -> None:
    old = models.save(models.random_model("llama"), tmp_path / "old")
    files = Files(old)
    for name, tensor in files.tensors.items():
        if tensor.dim() > 1 and ".layers." in name:
            step = tensor.abs().amax(1, keepdim=True) / 127
            files.tensors[name] = (tensor / step).round() * step
    new = files.write(tmp_path / "new")
    rows = audit(
        "--model", new, "--baseline", old, "--same", "quantised", "-k", "verdict or additivity"
    ).rows
    made = (tmp_path / "report" / "card.md").read_text()
    head = made.split("---\n")[1].splitlines()
    assert head == ["base_model_relation: quantized"]  # a path would tell its readers nothing
    named = [row | {"reproduce": "pytest --baseline somebody/model"} for row in rows]
    assert "base_model: somebody/model\n" in card(named)
    assert "---" not in card(rows + [row | {"model": "other"} for row in rows])
    assert card([row | {"reproduce": "an 'open quote"} for row in rows])
    held = [row["law"] for row in rows if row["outcome"] == "pass"]
    assert f"{len(held)} laws hold (" in made and "1 regression" in made and "), 0 fail" in made
    assert "beside its baseline: a quantisation of it" in made
    assert hashlib.sha256((new / "model.safetensors").read_bytes()).hexdigest() in made
    hostile = {"model": HOSTILE, "reason": HOSTILE, "outcome": "fail", "arithmetic": HOSTILE}
    hostile |= {"versions": {HOSTILE: HOSTILE}, "weights_sha256": HOSTILE}
    spoilt = card([row | hostile for row in rows])
    assert "<img" not in spoilt.replace("\\<", "") and "\n# no" not in spoilt
    shutil.rmtree(new)
