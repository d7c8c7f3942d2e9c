"""Patching scores agree with patching by hand through plain Hugging Face modules; circuits come
from a user's file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fixtures import catalogue
from streamgauge.engine.bridge import build_bridge
from streamgauge.errors import SettingsError
from streamgauge.groups.patching import _scores
from streamgauge.numerics.circuits import read_circuits
from streamgauge.record import Record
from tests import models
from tests.conftest import Audit

PAIRS = [
    ([1, 5, 6, 7], [1, 9, 6, 7], 11, 12),
    ([1, 20, 6, 8], [1, 21, 6, 8], 13, 14),
    ([1, 30, 31], [1, 30, 32], 15, 16),
]
OUT = {"gpt2": "c_proj", "llama": "o_proj", "gpt-neox-parallel": "dense", "qwen3": "o_proj"}
OWN = Path(__file__).with_name("circuits.toml")


def _by_hand(name: str) -> np.ndarray:
    model, where = models.random_model(name), models.ARCHITECTURES[name]
    projections = [
        b.get_submodule(where.attn).get_submodule(OUT[name])
        for b in model.get_submodule(where.blocks)
    ]

    def advantage(
        ids: list[int], answer: int, wrong: int, change: Callable[[int, torch.Tensor], torch.Tensor]
    ) -> float:
        handles = [
            projection.register_forward_pre_hook(
                lambda module, args, layer=layer: (change(layer, args[0]),)
            )
            for layer, projection in enumerate(projections)
        ]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        for handle in handles:
            handle.remove()
        return float(logits[answer] - logits[wrong])

    patched, whole = np.zeros((len(projections), models.HEADS)), 0.0
    for clean, corrupted, answer, wrong in PAIRS:
        kept: dict[int, torch.Tensor] = {}

        def keep(layer: int, x: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            kept[layer] = x.clone()
            return x

        at_best = advantage(clean, answer, wrong, keep)
        at_worst = advantage(corrupted, answer, wrong, lambda layer, x: x)
        whole += at_best - at_worst
        for layer, head in np.ndindex(*patched.shape):

            def patch(
                n: int,
                x: torch.Tensor,
                at: int = layer,
                head: int = head,
                kept: dict[int, torch.Tensor] = kept,
            ) -> torch.Tensor:
                if n != at:
                    return x
                x, size = x.clone(), x.shape[-1] // models.HEADS
                x[..., head * size : (head + 1) * size] = kept[n][
                    ..., head * size : (head + 1) * size
                ]
                return x

            patched[layer, head] += advantage(corrupted, answer, wrong, patch) - at_worst
    return patched / whole


@pytest.mark.parametrize("name", OUT)
def test_scores_agree_with_patching_by_hand(name: str) -> None:
    bridge = build_bridge(models.blockwise(models.random_model(name)))
    swapped = [(clean, corrupted, b, a) for clean, corrupted, a, b in PAIRS]
    both = [_scores(bridge, pairs) for pairs in (PAIRS, swapped)]
    scores = [found for found in both if not isinstance(found, str)]
    # Random weights get one of the two wrong, which is said rather than scored.
    assert len(scores) == 1
    np.testing.assert_allclose(scores[0], _by_hand(name), rtol=1e-3, atol=1e-5)


def test_a_users_circuit_is_measured_on_the_bundled_model(audit: Callable[..., Audit]) -> None:
    options = ["--model", "pystdlib-3m", "--circuits", OWN, "-k", "circuit"]
    found = audit(*options)
    assert {row["outcome"] for row in found.rows} == {"not_applicable"}
    score = found.row("attention/circuit_patching")
    assert score["value"] is not None and "3 prompt pairs" in score["of"]
    spectral = found.row("attention/circuit_spectral")
    assert [value["what"].split(" ")[0] for value in spectral["values"]] == ["σ₁(W_OV)", "σ₁(W_QK)"]
    assert "no ratio is published" in found.row("attention/circuit_norms")["reason"]


def test_only_patching_is_measured_again_for_another_task(
    audit: Callable[..., Audit], monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamgauge import plan

    report = audit("--model", "pystdlib-3m", "-k", "circuit_patching")
    assert "no circuit of this model is known" in report.row("attention/circuit_patching")["reason"]
    monkeypatch.setattr(
        plan, "PromptRun", lambda *_: pytest.fail("the model was run over the prompts again")
    )
    found = audit("--model", "pystdlib-3m", "-k", "circuit_patching", "--circuits", OWN)
    assert found.row("attention/circuit_patching")["value"] is not None


def test_shipped_pairs_differ_and_are_of_equal_length() -> None:
    _, tasks = catalogue.shipped_circuits()
    assert {task.name for task in tasks} == {"ioi", "sva"}
    for task in tasks:
        for pair in task.pairs:
            assert pair.answer != pair.wrong and pair.clean != pair.corrupted
            assert len(pair.clean.split()) == len(pair.corrupted.split())


BAD: dict[str, tuple[str, str]] = {
    "not TOML": ("[[circuit", "cannot be read as TOML"),
    "unknown table": ("[bands]\nx = 1", "'bands'"),
    "unknown key": ('[[circuit]]\nmodel="m"\ntask="t"\nheads=["0.1"]\nsource="s"\nhead=1', "head"),
    "no source": ('[[circuit]]\nmodel="m"\ntask="t"\nheads=["0.1"]', "source"),
    "head without layer": (
        '[[circuit]]\nmodel="m"\ntask="t"\nheads=["3"]\nsource="s"',
        "LAYER.HEAD",
    ),
    "no heads": ('[[circuit]]\nmodel="m"\ntask="t"\nheads=[]\nsource="s"', "no heads"),
    "a table": ('[circuit]\nmodel="m"', "[[circuit]]"),
    "pair without answer": (
        '[[task]]\nname="t"\npairs=[{clean="a",corrupted="b",wrong="c"}]',
        "answer",
    ),
    "empty text": (
        '[[task]]\nname="t"\npairs=[{clean="",corrupted="b",wrong="c",answer="d"}]',
        "each a text",
    ),
    "a name that is a path": ('[[task]]\nname="../t"\npairs=[]', "letters, digits"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_circuits_file_that_is_not_understood_is_refused(
    what: str, tmp_path: Path, run_pytest: Any
) -> None:
    content, named = BAD[what]
    path = tmp_path / "circuits.toml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"circuits\.toml") as refused:
        read_circuits(path)
    assert named in str(refused.value)


def test_a_missing_circuits_file_is_a_usage_error(tmp_path: Path, run_pytest: Any) -> None:
    done = run_pytest("invariants", "--circuits", tmp_path / "none.toml")
    assert done.returncode == 4
    assert (
        "none.toml cannot be read" in done.stdout + done.stderr
        and "Traceback" not in done.stdout + done.stderr
    )


def test_a_head_that_the_model_has_not_is_said(audit: Callable[..., Audit], tmp_path: Path) -> None:
    from tests.records import sound_record

    record = sound_record(model="mine")
    Record(record.arrays, record.metadata).save(tmp_path / "mine.safetensors")
    (tmp_path / "c.toml").write_text(
        '[[circuit]]\nmodel="mine"\ntask="own"\nheads=["40.1"]\nsource="s"'
    )
    row = audit(
        "--record",
        tmp_path / "mine.safetensors",
        "--circuits",
        tmp_path / "c.toml",
        "-k",
        "spectral",
    ).row("attention/circuit_spectral")
    assert row["outcome"] == "error" and "40.1" in row["reason"]
