"""What a record gives in a notebook: rates, tables, verdicts and the page's charts; and that each
law has what its page on the site says.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest

import streamgauge
from streamgauge import record as module
from streamgauge.errors import NotApplicable, NotInstalledError
from streamgauge.laws import laws
from tests.conftest import ROOT
from tests.records import LENGTH, N_HEADS, PROMPTS, replaced, sound_record


def test_a_growth_rate_is_the_laws() -> None:
    record = sound_record(1.045)
    assert record.growth_rate(2, 13) == pytest.approx(1.045, rel=1e-6)
    rows = {row["law"]: row for row in record.verdicts()}
    row = rows["residual/growth_rate"]
    assert row["value"] == pytest.approx(record.growth_rate(*row["layers"]), rel=1e-9)
    with pytest.raises(NotApplicable, match="layers 20 to 40 are not covered"):
        record.growth_rate(20, 40)


def test_tables_have_a_row_a_token_a_head_or_a_layer() -> None:
    record = sound_record()
    tokens = record.to_dataframe()
    assert len(tokens) == record.n_layers * PROMPTS * LENGTH
    one = tokens[(tokens.layer == 3) & (tokens.token == 7)].iloc[0]
    assert one["stream/resid_pre"] == record.resid_pre[3, 7]
    assert (one["prompt"], one["position"]) == (1, 1)
    heads = record.to_dataframe("heads")
    assert len(heads) == record.n_layers * N_HEADS
    np.testing.assert_array_equal(
        heads["weights/W_OV_frobenius"], record.array("weights/W_OV_frobenius").ravel()
    )
    layers = record.to_dataframe("layers")
    assert list(layers.layer) == list(range(record.n_layers)) and "weights/W_in" in layers
    assert not {*tokens} & {*layers} - {"layer"}
    with pytest.raises(ValueError, match="tokens, heads, layers, and not 'neurons'"):
        record.to_dataframe("neurons")


def test_without_pandas_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(NotInstalledError, match="needs pandas"):
        sound_record().to_dataframe()


def test_charts_are_the_pages_with_bands_where_rows_are_given() -> None:
    record = sound_record(model="gpt2", bend=0.02)
    alone = streamgauge.figures(record)
    judged = streamgauge.figures(record, record.verdicts())
    assert set(alone) == set(judged) >= {"Residual stream", "Growth factor"}
    drawn = [len(made["Growth factor"].layout.shapes) for made in (alone, judged)]
    assert drawn[1] > drawn[0]
    median = next(t for t in alone["Residual stream"].data if t.name == "median token")
    np.testing.assert_allclose(median.y, np.median(record.text_resid, 1), rtol=1e-4)


def test_a_failure_of_each_law_is_explained() -> None:
    triage = Path(ROOT / "docs" / "triage.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in triage.splitlines() if line.count("|") == 4]
    explained = {law.strip() for cell in cells for law in cell.split(",")}
    assert {law.id for law in laws()} <= explained


def test_verdicts_are_held_to_a_baseline_as_same_says() -> None:
    old = sound_record()
    moved = old.array("sketch/parameters") * 1.0
    moved += 0.1 * np.random.default_rng(7).normal(size=moved.shape)
    new = replaced(old, {"sketch/parameters": moved})
    outcomes = [
        {row["law"]: row["outcome"] for row in new.verdicts(old, same)}
        for same in (None, "trained")
    ]
    assert [found["regression/verdict"] for found in outcomes] == ["fail", "pass"]
    rows = new.verdicts(old)
    verdict = next(row for row in rows if row["law"] == "regression/verdict")
    assert verdict["reason"].endswith("same weights, and this with --same function")
    assert not any(tempfile.gettempdir() in str(row) for row in rows)
