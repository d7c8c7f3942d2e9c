"""Weights stay in the files: what is computed is what the whole model computes, and no more than a
few blocks are in memory.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import streamgauge
from streamgauge.checkpoints.files import open_checkpoint
from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.bridge import build_bridge
from streamgauge.engine.clean_runs import some_rows
from streamgauge.engine.layout import probe_layout
from streamgauge.engine.load import load_model
from streamgauge.errors import UnknownModelError
from streamgauge.groups.sampling import enough_prompts
from streamgauge.numerics.rows import Prompts
from tests import models
from tests.packed import carried_rows

IDS = torch.tensor([[1, *range(10 * k, 10 * k + 7)] for k in range(3)])


def opened(folder: Path) -> Blockwise:
    return Blockwise(load_model(open_checkpoint(folder), "cpu").mapped)


def _in_memory(model: Blockwise) -> list[torch.Tensor]:
    """Matrices of blocks that take more memory than one number."""
    matrices = [
        p
        for block in model.blocks
        for p in block.parameters()
        if p.dim() > 1 and p.device.type != "meta"
    ]
    return [p for p in matrices if p.untyped_storage().nbytes() > p.element_size()]


NARROW = [(name, torch.bfloat16) for name in models.ARCHITECTURES]
OTHERS = [
    (name, dtype)
    for name in ("gpt2", "gpt-neox-parallel", "gemma2")
    for dtype in (torch.float32, torch.float16)
]


@pytest.mark.parametrize(("name", "dtype"), NARROW + OTHERS)
@torch.no_grad()
def test_logits_are_the_whole_models(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = models.random_model(name).to(dtype)
    model = opened(models.save(whole, tmp_path))
    expected = models.tf.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )(IDS).logits
    batch = models.run(model, IDS)
    torch.testing.assert_close(model.logits(IDS, batch.stream), expected, rtol=1e-5, atol=1e-5)
    direct = model.mapped.model(IDS).logits
    torch.testing.assert_close(direct, expected, rtol=1e-5, atol=1e-5)
    assert {t.dtype for t in model.mapped.stored.values()} == {dtype}


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_matrices_of_a_block_are_there_only_while_it_is_held(name: str, tmp_path: Path) -> None:
    model = opened(models.save(models.random_model(name).bfloat16(), tmp_path))
    bridge = build_bridge(model)
    assert not _in_memory(model)
    with model.held(1) as block:
        own = [p for p in block.parameters() if p.dim() > 1]
        assert own and all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in own)
        assert torch.isfinite(bridge.part(1, "attn").W_V).all()
    assert not _in_memory(model)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_file_of_two_dtypes_loses_nothing(narrow: torch.dtype, tmp_path: Path) -> None:
    whole = models.save(models.random_model("llama"), tmp_path)
    tensors = load_file(whole / "model.safetensors")
    mixed = {name: t if "norm" in name else t.to(narrow) for name, t in tensors.items()}
    save_file(mixed, whole / "model.safetensors", {"format": "pt"})
    for name, stored in load_model(open_checkpoint(whole), "cpu").mapped.stored.items():
        assert torch.equal(stored.float(), mixed[name].float()), name


def test_a_buffer_of_old_versions_does_not_widen_the_weights(tmp_path: Path) -> None:
    folder = models.save(models.random_model("llama").half(), tmp_path)
    tensors = load_file(folder / "model.safetensors") | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    opened = load_model(open_checkpoint(folder), "cpu")
    mapped, unread = opened.mapped, opened.unread
    assert {t.dtype for t in mapped.stored.values()} == {torch.float16} and not unread


def test_an_unread_bias_is_not_taken_for_a_buffer(tmp_path: Path) -> None:
    folder = models.save(models.random_model("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors") | {
        "model.layers.0.self_attn.c_attn.bias": torch.ones(4)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert load_model(open_checkpoint(folder), "cpu").unread == [
        "model.layers.0.self_attn.c_attn.bias"
    ]


def test_changes_are_undone_when_something_fails() -> None:
    model = models.blockwise(models.random_model("gpt2"))
    with model.held(1) as block:
        before = block.mlp.c_fc.weight.clone()
        with (
            pytest.raises(ZeroDivisionError),
            model.mapped.changes(model.paths[1]) as use,
        ):
            use(lambda name, values, rows, room: 2 * values)
            assert torch.equal(block.mlp.c_fc.weight, 2 * before)
            raise ZeroDivisionError
        assert torch.equal(block.mlp.c_fc.weight, before)


def test_a_hold_that_fails_is_no_hold() -> None:
    model = models.blockwise(models.random_model("gpt2"))

    def fail(block: str) -> None:
        model.mapped.after_taking.remove(fail)
        raise MemoryError

    model.mapped.after_taking.append(fail)
    with pytest.raises(MemoryError), model.held(1):
        pass
    assert not _in_memory(model)
    with model.held(1) as block:
        assert torch.isfinite(block.mlp.c_fc.weight).all()


def test_horizons_keep_no_more_than_some_tokens() -> None:
    rows = [[1] * 1000] * 30
    assert len(some_rows(Prompts(rows, "test", None))) == 4
    assert len(some_rows(Prompts([[1] * 9000] * 3, "test", None))) == 1
    assert len(some_rows(Prompts([[1] * 30] * 30, "test", None))) == 8


def test_masks_of_equal_batches_are_one() -> None:
    model = models.blockwise(models.random_model("llama"))
    masks = [
        [
            x
            for x in model.enter(IDS).calls[0][1].values()
            if isinstance(x, torch.Tensor) and x.dim() == 4
        ]
        for _ in range(2)
    ]
    assert masks[0] and all(one is other for one, other in zip(*masks, strict=True))


def test_what_the_configuration_says_of_dtypes_truncates_nothing(tmp_path: Path) -> None:
    models.save(models.random_model("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"})
    )
    tensors = load_file(tmp_path / "model.safetensors")
    for name, stored in load_model(open_checkpoint(tmp_path), "cpu").mapped.stored.items():
        assert torch.equal(stored, tensors[name]), name


@torch.no_grad()
def test_a_stream_that_changes_between_blocks_is_followed() -> None:
    plain = models.random_model("llama")
    # Whatever runs between two blocks: here on the way into the second, whoever stands in for it.
    plain.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    expected = plain(IDS).logits
    model = models.blockwise(plain)
    assert model.seen.between and not probe_layout(model).is_sum
    plain.model.layers[1]._forward_pre_hooks.clear()
    with torch.no_grad():
        batch = model.enter(IDS)
        for layer in range(model.n_layers):
            if layer == 1:
                batch.stream = batch.stream + 1
            model.step(batch, layer)
    torch.testing.assert_close(model.logits(IDS, batch.stream), expected)


def test_only_the_groups_that_are_asked_for(tmp_path: Path) -> None:
    folder = models.save(models.gpt2(3), tmp_path)
    rows = Prompts([[1, 5, 9, 11, 12, 13, 14, 15]] * 2, "test", 1)
    record = streamgauge.measure(folder, rows=rows, groups=["weights", "stream"])
    assert (
        {name.split("/")[0] for name in record.arrays}
        == {"instrument", "stream", "weights"}
        == set(record.groups)
    )
    whole = streamgauge.measure(folder, rows=rows, known=record)
    np.testing.assert_array_equal(whole.resid_pre, record.resid_pre)
    assert set(whole.groups) > set(record.groups)
    with pytest.raises(UnknownModelError, match="no group 'weight'; the nearest are weights"):
        streamgauge.measure(folder, groups=["weight"])


def test_a_record_says_what_it_cost(tmp_path: Path) -> None:
    said = streamgauge.measure(models.save(models.gpt2(3), tmp_path)).metadata
    assert 0 < sum(said["seconds_by_part"].values()) <= said["seconds"] + 0.1
    assert {"loading", "prompts", "weights", "horizon"} <= set(said["seconds_by_part"])
    assert said["peak_private_bytes"] > 10**7 and (
        said["read_bytes"] is None or said["read_bytes"] >= 0
    )


@pytest.mark.parametrize(("precision", "fewer"), [(0.5, True), (1e-9, False)])
def test_sampling_stops_when_the_growth_rate_is_known(
    precision: float, fewer: bool, tmp_path: Path
) -> None:
    folder = models.save(models.planted_gpt2(1.05), tmp_path)
    rng = np.random.default_rng(0)
    rows = Prompts([[1, *rng.integers(4, 90, 12).tolist()] for _ in range(20)], "20 prompts", 1)
    model = opened(folder)
    layout = probe_layout(model)
    kept, reached = enough_prompts(model, layout, rows, precision, show=False)
    assert (len(kept.rows) == 8) == fewer and reached["prompts"] == len(kept.rows)
    assert (reached["reached"] <= precision) == fewer and reached["tokens"] == 13 * len(kept.rows)
    assert all(row in rows.rows for row in kept.rows)
    assert kept.source == ("8 of 20 prompts" if fewer else "20 prompts")


@pytest.mark.parametrize(("texts", "kept"), [(1, 31), (12, 8)])
def test_an_interval_takes_several_prompts_of_several_tokens(texts: int, kept: int) -> None:
    model = models.blockwise(models.planted_gpt2(1.05))
    rng = np.random.default_rng(0)
    rows = [[1]] * 30 + [[1, *rng.integers(4, 90, 12).tolist()] for _ in range(texts)]
    drawn, reached = enough_prompts(
        model, probe_layout(model), Prompts(rows, "rows", 1), 0.5, show=False
    )
    assert len(drawn.rows) == kept and (reached["reached"] is None) == (texts == 1)
    assert sum(len(row) > 1 for row in drawn.rows) == min(texts, 8)


@pytest.mark.parametrize(("length", "looked"), [(1, False), (2, True)])
def test_two_tokens_are_enough_to_grow(length: int, looked: bool) -> None:
    model = models.blockwise(models.planted_gpt2(1.05))
    rows = Prompts([[1, n][:length] for n in range(4, 24)], "rows", 1)
    drawn, reached = enough_prompts(model, probe_layout(model), rows, 0.5, show=False)
    assert len(drawn.rows) == (8 if looked else 20)
    assert (reached["reached"] is not None) == looked


def test_early_positions_of_so_many_long_prompts_are_kept() -> None:
    from streamgauge.groups.random_input import EARLY, EARLY_PROMPTS, EarlyInputs

    early = EarlyInputs(None)  # type: ignore[arg-type]
    keep = early._keeper(3)
    keep(torch.ones(5, EARLY.stop - 1, 2), None)  # too short
    assert early.inputs == {3: []}
    for number in range(EARLY_PROMPTS):
        keep(torch.full((3, EARLY.stop, 2), float(number)), None)
    rows = torch.cat(early.inputs[3])
    assert rows.shape == (EARLY_PROMPTS, EARLY.stop - EARLY.start, 2)
    assert rows[:, 0, 0].tolist() == [float(n // 3) for n in range(EARLY_PROMPTS)]


def test_precision_on_the_command_line(audit: Callable[..., Any], tmp_path: Path) -> None:
    found = audit("--model", "pystdlib-3m", "--precision", "0.5", "-k", "growth_rate")
    row = found.row("residual/growth_rate")
    assert 100 < int(row["of"].split()[2]) < 400  # tokens of eight prompts, where all 64 have 1,982
    assert "--precision 0.5" in row["reproduce"] and row["outcome"] == "pass"
    (model,) = carried_rows(tmp_path / "report" / "report.html")["models"]
    assert model["cost"]["peak"] > 0 and "random input" in dict(model["cost"]["parts"])
    refused = audit("--model", "pystdlib-3m", "--precision", "0")
    assert refused.exit == 4 and "--precision 0.0 is no width of an interval" in refused.output
