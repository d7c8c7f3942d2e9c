"""How often a conversion to a narrower dtype is taken for something else than the same weights:
random models of all architectures, in bf16 and fp16, held to themselves in fp32. Never.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import streamgauge
from streamgauge.numerics.rows import Prompts
from streamgauge.record import Record
from tests import models

SEEDS = 4
_dice = random.Random(0)
ROWS = Prompts([[1, *_dice.choices(range(97), k=31)] for _ in range(24)], "drawn", None)


def _record(model: Any, folder: Path) -> Record:
    models.save(model, folder)
    return streamgauge.measure(folder, rows=ROWS, neighbours="none", draws=0)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_a_conversion_is_the_same_weights(name: str, seed: int, tmp_path: Path) -> None:
    baseline = _record(models.random_model(name, seed), tmp_path / "float32")
    for dtype in (torch.bfloat16, torch.float16):
        model = models.random_model(name, seed).to(dtype)
        found = _record(model, tmp_path / str(dtype).removeprefix("torch."))
        rows = [row for row in found.verdicts(baseline) if row["kind"] == "regression"]
        assert {row["outcome"] for row in rows} >= {"pass"}
        wrong = [row["reason"] for row in rows if row["outcome"] in ("fail", "error")]
        assert not wrong, dtype
