"""A comparison with a baseline finds every fault of the catalogue, says where it sits, and is quiet
on harmless changes.
"""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import streamgauge
from streamgauge.compare import beyond, differences
from streamgauge.engine.pieces import sketch
from streamgauge.errors import CheckpointError
from streamgauge.numerics import sketches
from streamgauge.record import Record
from tests import faults, models
from tests.conftest import Audit, shared_checkpoint

MEASURED = (
    "stream",
    "weights",
    "sketch",
    "prediction",
    "rounding",
)  # the groups that a comparison looks at
CONFIGS = {
    "gpt2": lambda: tf.GPT2Config(**models.GPT2 | {"n_layer": 5}),
    "llama": lambda: tf.LlamaConfig(
        **models.LLAMA | {"num_hidden_layers": 5, "num_key_value_heads": 2, "head_dim": 8}
    ),
}
SIGNS = [
    [1, 1, -1, -1, -1, -1],
    [1, -1, -1, 1, -1, 1],
]  # the first draw of length 6, left and right
NAMES = [*CONFIGS, "stories260K", "makemore_lmj9"]


@pytest.fixture(scope="module", autouse=True)
def only_what_is_compared() -> Iterator[None]:
    """Other groups take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("streamgauge.measure")
        patch.setattr(module, "GROUPS", {name: module.GROUPS[name] for name in MEASURED})
        yield


def _random(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]()).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return models.save(model, folder)


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Record]]:
    """A checkpoint folder by name, and its record; made once."""
    known: dict[str, tuple[Path, Record]] = {}

    def get(name: str) -> tuple[Path, Record]:
        if name not in known:
            folder = (
                _random(name, tmp_path_factory.mktemp(name) / name)
                if name in CONFIGS
                else shared_checkpoint(name)
            )
            known[name] = folder, streamgauge.measure(folder, neighbours="none")
        return known[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_faults_are_found_and_located(name: str, baselines: Any, tmp_path: Path) -> None:
    folder, record = baselines(name)
    missed, misplaced, misnamed, tried = [], [], [], 0
    for number, fault in enumerate(faults.FAULTS):
        if (changed := faults.Files(folder)) and fault.change(changed) is not False:
            tried += 1
            target = changed.write(tmp_path / str(number))
            verdict = faults.compare_with(record, target, folder)
            missed += [] if verdict.found else [fault.name]
            misplaced += [] if verdict.locates(fault) else [(fault.name, verdict.says)]
            if fault.named() not in verdict.sentence:
                misnamed.append((fault.name, verdict.sentence))
    assert tried >= 25
    assert not missed
    assert not misplaced
    assert not misnamed


@pytest.mark.parametrize("name", NAMES)
def test_harmless_changes_raise_no_alarm(name: str, baselines: Any, tmp_path: Path) -> None:
    folder, record = baselines(name)
    targets = {"in three files": faults.reshard(folder, tmp_path / "shards")}
    for number, (what, change) in enumerate(faults.HARMLESS.items()):
        if (changed := faults.Files(folder)) and change(changed) is not False:
            targets[what] = changed.write(tmp_path / str(number))
    alarms = {
        what: verdict.says
        for what, target in targets.items()
        if (verdict := faults.compare_with(record, target)).found
    }
    assert not alarms


def test_other_arithmetic_raises_no_alarm(baselines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other batches and another number of threads add up in another order, as another machine
    would.
    """
    folder, record = baselines("gpt2")
    monkeypatch.setattr("streamgauge.engine.forward.BATCH_TOKENS", 48)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert not faults.compare_with(record, folder).found
    finally:
        torch.set_num_threads(threads)


def test_another_order_of_prompts_raises_no_alarm(baselines: Any) -> None:
    from streamgauge.compare import rows_to_share
    from streamgauge.numerics.rows import Prompts

    folder, record = baselines("llama")
    rows = rows_to_share(record)
    assert rows is not None
    turned = streamgauge.measure(
        folder, rows=Prompts(rows.rows[::-1], rows.source, rows.bos, sampled=True)
    )
    assert not [
        one for compared in differences(record, turned).values() for one in beyond(compared)
    ]


