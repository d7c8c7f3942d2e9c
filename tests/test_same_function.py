"""What is measured is what transformers computes, whatever a configuration says; and a bridge that
computes something else is found.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamgauge
from streamgauge.engine import bridge as bridges
from streamgauge.numerics.rounding import other_order
from tests import models, variants
from tests.benchmarks.architectures import difference
from tests.conftest import Audit, shared_checkpoint

GROUPS = ["instrument", "stream", "weights", "prediction"]


@pytest.mark.parametrize("name", variants.CONFIGS)
def test_every_entry_of_a_configuration_is_measured_right(name: str, tmp_path: Path) -> None:
    folder = variants.build(name, tmp_path / "model")
    record = streamgauge.measure(folder, groups=GROUPS)
    assert difference(folder, record) < 1e-5
    assert not record.metadata["failed"]
    assert ("beside the language model" in (record.metadata["left_out"] or "")) == (
        "beside" in name
    )
    if name != "opt post-norm":
        assert record.array("stream/additivity_error").max() < 8 * 2.0**-24


@pytest.mark.parametrize("scaled", [True, False])
def test_scores_are_divided_only_where_the_configuration_says_so(
    scaled: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "makemore"
    shutil.copytree(shared_checkpoint("makemore_lmj9"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scale_attn_weights": scaled}))
    record = streamgauge.measure(folder, groups=GROUPS)
    assert difference(folder, record) < 1e-5
    assert not record.metadata["failed"] and "weights/W_OV_frobenius" in record.arrays


BORROWED = {
    "HeliumForCausalLM": (
        "LlamaForCausalLM",
        lambda: models.tf.HeliumConfig(**variants.HEADED),
    ),
    "DiffLlamaForCausalLM": (
        "LlamaForCausalLM",
        lambda: models.tf.DiffLlamaConfig(**variants.HEADED),
    ),
    "HunYuanMoEV1ForCausalLM": (
        "MixtralForCausalLM",
        lambda: models.tf.HunYuanMoEV1Config(**variants.HEADED, num_experts=4, moe_topk=2),
    ),
    "MiMoV2FlashForCausalLM": (
        "Glm4MoeForCausalLM",
        lambda: models.tf.MiMoV2FlashConfig(
            **variants.HEADED,
            v_head_dim=16,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=16,
            swa_v_head_dim=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            n_group=1,
            topk_group=1,
            sliding_window=8,
        ),
    ),
}


@pytest.mark.parametrize("architecture", BORROWED)
def test_a_relatives_adapter_is_found_to_be_one(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relative, config = BORROWED[architecture]
    torch.manual_seed(0)
    model = models.tf.AutoModelForCausalLM.from_config(config()).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    folder = models.save(model, tmp_path)
    monkeypatch.setitem(bridges.RELATIVES, architecture, relative)
    record = streamgauge.measure(folder, groups=GROUPS)
    assert (
        difference(folder, record) < 1e-5
    )  # what runs through transformers' blocks is right still
    assert "TransformerLens runs another function" in record.metadata["failed"]["weights"]
    assert not any(name.startswith("weights/") for name in record.arrays)
    assert record.array("stream/attn_out").shape[0] == 4


def _scaled_values(block: Any) -> None:
    block.attn.v.hook_out.add_hook(lambda x, hook: 1.001 * x, is_permanent=True)


def _no_mlp(block: Any) -> None:
    block.mlp.hook_out.add_hook(lambda x, hook: 0 * x, is_permanent=True)


def _heads_exchanged(block: Any) -> None:
    block.attn.hook_z.add_hook(lambda x, hook: x.flip(2), is_permanent=True)


def _other_epsilon(block: Any) -> None:
    block.ln1.hook_out.add_hook(lambda x, hook: x * (1 + 1e-4), is_permanent=True)


def _no_mask(block: Any) -> None:
    block.attn.hook_pattern.add_hook(lambda x, hook: x.flip(-1), is_permanent=True)


def _first_number_only(block: Any) -> None:
    block.mlp.hook_out.add_hook(lambda x, hook: x[0, 0, 0, 0], is_permanent=True)


def _break_bridges(
    monkeypatch: pytest.MonkeyPatch, break_it: Callable[[Any], None], *, layer: int
) -> None:
    """Let every bridge that is built have a block that was tampered with."""
    build = bridges._around

    def broken(*args: Any) -> Any:
        bridge = build(*args)
        break_it(bridge.blocks[layer])
        return bridge

    monkeypatch.setattr(bridges, "_around", broken)


@pytest.mark.parametrize(
    "break_it", [_scaled_values, _no_mlp, _heads_exchanged, _other_epsilon, _no_mask]
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_bridge_that_is_broken_on_purpose_is_found(
    name: str, break_it: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break_bridges(monkeypatch, break_it, layer=1)
    folder = models.save(models.random_model(name), tmp_path)
    record = streamgauge.measure(folder, groups=GROUPS)
    assert "block 1" in record.metadata["failed"]["weights"]
    allowed = other_order(record.array("instrument/gain"), record.metadata["d_model"])
    over = record.array("instrument/bridge_error") > allowed
    assert over.tolist() == [False, True, False]


def test_what_cannot_be_trusted_is_said_to_be_unmeasured(
    audit: Callable[..., Audit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break_bridges(monkeypatch, _no_mlp, layer=0)
    found = audit("--model", models.save(models.random_model("gpt2"), tmp_path / "model"))
    assert found.row("instrument/same_function")["outcome"] == "fail"
    row = found.row("attention/amplification_bound")
    assert row["outcome"] == "error"
    assert "block 0's mlp_out differs by" in row["reason"]
    assert found.row("residual/additivity")["outcome"] == "pass"


def test_a_walk_that_goes_elsewhere_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamgauge.engine.blockwise import Blockwise

    enter = Blockwise.enter

    def wrong(self: Any, rows: Any) -> Any:
        batch = enter(self, rows)
        batch.stream = 1.001 * batch.stream
        return batch

    monkeypatch.setattr(Blockwise, "enter", wrong)
    record = streamgauge.measure(models.save(models.random_model("llama"), tmp_path))
    with pytest.raises(streamgauge.errors.NotMeasured, match="walk over the blocks"):
        record.array("stream/resid_pre")


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    config = models.tf.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=97,
        max_position_embeddings=64,
    )
    folder = models.save(models.tf.BertLMHeadModel(config).float().eval(), tmp_path)
    with pytest.raises(streamgauge.StreamgaugeError, match="not causal as it is saved"):
        streamgauge.measure(folder)


def test_a_zero_row_of_the_embedding_is_no_fault(
    audit: Callable[..., Audit], tmp_path: Path
) -> None:
    model = models.random_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = 0
    folder = models.save(model, tmp_path / "model")
    found = audit("--model", folder, "-m", "theorem")
    assert not [row for row in found.rows if row["outcome"] in ("fail", "error")]
    stored = next((tmp_path / "store" / "records").glob("*.safetensors"))
    record = streamgauge.Record.load(stored)
    assert (record.resid_pre[0] == 0).any(), "no prompt has the token"
    assert np.isfinite(record.array("sublayer_effect/attn_share")).all()


def test_a_bridge_that_cannot_be_run_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break_bridges(monkeypatch, _first_number_only, layer=2)
    folder = models.save(models.random_model("gpt2"), tmp_path)
    record = streamgauge.measure(folder, groups=GROUPS)
    assert "block 2 cannot be run: IndexError" in record.metadata["failed"]["weights"]
    assert record.resid_pre.shape[0] == 3


def test_what_is_measured_anew_is_checked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.save(models.random_model("gpt2"), tmp_path)
    known = streamgauge.measure(folder, groups=GROUPS)
    assert not known.metadata["failed"]
    _break_bridges(monkeypatch, _no_mlp, layer=1)
    del known.metadata["groups"]["weights"]  # as if an older instrument had measured them
    record = streamgauge.measure(folder, known=known, groups=["weights"])
    assert "block 1's mlp_out differs" in record.metadata["failed"]["weights"]


def test_the_gain_is_that_of_a_small_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of another small change: a block is linear there, or the gain says nothing of rounding."""
    from streamgauge.groups import instrument

    def gains() -> np.ndarray:
        model = models.blockwise(models.random_model("gpt2"))
        group = instrument.InstrumentGroup(model, None, "none is needed")
        found, _ = models.measure_group(model, group)
        return np.asarray(found["gain"])

    own = gains()
    monkeypatch.setattr(instrument, "NUDGE", 2.0**-14)
    np.testing.assert_allclose(own, gains(), rtol=0.02)
