"""Every format: made from one Llama, opened, audited and compared with what it was made from."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    Qwen3MoeConfig,
)
from transformers import modeling_gguf_pytorch_utils as tables

from streamgauge.__main__ import main
from streamgauge.checkpoints.converted import Origin, Writer, convert_once
from streamgauge.checkpoints.files import Checkpoint, open_checkpoint
from streamgauge.checkpoints.formats import awq, gptq
from streamgauge.checkpoints.formats.gguf_settings import Settings, complete
from streamgauge.errors import CheckpointError, NotInstalledError, StoreError, StreamgaugeError
from streamgauge.numerics.grids import even_grid, uneven_grid, without_grid
from streamgauge.store import Store
from tests import formats, models
from tests.conftest import SHARED, Audit

Auditing = Callable[..., Audit]
Q_AND_K = "self_attn.[qk]_proj.weight"
STORIES = SHARED / "checkpoints" / "stories260K"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers whose rows hold whole blocks of every format."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return models.save(AutoModelForCausalLM.from_config(config), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def _int8(folder: Path, target: Path) -> Path:
    from torchao.quantization import Int8WeightOnlyConfig

    return formats.torchao(folder, target, Int8WeightOnlyConfig())


def _float8(folder: Path, target: Path) -> Path:
    from torchao.quantization import Float8WeightOnlyConfig

    return formats.torchao(folder, target, Float8WeightOnlyConfig())


def _made(maker: Callable[..., Path], **arguments: Any) -> Callable[[Path, Path], Path]:
    return lambda folder, target: maker(folder, target, **arguments)


def _gguf(kind: str) -> Callable[[Path, Path], Path]:
    return lambda folder, target: formats.write_gguf(folder, target.with_suffix(".gguf"), kind)


GGUF_ERRORS = {"F32": 0, "F16": 5e-4, "Q8_0": 0.01, "Q5_1": 0.06, "Q4_0": 0.15, "Q4_1": 0.12}
# How each is made, the package it takes, what the record says, and the largest relative error that
# half a step of its grid on Gaussian weights may make of a matrix.
FORMATS: dict[str, tuple[Callable[[Path, Path], Path], str, str, float]] = {
    **{kind: (_gguf(kind), "gguf", kind, error) for kind, error in GGUF_ERRORS.items()},
    "fp8": (formats.fp8, "torch", "F8_E4M3", 0.04),
    "fp8-odd": (_made(formats.fp8, block=(80, 48)), "torch", "F8_E4M3", 0.04),
    "fp8-rows": (formats.fp8_by_rows, "torch", "F8_E4M3", 0.04),
    "gptq": (formats.gptq, "torch", "GPTQ 4 bit", 0.12),
    "gptq-ordered": (_made(formats.gptq, bits=3, ordered=True), "torch", "GPTQ 3 bit", 0.25),
    "gptq-8": (_made(formats.gptq, bits=8, size=64), "torch", "GPTQ 8 bit", 0.01),
    "awq": (formats.awq, "torch", "AWQ 4 bit", 0.12),
    **{
        layout: (
            _made(formats.compressed, layout=layout),
            "compressed_tensors",
            f"compressed-tensors {kind}",
            error,
        )
        for layout, kind, error in (
            ("pack-quantized", "int4", 0.15),
            ("int-quantized", "int8", 0.02),
            ("float-quantized", "float8", 0.04),
        )
    },
    "bnb-fp4": (formats.bitsandbytes, "bitsandbytes", "FP4", 0.2),
    "bnb-nf4": (
        _made(
            formats.bitsandbytes,
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
        ),
        "bitsandbytes",
        "NF4",
        0.15,
    ),
    "bnb-int8": (_made(formats.bitsandbytes, load_in_8bit=True), "bitsandbytes", "LLM.int8", 0.02),
    "torchao-int8": (_int8, "torchao", "torchao Int8Tensor", 0.02),
    "torchao-fp8": (_float8, "torchao", "torchao Float8Tensor", 0.04),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_back_what_it_was_made_from(
    name: str, plain: Path, store: Path, tmp_path: Path
) -> None:
    maker, package, dtype, error = FORMATS[name]
    pytest.importorskip(package)
    checkpoint = open_checkpoint(maker(plain, tmp_path / name), store=store)
    assert checkpoint.origin is not None and checkpoint.folder.is_relative_to(store)
    before, after = formats.plain_tensors(plain), formats.plain_tensors(checkpoint.folder)
    assert set(before) == set(after)
    packed = [n for n, kind in checkpoint.origin.dtypes.items() if kind == dtype]
    assert len(packed) >= 21  # every Linear of three blocks
    for tensor, old in before.items():
        moved = np.linalg.norm(after[tensor] - old) / np.linalg.norm(old)
        assert moved <= (error if tensor in packed else 5e-4)
        assert moved <= checkpoint.origin.rounding.get(tensor, 5e-4)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "fp8", "gptq", "pack-quantized", "bnb-nf4"])
def test_a_comparison_finds_nothing_but_quantisation(
    name: str, plain: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maker, package, _, _ = FORMATS[name]
    pytest.importorskip(package)
    made = maker(plain, tmp_path / name)
    assert main(["diff", str(plain), str(made), "--store", str(store)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("a quantisation of it (") and "matrices are off by 0." in out
    assert "config: 0 of " in out and "; perplexity ×" in out


def test_rows_of_q_and_k_in_the_wrong_order_are_found_through_quantisation(
    plain: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = formats.write_gguf(plain, tmp_path / "broken.gguf", permute=False)
    assert main(["diff", str(plain), str(broken), "--store", str(store), "--all"]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {line[3] for line in lines if line[0] == "layer" and "_proj.weight" in line[3]}
    assert found == {
        f"model.layers.{n}.self_attn.{part}_proj.weight" for n in range(3) for part in "qk"
    }


def test_a_gguf_file_is_audited(plain: Path, tmp_path: Path, audit: Auditing) -> None:
    path = formats.write_gguf(plain, tmp_path / "somebody-Q4_1.gguf", "Q4_1")
    found = audit("--model", path, "--baseline", path, "-m", "theorem or regression")
    assert found.exit == 0
    row = found.row("weights/integrity")
    assert row["model"] == "somebody-Q4_1" and row["outcome"] == "pass"
    assert row["stored_dtype"].startswith("F32, Q4_1 (GGUF, dequantised to fp32 by gguf ")
    assert row["reproduce"].endswith(f"--model {path} --baseline {path}")


@pytest.mark.skipif(not STORIES.is_dir(), reason="shared/ is not beside the clone")
def test_the_tokens_of_a_gguf_are_those_of_what_it_was_made_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = formats.write_gguf(STORIES, tmp_path / "stories.gguf", "F32")
    assert main(["diff", str(STORIES), str(path), "--store", str(tmp_path / "store")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "the same weights, in other files",
        "tensors: 0 of 47 differ, every number compared",
        "config: 0 of 17 differ",
        "activations: 0 of 16 differ",
        "predictions: 0 of 2 differ",
    ]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("lowest", [0, 1])  # of the zeros
def test_gptq_is_unpacked_as_the_library_that_made_it_unpacks(bits: int, lowest: int) -> None:
    held = load_file(Path(__file__).parent / "data" / "packed.safetensors")
    prefix = f"gptq.{bits}.{lowest}."
    parts = {n.removeprefix(prefix): t for n, t in held.items() if n.startswith(prefix)}
    expected = parts.pop("weight")
    made = gptq.weight("m", parts, {"bits": bits, "group_size": 32}, None)
    assert (made.values - expected).abs().max() < 2e-4  # theirs is fp16


def test_awq_is_unpacked_as_the_library_that_made_it_unpacks() -> None:
    held = load_file(Path(__file__).parent / "data" / "packed.safetensors")
    parts = {n.removeprefix("awq."): t for n, t in held.items() if n.startswith("awq.")}
    expected = parts.pop("weight")
    made = awq.weight("m", parts, {"bits": 4, "group_size": 32}, None)
    assert (made.values - expected).abs().max() < 5e-4


def _packed_fp4(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MXFP4 by hand: blocks, scales, and what they stand for; 32 numbers a block, last axis."""
    steps = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    groups = stack.reshape(*stack.shape[:-1], -1, 32)
    exponent = groups.abs().amax(-1, keepdim=True).clamp_min(2**-100).log2().floor() - 2
    scaled = groups / 2**exponent
    codes = (scaled.abs()[..., None] - steps).abs().argmin(-1)
    meant = steps[codes] * scaled.sign() * 2**exponent
    codes = codes + 8 * (scaled < 0)
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    scales = (exponent[..., 0] + 127).to(torch.uint8)
    return blocks, scales, meant.reshape(stack.shape)


