"""The catalogue is data that can be trusted: names, depths, windows, bands with sources; and the
laws are listed.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special

from fixtures import catalogue
from streamgauge.laws import laws
from streamgauge.numerics.bands import Band, below, default_window
from streamgauge.numerics.growth import (
    curvature,
    growth_rates,
    log_linear_r2,
    mean_rate,
    measured_window,
)
from streamgauge.numerics.student_t import quantile
from tests.conftest import ROOT
from tests.records import sound_record

BANDS: list[dict[str, Any]] = catalogue._toml()["band"]
NAMED = (
    "distilgpt2 gpt2 gpt2-medium gpt2-large gpt2-xl opt-125m opt-350m opt-1.3b opt-2.7b opt-6.7b "
    "gpt-neo-125m gpt-neo-1.3b "
    "gpt-neo-2.7b pythia-14m pythia-31m pythia-70m pythia-160m pythia-410m pythia-1b pythia-1.4b "
    "pythia-2.8b pythia-6.9b "
    "pythia-12b pystdlib-3m smollm2-135m"
)


def test_every_model_is_there_and_can_be_found() -> None:
    with_weights = {model.id for model in catalogue.models().values() if model.has_weights}
    assert with_weights == set(NAMED.split())
    for model in catalogue.models().values():
        assert (model.hub is None) or (model.bundled is None)
        assert model.has_weights or model.published
        assert "@" not in model.id
        assert model.window is None or 0 <= model.window[0] < model.window[1] <= model.layers


@pytest.mark.parametrize(
    "band", BANDS, ids=lambda b: f"{b['law']}-{'+'.join(catalogue._models_of(b)) or 'any'}"
)
def test_every_band_is_of_a_law_and_a_model_and_has_a_source(band: dict[str, Any]) -> None:
    assert band["law"] in {law.id for law in laws()}
    assert set(catalogue._models_of(band)) <= set(catalogue.models())
    assert len(band.get("source") or band["unclaimed"]) > 20
    assert "unclaimed" in band or {"low", "high"} & set(band)
    assert band.get("low", -np.inf) < band.get("high", np.inf)
    assert set(band) <= {
        "law",
        "model",
        "min_layers",
        "low",
        "high",
        "kind",
        "source",
        "layers",
        "unclaimed",
    }


def test_no_band_is_given_twice() -> None:
    keys = [
        (band["law"], model) for band in BANDS for model in catalogue._models_of(band) or [None]
    ]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("law", laws(), ids=lambda law: law.id)
def test_every_law_states_itself(law: Any) -> None:
    assert law.kind in ("theorem", "phenomenon", "regression")
    assert law.claim and law.formula and law.source and law.applies_to


def test_nearest_names() -> None:
    assert catalogue.nearest("gpt2xl").startswith("gpt2-xl")
    assert "pythia-70m" in catalogue.nearest("pythia70m")


def test_a_model_has_its_own_band_or_the_general_one_or_none() -> None:
    assert catalogue.band("residual/growth_rate", "gpt2-xl", 48).window == (5, 41)
    assert catalogue.is_reference("residual/growth_rate", "gpt2-xl")
    assert catalogue.band("residual/growth_rate", "somebody's", 32).window == (4, 27)
    assert catalogue.band("residual/growth_rate", "somebody's", 5).unclaimed == (
        "claimed of models with 12 layers or more; this one has 5"
    )
    assert (
        catalogue.band("residual/super_exponential", "somebody's", 32).unclaimed
        == "no source claims it of this model"
    )
    assert catalogue.band("residual/exponential", "somebody's", 32).unclaimed == (
        "no source claims it of this model"
    )
    assert str(catalogue.band("residual/exponential", "gpt2", 12).unclaimed).startswith(
        "not claimed of this model: gpt2 grows"
    )


def test_bands_are_open_and_refuse_nan() -> None:
    band = Band(1.0, 2.0, "test")
    assert 1.5 in band and 1.0 not in band and 2.0 not in band and float("nan") not in band
    unknown = Band(float("nan"), float("nan"), "test")
    assert 1.5 not in unknown and unknown.margin(1.5) == float("-inf")
    assert (
        0.0 in below(1e-9, "test")
        and str(below(0.5, "test")) == "below 0.5"
        and str(band) == "1 to 2"
    )


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 37, 150])
def test_quantiles_of_students_t_are_scipys(freedom: int) -> None:
    for level in (0.01, 0.25, 0.5, 0.9, 0.975):
        assert quantile(level, freedom) == pytest.approx(
            scipy.special.stdtrit(freedom, level), rel=1e-9, abs=1e-12
        )


def test_growth_helpers_on_a_known_curve() -> None:
    resid = sound_record(1.045).text_resid
    window = default_window(16)
    assert window == (2, 13) and measured_window(resid, window) == window
    assert mean_rate(growth_rates(resid, window)) == pytest.approx(1.045)
    assert log_linear_r2(resid, window) == pytest.approx(1)
    assert curvature(sound_record(1.045, bend=0.01).text_resid, window, 0.01)[0] == pytest.approx(
        0.01, abs=1e-5
    )


def test_laws_are_listed(run_streamgauge: Callable[..., Any]) -> None:
    listed = json.loads(run_streamgauge("laws", "--json").stdout)
    assert [law["id"] for law in listed] == [law.id for law in laws()]
    assert {"id", "kind", "claim", "source", "applies_to", "formula", "takes_band"} == set(
        listed[0]
    )
    assert "residual/growth_rate  (phenomenon)" in run_streamgauge("laws").stdout


def test_reference_bands_are_marked(run_pytest: Callable[..., Any]) -> None:
    chosen = run_pytest(
        "invariants", "--published", "-m", "reference", "--collect-only", "-q"
    ).stdout
    assert "test_growth_rate[gpt2-xl:58-prompts]" in chosen
    assert "test_growth_rate[gpt2:58-prompts]" not in chosen and "additivity" not in chosen


def test_a_reference_is_of_one_law_and_one_model() -> None:
    assert catalogue.is_reference("residual/growth_rate", "gpt2-xl")
    assert not catalogue.is_reference("residual/growth_rate", "gpt2")
    assert not catalogue.is_reference("weights/repeated_blocks", "gpt2-xl")


def test_models_are_chosen_by_marker(run_pytest: Callable[..., Any]) -> None:
    chosen = run_pytest(
        "invariants", "--published", "-m", "model(id='gpt2')", "--collect-only", "-q"
    ).stdout
    assert (
        "[gpt2:58-prompts]" in chosen and "[gpt2-xl" not in chosen and "[distilgpt2" not in chosen
    )


def test_every_law_has_its_triage() -> None:
    """docs/triage.md says of each law, once, what its failure usually means."""
    lines = (ROOT / "docs" / "triage.md").read_text(encoding="utf-8").splitlines()
    named = [
        name.strip()
        for line in lines
        if line.startswith("| ")
        for name in line.split("|")[1].split(",")
        if "/" in name
    ]
    assert sorted(named) == sorted(law.id for law in laws())
