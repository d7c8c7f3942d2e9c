"""What is printed to whoever makes a mistake: one sentence, what is wrong and what to do."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.conftest import ROOT, Audit
from tests.records import sound_record

Auditing = Callable[..., Audit]
Running = Callable[..., "subprocess.CompletedProcess[str]"]

TWO_LAWS = '''
"""Two claims in one file."""

import pytest

from streamgauge.numerics.bands import below


@pytest.mark.phenomenon
def test_one(record, check):
    check(1, within=below(2, "a hunch"), what="one")


@pytest.mark.phenomenon
def test_other(record, check):
    check(3, within=below(2, "a hunch"), what="other")
'''


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A record that keeps every law."""
    sound_record().save(tmp_path / "it.safetensors")
    return tmp_path / "it.safetensors"


def test_a_cause_that_hits_all_laws_is_said_once(audit: Auditing, tmp_path: Path) -> None:
    model = models.gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] = torch.nan
    found = audit("--model", models.save(model, tmp_path / "broken"))
    assert found.exit == 1
    assert sum(row["outcome"] == "error" for row in found.rows) > 20
    # With the law that reports it, with the first that it keeps from being measured, and with both
    # in the list.
    # pytest's own summary says it once more of each failure, in CI at full length.
    ours, _ = found.output.split("short test summary info")
    assert ours.count("transformer.h.1.mlp.c_fc.weight: 1 of") == 4
    assert "not measured for the same reason" in found.output
    summary = (tmp_path / "report" / "summary.md").read_text()
    assert summary.count("not finite") <= 2 and len(summary.splitlines()) < 40


def test_a_hub_that_cannot_be_reached_is_one_line(run_pytest: Running, tmp_path: Path) -> None:
    arguments = ["--model", "gpt2-xl", "--store", tmp_path / "store", "-q"]
    hub = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = run_pytest(*arguments, "--report", tmp_path / "report", **hub)
    assert done.returncode == 1
    assert "--published" in done.stdout
    assert len(done.stdout.splitlines()) < 25, done.stdout
    assert len((tmp_path / "report" / "summary.md").read_text().splitlines()) < 20


def test_laws_that_share_a_file_have_names_of_their_own(
    run_pytest: Running, record: Path, tmp_path: Path
) -> None:
    (tmp_path / "laws").mkdir()
    law = tmp_path / "laws" / "test_both.py"
    law.write_text(TWO_LAWS)
    done = run_pytest(law, "-p", "streamgauge.plugin", "--record", record, "-v")
    assert done.returncode == 1
    assert "laws/both.one: holds" in done.stdout and "laws/both.other: FAILS" in done.stdout


def test_a_law_without_a_claim_is_told_so(
    run_pytest: Running, record: Path, tmp_path: Path
) -> None:
    (tmp_path / "laws").mkdir()
    law = tmp_path / "laws" / "test_silent.py"
    law.write_text(TWO_LAWS.split('"""')[2].split("@pytest.mark.phenomenon\ndef test_other")[0])
    report = tmp_path / "report"
    done = run_pytest(law, "-p", "streamgauge.plugin", "--record", record, "--report", report)
    assert done.returncode == 0, done.stdout
    rows = (report / "rows.jsonl").read_text()
    assert "test_silent.py has no docstring that says what it claims" in rows


def test_a_law_that_cannot_be_imported_is_no_error_of_ours(
    run_pytest: Running, record: Path, tmp_path: Path
) -> None:
    (tmp_path / "test_own.py").write_text("import a_module_that_there_is_not\n")
    done = run_pytest(tmp_path / "test_own.py", "--record", record, "--rootdir", ROOT)
    assert done.returncode == 2 and "a_module_that_there_is_not" in done.stdout
    assert "INTERNALERROR" not in done.stdout + done.stderr


def test_who_has_read_enough_sees_no_traceback() -> None:
    command = f"{sys.executable} -m streamgauge laws | head -1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout and not done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-k", "grwth_rate"], "growth_rate"),
        (["-k", "regression"], "--baseline"),
        (["-m", "regression"], "--baseline"),
        (["-m", "theorum"], "theorum. Use 'pytest --markers'"),  # says pytest
    ],
)
def test_a_name_that_matches_nothing_ends_in_the_sentence_that_helps(
    arguments: list[str], says: str, run_pytest: Running, record: Path
) -> None:
    done = run_pytest("--record", record, *arguments)
    assert done.returncode == 4
    assert says in done.stderr and "Traceback" not in done.stderr