def test_mxfp4_is_opened_as_gpt_oss_stores_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    original = models.save(AutoModelForCausalLM.from_config(config), tmp_path / "original")
    folder = Path(shutil.copytree(original, tmp_path / "gpt-oss"))
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales, rounded = _packed_fp4(tensors.pop(name).transpose(1, 2))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = rounded.transpose(1, 2)
    save_file(tensors, folder / "model.safetensors")
    formats.configure(folder, quantization_config={"quant_method": "mxfp4"})
    checkpoint = open_checkpoint(folder, store=tmp_path / "store")
    found = formats.plain_tensors(checkpoint.folder)
    assert len(meant) == 4
    for name, values in meant.items():
        assert np.array_equal(found[name], values.numpy())
    assert main(["diff", str(original), str(folder), "--store", str(tmp_path / "store")]) == 0
    assert capsys.readouterr().out.startswith("a quantisation of it (MXFP4): 4 of 20 matrices")


def _write_experts(model: Any, path: Path, kept: Callable[[str], bool]) -> Path:
    """A Qwen3 mixture as llama.cpp writes it: gate and up of all experts in two stacks."""
    config, writer = model.config, gguf.GGUFWriter(path, "qwen3moe")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    processor = tables.Qwen2MoeTensorProcessor(config=config.to_dict())
    state = model.state_dict()
    for name, target in tables.get_gguf_hf_weights_map(model, processor).items():
        values = state[target].numpy()
        if target.endswith("gate_up_proj"):
            half = values.shape[1] // 2
            values = values[:, :half] if "gate" in name else values[:, half:]
        name += "" if name.endswith((".weight", ".bias")) else ".weight"
        if kept(name):
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_experts_of_a_gguf_are_put_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    path = _write_experts(model, tmp_path / "it.gguf", lambda name: True)
    found = formats.plain_tensors(open_checkpoint(path, store=tmp_path / "store").folder)
    assert set(found) == set(model.state_dict())
    for name, values in model.state_dict().items():
        assert np.array_equal(found[name], values.numpy())
    _write_experts(model, path, lambda name: name != "blk.1.ffn_up_exps.weight")
    with pytest.raises(
        CheckpointError, match=r"1\.mlp\.experts\.gate_up_proj is made of 2 tensors, 1"
    ):
        open_checkpoint(path, store=tmp_path / "store")