def test_a_mask_that_leaks_in_one_layer_is_found(
    baselines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    folder, record = baselines("gpt2")
    forward = GPT2Attention.forward

    def leaking(self: Any, x: Any, *args: Any, attention_mask: Any = None, **others: Any) -> Any:
        mask = torch.zeros_like(attention_mask) if self.layer_idx == 1 else attention_mask
        return forward(self, x, *args, attention_mask=mask, **others)

    monkeypatch.setattr(GPT2Attention, "forward", leaking)
    verdict = faults.compare_with(record, folder)
    assert verdict.found and "layer 1 attn" in verdict.says
    found = streamgauge.measure(folder)
    changes = found.array("prediction/later_changes")
    assert changes[:2].max() < 1e-6 < 1e-3 < changes[2:].min()
    assert np.argmax(found.array("prediction/future_weight") > 1e-3) == 1


def test_a_mask_that_leaks_everywhere_is_that_of_an_encoder(
    baselines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.gpt2 import modeling_gpt2

    folder, _ = baselines("gpt2")
    make = modeling_gpt2.create_causal_mask
    monkeypatch.setattr(
        modeling_gpt2, "create_causal_mask", lambda *a, **k: torch.zeros_like(make(*a, **k))
    )
    with pytest.raises(CheckpointError, match="not causal as it is saved"):
        streamgauge.measure(folder)


def test_one_token_says_nothing_of_causality(baselines: Any) -> None:
    from streamgauge.numerics.rows import Prompts

    folder, _ = baselines("gpt2")
    record = streamgauge.measure(folder, rows=Prompts([[1], [2]], "test", None, sampled=True))
    assert "prediction/later_changes" not in record.arrays
    assert "two tokens" in record.metadata["absent"]["prediction/later_changes"]


def test_sketches_estimate_distances() -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 96)
    moved = weight + 0.01 * torch.randn(200, 96)
    one, other = sketch(weight).numpy(), sketch(moved).numpy()
    assert sketches.moved(one, other) == pytest.approx(float((moved - weight).norm()), rel=0.5)
    assert sketches.surely_moved(one, other) < float((moved - weight).norm())
    assert sketches.surely_moved(one, sketch(weight[torch.randperm(200)]).numpy()) > 0.05 * float(
        weight.norm()
    )
    seen = []
    for first in range(
        0, 200, 2
    ):  # two rows that changed places: half of the sketches cannot see it
        order = torch.arange(200)
        order[[first, first + 1]] = order[[first + 1, first]]
        seen.append(sketches.surely_moved(one, sketch(weight[order]).numpy()) > 0)
    assert all(seen)
    stacked = torch.stack([weight, moved])
    np.testing.assert_allclose(sketch(stacked).numpy(), np.stack([one, other]), rtol=1e-9)


def test_sketches_raise_no_false_alarm() -> None:
    """The worst case for them, a difference of rank one, and the usual one; ten thousand draws of
    signs, none beyond.
    """
    rng = np.random.RandomState(1)
    for rank in (1, 8):
        left, right = rng.randn(40, rank), rng.randn(30, rank)
        difference = left @ right.T
        a, b = (rng.randint(0, 2, (10_000, 16, n)) * 2 - 1 for n in (40, 30))
        s = np.einsum("dki,ij,dkj->dk", a, difference, b, optimize=True)
        assert (sketches.surely_moved(np.zeros_like(s), s) <= np.linalg.norm(difference)).all()


def test_signs_never_change() -> None:
    """Records are compared years later."""
    assert (
        sketches.signs(6, 0)[0].tolist() == SIGNS[0]
        and sketches.signs(6, 1)[0].tolist() == SIGNS[1]
    )


def test_an_audit_with_a_baseline(
    baselines: Any, audit: Callable[..., Audit], tmp_path: Path
) -> None:
    folder, record = baselines("gpt2")
    files = faults.Files(folder)
    files["W_in"] = files["W_in"] * 1.1
    broken = files.write(tmp_path / "new")
    found = audit("--model", broken, "--baseline", folder, "-m", "regression")
    assert found.exit == 1 and set(found.outcomes()) == {
        f"regression/{k}" for k in [*differences(record, record), "verdict", "loss", "movement"]
    }
    assert found.row("regression/verdict")["of"].startswith("damaged: layer 2 mlp transformer.h.2")
    row = found.row("regression/weights")
    assert (
        row["kind"] == "regression"
        and row["outcome"] == "fail"
        and f"layer {faults.LAYER} mlp" in row["reason"]
    )
    assert "×1.1" in row["reason"] and "--baseline" in row["reproduce"]
    assert found.row("regression/config")["outcome"] == "pass"
    again = audit(
        "--model",
        folder,
        "--baseline",
        tmp_path / "report" / "records" / "new.safetensors",
        "-m",
        "regression",
    )
    assert again.row("regression/weights")["outcome"] == "fail"
    rows = tmp_path / "kept.jsonl"
    rows.write_text(
        (tmp_path / "report" / "rows.jsonl")
        .read_text()
        .replace('"records/', f'"{tmp_path}/report/records/')
    )
    assert audit("--model", folder, "--baseline", rows, "-m", "regression").exit in (0, 1)


def test_an_audit_reads_every_number_where_both_are_at_hand(
    baselines: Any, audit: Callable[..., Audit], tmp_path: Path
) -> None:
    """By sketches rounding to few bits looks like training."""
    folder, record = baselines("llama")
    files = faults.Files(folder)
    for name, tensor in files.tensors.items():
        if tensor.dim() > 1 and ".layers." in name:
            step = tensor.abs().amax(1, keepdim=True) / 127
            files.tensors[name] = (tensor / step).round() * step
    asked = ("--model", files.write(tmp_path / "int8"), "-k", "regression and verdict", "--same")
    assert audit(*asked, "quantised", "--baseline", folder).exit == 0
    assert audit(*asked, "trained", "--baseline", folder).exit == 1
    record.save(tmp_path / "record.safetensors")
    assert audit(*asked, "quantised", "--baseline", tmp_path / "record.safetensors").exit == 1


def test_without_a_baseline_nothing_is_compared(
    baselines: Any, audit: Callable[..., Audit]
) -> None:
    folder, _ = baselines("gpt2")
    assert not [
        law
        for law in audit("--model", folder, "-k", "weights or causality").outcomes()
        if "regression" in law
    ]


def test_baselines_that_lead_nowhere(run_pytest: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"record": None}))
    for wrong, says in (
        ("", "names nothing"),
        ("gpt3", "nearest"),
        (tmp_path / "no.safetensors", "there is no record"),
        (tmp_path / "rows.jsonl", "0 models"),
    ):
        done = run_pytest("invariants", "--model", "pystdlib-3m", "--baseline", wrong)
        assert done.returncode == 4 and says in done.stdout + done.stderr, done.stdout + done.stderr