def test_no_laws_at_all_says_how_they_are_named(run_pytest: Running, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = run_pytest(empty, "-p", "streamgauge.plugin", "--report", tmp_path / "report")
    assert done.returncode == 5
    assert "--pyargs streamgauge.invariants" in done.stdout


def test_a_folder_given_for_rows_is_said_to_be_one(
    run_streamgauge: Running, tmp_path: Path
) -> None:
    done = run_streamgauge("report", tmp_path, "-o", tmp_path / "out")
    assert done.returncode == 4
    assert done.stderr.strip() == (
        f"streamgauge: {tmp_path} is a folder; name the rows.jsonl in it."
    )


def test_a_misspelt_model_in_settings_is_found(
    run_pytest: Running, record: Path, tmp_path: Path
) -> None:
    (tmp_path / "streamgauge.toml").write_text(
        '[[leave_out]]\nlaw = "residual/moments"\nreason = "a test"\nmodel = "somebodys"\n'
    )
    done = run_pytest(ROOT / "invariants", "--rootdir", tmp_path, "--record", record)
    assert done.returncode == 4
    assert "speaks of a model 'somebodys'" in done.stderr
    assert "the nearest is somebody's" in done.stderr


def test_the_header_names_settings_models_and_store(
    run_pytest: Running, record: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "streamgauge.toml"
    settings.write_text('[[leave_out]]\nlaw = "residual/moments"\nreason = "a test"\n')
    store = tmp_path / "store"
    arguments = [ROOT / "invariants/residual/test_additivity.py", "--record", record]
    done = run_pytest(*arguments, "--rootdir", tmp_path, "--store", store)
    assert f"streamgauge: settings {settings}" in done.stdout
    assert f"streamgauge: {record}; store {store}" in done.stdout


def test_settings_that_are_not_read_are_said_not_to_be(record: Path, tmp_path: Path) -> None:
    (tmp_path / "streamgauge.toml").write_text("")
    below = tmp_path / "below"
    below.mkdir()
    law = ROOT / "invariants/residual/test_additivity.py"
    command = [sys.executable, "-m", "pytest", str(law), f"--record={record}"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=below, capture_output=True, text=True, check=False
    )
    assert f"{tmp_path / 'streamgauge.toml'} is not read" in done.stdout


def _known(tmp_path: Path, until: str) -> None:
    (tmp_path / "streamgauge.toml").write_text(
        f'[[known_failure]]\nlaw = "residual/additivity"\nreason = "why"\nexpires = {until}\n'
    )


def test_a_known_failure_that_holds_is_said_to_hold(
    run_pytest: Running, record: Path, tmp_path: Path
) -> None:
    _known(tmp_path, "2999-01-31")
    law = ROOT / "invariants/residual/test_additivity.py"
    done = run_pytest(law, "--rootdir", tmp_path, "--record", record)
    assert done.returncode == 1
    assert "residual/additivity: FAILS, listed in streamgauge.toml" in done.stdout
    assert "below 4.768e-07" not in done.stdout


def test_a_known_failure_that_is_over_is_said_once(run_pytest: Running, tmp_path: Path) -> None:
    sound = sound_record()
    sound.arrays["stream/additivity_error"][3, 3] = 1
    sound.save(tmp_path / "it.safetensors")
    _known(tmp_path, "2020-01-31")
    law = ROOT / "invariants/residual/test_additivity.py"
    done = run_pytest(law, "--rootdir", tmp_path, "--record", tmp_path / "it.safetensors")
    assert done.returncode == 1
    failures = done.stdout.split("short test summary")[0]
    assert failures.count("known until 2020-01-31, which is over") == 1


def test_junit_files_name_the_model(run_pytest: Running, record: Path, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    law = ROOT / "invariants/residual/test_additivity.py"
    run_pytest(law, "--record", record, "--junitxml", junit)
    assert '<property name="model" value="somebody\'s"' in junit.read_text()


def test_junit_files_charge_no_law_for_measuring(run_pytest: Running, tmp_path: Path) -> None:
    folder, junit = models.save(models.gpt2(3), tmp_path / "model"), tmp_path / "junit.xml"
    law = ROOT / "invariants/residual/test_additivity.py"
    report = ["--store", tmp_path / "store", "--report", tmp_path / "report"]
    assert run_pytest(law, "--model", folder, "--junitxml", junit, *report).returncode == 0
    row = json.loads((tmp_path / "report" / "rows.jsonl").read_text())
    (case,) = ET.parse(junit).iter("testcase")
    assert float(case.attrib["time"]) < 0.1 * row["cost"]["seconds"]


def test_a_record_is_called_what_it_was_made_from(audit: Auditing, record: Path) -> None:
    found = audit("--record", record, "-k", "additivity")
    assert {row["model"] for row in found.rows} == {"somebody's"}


def test_help_has_a_heading_of_ours(run_pytest: Running) -> None:
    assert "streamgauge, which audits the weights of transformers:" in run_pytest("--help").stdout


def test_a_folder_called_gpt2_is_not_gpt2(audit: Auditing, tmp_path: Path) -> None:
    found = audit("--model", models.save(models.gpt2(), tmp_path / "gpt2"), "-k", "circuit")
    assert {row["outcome"] for row in found.rows} == {"not_applicable"}


BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import importlib.util
own = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in {blocked} else own(name, *a)
"""
HEAVY = ("torch", "transformers", "transformer_lens", "accelerate", "greenlet", "psutil")


def _without_measuring(code: str, *arguments: Any) -> "subprocess.CompletedProcess[str]":
    script = BLOCKED.format(blocked=HEAVY) + code
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_base_install_says_what_measuring_needs(tmp_path: Path) -> None:
    folder = models.save(models.gpt2(2), tmp_path / "model")
    code = "from streamgauge.__main__ import main; sys.exit(main())"
    done = _without_measuring(code, "measure", folder, "-o", tmp_path / "it.safetensors")
    assert done.returncode == 1
    assert "streamgauge[measure]" in done.stderr and "Traceback" not in done.stderr


def test_a_base_install_asserts_records_and_renders(record: Path, tmp_path: Path) -> None:
    code = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    report = tmp_path / "report"
    arguments = [f"--record={record}", f"--report={report}", "-p", "no:cacheprovider"]
    done = _without_measuring(code, "invariants", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (report / "report.html").is_file()
