"""Published numbers as records: what `pytest -k NAME --published` asserts, offline."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fixtures import catalogue
from streamgauge.record import Record
from tests.conftest import Audit

Auditing = Callable[..., Audit]


def test_gpt2_xl_grows_as_published(audit: Auditing) -> None:
    found = audit("-k", "gpt2-xl", "--published")
    assert found.exit == 0
    (row,) = [r for r in found.rows if r["law"] == "residual/growth_rate" and r["model"] == "gpt2-xl:58-prompts"]
    assert (row["kind"], row["outcome"], row["layers"]) == ("reference", "pass", [5, 40])  # where it was published
    assert row["value"] == pytest.approx(1.0446, abs=5e-5)
    (row,) = [r for r in found.rows if r["law"] == "residual/growth_rate" and r["model"] == "gpt2-xl:6-tokens"]
    assert row["value"] == pytest.approx(1.0447, abs=5e-5) and row["layers"] == [5, 41]
    exponential = {r["model"]: r for r in found.rows if r["law"] == "residual/exponential"}
    assert exponential["gpt2-xl:58-prompts"]["value"] == pytest.approx(0.9993, abs=5e-5)
    assert exponential["gpt2-xl:58-prompts"]["outcome"] == "pass"


def test_laws_that_need_weights_are_not_applicable(audit: Auditing) -> None:
    rows = [r for r in audit("-k", "gpt2-xl", "--published").rows if r["law"].startswith(("attention/", "weights/"))]
    assert len(rows) == 9
    assert all(r["outcome"] == "not_applicable" and r["reason"].startswith("no weights") for r in rows)


def test_gpt2_grows_faster_than_exponentially(audit: Auditing) -> None:
    found = audit("--model", "gpt2", "--model", "distilgpt2", "--published", "-k", "super_exponential")
    outcomes = {row["model"]: row["outcome"] for row in found.rows}
    assert outcomes == {"gpt2:rms": "pass", "gpt2:58-prompts": "pass", "distilgpt2:3-prompts": "pass"}


def test_numbers_survived_the_import() -> None:
    gpt2 = catalogue.models()["gpt2"]
    record = Record.load(gpt2.published_path("58-prompts"))
    means = [9.815, 14.699, 12.466, 15.530, 19.098, 22.497, 29.434, 29.918, 31.941, 41.114, 49.595, 105.14]
    np.testing.assert_allclose(record.array("weights/W_OV_frobenius").mean(1), means, rtol=5e-5)
    bos = record.resid_pre[:5, record.array("stream/is_bos")].mean(1)
    np.testing.assert_allclose(bos, [10.3, 165, 642, 2577, 2776], rtol=5e-3)
    assert record.is_text.sum() == 1061
    rms = Record.load(gpt2.published_path("rms"))
    rates = np.diff(np.log(rms.resid[4:, 0]))
    np.testing.assert_allclose(np.exp(rates), [1.071, 1.097, 1.115, 1.164, 1.179, 1.261, 1.453, 2.086], rtol=5e-4)


@pytest.mark.parametrize(("model", "name"), [(m, n) for m in catalogue.models().values() for n in m.published], ids=str)
def test_every_published_record_says_where_it_is_from(model: Any, name: str) -> None:
    record = Record.load(model.published_path(name))
    assert record.metadata["source"] and record.metadata["convention"] and record.metadata["prompts"]
    assert record.n_layers == model.layers
