"""The bundled model is what its card says, and the records of its training show the growth
appear.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures import catalogue
from streamgauge.checkpoints.prompts import read_prompts
from streamgauge.record import Record
from tests.conftest import ROOT, Audit

BUNDLED = ROOT / "fixtures" / "bundled"
MODEL = BUNDLED / "pystdlib-3m"
STEPS = sorted(int(path.stem.removeprefix("step-")) for path in (BUNDLED / "history").iterdir())


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that trains it; it imports its neighbour as scripts do."""
    monkeypatch.syspath_prepend(str(BUNDLED))
    import train

    yield train
    sys.modules.pop("train")


def test_it_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(files.values()) <= 8e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)


def test_the_card_tells_the_losses() -> None:
    losses = json.loads((BUNDLED / "losses.json").read_text())
    card = (MODEL / "README.md").read_text()
    assert f"{losses['model']['3500']:.3f} nats" in card and f"{losses['trigram']:.3f} nats" in card
    assert losses["model"]["3500"] < losses["trigram"] - 0.5
    assert sorted(map(int, losses["model"])) == STEPS


def test_its_loss_on_held_out_text_is_what_the_card_says(recipe: Any) -> None:
    import corpus
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        _, texts = corpus.split(corpus.corpus_files())
    except SystemExit as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    stream = recipe.token_stream(tokenizer, texts)
    starts = np.arange(0, len(stream) - recipe.CONTEXT, 20 * (recipe.CONTEXT - 1))
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    loss = recipe.validation_loss(model, recipe.windows(stream, starts, tokenizer.bos_token_id))
    # A twentieth of the windows: their losses vary by about 0.7, so the mean by 0.7 / √128.
    assert loss == pytest.approx(3.656, abs=4 * 0.7 / np.sqrt(len(starts)))


def test_the_trigram_model_is_a_fair_one(recipe: Any) -> None:
    from corpus import Trigram

    draw = np.random.default_rng(0)
    uniform = np.concatenate([np.zeros((200, 1), int), draw.integers(1, 50, (200, 60))], 1)
    assert Trigram(uniform, 50).loss(uniform[-20:]) == pytest.approx(np.log(49), abs=0.1)
    cycle = np.tile(np.arange(1, 31), (200, 2))
    cycle = np.concatenate([np.zeros((200, 1), int), cycle], 1)
    assert Trigram(cycle, 50).loss(cycle[-20:]) < 0.05


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 2e-5), (74, 1.5e-3), (149, 3e-3), (150, 3e-3), (1825, 1.65e-3), (3500, 3e-4)],
)
def test_the_learning_rate_rises_and_falls(step: int, rate: float, recipe: Any) -> None:
    assert recipe.learning_rate(step) == pytest.approx(rate, rel=1e-6)


def test_growth_appears_in_training() -> None:
    records = {
        step: Record.load(BUNDLED / "history" / f"step-{step:05d}.safetensors") for step in STEPS
    }
    last_over_first = {
        step: record.text_resid.mean(1)[-1] / record.text_resid.mean(1)[0]
        for step, record in records.items()
    }
    assert last_over_first[0] < 5 < 20 < last_over_first[STEPS[-1]]
    ov = {step: record.array("weights/W_OV_frobenius").mean(1) for step, record in records.items()}
    assert ov[0].max() / ov[0].min() < 1.2 and ov[STEPS[-1]][-1] > 2 * ov[STEPS[-1]][1]


def test_calibration_and_audit_share_no_prompt() -> None:
    assert not set(read_prompts(BUNDLED / "calibration_prompts.txt")) & set(read_prompts(None))


def test_it_passes_its_own_audit(audit: Callable[..., Audit]) -> None:
    found = audit("--model", "pystdlib-3m")
    assert found.exit == 0, found.output
    # Of 3 million parameters, it does in some laws as no large model does.
    assert set(found.outcomes().values()) == {"pass", "not_applicable", "unusual"}


def test_a_copy_under_another_name_is_as_sound(audit: Callable[..., Audit], tmp_path: Path) -> None:
    copy = shutil.copytree(MODEL, tmp_path / "release-candidate")
    found = audit("--model", copy)
    assert found.exit == 0
    # Of 3 million parameters, it does in some laws as no large model does.
    assert set(found.outcomes().values()) == {"pass", "not_applicable", "unusual"}
    row = found.row("residual/exponential")
    assert row["outcome"] == "not_applicable" and row["value"] == pytest.approx(0.8255, abs=5e-4)


def test_catalogue_knows_it() -> None:
    model = catalogue.models()["pystdlib-3m"]
    assert model.folder == Path(catalogue.HERE) / "bundled" / "pystdlib-3m"
