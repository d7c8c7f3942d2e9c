"""Bands of one's own: what `python -m streamgauge calibrate` makes of sound records, and how often
another sound one then fails.
"""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from streamgauge.numerics.calibration import calibrated, prediction_interval
from streamgauge.record import Record
from tests.conftest import ROOT
from tests.records import replaced, sound_record

HISTORY = ROOT / "fixtures" / "bundled" / "history"
LATE = [HISTORY / f"step-{n:05}.safetensors" for n in (700, 1200, 2000, 2800, 3500)]
Running = Callable[..., Any]


def test_an_interval_holds_another_draw_as_often_as_it_says() -> None:
    dice = np.random.default_rng(0)
    for n in (4, 6, 12):
        draws = dice.normal(-3, 2, (4000, n + 1))
        inside = [
            low <= row[-1] <= high
            for row in draws
            for low, high in [prediction_interval(row[:-1], 0.1)]
        ]
        assert np.mean(inside) == pytest.approx(0.9, abs=3 * (0.9 * 0.1 / 4000) ** 0.5)


def test_an_interval_is_students_and_of_logarithms_where_all_are_positive() -> None:
    values = np.array([-1.0, 0.5, 0.2, 1.5])
    reach = scipy.stats.t.ppf(0.995, 3) * values.std(ddof=1) * 1.25**0.5
    found = prediction_interval(values, 0.01)
    assert found == pytest.approx((values.mean() - reach, values.mean() + reach), rel=1e-6)
    low, high = prediction_interval(np.exp(values), 0.01, ratios=True)
    assert (np.log(low), np.log(high)) == pytest.approx(found, rel=1e-6)


def test_leaving_out_finds_the_one_that_lies_elsewhere() -> None:
    assert calibrated(np.array([1.0, 1.01, 1.02, 0.99, 1.0, 30.0]), 0.01).outside == (5,)
    assert calibrated(np.array([1.0, 1.01, 1.02, 0.99, 1.0]), 0.01).outside == ()


def test_bands_of_steps_pass_one_among_them_and_fail_an_early_one(
    run_streamgauge: Running, run_pytest: Running, tmp_path: Path
) -> None:
    own = tmp_path / "streamgauge.toml"
    done = run_streamgauge("calibrate", *LATE[:2], *LATE[3:], "-o", own)
    assert done.returncode == 0, done.stderr
    bands = {band["law"]: band for band in tomllib.loads(own.read_text())["band"]}
    assert "residual/growth_rate" in bands
    assert "residual/fits_dtype" not in bands  # of a copy in another dtype it is another
    assert bands["residual/growth_rate"]["layers"] == [2, 13]
    assert "but for a chance of 0.05" in bands["residual/growth_rate"]["source"]
    assert "by chance 5% of sound checkpoints fail" in done.stdout

    def failing(record: Path) -> set[str]:
        found = run_pytest(
            ROOT / "invariants", "--rootdir", tmp_path, "--record", record, "-q", "-p", "no:xdist"
        )
        lines = found.stdout.splitlines()
        return {line.split("::test_")[1].split("[")[0] for line in lines if "FAILED" in line}

    assert failing(LATE[2]) == set()
    assert "growth_rate" in failing(HISTORY / "step-00100.safetensors")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (LATE[:3], "3 records are too few"),
        ([*LATE, "--rate", "2"], "is not between 1e-06 and 0.5"),
        ([*LATE, "--rate", "1e-300"], "is not between 1e-06 and 0.5"),
        ([*LATE[:3], ROOT / "README.md"], "README.md"),
        ([*LATE[:3], "nowhere.safetensors"], "nowhere.safetensors"),
        ([*LATE, LATE[0]], "of the same weights"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    arguments: list[Any], said: str, run_streamgauge: Running, tmp_path: Path
) -> None:
    done = run_streamgauge("calibrate", *arguments, "-o", tmp_path / "streamgauge.toml")
    assert done.returncode in (1, 4)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "streamgauge.toml").exists()


def test_somebody_elses_settings_are_not_overwritten(
    run_streamgauge: Running, tmp_path: Path
) -> None:
    own = tmp_path / "streamgauge.toml"
    own.write_text('[[leave_out]]\nlaw = "residual/spread"\nreason = "mine"\n')
    done = run_streamgauge("calibrate", *LATE, "-o", own)
    assert done.returncode == 4
    assert "was written by somebody else" in done.stderr
    assert "mine" in own.read_text()