def test_diff_prints_a_table(baselines: Any, run_streamgauge: Any, tmp_path: Path) -> None:
    folder, record = baselines("llama")
    files = faults.Files(folder)
    files["W_out"] = -files["W_out"]
    changed = streamgauge.measure(files.write(tmp_path / "new"))
    record.save(tmp_path / "old.safetensors")
    changed.save(tmp_path / "new.safetensors")
    done = run_streamgauge("diff", tmp_path / "old.safetensors", tmp_path / "new.safetensors")
    assert done.returncode == 1
    name = f"layer {faults.LAYER} mlp model.layers.{faults.LAYER}.mlp.down_proj.weight"
    assert done.stdout.splitlines()[0] == f"damaged: {name}: sign turned, ×-1"
    assert "config: 0 of" in done.stdout
    table = run_streamgauge(
        "diff", "--all", tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    ).stdout
    assert f"{name}  sign turned, ×-1" in table
    same = run_streamgauge("diff", tmp_path / "old.safetensors", tmp_path / "old.safetensors")
    assert same.returncode == 0 and "differ" in same.stdout
    wrong = run_streamgauge("diff", tmp_path / "old.safetensors", "gpt2-xxl")
    assert wrong.returncode == 4 and "nearest" in wrong.stderr


def test_another_tokenizer_is_a_difference(run_streamgauge: Any, tmp_path: Path) -> None:
    from tests.records import replaced, sound_record

    sound_record().save(tmp_path / "old.safetensors")
    tokens = sound_record().array("prediction/token")
    for name, record in {
        "rotated": replaced(sound_record(), {"prediction/token": tokens + 100}),
        "gone": replaced(sound_record(sampled=True), {"prediction/token": tokens + 100}),
    }.items():
        record.save(tmp_path / f"{name}.safetensors")
        done = run_streamgauge(
            "diff", tmp_path / "old.safetensors", tmp_path / f"{name}.safetensors"
        )
        assert (
            done.returncode == 1
            and "0 of 8 prompts of the baseline have the same tokens" in done.stdout
        )


def test_prompts_that_repeat_are_no_difference(baselines: Any) -> None:
    from streamgauge.numerics.rows import Prompts

    folder, _ = baselines("gpt2")
    record = streamgauge.measure(
        folder, rows=Prompts([[1, 2, 3]] * 3 + [[4, 5, 6]], "test", None, sampled=True)
    )
    assert not [
        one for compared in differences(record, record).values() for one in beyond(compared)
    ]


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_dtypes_of_every_architecture_raise_no_alarm(name: str, tmp_path: Path) -> None:
    model = models.random_model(name)
    model.save_pretrained(tmp_path / "fp32")
    record = streamgauge.measure(tmp_path / "fp32")
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
        verdict = faults.compare_with(record, tmp_path / str(dtype))
        assert not verdict.found, verdict.says
        model = models.random_model(name)


def test_a_zero_tensor_that_came_alive_in_another_dtype(tmp_path: Path) -> None:
    model = models.gpt2(3)  # biases are zero before training
    model.save_pretrained(tmp_path / "old")
    with torch.no_grad():
        model.transformer.h[1].ln_1.bias.normal_()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "new")
    verdict = faults.compare_with(streamgauge.measure(tmp_path / "old"), tmp_path / "new")
    assert verdict.found and "transformer.h.1.ln_1.bias: was all zero" in verdict.says


def test_two_percent_are_seen_through_bf16(tmp_path: Path) -> None:
    model = models.random_model("mixtral")
    model.save_pretrained(tmp_path / "old")
    record = streamgauge.measure(tmp_path / "old")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.02)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "new")
    new = streamgauge.measure(tmp_path / "new", rows=None)
    assert "‖lm_head.weight‖" in [one.name for one in beyond(differences(record, new)["norms"])]
