"""Each law holds where it should and fails where it should: its negative controls, and random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamgauge
from streamgauge import checkpoint as checkpoints
from streamgauge.laws import laws
from streamgauge.prompts import Prompts
from streamgauge.record import Record
from streamgauge.store import Store
from tests import models
from tests.conftest import Audit
from tests.records import changed, sound_record

Auditing = Callable[..., Audit]
THEOREMS = {law.id for law in laws() if law.kind == "theorem"}


def _scaled(name: str, factor: float, where: tuple[Any, ...]) -> Callable[[], Record]:
    """A record with part of one of its arrays scaled."""

    def make() -> Record:
        record = sound_record()
        values = record.array(f"stream/{name}").copy()
        values[where] *= factor
        return changed(record, **{name: values})

    return make


def _without_plateau() -> Record:
    record = sound_record()
    bos = record.array("stream/is_bos")
    pre = record.resid_pre.copy()
    pre[:, bos] = pre[:, ~bos][:, : bos.sum()]
    return changed(record, resid_pre=pre)


def _without_fall() -> Record:
    record = sound_record()
    post = record.array("stream/resid_post").copy()
    post[-1, record.array("stream/is_bos")] = 5000
    return changed(record, resid_post=post)


def _heads_reversed(n_layers: int) -> Record:
    record = sound_record(n_layers=n_layers)
    return Record(
        record.arrays | {"weights/W_OV_frobenius": record.array("weights/W_OV_frobenius")[::-1].copy()}, record.metadata
    )


def _faulty(kind: str) -> Callable[[], Record]:
    return lambda: sound_record(integrity={"not_finite": [], "dead": [], "alike": []} | {kind: ["h.3.mlp.c_fc.weight"]})


def _dead_head() -> Record:
    norms = sound_record().array("weights/W_OV_frobenius").copy()
    norms[5, 2] = 0
    return Record(sound_record().arrays | {"weights/W_OV_frobenius": norms}, sound_record().metadata)


# Law, the model the record says it was made from (it chooses the band), what is wrong with it.
CONTROLS: list[tuple[str, str, Callable[[], Record]]] = [
    ("residual/growth_rate", "shrinking", lambda: sound_record(0.99)),
    ("residual/growth_rate", "constant", lambda: sound_record(1.0)),
    ("residual/growth_rate", "gpt2-xl", lambda: sound_record(1.06, n_layers=48)),
    ("residual/exponential", "shrinking", lambda: sound_record(0.95)),
    ("residual/exponential", "constant", lambda: sound_record(1.0)),
    ("residual/exponential", "spiked", _scaled("resid_pre", 3.0, (slice(6, 8),))),
    ("residual/exponential", "logarithmic", lambda: sound_record(1.5, bend=-0.04)),
    ("residual/exponential", "tokens-missing", _scaled("resid_pre", np.nan, (slice(5, 9), slice(0, 24)))),
    ("residual/super_exponential", "gpt2", lambda: sound_record(1.045)),
    ("residual/super_exponential", "gpt2", lambda: sound_record(1.3, bend=-0.02)),
    ("residual/every_token_grows", "gpt2", _scaled("resid_pre", 0.3, (slice(10, None), 4))),
    ("residual/every_token_grows", "gpt2", _scaled("resid_pre", np.nan, (slice(None), 4))),
    ("residual/growth_rate", "infinite", _scaled("resid_pre", np.inf, (13, 4))),
    ("residual/growth_rate", "zero", _scaled("resid_pre", 0.0, (2, 4))),
    ("residual/position_0", "gpt2", _without_plateau),
    ("residual/position_0", "gpt2", _without_fall),
    ("residual/moments", "scale-off", _scaled("ln1_scale", 1.001, (7, 3))),
    ("residual/moments", "norm-is-more-than-scaling", lambda: changed(sound_record(), ln1_residual=np.full((16, 48), 1e-3))),
    ("residual/additivity", "not-a-sum", lambda: changed(sound_record(), additivity_error=np.full((16, 48), 1e-3))),
    ("sublayers/contribution_bound", "attn-too-small", _scaled("attn_out", 0.5, (9, 2))),
    ("attention/ov_growth", "gpt2-xl", lambda: _heads_reversed(48)),
    ("attention/ov_growth", "gpt2", lambda: sound_record(n_layers=12)),
    ("weights/integrity", "not-finite", _faulty("not_finite")),
    ("weights/integrity", "dead", _faulty("dead")),
    ("weights/integrity", "alike", _faulty("alike")),
    ("weights/integrity", "dead-head", _dead_head),
]
ON_WEIGHTS = {"attention/frobenius_is_random_response"}  # its controls need matrices and are below


@pytest.mark.parametrize(("law", "name", "make"), CONTROLS, ids=[f"{law}-{name}" for law, name, _ in CONTROLS])
def test_fails_on_its_negative_control(
    law: str, name: str, make: Callable[[], Record], audit: Auditing, tmp_path: Path
) -> None:
    record = make()
    Record(record.arrays, record.metadata | {"model": name}).save(tmp_path / f"{name}.safetensors")
    folder, test = law.split("/")
    found = audit("--record", tmp_path / f"{name}.safetensors", laws=f"invariants/{folder}/test_{test}.py")
    assert found.exit == 1
    assert found.row(law)["outcome"] == "fail", found.row(law)
    assert found.row(law)["margin"] is None or found.row(law)["margin"] <= 0
    assert "reproduce: pytest" in found.output and "source: " in found.output


def test_every_law_has_a_negative_control() -> None:
    assert {law for law, _, _ in CONTROLS} | ON_WEIGHTS == {law.id for law in laws()}


@pytest.mark.parametrize(("name", "bend"), [("anything", 0.0), ("gpt2", 0.02)])
def test_laws_hold_on_a_sound_record(name: str, bend: float, audit: Auditing, tmp_path: Path) -> None:
    sound_record(model=name, bend=bend).save(tmp_path / f"{name}.safetensors")
    outcomes = audit("--record", tmp_path / f"{name}.safetensors").outcomes()
    broken = {law for law, outcome in outcomes.items() if outcome in ("fail", "error")}
    # The bands of gpt2's own growth of W_OV is for gpt2's own weights.
    assert broken == ({"attention/ov_growth"} if name == "gpt2" else set())


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_theorems_hold_on_random_weights(name: str, audit: Auditing, tmp_path: Path) -> None:
    found = audit("--model", models.save(models.random_model(name), tmp_path / name), "-m", "theorem")
    assert found.outcomes()["weights/integrity"] == "pass"
    assert not [row for row in found.rows if row["outcome"] in ("fail", "error")]


def test_growth_that_was_planted_is_measured(tmp_path: Path) -> None:
    from streamgauge.growth import growth_rates, mean_rate

    record = streamgauge.measure(models.save(models.planted_gpt2(1.045), tmp_path))
    assert mean_rate(growth_rates(record.text_resid, (3, 20))) == pytest.approx(1.045, abs=1e-3)


def test_untrained_weights_do_not_grow_like_trained_ones(audit: Auditing, tmp_path: Path) -> None:
    record = streamgauge.measure(models.save(models.gpt2(16), tmp_path / "untrained"))
    record.metadata.update(model="pystdlib-3m", revision="test")
    record.save(tmp_path / "untrained.safetensors")
    outcomes = audit("--record", tmp_path / "untrained.safetensors", "-m", "phenomenon").outcomes()
    # Heads of an untrained model are all alike, and its stream grows like a random walk.
    assert outcomes["attention/ov_growth"] == "fail"
    assert outcomes["residual/growth_rate"] == "fail"


def _audit_with_stored(audit: Auditing, tmp_path: Path, spoil: Callable[[Record], None]) -> dict[str, Any]:
    """Audit a checkpoint whose stored record was spoilt, so that record and files disagree."""
    folder = models.save(models.gpt2(3), tmp_path / "model")
    checkpoint, store = checkpoints.open_checkpoint(folder), Store(tmp_path / "store")
    store.prepare()
    record = store.record(checkpoint, prompts=None, device="cpu")
    spoil(record)
    record.save(store.folder / "records" / f"{store.key(checkpoint, None, 'cpu')}.safetensors")
    return audit("--model", folder, "-k", "frobenius").row("attention/frobenius_is_random_response")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record.arrays["weights/W_OV_frobenius"].__imul__(1.3),
        lambda record: record.arrays["weights/W_OV_frobenius"].__setitem__((1, 2), 99.0),
        lambda record: record.arrays["weights/ln1_gain"].__imul__(1.3),
    ],
    ids=["all heads scaled", "one head wrong", "gain folded wrongly"],
)
def test_random_response_finds_a_wrong_norm(spoil: Callable[[Record], None], audit: Auditing, tmp_path: Path) -> None:
    assert _audit_with_stored(audit, tmp_path, spoil)["outcome"] == "fail"


def test_random_response_holds_on_the_same_model_unspoilt(audit: Auditing, tmp_path: Path) -> None:
    assert _audit_with_stored(audit, tmp_path, lambda record: None)["outcome"] == "pass"


def test_additivity_finds_arithmetic_in_bf16() -> None:
    from streamgauge.model import build_bridge, probe_layout
    from streamgauge.stream import measure_stream

    bridge = build_bridge(models.random_model("llama"))
    layout = probe_layout(bridge)
    bridge.original_model.bfloat16()
    stream, _ = measure_stream(bridge, layout, Prompts([[1, 2, 3, 4]], "test", 1), show=False)
    assert stream["additivity_error"].max() > 8 * 2.0**-24


def _nan(model: Any) -> None:
    model.transformer.h[1].mlp.c_fc.weight[3, 4] = torch.nan


def _infinite(model: Any) -> None:
    model.transformer.h[1].attn.c_attn.weight[0, 0] = torch.inf


@pytest.mark.parametrize("break_it", [_nan, _infinite])
def test_nan_is_named_and_nothing_passes_over_it(break_it: Callable[[Any], None], audit: Auditing, tmp_path: Path) -> None:
    model = models.gpt2()
    with torch.no_grad():
        break_it(model)
    found = audit("--model", models.save(model, tmp_path / "broken"))
    assert found.exit == 1
    row = found.row("weights/integrity")
    assert row["outcome"] == "fail" and "transformer.h.1." in row["reason"]
    others = {law: outcome for law, outcome in found.outcomes().items() if law != "weights/integrity"}
    assert set(others.values()) <= {"error", "not_applicable"}
    assert "the weights are not finite" in found.row("residual/additivity")["reason"]


def _dead_layer(model: Any) -> None:
    model.transformer.h[4].mlp.c_proj.weight.zero_()


def _twin_layers(model: Any) -> None:
    model.transformer.h[4].mlp.c_fc.weight.copy_(model.transformer.h[5].mlp.c_fc.weight)


def _dead_head_in_weights(model: Any) -> None:
    model.transformer.h[4].attn.c_proj.weight[:8] = 0


@pytest.mark.parametrize("break_it", [_dead_layer, _twin_layers, _dead_head_in_weights])
def test_integrity_finds_broken_layers(break_it: Callable[[Any], None], audit: Auditing, tmp_path: Path) -> None:
    model = models.gpt2()
    with torch.no_grad():
        break_it(model)
    row = audit("--model", models.save(model, tmp_path / "broken"), "-k", "integrity").row("weights/integrity")
    assert row["outcome"] == "fail"
    assert "4" in row["reason"]
