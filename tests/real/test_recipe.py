"""The bundled model's recipe makes it again, as far as its eleventh step."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamgauge
from streamgauge.record import Record
from tests.test_bundled import BUNDLED, recipe

__all__ = ["recipe"]  # the fixture


def test_its_recipe_makes_it_again(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the eleventh step, on little held-out text: the record of then is in `history`."""

    class Nothing:
        def __init__(self, windows: np.ndarray, vocabulary: int) -> None:
            assert windows.shape[1] == recipe.CONTEXT and (windows[:, 0] == windows[0, 0]).all()

        def loss(self, rows: np.ndarray) -> float:
            return float(len(rows))

    try:
        training, held_out = recipe.split(recipe.corpus_files())
    except SystemExit as error:
        pytest.skip(str(error))
    monkeypatch.setattr(recipe, "split", lambda files: (training, held_out[:3]))
    monkeypatch.setattr(recipe, "STEPS", (0, 10))
    monkeypatch.setattr(recipe, "Trigram", Nothing)
    measure = functools.partial(streamgauge.measure, groups=["stream", "weights"])
    monkeypatch.setattr(recipe.streamgauge, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path)])
    recipe.main()
    for step in ("step-00000", "step-00010"):
        made = Record.load(tmp_path / "history" / f"{step}.safetensors")
        kept = Record.load(BUNDLED / "history" / f"{step}.safetensors")
        for name in ("stream/resid_post", "stream/mlp_out", "weights/W_OV_frobenius"):
            np.testing.assert_allclose(made.array(name), kept.array(name), rtol=1e-3, err_msg=name)
    losses = json.loads((tmp_path / "losses.json").read_text())
    known = json.loads((BUNDLED / "losses.json").read_text())["model"]
    for step in ("0", "10"):
        assert losses["model"][step] == pytest.approx(known[step], abs=0.1)
