"""What is measured agrees with plain Hugging Face hooks and with TransformerLens's compatibility
mode.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamgauge
from streamgauge.checkpoints.files import open_checkpoint, tensor_reader
from streamgauge.engine.bridge import build_bridge
from streamgauge.engine.forward import PromptRun, walk
from streamgauge.engine.heads import Heads
from streamgauge.engine.layout import probe_layout, probe_norm, run_mlp
from streamgauge.groups.random_input import EarlyInputs, RandomInputGroup
from streamgauge.groups.stream import StreamMeter
from streamgauge.groups.weights import WeightsGroup
from streamgauge.numerics.convention import centre, ov_norms, random_inputs
from streamgauge.numerics.matrices import Matrices
from streamgauge.numerics.rows import Prompts
from tests import models

ROWS = [[1, *range(10 * k, 10 * k + 7)] for k in range(4)]
IDS = torch.tensor(ROWS)
# Compatibility mode leaves post-norm weights (olmo2) and mixtures of experts in a form of its own.
REFUSED = {
    "olmo2": "no norm before the attention, nothing to fold",
    "bloom": "a norm behind the embedding, which compatibility mode centres",
    "granite": "its residual multiplier stays in the block, where compatibility mode leaves it",
}


def measured(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Any]:
    model = models.blockwise(models.random_model(name))
    layout, prompts = probe_layout(model), Prompts(ROWS, "test", 1)
    meter = StreamMeter(layout, prompts)
    weights = WeightsGroup(layout, Heads(build_bridge(model), None))
    walk(model, {"prompts": PromptRun(model, prompts, [meter]), "weights": weights})
    return meter.found()[0], weights.found()[0], layout


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_agrees_with_plain_hooks(name: str) -> None:
    stream, _, layout = measured(name)
    reference = models.reference_norms(models.random_model(name), name, IDS, centred=layout.centres)
    for kind, expected in reference.items():
        np.testing.assert_allclose(stream[kind], expected, rtol=1e-5, err_msg=f"{name} {kind}")


def compatible(name: str) -> Any:
    bridge = models.bridge(models.random_model(name))
    try:
        bridge.enable_compatibility_mode()
    except Exception as error:
        pytest.skip(f"compatibility mode refuses {name}: {error}")
    return bridge


@pytest.mark.parametrize("name", [n for n in models.ARCHITECTURES if n not in REFUSED])
def test_weights_and_biases_agree_with_compatibility_mode(name: str) -> None:
    _, weights, layout = measured(name)
    for n, block in enumerate(compatible(name).blocks):
        for kind in (
            "W_Q",
            "W_K",
            "W_V",
            "W_O",
            "b_Q",
            "b_K",
            "b_O",
            "W_in",
            "W_gate",
            "W_out",
            "b_in",
            "b_gate",
            "b_out",
        ):
            oracle = getattr(block.attn if kind[-1] in "QKVO" else block.mlp, kind, None)
            if oracle is None or kind not in weights:
                continue
            rows = oracle.detach().double().reshape(weights[kind][n].size, -1).norm(dim=1)
            np.testing.assert_allclose(
                weights[kind][n].ravel(), rows, rtol=1e-5, atol=1e-7, err_msg=f"{name} {kind} {n}"
            )
        if "W_in_W_out" in weights:
            W_in, W_out = block.mlp.W_in.detach().double(), block.mlp.W_out.detach().double()
            np.testing.assert_allclose(weights["W_in_W_out"][n], (W_in @ W_out).norm(), rtol=1e-5)
            if block.mlp.b_in is not None:
                b_in = block.mlp.b_in.detach().double()
                np.testing.assert_allclose(
                    weights["b_in_W_out"][n], (b_in @ W_out).norm(), rtol=1e-5
                )
    assert {"W_in", "W_out"} <= set(weights) or not layout.with_neurons


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_raw_norms_are_the_files(name: str) -> None:
    _, weights, layout = measured(name)
    model = models.bridge(models.random_model(name))
    for n, block in enumerate(model.blocks):
        for kind in ("W_Q", "W_K", "W_V", "W_O") + (
            ("W_in", "W_out") if layout.with_neurons else ()
        ):
            own = getattr(block.attn if kind[-1] in "QKVO" else block.mlp, kind).detach().double()
            np.testing.assert_allclose(
                np.linalg.norm(weights[f"{kind}_raw"][n]), own.norm(), rtol=1e-12
            )


@pytest.mark.parametrize("name", [n for n in models.ARCHITECTURES if n not in REFUSED])
def test_random_responses_agree_with_compatibility_mode(name: str) -> None:
    model = models.blockwise(models.random_model(name))
    layout = probe_layout(model)
    found, _ = models.measure_group(
        model,
        RandomInputGroup(
            model, layout, EarlyInputs(layout), Heads(build_bridge(model), None), tokens=10**6
        ),
    )
    oracle = compatible(name)
    x = torch.from_numpy(random_inputs(4096, layout.d_model, layout.centres, seed=10**6)).float()[
        :, None
    ]
    for n, block in enumerate(oracle.blocks):
        W_V, W_O = block.attn.W_V, block.attn.W_O
        attn = sum(x @ W_V[h // (len(W_O) // len(W_V))] @ W_O[h] for h in range(len(W_O)))
        expected = {
            "attn": block.ln1_post(attn) if "ln1_post" in block.submodules else attn,
            "mlp": models.bridge_mlp(block, x),
        }
        for kind, answers in expected.items():
            norms = answers.detach().double().norm(dim=-1).numpy()
            error = np.hypot(found[f"{kind}_error"][n], norms.std() / np.sqrt(norms.size))
            # Two independent samples: five standard errors, a false alarm in two million. Folding
            # leaves fp32 rounding.
            assert abs(found[f"{kind}_norm"][n] - norms.mean()) < 5 * error + 1e-5 * norms.mean(), (
                name,
                kind,
                n,
            )


@pytest.mark.parametrize("name", [n for n in models.ARCHITECTURES if n not in REFUSED])
def test_agrees_with_compatibility_mode(name: str) -> None:
    stream, weights, layout = measured(name)
    bridge = compatible(name)
    kinds = ["resid_pre", "attn_out", "mlp_out", *([] if layout.parallel_layers else ["resid_mid"])]
    with torch.no_grad():
        cache = bridge.run_with_cache(IDS)[1]
    for kind in kinds:
        found = [
            cache[f"blocks.{n}.hook_{kind}"].reshape(len(IDS) * IDS.shape[1], -1)
            for n in range(layout.n_layers)
        ]
        expected = torch.stack(found).double().norm(dim=-1).numpy()
        np.testing.assert_allclose(stream[kind], expected, rtol=1e-5, err_msg=f"{name} {kind}")
    for n, block in enumerate(bridge.blocks):
        W_V, W_O = block.attn.W_V.detach().double(), block.attn.W_O.detach().double()
        dense = W_V.repeat_interleave(len(W_O) // len(W_V), 0) @ W_O
        np.testing.assert_allclose(weights["W_OV_frobenius"][n], dense.norm(dim=(1, 2)), rtol=1e-6)
        np.testing.assert_allclose(
            weights["W_OV_spectral"][n], torch.linalg.matrix_norm(dense, 2), rtol=1e-6
        )
        if "W_QK_spectral" in weights:
            W_Q, W_K = block.attn.W_Q.detach().double(), block.attn.W_K.detach().double()
            dense = W_Q @ W_K.repeat_interleave(len(W_Q) // len(W_K), 0).transpose(1, 2)
            np.testing.assert_allclose(
                weights["W_QK_frobenius"][n], dense.norm(dim=(1, 2)), rtol=1e-6
            )
            np.testing.assert_allclose(
                weights["W_QK_spectral"][n], torch.linalg.matrix_norm(dense, 2), rtol=1e-6
            )
    assert ("W_QK_spectral" in weights) == (name not in ("qwen3", "gemma3"))


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_files_hold_the_matrices_that_were_measured(name: str, tmp_path: Any) -> None:
    models.save(models.random_model(name), tmp_path)
    record = streamgauge.measure(tmp_path)
    matrices = Matrices(tensor_reader(open_checkpoint(tmp_path)), record)
    for layer in range(record.n_layers):
        frobenius, _ = ov_norms(matrices.W_V(layer), matrices.W_O(layer))
        np.testing.assert_allclose(
            frobenius, record.array("weights/W_OV_frobenius")[layer], rtol=1e-12
        )


def test_stored_bf16_is_measured_in_fp32(tmp_path: Any) -> None:
    model = models.random_model("llama").bfloat16()
    models.save(model, tmp_path / "bf16")
    models.save(model.float(), tmp_path / "fp32")
    bf16, fp32 = streamgauge.measure(tmp_path / "bf16"), streamgauge.measure(tmp_path / "fp32")
    assert (bf16.metadata["stored_dtype"], fp32.metadata["stored_dtype"]) == ("BF16", "F32")
    np.testing.assert_array_equal(bf16.resid_pre, fp32.resid_pre)
    matrices = Matrices(tensor_reader(open_checkpoint(tmp_path / "bf16")), bf16)
    np.testing.assert_allclose(
        ov_norms(matrices.W_V(1), matrices.W_O(1))[0],
        fp32.array("weights/W_OV_frobenius")[1],
        rtol=1e-12,
    )


def test_post_norm_blocks_are_said_to_be_so(tmp_path: Any) -> None:
    config = models.tf.OPTConfig(
        **models.LLAMA, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False
    )
    record = streamgauge.measure(models.save(models.tf.OPTForCausalLM(config).float(), tmp_path))
    with pytest.raises(streamgauge.errors.NotApplicable, match="post-norm"):
        record.array("stream/additivity_error")
    with pytest.raises(streamgauge.errors.NotApplicable, match="post-norm"):
        _ = record.text_resid


def test_without_heads_of_its_own_the_stream_is_measured_still(tmp_path: Any) -> None:
    config = models.tf.DeepseekV3Config(
        **models.LLAMA,
        num_key_value_heads=4,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    )
    record = streamgauge.measure(
        models.save(models.tf.DeepseekV3ForCausalLM(config).float().eval(), tmp_path)
    )
    assert record.resid_pre.shape[0] == 3
    with pytest.raises(streamgauge.errors.NotApplicable, match="shows no W_V and W_O"):
        record.array("weights/W_OV_frobenius")


@torch.no_grad()
def test_gains_are_found_at_any_width() -> None:
    torch.manual_seed(0)
    for width in (32, 33):
        norm = torch.nn.LayerNorm(width)
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        gain, bias, centres = probe_norm(norm, width)
        assert centres
        np.testing.assert_allclose(
            gain, norm.weight.detach(), rtol=1e-6, atol=1e-6
        )  # output minus bias, in fp32
        np.testing.assert_allclose(bias, norm.bias.detach(), rtol=1e-6)
    assert not probe_norm(torch.nn.RMSNorm(32), 32)[2]


def test_centring_is_what_layernorm_ignores() -> None:
    x = np.random.default_rng(0).standard_normal((5, 8)) + 3
    np.testing.assert_allclose(centre(x).mean(-1), 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(centre(x), axis=-1), np.sqrt(8) * x.std(-1))


def test_batches_hold_every_row_once_and_no_padding() -> None:
    prompts = Prompts([[0] * n for n in (3, 5, 3, 7, 5, 3)], "test", None)
    batches = list(prompts.batches(6))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert all(len({len(prompts.rows[i]) for i in batch}) == 1 for batch in batches)


def test_shards_and_one_file_give_the_same_record(tmp_path: Any) -> None:
    model = models.random_model("gpt2")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    sharded = streamgauge.measure(tmp_path / "sharded")
    single = streamgauge.measure(models.save(model, tmp_path / "single"))
    np.testing.assert_array_equal(sharded.resid_pre, single.resid_pre)
    matrices = Matrices(tensor_reader(open_checkpoint(tmp_path / "sharded")), sharded)
    np.testing.assert_allclose(
        ov_norms(matrices.W_V(1), matrices.W_O(1))[0],
        single.array("weights/W_OV_frobenius")[1],
        rtol=1e-12,
    )


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_the_closed_form_of_the_mlp_is_what_the_block_adds(name: str) -> None:
    model = models.blockwise(models.random_model(name))
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        (f"blocks.1.{h}", lambda x, hook, h=h: seen.__setitem__(h, x.clone()))
        for h in ("mlp.hook_in", "hook_mlp_out")
    ]
    with torch.no_grad(), model.held(1):
        models.run(model, IDS, hooks)
        answer = run_mlp(model, 1, seen["mlp.hook_in"])
    torch.testing.assert_close(
        answer.reshape(seen["hook_mlp_out"].shape), seen["hook_mlp_out"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_rounding_leaves_the_weights_as_they_were(name: str) -> None:
    from streamgauge.groups.rounding import rounding_group

    model = models.blockwise(models.random_model(name))
    before = {key: value.clone() for key, value in model.mapped.stored.items()}
    with torch.no_grad():
        batch = models.run(model, IDS)
        rounding = rounding_group(
            model, probe_layout(model), Prompts([[1, 2, 3, 4, 5, 6]] * 4, "test", 1)
        )
        arrays, _ = models.measure_group(model, rounding)
        again = models.run(model, IDS)
        assert torch.equal(again.stream, batch.stream)
        assert torch.equal(model.logits(IDS, again.stream), model.logits(IDS, batch.stream))
    for key, value in model.mapped.stored.items():
        assert torch.equal(before[key], value), key
    assert (arrays["resid"] > 0).all() and (arrays["loss"] > 0).all()


@pytest.mark.parametrize(("name", "norm"), [("gpt2", "LayerNorm"), ("llama", "RMSNorm")])
def test_a_record_names_its_norms(name: str, norm: str, tmp_path: Path) -> None:
    folder = models.save(models.random_model(name), tmp_path)
    assert streamgauge.measure(folder, groups=["weights"]).metadata["norm"] == norm
