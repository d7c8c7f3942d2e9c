"""Checkpoints in other formats, made from a folder of plain safetensors of a Llama: by the format's
own library where it makes them on a CPU, by hand to its specification where it does not.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

FLOATS = {"F32": gguf.GGMLQuantizationType.F32, "F16": gguf.GGMLQuantizationType.F16}
INSIDE = re.compile(r"model\.layers\.(\d+)\.(.+)")
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def plain_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, by name."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def write_gguf(
    folder: Path,
    path: Path,
    kind: str = "Q8_0",
    *,
    permute: bool = True,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    tensors: Callable[[str], bool] = lambda name: True,
) -> Path:
    """A Llama as llama.cpp writes it. permute: whether rows of q and k are put in its order.

    change: adds keys. tensors: which ones are written.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    _say_llama(writer, config)
    _say_tokenizer(writer, folder, config)
    change(writer)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, array in plain_tensors(folder).items():
        inside = INSIDE.match(name)
        short = f"blk.{inside[1]}.{NAMES[inside[2]]}" if inside else NAMES[name]
        if not tensors(short):
            continue
        own = next((n for part, n in heads.items() if f".{part}." in short), None)
        if own and permute:
            array = _as_llama_cpp(array, own)
        _add(writer, short, array, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_llama_cpp(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head's two halves, one after the other."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _add(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    array = np.ascontiguousarray(array, np.float32)
    if array.ndim == 1:
        writer.add_tensor(name, array)
    elif kind in FLOATS or array.shape[-1] % 32:
        kind = kind if kind in FLOATS else "F16"  # as llama.cpp does where a row has odd blocks
        writer.add_tensor(name, array.astype(np.float32 if kind == "F32" else np.float16))
    else:
        type_ = gguf.GGMLQuantizationType[kind]
        packed = gguf.quantize(array, type_)
        writer.add_tensor(name, packed, raw_dtype=type_)


def _say_llama(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])


def _say_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    """The vocabulary of tokenizer.json, of bytes or as SentencePiece has it; an invented one where
    the folder has none.
    """
    path, merges = folder / "tokenizer.json", None
    tokens = ["<unk>", "<s>", "</s>", *(f"<{n}>" for n in range(3, config["vocab_size"]))]
    if path.is_file():
        said = json.loads(path.read_text())["model"]
        tokens = sorted(said["vocab"], key=said["vocab"].__getitem__)
        merges = None if said.get("byte_fallback") else said["merges"]
    kinds = [_kind(n, token) for n, token in enumerate(tokens)]
    writer.add_tokenizer_model("llama" if merges is None else "gpt2")
    writer.add_token_list(tokens)
    if merges is None:
        writer.add_token_scores([-float(n) for n in range(len(tokens))])
    else:
        writer.add_token_merges(
            [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
        )
        writer.add_tokenizer_pre("smollm")
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _kind(number: int, token: str) -> gguf.TokenType:
    if number == 0:
        return gguf.TokenType.UNKNOWN
    if number in (1, 2):
        return gguf.TokenType.CONTROL
    byte = re.fullmatch("<0x..>", token)
    return gguf.TokenType.BYTE if byte else gguf.TokenType.NORMAL


def _linear(name: str, array: np.ndarray) -> bool:
    """Whether a matrix is one that quantisers take: of a Linear inside a block."""
    return bool(INSIDE.match(name)) and array.ndim == 2


def _by_hand(
    folder: Path,
    target: Path,
    said: dict[str, Any],
    pack: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
) -> Path:
    """A copy with each Linear's matrix packed."""
    target.mkdir(parents=True)
    made: dict[str, torch.Tensor] = {}
    for name, array in plain_tensors(folder).items():
        if _linear(name, array):
            made |= pack(name.removesuffix(".weight"), torch.from_numpy(np.array(array)).float())
        else:
            made[name] = torch.from_numpy(np.array(array))
    save_file({k: v.contiguous() for k, v in made.items()}, target / "model.safetensors")
    for path in folder.glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copy(path, target)
    configure(target, quantization_config=said)
    return target


def configure(folder: Path, **entries: Any) -> None:
    """Change entries of a config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def fp8(folder: Path, target: Path, block: tuple[int, int] = (128, 128)) -> Path:
    """Fine-grained FP8: the last blocks of a row or column may be short."""

    def pack(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        high, wide = (-(-rows // block[0]), -(-columns // block[1]))
        scale = torch.zeros(high, wide)
        numbers = torch.zeros(rows, columns)
        for i in range(high):
            for j in range(wide):
                here = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
                scale[i, j] = weight[here].abs().max() / 448
                numbers[here] = weight[here] / scale[i, j]
        packed = numbers.to(torch.float8_e4m3fn)
        return {f"{module}.weight": packed, f"{module}.weight_scale_inv": scale}

    said = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    return _by_hand(folder, target, said | {"activation_scheme": "dynamic"}, pack)


def fp8_by_rows(folder: Path, target: Path) -> Path:
    """FP8 with one scale a row, as fbgemm stores it."""

    def pack(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 448
        packed = (weight / scale).to(torch.float8_e4m3fn)
        return {f"{module}.weight": packed, f"{module}.weight_scale": scale}

    return _by_hand(folder, target, {"quant_method": "fbgemm_fp8"}, pack)


def _grouped(weight: torch.Tensor, bits: int, size: int) -> tuple[torch.Tensor, ...]:
    """Codes (out, in), scales and zeros (out, groups): the nearest of an even grid."""
    groups = weight.reshape(weight.shape[0], -1, size)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = (-low / scales).round().clamp(0, 2**bits - 1)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return codes.reshape(weight.shape).long(), scales, zeros.long()


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes as 32-bit words, the first in the lowest bits."""
    stream = ((codes[..., None] >> torch.arange(bits)) & 1).reshape(codes.shape[0], -1, 32)
    words = (stream << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _less_one(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Zeros as the first version of GPTQ stores them: one is taken from all of a word at once."""
    if bits == 3:
        return _words((zeros - 1) & 7, bits)
    ones = sum(1 << place for place in range(0, 32, bits))
    words = (_words(zeros, bits).long() - ones) & 0xFFFFFFFF
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gptq(folder: Path, target: Path, bits: int = 4, size: int = 32, ordered: bool = False) -> Path:
    """GPTQ's layout. ordered: whether groups are of inputs that do not lie side by side."""

    def pack(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        order = torch.arange(weight.shape[1])
        if ordered:
            order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
        codes, scales, zeros = _grouped(weight[:, order], bits, size)
        back = torch.argsort(order)
        return {
            f"{module}.qweight": _words(codes[:, back], bits).T,
            f"{module}.qzeros": _less_one(zeros.T, bits),
            f"{module}.scales": scales.T.half(),
            f"{module}.g_idx": (torch.arange(len(order)) // size)[back].to(torch.int32),
        }

    said = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": ordered}
    return _by_hand(folder, target, said, pack)


def awq(folder: Path, target: Path, size: int = 32) -> Path:
    """AWQ's layout: eight outputs a word, the even ones first."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(codes: torch.Tensor) -> torch.Tensor:
        return _words(codes.reshape(codes.shape[0], -1, 8)[..., order].reshape(codes.shape), 4)

    def pack(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, scales, zeros = _grouped(weight, 4, size)
        return {
            f"{module}.qweight": words(codes.T),
            f"{module}.qzeros": words(zeros.T),
            f"{module}.scales": scales.T.half(),
        }

    said = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}
    return _by_hand(folder, target, said | {"zero_point": True}, pack)


def compressed(folder: Path, target: Path, layout: str = "pack-quantized") -> Path:
    """compressed-tensors, each matrix by the library's own compressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = {
        "pack-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        "int-quantized": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel"},
    }[layout]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    largest = {"pack-quantized": 7.0, "int-quantized": 127.0, "float-quantized": 448.0}[layout]
    compressor = BaseCompressor.get_value_from_registry(layout)

    def pack(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        size = arguments.get("group_size", weight.shape[1])
        groups = weight.reshape(weight.shape[0], -1, int(str(size)))
        scale = groups.abs().amax(2) / largest
        made = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        return {f"{module}.{name}": part for name, part in made.items()}

    groups = {"group_0": {"targets": ["Linear"], "weights": arguments}}
    said = {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}
    return _by_hand(
        folder, target, said | {"quantization_status": "compressed", "ignore": ["lm_head"]}, pack
    )


def by_transformers(folder: Path, target: Path, config: Any) -> Path:
    """A checkpoint that transformers quantises and saves, with the library of the format."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(target)
    for path in folder.glob("tokenizer*"):
        shutil.copy(path, target)
    return target


def bitsandbytes(folder: Path, target: Path, **arguments: Any) -> Path:
    """bitsandbytes, 4 bits unless told otherwise."""
    return by_transformers(
        folder, target, BitsAndBytesConfig(**(arguments or {"load_in_4bit": True}))
    )


def torchao(folder: Path, target: Path, config: Any) -> Path:
    """torchao, by one of its configurations."""
    return by_transformers(folder, target, TorchAoConfig(config))