LFM2 = {
    "model.embed_tokens.": "token_embd.", "model.embedding_norm.": "token_embd_norm.",
    "model.layers.": "blk.", ".operator_norm.": ".attn_norm.", ".self_attn.q_proj.": ".attn_q.",
    ".self_attn.k_proj.": ".attn_k.", ".self_attn.v_proj.": ".attn_v.",
    ".self_attn.out_proj.": ".attn_output.", ".self_attn.q_layernorm.": ".attn_q_norm.",
    ".self_attn.k_layernorm.": ".attn_k_norm.", ".feed_forward.w1.": ".ffn_gate.",
    ".feed_forward.w2.": ".ffn_down.", ".feed_forward.w3.": ".ffn_up.", ".conv.": ".shortconv.",
}  # fmt: skip


def test_an_architecture_of_transformers_newer_tables_is_opened(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, conv_L_cache=3,
        num_attention_heads=4, num_key_value_heads=2, block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv"], tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    model, path = AutoModelForCausalLM.from_config(config), tmp_path / "it.gguf"
    writer = gguf.GGUFWriter(path, "lfm2")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(3)
    writer.add_head_count(4)
    writer.add_head_count_kv([0, 2, 0])
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_shortconv_l_cache(3)
    writer.add_rope_freq_base(10_000.0)
    writer.add_token_list([f"<{n}>" for n in range(64)])
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    for name, values in state.items():
        for old, new in LFM2.items():
            name = name.replace(old, new, 1)
        kernel = name.endswith("shortconv.conv.weight")
        writer.add_tensor(name, (values.squeeze(1) if kernel else values).numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(path, store=tmp_path / "store")
    found = formats.plain_tensors(checkpoint.folder)
    assert set(found) == set(state) and not checkpoint.origin.unread
    for name, values in state.items():
        assert np.array_equal(found[name], values.numpy())


# What a GGUF file says beyond what transformers reads.


def _converted(plain: Path, path: Path, change: Callable[[gguf.GGUFWriter], None]) -> Any:
    made = formats.write_gguf(plain, path / "it.gguf", "F32", change=change)
    checkpoint = open_checkpoint(made, store=path / "store")
    return checkpoint, json.loads((checkpoint.folder / "config.json").read_text())


@pytest.mark.parametrize("said", [True, False])
def test_scaled_positions_of_a_gguf_are_read(said: bool, plain: Path, tmp_path: Path) -> None:
    def linear(writer: gguf.GGUFWriter) -> None:
        if said:  # or it is what a factor means
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    _, config = _converted(plain, tmp_path, linear)
    assert config["rope_parameters"]["rope_type"] == "linear"
    assert config["rope_parameters"]["factor"] == 4.0


def test_yarn_of_a_gguf_is_read(plain: Path, tmp_path: Path) -> None:
    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)
        writer.add_float32("llama.rope.scaling.yarn_beta_fast", 16.0)

    _, config = _converted(plain, tmp_path, yarn)
    rope = config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["beta_fast"]) == ("yarn", 4.0, 16.0)
    assert rope["original_max_position_embeddings"] == 16


