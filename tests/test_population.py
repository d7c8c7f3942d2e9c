"""Where real models lie: the outcome `unusual`, the published numbers behind it, and the page of
claims.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures import catalogue, population
from fixtures.published import claims
from reports import render
from streamgauge.record import Record
from tests.conftest import ROOT, SHARED, Audit
from tests.records import changed, sound_record

Auditing = Callable[..., Audit]
MODERN = "modern-27.activation-stats.json"


def modern() -> dict[str, Any]:
    path = SHARED / "reference" / MODERN
    if not path.is_file():
        pytest.skip("the published files are not on this machine")
    found: dict[str, Any] = json.loads(path.read_text())["models"]
    return found


def growing(rate: float) -> Record:
    """A sound record that grows so fast; both sublayers with it."""
    record = sound_record(rate, n_layers=16)
    layers = rate ** np.arange(16)[:, None]
    outputs = {
        name: layers * record.array(f"stream/{name}")[:1] for name in ("attn_out", "mlp_out")
    }
    return changed(record, **outputs)


def test_a_value_beyond_all_real_models_is_unusual_and_no_failure(
    audit: Auditing, tmp_path: Path
) -> None:
    growing(1.5).save(tmp_path / "fast.safetensors")
    found = audit("--record", tmp_path / "fast.safetensors", "-k", "growth_rate")
    row = found.row("residual/growth_rate")
    assert (found.exit, row["outcome"]) == (0, "unusual")
    known = population.of("residual/growth_rate", "growth", "somebody's")
    assert known is not None
    assert row["population"] == {"low": known.low, "high": known.high, "models": known.models}
    assert f"above the range of {known.models} real models, 1.0433 to 1.3524" in row["reason"]
    assert "were all models drawn alike, 6% of sound ones would lie outside" in row["reason"]
    assert "of a new family 15% do" in row["reason"]
    assert "1 unusual" in found.output
    assert row["reason"] in found.output


def test_strict_makes_it_a_failure(audit: Auditing, tmp_path: Path) -> None:
    growing(1.5).save(tmp_path / "fast.safetensors")
    found = audit("--record", tmp_path / "fast.safetensors", "-k", "growth_rate", "--strict")
    row = found.row("residual/growth_rate")
    assert (found.exit, row["outcome"]) == (1, "fail")
    assert "--strict" in found.output
    assert "Traceback" not in found.output


@pytest.mark.parametrize(("rate", "outcome"), [(1.1, "pass"), (1.36, "unusual"), (0.9, "fail")])
def test_a_broken_band_comes_before_what_is_usual(
    rate: float, outcome: str, audit: Auditing, tmp_path: Path
) -> None:
    growing(rate).save(tmp_path / "it.safetensors")
    found = audit("--record", tmp_path / "it.safetensors", "-k", "growth_rate")
    assert found.row("residual/growth_rate")["outcome"] == outcome


def test_a_value_that_nobody_claims_is_held_against_real_models(
    audit: Auditing, tmp_path: Path
) -> None:
    growing(1.5).save(tmp_path / "fast.safetensors")
    row = audit("--record", tmp_path / "fast.safetensors", "-k", "both_grow").row(
        "sublayers/both_grow"
    )
    assert row["outcome"] == "unusual"
    assert row["band"] is None


def test_shallow_models_and_bands_of_ones_own_are_not_held_against_it(
    audit: Auditing, tmp_path: Path
) -> None:
    for model, n_layers in (("somebody's", 10), ("gpt2-large", 36)):
        sound_record(1.6, n_layers=n_layers, model=model).save(tmp_path / "it.safetensors")
        found = audit("--record", tmp_path / "it.safetensors", "-k", "growth_rate")
        assert found.row("residual/growth_rate")["outcome"] != "unusual"


def test_a_model_is_not_held_against_itself() -> None:
    law, what = "residual/growth_rate", "growth"
    values = population.values()[law][what]
    largest = max(values, key=lambda name: values[name])
    without = population.of(law, what, largest)
    assert without is not None
    assert values[largest] not in without
    assert without.models == len(values) - 1
    assert population.of(law, "another quantity", "any") is None


def test_every_population_is_of_a_law_and_large_enough() -> None:
    laws = {path.stem for path in (ROOT / "invariants").glob("*/test_*.py")}
    for law, by_what in population.values().items():
        assert f"test_{law.split('/')[1]}" in laws
        for by_model in by_what.values():
            assert len(by_model) > population.LEAST
            assert np.isfinite(list(by_model.values())).all()


def test_medians_are_what_was_published() -> None:
    models = modern()
    assert len(models) == 27
    for name, entry in models.items():
        path = catalogue.models()[name.lower()].published_path("activations")
        record = Record.load(path)
        width = entry["hidden_size"] ** 0.5
        post = record.array("stream/resid_post")[:, 0]
        np.testing.assert_allclose(post, width * np.array(entry["hidden"]["abs_median"]), rtol=1e-6)
        assert record.metadata["source"]["paper"] == "arXiv 2605.15572"
        assert "bfloat16" in record.metadata["convention"]
        assert ("stream/attn_out" in record.arrays) == (
            not name.startswith(("gemma-2-", "gemma-3"))
        )


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of an audit of everything that is published."""
    folder = tmp_path_factory.mktemp("published")
    command = [sys.executable, "-m", "pytest", "--published", "--report", str(folder), "-q"]
    subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, check=True, capture_output=True)
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_all_27_grow_and_sixteen_or_so_exponentially(published: list[dict[str, Any]]) -> None:
    rows = [r for r in published if r["model"].endswith(":activations")]
    growth = [r for r in rows if r["law"] == "residual/growth_rate"]
    assert len(growth) == 27
    assert all(r["value"] > 1 and r["outcome"] in ("pass", "unusual") for r in growth)
    r2 = [r["value"] for r in rows if r["law"] == "residual/exponential"]
    assert sum(value < 0.9 for value in r2) == 10  # of 27; LAWS counts 11 over another window
    for law in ("residual/spread", "residual/every_token_grows", "sublayers/alignment"):
        assert {r["outcome"] for r in rows if r["law"] == law} == {"not_applicable"}
        assert all(r["value"] is None for r in rows if r["law"] == law)