def test_a_checkpoint_that_is_not_sound_is_no_measure(
    run_streamgauge: Running, tmp_path: Path
) -> None:
    record = Record.load(LATE[0])
    broken = replaced(record, {"stream/resid_post": record.array("stream/resid_post") * 30})
    broken.metadata["weights_sha256"] = None
    broken.save(tmp_path / "broken.safetensors")
    done = run_streamgauge(
        "calibrate", *LATE[1:], tmp_path / "broken.safetensors", "-o", tmp_path / "own.toml"
    )
    assert done.returncode == 4
    assert "broken.safetensors is not sound: " in done.stderr


def test_records_on_other_prompts_are_refused(run_streamgauge: Running, tmp_path: Path) -> None:
    record = Record.load(LATE[0])
    record.metadata.update(prompts_sha256="0" * 64, weights_sha256=None)
    record.save(tmp_path / "other.safetensors")
    done = run_streamgauge(
        "calibrate", *LATE[1:], tmp_path / "other.safetensors", "-o", tmp_path / "own.toml"
    )
    assert done.returncode == 1
    assert "have other prompts" in done.stderr


def test_releases_that_follow_one_another_say_how_far_the_next_may_move(
    run_streamgauge: Running, run_pytest: Running, tmp_path: Path
) -> None:
    releases = [sound_record()]

    def release(name: str, moved: float, rise: float) -> Path:
        last = releases[-1]
        dice = np.random.default_rng(100 + len(releases))
        sketches = last.array("sketch/parameters")
        arrays = {
            "sketch/parameters": sketches + moved * dice.normal(size=sketches.shape),
            "prediction/loss": last.array("prediction/loss") + np.float32(rise),
        }
        releases.append(replaced(last, arrays))
        path = tmp_path / f"{name}.safetensors"
        releases[-1].save(path)
        return path

    sizes = [(0.1, 0.0), (0.11, -0.011), (0.09, -0.012), (0.1, -0.01), (0.105, -0.009)]
    paths = [release(f"v{n}", *size) for n, size in enumerate(sizes, 1)]
    own = tmp_path / "own" / "streamgauge.toml"
    own.parent.mkdir()
    done = run_streamgauge("calibrate", "--successive", *paths, "-o", own)
    assert done.returncode == 0, done.stderr
    bands = {band["law"]: band for band in tomllib.loads(own.read_text())["band"]}
    how_it_moved = {"regression/loss", "regression/movement"}
    assert set(bands) == {"predictions/beats_unigram", *how_it_moved}
    assert all("low" not in bands[law] for law in how_it_moved)
    assert 0.1 < bands["regression/movement"]["high"] < 0.5
    assert -0.009 < bands["regression/loss"]["high"] < 0.01

    def outcomes(new: Path, last: Path) -> dict[str, str]:
        asked = (
            "--record",
            new,
            "--baseline",
            last,
            "--same",
            "trained",
            "--report",
            tmp_path / "r",
        )
        run_pytest(ROOT / "invariants" / "regression", "--rootdir", own.parent, *asked)
        lines = (tmp_path / "r" / "rows.jsonl").read_text().splitlines()
        return {row["law"]: row["outcome"] for row in map(json.loads, lines)}

    good = outcomes(release("v6", 0.1, -0.01), paths[-1])
    assert good["regression/movement"] == good["regression/loss"] == "pass"
    far = outcomes(release("v7", 0.6, 0.2), tmp_path / "v6.safetensors")
    assert far["regression/verdict"] == "pass"  # it is a trained state of the same model
    assert far["regression/movement"] == far["regression/loss"] == "fail"
    mixed = [paths[n] for n in (0, 3, 1, 2, 4)]
    done = run_streamgauge("calibrate", "--successive", *mixed, "-o", tmp_path / "mixed.toml")
    assert done.returncode == 4
    assert f"{mixed[0]} is nearer to {mixed[2]} than to {mixed[1]}" in done.stderr
    few = run_streamgauge("calibrate", "--successive", *paths[:4], "-o", tmp_path / "few.toml")
    assert few.returncode == 4
    assert "4 records are too few" in few.stderr and "give 5 or more" in few.stderr