def test_factors_of_llama_3_are_told_from_a_gguf(plain: Path, tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=128, num_attention_heads=4)
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = 10_000.0 ** -(np.arange(16) / 16) / scaled.numpy()

    def write(values: np.ndarray) -> Callable[[gguf.GGUFWriter], None]:
        return lambda writer: writer.add_tensor("rope_freqs.weight", values.astype(np.float32))

    _, said = _converted(plain, tmp_path, write(factors))
    assert said["rope_parameters"]["rope_type"] == "llama3"
    assert said["rope_parameters"]["factor"] == 32.0
    _, said = _converted(plain, tmp_path, write(np.ones(16)))
    assert said["rope_parameters"]["rope_type"] == "default"
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight that are not Llama 3's"):
        _converted(plain, tmp_path, write(factors * 1.1))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("llama.attention.scale", 0.5, "llama.attention.scale = 0.5, which transformers does not"),
        ("llama.final_logit_softcapping", 30.0, "final_logit_softcapping = 30"),
        ("llama.rope.scaling.type", "longrope", "scaling.type = longrope"),
        ("llama.rope.scaling.attn_factor", 1.5, "scaling.attn_factor = 1.5"),
        ("llama.attention.key_length", 64, "dimension_count = 32 of heads of 64"),
    ],
)
def test_what_transformers_does_not_heed_is_refused(
    key: str, value: Any, says: str, plain: Path, tmp_path: Path
) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        kinds = gguf.GGUFValueType
        kind = {str: kinds.STRING, int: kinds.UINT32, float: kinds.FLOAT32}[type(value)]
        writer.add_key_value(key, value, kind)

    with pytest.raises(CheckpointError, match=says):
        _converted(plain, tmp_path, change)


@pytest.mark.parametrize(("depth", "scale"), [(62, 168), (34, 256)])
def test_the_largest_gemma_scales_its_attention_by_its_width(depth: int, scale: int) -> None:
    """168 = 5376 / 32 is what Gemma 3 27B's own configuration says; GGUF has no key for it."""
    config = Gemma3TextConfig(hidden_size=5376, num_attention_heads=32, num_hidden_layers=depth)
    said = Settings("it.gguf", "gemma3", {"gemma3.block_count": depth}, set(), {}, in_parts=False)
    complete(config, said, Origin("GGUF"))
    assert config.query_pre_attn_scalar == scale


def test_keys_that_nothing_reads_are_said(plain: Path, tmp_path: Path) -> None:
    checkpoint, _ = _converted(plain, tmp_path, lambda w: w.add_uint32("llama.novelty", 3))
    assert checkpoint.origin.done.endswith("; nothing reads its llama.novelty = 3")


def test_tensors_that_nothing_reads_fail_integrity(
    plain: Path, tmp_path: Path, audit: Auditing
) -> None:
    extra = np.ones((4, 4), np.float32)
    path = formats.write_gguf(
        plain, tmp_path / "it.gguf", change=lambda w: w.add_tensor("blk.1.strange.weight", extra)
    )
    row = audit("--model", path, "-k", "integrity").row("weights/integrity")
    assert row["outcome"] == "fail" and "blk.1.strange.weight" in row["of"]


# Files that are not as they should be.


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _no_gguf(path: Path) -> None:
    path.write_bytes(b"GGUF" + bytes(range(100)))


@pytest.mark.parametrize("damage", [_cut, _no_gguf, lambda path: path.write_bytes(b"")])
def test_a_damaged_gguf_is_one_sentence(
    damage: Callable[[Path], None], plain: Path, tmp_path: Path, audit: Auditing
) -> None:
    path = formats.write_gguf(plain, tmp_path / "it.gguf")
    damage(path)
    found = audit("--model", path, "-k", "integrity")
    assert found.exit == 1
    reason = found.row("weights/integrity")["reason"]
    assert re.search(
        r"it\.gguf (is truncated: .*copy it again|is no GGUF file; copy it again|is of version \d+ "
        r"of GGUF, and 2 and 3 can be read|cannot be read as GGUF, or is truncated .* again)",
        reason,
    )
    assert "Traceback" not in found.output