def test_first_positions_speak_of_position_0_alone(published: list[dict[str, Any]]) -> None:
    rows = [r for r in published if r["model"].endswith(":first-positions")]
    told = {r["model"]: r["value"] for r in rows if r["value"] is not None}
    assert told.keys() == {
        f"{m}:first-positions" for m in ("gpt2", "gpt2-medium", "dialogpt-medium")
    }
    assert {r["law"] for r in rows if r["value"] is not None} == {"residual/position_0"}
    assert min(told.values()) > 10


def test_the_page_of_claims_is_what_the_records_say() -> None:
    text = (ROOT / "docs" / "claims.md").read_text()
    assert claims.usual() in text
    values = population.values()["residual/growth_rate"]["growth"]
    for model, value in values.items():
        assert f"✓ {value:.4g} |" in next(
            line
            for line in text.splitlines()
            if line.startswith(f"| {model} | ")
            and line != "·"
            and "first-positions" not in line
            and "massive" not in line
            and "rms" not in line
            and "6-tokens" not in line
        )


def test_published_models_without_weights_are_refused(run_pytest: Callable[..., Any]) -> None:
    done = run_pytest("--model", "qwen3-8b")
    assert done.returncode == 4
    assert "published numbers alone are known here (--published)" in done.stderr


def strip(value: float | None, band: Any = None, known: Any = None) -> dict[str, Any] | None:
    row = {"value": value, "band": band, "population": known, "outcome": "pass"}
    return render.strip(row)


def test_a_strip_puts_the_mark_where_the_value_is() -> None:
    inside = strip(1.5, [1.0, 2.0])
    assert inside is not None
    assert inside["low"] < inside["mark"] < inside["high"]
    assert inside["mark"] == pytest.approx((inside["low"] + inside["high"]) / 2, abs=0.1)
    above = strip(9.0, None, {"low": 1.0, "high": 2.0, "models": 30})
    assert above is not None
    assert above["mark"] > above["high"]
    assert above["says"] == "9; 30 real models 1 to 2"
    steep = strip(1e-3, [None, 1.0])
    assert steep is not None
    assert (steep["low"], steep["mark"] < steep["high"]) == (0, True)
    assert strip(None, [0, 1]) is None
    assert strip(1.0) is None


def test_root_mean_squares_are_held_against_nobody(published: list[dict[str, Any]]) -> None:
    rows = [r for r in published if r["model"].endswith(":rms")]
    assert rows
    assert all(r["outcome"] != "unusual" and r["population"] is None for r in rows)
