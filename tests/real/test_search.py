"""The search for repairs on the bundled model, of another fault than the tests have."""

from pathlib import Path

import pytest

import streamgauge
from tests import faults
from tests.conftest import ROOT

BUNDLED = ROOT / "fixtures" / "bundled" / "pystdlib-3m"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scores not scaled", "the whole model: with config.json with scale_attn_weights True"),
        ("W_out with its sign turned", "layer 15 mlp: with the sign of W_out turned"),
    ],
)
def test_a_fault_is_found_and_named_without_a_baseline(
    name: str, words: str, tmp_path: Path
) -> None:
    files = faults.Files(BUNDLED, 15)
    next(fault for fault in faults.FAULTS if fault.name == name).change(files)
    record = streamgauge.measure(files.write(tmp_path / "faulty"), draws=0)
    (row,) = [
        row
        for row in streamgauge.verdicts(record)
        if row["law"] == "predictions/best_of_its_neighbours"
    ]
    assert row["outcome"] == "fail" and words in row["reason"] and "probably" in row["reason"]