def test_a_gguf_of_another_kind_is_refused(plain: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "clip.gguf", "clip")
    writer.add_tensor("v.blk.0.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"transformers cannot read clip\.gguf \(clip\)"):
        open_checkpoint(tmp_path / "clip.gguf", store=tmp_path / "store")


def test_a_gguf_that_lacks_tensors_is_refused(plain: Path, tmp_path: Path) -> None:
    path = formats.write_gguf(plain, tmp_path / "it.gguf", tensors=lambda n: "blk.2.ffn" not in n)
    says = r"nothing for 4 tensors of the LlamaForCausalLM .* model\.layers\.2\.mlp\.down_proj"
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(path, store=tmp_path / "store")


def test_a_gguf_whose_rows_are_of_another_model_is_refused(plain: Path, tmp_path: Path) -> None:
    path = formats.write_gguf(
        plain, tmp_path / "it.gguf", change=lambda writer: writer.add_vocab_size(127)
    )
    with pytest.raises(
        StreamgaugeError, match=r"lm_head\.weight as \[128, 128\], where .* makes \[127, 128\]"
    ):
        open_checkpoint(path, store=tmp_path / "store")


def _in_parts(plain: Path, folder: Path) -> list[Path]:
    """A model in two files, the output's matrix in the second."""
    found = []
    for number in (0, 1):
        path = folder / f"it-{number + 1:05d}-of-00002.gguf"

        def say(writer: gguf.GGUFWriter, number: int = number) -> None:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 2)
            writer.add_int32("split.tensors.count", 30)

        def mine(name: str, number: int = number) -> bool:
            return name.startswith(("blk.2.", "output")) == bool(number)

        found.append(formats.write_gguf(plain, path, "F32", change=say, tensors=mine))
    return found


def test_a_gguf_in_parts_is_one_model(plain: Path, tmp_path: Path, audit: Auditing) -> None:
    first, second = _in_parts(plain, tmp_path)
    for named in (first, second, tmp_path):
        checkpoint = open_checkpoint(named, store=tmp_path / "store")
        assert checkpoint.origin is not None and checkpoint.origin.files == (first, second)
        found = formats.plain_tensors(checkpoint.folder)
        for name, values in formats.plain_tensors(plain).items():
            assert np.array_equal(found[name], values)
        assert not checkpoint.config()["tie_word_embeddings"]
    second.unlink()
    row = audit("--model", first, "-k", "integrity").row("weights/integrity")
    assert "lacks it-00002-of-00002.gguf, which belongs to it-00001-of-00002.gguf" in row["reason"]


def test_parts_of_different_models_are_refused(plain: Path, tmp_path: Path) -> None:
    first, _ = _in_parts(plain, tmp_path)
    formats.write_gguf(plain, first, "F32", change=lambda w: w.add_int32("split.tensors.count", 30))
    with pytest.raises(CheckpointError, match="says that its parts hold 30"):
        open_checkpoint(first, store=tmp_path / "store")


def test_a_folder_of_gguf_models_asks_which(plain: Path, tmp_path: Path) -> None:
    for kind in ("Q8_0", "Q4_0"):
        formats.write_gguf(plain, tmp_path / f"it-{kind}.gguf", kind)
    says = r"holds 2 GGUF models; name one of its files: it-Q4_0\.gguf, it-Q8_0\.gguf\."
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(tmp_path, store=tmp_path / "store")
    (tmp_path / "it-Q4_0.gguf").rename(tmp_path / "mmproj-it.gguf")
    assert open_checkpoint(tmp_path, store=tmp_path / "store").origin


def test_what_lies_beside_a_gguf_is_no_part_of_it(plain: Path, tmp_path: Path) -> None:
    path = formats.write_gguf(plain, tmp_path / "it.gguf")
    store = Store(tmp_path / "store")
    key = store.key(open_checkpoint(path, store=store.folder), None, "cpu")
    (tmp_path / "another.bin").write_bytes(b"somebody else's")
    assert store.key(open_checkpoint(path, store=store.folder), None, "cpu") == key


def test_a_gguf_that_is_not_there_is_a_mistake_of_the_command_line(audit: Auditing) -> None:
    found = audit("--model", "./nowhere.gguf")
    assert found.exit == 4 and "there is no folder or .gguf file './nowhere.gguf'" in found.output


def test_parts_without_the_first_are_called_so(plain: Path, tmp_path: Path) -> None:
    first, _ = _in_parts(plain, tmp_path)
    first.unlink()
    with pytest.raises(CheckpointError, match=r"lacks it-00001-of-00002\.gguf"):
        open_checkpoint(tmp_path, store=tmp_path / "store")
    (tmp_path / "it-00002-of-00002.gguf").rename(tmp_path / "it-00000-of-00000.gguf")
    with pytest.raises(CheckpointError, match="is no part of a model by its name"):
        open_checkpoint(tmp_path, store=tmp_path / "store")


def _more_heads(writer: gguf.GGUFWriter) -> None:
    writer.add_head_count_kv(3)


