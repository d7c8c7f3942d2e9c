"""The plugin as users meet it: options in two words, xdist, a law of one's own, the wheel."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures.check import _outside
from streamgauge import plugin
from streamgauge.measure import measure
from streamgauge.numerics.bands import Band, below
from streamgauge.record import Record
from tests import models
from tests.conftest import ROOT, Audit, shared_checkpoint
from tests.records import sound_record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.gpt2(12), tmp_path_factory.mktemp("elsewhere") / "somebody")


def test_a_folder_in_two_words_is_not_taken_for_a_test_path(
    folder: Path, run_pytest: Callable[..., Any], tmp_path: Path
) -> None:
    done = run_pytest("--model", folder, "--store", tmp_path / "store", "-m", "theorem")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"rootdir: {ROOT}" in done.stdout and "configfile: pyproject.toml" in done.stdout


def test_xdist_measures_each_model_once(
    folder: Path, run_pytest: Callable[..., Any], audit: Callable[..., Audit], tmp_path: Path
) -> None:
    other = models.save(models.gpt2(3, seed=1), tmp_path / "other")
    report = tmp_path / "by two"
    asked = ["--model", folder, "--model", other, "-k", "additivity or moments or integrity"]
    done = run_pytest(*asked, "--store", tmp_path / "store", "--report", report, "-n", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (report / "rows.jsonl").read_text().splitlines()]
    alone = audit(*asked, "--store", tmp_path / "alone").rows
    found = [[row | {"cost": None} for row in of] for of in (rows, alone)]
    assert len(found[0]) == 6 and found[0] == found[1]
    assert {path.name for path in (report / "records").iterdir()} == {
        "somebody.safetensors",
        "other.safetensors",
    }
    assert len(list((tmp_path / "store" / "records").iterdir())) == 2


OWN_LAW = '''"""Attention patterns of the first layer sum to one.

Source: softmax.
Applies to: everything.
"""

import pytest
from streamgauge.numerics.bands import between


@pytest.mark.theorem
def test_patterns(activations, record, check):
    resid = activations(["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]
    one = between(0.999, 1.001, "one vector a token")
    check(len(resid) / record.resid_pre.shape[1], within=one, what="vectors a token")
'''


def test_a_law_of_ones_own_takes_our_fixtures(
    folder: Path, run_pytest: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "test_patterns.py").write_text(OWN_LAW)
    done = run_pytest(
        tmp_path / "test_patterns.py",
        "--model",
        folder,
        "--store",
        tmp_path / "store",
        "-c",
        ROOT / "pyproject.toml",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "laws on 1 model: 1 hold, 0 fail" in done.stdout


def test_the_wheel_carries_laws_fixtures_and_reports(
    folder: Path, installed: dict[str, str], tmp_path: Path
) -> None:
    """Unpacked where nothing of the clone is, and run against a checkpoint with --pyargs."""
    away = tmp_path / "away"
    away.mkdir()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--pyargs",
        "streamgauge.invariants",
    ]
    options = [
        "--model",
        str(folder),
        "--store",
        str(tmp_path / "store"),
        "--report",
        str(tmp_path / "report"),
        "-v",
    ]
    done = subprocess.run(
        [*command, *options], cwd=away, env=installed, capture_output=True, text=True, check=False
    )
    assert "could not be measured\n" in done.stdout and " 0 could not be measured" in done.stdout, (
        done.stdout + done.stderr
    )
    assert "residual/test_growth_rate.py::test_growth_rate[somebody]" in done.stdout
    assert (tmp_path / "report" / "report.html").is_file()
    rows = (tmp_path / "report" / "rows.jsonl").read_text()
    assert (
        f"pytest --pyargs streamgauge.invariants.residual.test_growth_rate --model {folder}" in rows
    )


@pytest.mark.parametrize(("name", "layers"), [("stories260K", 5), ("makemore_lmj9", 4)])
def test_trained_checkpoints_of_others(name: str, layers: int, audit: Callable[..., Audit]) -> None:
    found = audit("--model", shared_checkpoint(name), "-rs")
    assert found.exit == 0 and f"this one has {layers}" in found.output, found.output


def test_block_0_of_makemore_shrinks_the_norm() -> None:
    import streamgauge

    record = streamgauge.measure(shared_checkpoint("makemore_lmj9"))
    mean = record.text_resid.mean(1)
    assert mean[1] < mean[0]
    assert "sampled from the model" in record.metadata["prompts"]


@pytest.mark.parametrize(
    ("word", "path"),
    [
        ("streamgauge.invariants", "invariants"),
        ("streamgauge.invariants.residual", "invariants/residual"),
        ("streamgauge.invariants.mlp.test_gain_share", "invariants/mlp/test_gain_share.py"),
        ("streamgauge.invariantsx", None),
        ("my.streamgauge.invariants", None),
    ],
)
def test_laws_that_are_named_as_a_module_are_found_beside_the_package(
    word: str, path: str | None
) -> None:
    assert plugin._laws(word) == (word if path is None else str(ROOT / path))


def test_pyargs_work_where_the_package_was_installed_from_a_clone(
    run_pytest: Callable[..., Any], tmp_path: Path
) -> None:
    sound_record().save(tmp_path / "it.safetensors")
    asked = ("--pyargs", "streamgauge.invariants.residual.test_growth_rate", "-q")
    done = run_pytest(*asked, "--record", tmp_path / "it.safetensors")
    assert done.returncode == 0, done.stderr
    assert "1 hold" in done.stdout or "1 passed" in done.stdout


def test_a_record_of_the_bundled_model_is_held_to_its_bands(
    audit: Callable[..., Audit], tmp_path: Path
) -> None:
    """A measurement asserted elsewhere is the same audit; other weights of that name are not."""
    path = tmp_path / "it.safetensors"
    record = measure("pystdlib-3m", groups=["stream"])
    record.save(path)

    def outcome() -> dict[str, Any]:
        law = "invariants/residual/test_growth_rate.py"
        return audit("--record", path, laws=law).row("residual/growth_rate")

    found = outcome()
    assert (found["outcome"], found["layers"]) == ("pass", [1, 13])
    Record(record.arrays, record.metadata | {"weights_sha256": "0" * 64}).save(path)
    assert outcome()["outcome"] == "unusual"


def test_a_band_is_told_from_what_lies_just_outside() -> None:
    band = Band(1.0274, 1.0321, "a source")
    assert _outside(1.03214, band) == "1.0321"  # the end is said to be 1.032
    assert _outside(1.05, band) == "1.05"
    assert _outside(1.0, below(1, "another")) == "1"


def test_what_is_wrong_with_the_baseline_is_said_to_be(
    run_pytest: Callable[..., Any], tmp_path: Path
) -> None:
    sound_record().save(tmp_path / "it.safetensors")
    broken = models.save(models.gpt2(1), tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    asked = ("--record", tmp_path / "it.safetensors", "--baseline", broken, "-m", "regression")
    done = run_pytest("invariants", *asked)
    assert done.returncode == 1
    assert "the baseline: " in done.stdout and "model.safetensors" in done.stdout