def _many_keys(writer: gguf.GGUFWriter) -> None:
    for number in range(10_001):
        writer.add_uint32(f"llama.key{number}", number)


def _vast_array(writer: gguf.GGUFWriter) -> None:
    writer.add_key_value("llama.array", [0] * (2**22 + 1), gguf.GGUFValueType.ARRAY)


HOSTILE: dict[Callable[[gguf.GGUFWriter], None], str] = {
    _more_heads: r"transformers cannot read it\.gguf \(llama\): cannot reshape",
    _many_keys: r"it\.gguf declares 10,0\d\d keys, more than any model has; refused",
    _vast_array: r"it\.gguf declares 4,194,\d\d\d elements of arrays, more than any model has",
}


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_a_hostile_gguf_is_one_sentence(
    change: Callable[[gguf.GGUFWriter], None], plain: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=HOSTILE[change]):
        _converted(plain, tmp_path, change)


def test_an_array_that_only_its_header_holds_is_refused(plain: Path, tmp_path: Path) -> None:
    path = formats.write_gguf(
        plain, tmp_path / "it.gguf", change=lambda writer: writer.add_array("llama.array", [7] * 5)
    )
    content = path.read_bytes()
    place = content.index(b"llama.array") + len(b"llama.array") + 8
    path.write_bytes(content[:place] + (2**21).to_bytes(8, "little") + content[place + 8 :])
    with pytest.raises(CheckpointError, match=r"it\.gguf is truncated: it ends before what it"):
        open_checkpoint(path, store=tmp_path / "store")


def test_a_tensor_outside_of_its_file_is_refused(plain: Path, tmp_path: Path) -> None:
    path = formats.write_gguf(plain, tmp_path / "it.gguf", "F32")
    content = path.read_bytes()
    name = b"blk.1.attn_norm.weight"
    place = content.index(name) + len(name) + 4 + 8 + 4  # one dimension, its size, its type
    path.write_bytes(content[:place] + (2**64 - 32).to_bytes(8, "little") + content[place + 8 :])
    with pytest.raises(CheckpointError, match=r"lies outside of its data|cannot be read as GGUF"):
        open_checkpoint(path, store=tmp_path / "store")


def test_a_tensor_of_numbers_that_nothing_reads_is_no_traceback(
    plain: Path, tmp_path: Path
) -> None:
    junk = np.ones((4, 4), np.int32)
    checkpoint, _ = _converted(
        plain, tmp_path, lambda writer: writer.add_tensor("blk.0.junk.weight", junk)
    )
    assert checkpoint.origin.unread == ["blk.0.junk.weight"]


def test_a_gguf_beside_pickled_weights_asks_which(plain: Path, tmp_path: Path) -> None:
    formats.write_gguf(plain, tmp_path / "it.gguf")
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds it\.gguf and pickled weights; name the file"):
        open_checkpoint(tmp_path, allow_pickle=True, store=tmp_path / "store")


def test_parts_in_a_folder_of_the_hub_are_followed_to_its_blobs(
    plain: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "models--a--b"
    inside = cache / "snapshots" / "main" / "Q8_0"
    for folder in (cache / "blobs", inside):
        folder.mkdir(parents=True)
    for number, path in enumerate(_in_parts(plain, tmp_path)):
        shutil.move(path, cache / "blobs" / f"blob{number}")
        (inside / path.name).symlink_to(cache / "blobs" / f"blob{number}")
    named = inside / "it-00001-of-00002.gguf"
    assert open_checkpoint(named, store=tmp_path / "store").origin
    (inside / "it-00002-of-00002.gguf").unlink()
    (inside / "it-00002-of-00002.gguf").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        open_checkpoint(named, store=tmp_path / "store")


# Quantised folders that are not as they should be.


def test_parts_shorter_than_a_kernel_reads_are_refused(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = formats.bitsandbytes(plain, tmp_path / "odd")
    sound = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    for part, length in (("absmax", 1), ("absmax", 0), ("quant_map", 3)):
        short = {f"{name}.{part}": sound[f"{name}.{part}"][:length].clone()}
        save_file(sound | short, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="and parts of other lengths"):
            open_checkpoint(folder, store=tmp_path / "store")


def test_a_model_that_is_not_sparse_may_say_so(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = formats.compressed(plain, tmp_path / "it")
    _said(sparsity_config={"format": "dense", "global_sparsity": 0.1})(folder)
    assert open_checkpoint(folder, store=tmp_path / "store").origin


def test_nobody_is_asked_to_run_a_checkpoint_s_code(plain: Path, tmp_path: Path) -> None:
    folder = formats.fp8(plain, tmp_path / "it")
    formats.configure(folder, model_type="novelty", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("raise SystemExit")
    assert open_checkpoint(folder, store=tmp_path / "store").origin  # refused when it is opened


def test_a_full_disk_is_said(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("No space left on device")

    folder = formats.fp8(plain, tmp_path / "it")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StoreError, match=r"No space left on device.*made of FP8 would be kept"):
        open_checkpoint(folder, store=tmp_path / "store")


def test_heads_that_changed_places_are_found_through_nf4(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    broken = Path(shutil.copytree(plain, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = torch.cat([tensors[name][32:64], tensors[name][:32], tensors[name][64:]])
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    made = formats.bitsandbytes(broken, tmp_path / "nf4", **nf4)
    assert main(["diff", str(plain), str(made), "--store", str(tmp_path / "store")]) == 1
    says = capsys.readouterr().out.splitlines()[0]
    assert says.startswith(f"damaged, beyond a quantisation (bitsandbytes): layer 1 attn {name}: ")


def _without(folder: Path, ending: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.endswith(ending)}
    save_file(kept, folder / "model.safetensors")


def _unsaid(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def _said(**entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        formats.configure(folder, quantization_config=config["quantization_config"] | entries)

    return change


ODD: dict[str, tuple[Callable[..., Path], Callable[[Path], None], str]] = {
    "fp8 without scales": (
        formats.fp8,
        lambda folder: _without(folder, "_scale_inv"),
        r"q_proj\.weight holds FP8 numbers \(F8_E4M3\) and no scales lie beside it|"
        r"holds FP8 numbers .* and no scales",
    ),
    "fp8 unsaid": (
        formats.fp8,
        _unsaid,
        r"holds 21 tensors of FP8 numbers \(F8_E4M3\), model\.layers\.0\..* no quantization_config",
    ),
    "fp8 of other blocks": (
        formats.fp8,
        _said(weight_block_size=[32, 32]),
        r"scales of shape .*, which are neither one for each block of 32 × 32",
    ),
    "another library's": (
        formats.gptq,
        _said(quant_method="novelty"),
        "quantised as 'novelty', which is not one of awq, bitsandbytes, compressed-tensors, ",
    ),
    "gptq of other bits": (
        formats.gptq,
        _said(bits=8),
        "do not make a matrix as GPTQ stores it",
    ),
    "gptq without bits": (formats.gptq, _said(bits=None), "do not make a matrix as GPTQ stores it"),
    "awq of another version": (formats.awq, _said(version="gemv"), "version gemv, 4 bits"),
    "awq in groups that do not fit": (
        formats.awq,
        lambda folder: _without(folder, "0.self_attn.q_proj.scales"),
        "the parts of model.layers.0.self_attn.q_proj.weight do not make a matrix as AWQ",
    ),
    "sparse": (
        formats.compressed,
        _said(sparsity_config={"format": "sparse-24"}),
        "a sparsity_config of compressed-tensors, which streamgauge cannot undo",
    ),
    "gptq of settings by module": (formats.gptq, _said(dynamic={"a": {"bits": 8}}), "by module: T"),
    "gptq of no known version": (formats.gptq, _said(checkpoint_format="marlin"), "format marlin"),
    "gptq with groups that are not there": (
        formats.gptq,
        lambda folder: (_without(folder, "g_idx"), _said(group_size=64)(folder)),
        "scales for each output, not",
    ),
    "a word for a table": (
        formats.fp8,
        lambda folder: formats.configure(folder, quantization_config="fp8"),
        "quantization_config is 'fp8', where a table of settings belongs",
    ),
    "for nobody": (
        formats.compressed,
        _said(config_groups={}),
        "no group of config.json's quantization_config is for it",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_quantised_folders_are_one_sentence(
    name: str, plain: Path, tmp_path: Path, audit: Auditing
) -> None:
    maker, change, says = ODD[name]
    if maker is formats.compressed:
        pytest.importorskip("compressed_tensors")
    folder = maker(plain, tmp_path / "odd")
    change(folder)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(folder, store=tmp_path / "store")
    found = audit("--model", folder, "-k", "integrity")
    assert found.exit == 1 and "Traceback" not in found.output
    assert not list((tmp_path / "store").glob("converted/*/odd"))  # nothing half made is kept


def test_a_library_that_is_not_installed_is_named(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = formats.gptq(plain, tmp_path / "it")
    formats.configure(folder, quantization_config={"quant_method": "torchao"})
    module = "streamgauge.checkpoints.formats.quantized.find_spec"
    monkeypatch.setattr(module, lambda name: None if name == "torchao" else object())
    says = "quantised as torchao, which needs the package torchao; install 'streamgauge\\[quant"
    with pytest.raises(NotInstalledError, match=says):
        open_checkpoint(folder, store=tmp_path / "store")


def test_matrices_that_face_the_other_way_are_turned(tmp_path: Path) -> None:
    """GPT-2's are (in, out), and quantisers store (out, in)."""
    folder = models.save(models.random_model("gpt2"), tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("mlp.c_proj.weight"))
    weight = tensors.pop(name).T
    scale = weight.abs().amax(1, keepdim=True) / 448
    tensors[name] = (weight / scale).to(torch.float8_e4m3fn).contiguous()
    save_file(tensors | {f"{name}_scale": scale}, folder / "model.safetensors")
    formats.configure(folder, quantization_config={"quant_method": "fbgemm_fp8"})
    found = formats.plain_tensors(open_checkpoint(folder, store=tmp_path / "store").folder)[name]
    assert np.abs(found - weight.T.numpy()).max() < 0.04 * np.abs(found).max()


# What is made is made once.


def test_a_conversion_is_made_once_and_anew_where_its_files_change(
    plain: Path, tmp_path: Path
) -> None:
    folder, store = formats.fp8(plain, tmp_path / "it"), tmp_path / "store"
    first = open_checkpoint(folder, store=store)
    times = [path.stat().st_mtime_ns for path in first.files]
    again = open_checkpoint(folder, store=store)
    assert again.folder == first.folder and again.origin == first.origin
    assert [path.stat().st_mtime_ns for path in again.files] == times
    formats.configure(folder, rms_norm_eps=1e-3)
    changed = open_checkpoint(folder, store=store)
    assert changed.folder != first.folder and changed.config()["rms_norm_eps"] == 1e-3
    assert changed.own_files == first.own_files == (folder / "model.safetensors",)


def test_shards_are_written_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamgauge.checkpoints.converted.SHARD", 100)
    source = tmp_path / "source"
    source.write_bytes(b"it")

    def make(writer: Writer) -> None:
        for number in range(5):
            writer.add(f"t{number}", torch.full((25,), float(number)), "F32")

    folder = convert_once(tmp_path / "store", "it", Origin("made up", files=(source,)), make)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 5 and set(index) == {f"t{n}" for n in range(5)}
    found = formats.plain_tensors(folder)
    assert all((found[f"t{n}"] == n).all() for n in range(5))


def test_an_interrupted_conversion_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"it")

    def make(writer: Writer) -> None:
        writer.add("t", torch.ones(3), "F32")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_once(tmp_path / "store", "it", Origin("made up", files=(source,)), make)
    assert not [path for path in (tmp_path / "store").rglob("*") if path.suffix == ".safetensors"]


def test_a_store_that_cannot_be_written_is_said(plain: Path, tmp_path: Path) -> None:
    path = formats.write_gguf(plain, tmp_path / "it.gguf")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "converted").write_text("a file")
    with pytest.raises(StreamgaugeError, match=r"cannot be written .* made of GGUF"):
        open_checkpoint(path, store=tmp_path / "store")


def test_an_even_grid_bounds_what_rounding_moves() -> None:
    rng = np.random.default_rng(0)
    for bits in (2, 4, 8):
        weight = rng.standard_normal((64, 96)).astype(np.float32)
        groups = weight.reshape(-1, 32)
        step = 2 * np.abs(groups).max(1, keepdims=True) / (2**bits - 1)
        low = -np.abs(groups).max(1, keepdims=True)
        rounded = (np.round((groups - low) / step) * step + low).reshape(weight.shape)
        moved = np.linalg.norm(rounded - weight) / np.linalg.norm(rounded)
        bound = even_grid(rounded, bits, 32)
        assert moved < bound < (4 if bits == 2 else 2) * moved
    assert even_grid(np.zeros((4, 32)), 4, 32) == 0
    short = even_grid(np.ones((1, 40)), 4, 32)  # the last block is
    assert short == pytest.approx(1.5 * 2 / 14 / 12**0.5)
    assert uneven_grid(np.ones((1, 40)), [-1, 0, 1], 32) == pytest.approx(1.5 / 12**0.5)
    assert without_grid(2.0) == 0.5


def test_a_checkpoint_of_the_hub_may_be_a_file(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--somebody--it-GGUF" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    refs = cache / "models--somebody--it-GGUF" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    blob = formats.write_gguf(plain, tmp_path / "it-Q8_0.gguf")
    shutil.copy(blob, snapshot / "it-Q8_0.gguf")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    name = "somebody/it-GGUF/it-Q8_0.gguf"
    found: Checkpoint = open_checkpoint(name, fetch=False, store=tmp_path / "store")
    assert found.name == "somebody/it-GGUF/it-Q8_0" and found.revision == "a" * 40
    assert found.origin is not None and found.origin.files == (snapshot / "it-Q8_0.gguf",)
