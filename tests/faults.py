"""Faults that conversions, quantisations and copies really make, and changes that are harmless:
each edits a checkpoint folder.

A fault says where it sits: the layer (None for what belongs to none) and words of which one must
stand in the verdict.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import streamgauge
from streamgauge.checkpoints.files import open_checkpoint
from streamgauge.compare import beyond, differences, rows_to_share
from streamgauge.compare.judgement import judge
from streamgauge.diff import read_both
from streamgauge.errors import StreamgaugeError
from streamgauge.record import Record

LAYER = 2  # where faults are put, where nothing else is said


class Files:
    """A checkpoint's tensors and configuration, to be changed and written again; GPT-2's and
    Llama's names by one word each. layer: the one that faults are put into.
    """

    def __init__(self, folder: Path, layer: int = LAYER) -> None:
        self.folder, self.layer = folder, layer
        self.tensors = load_file(folder / "model.safetensors")
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.is_gpt2 = self.config["model_type"] == "gpt2"

    def name(self, part: str) -> str:
        """The tensor of one part of the layer, or of none: W_in, ln1, embed …"""
        if self.is_gpt2:
            block = f"transformer.h.{self.layer}."
            names = {
                "qkv": block + "attn.c_attn.weight",
                "W_O": block + "attn.c_proj.weight",
                "ln1": block + "ln_1.weight",
                "ln2": block + "ln_2.weight",
                "W_in": block + "mlp.c_fc.weight",
                "W_out": block + "mlp.c_proj.weight",
                "b_in": block + "mlp.c_fc.bias",
                "b_O": block + "attn.c_proj.bias",
                "b_qkv": block + "attn.c_attn.bias",
                "embed": "transformer.wte.weight",
                "position": "transformer.wpe.weight",
                "final": "transformer.ln_f.weight",
            }
        else:
            block = f"model.layers.{self.layer}."
            names = {
                "W_Q": block + "self_attn.q_proj.weight",
                "W_K": block + "self_attn.k_proj.weight",
                "W_V": block + "self_attn.v_proj.weight",
                "W_O": block + "self_attn.o_proj.weight",
                "ln1": block + "input_layernorm.weight",
                "ln2": block + "post_attention_layernorm.weight",
                "W_in": block + "mlp.up_proj.weight",
                "W_gate": block + "mlp.gate_proj.weight",
                "W_out": block + "mlp.down_proj.weight",
                "embed": "model.embed_tokens.weight",
                "final": "model.norm.weight",
            }
        return names[part]

    def __getitem__(self, part: str) -> torch.Tensor:
        return self.tensors[self.name(part)]

    def __setitem__(self, part: str, tensor: torch.Tensor) -> None:
        self.tensors[self.name(part)] = tensor.contiguous()

    @property
    def n_layers(self) -> int:
        return int(self.config["n_layer" if self.is_gpt2 else "num_hidden_layers"])

    @property
    def n_heads(self) -> int:
        return int(self.config["n_head" if self.is_gpt2 else "num_attention_heads"])

    def of_layer(self, layer: int) -> list[str]:
        """The names of all tensors of a layer."""
        block = f".h.{layer}." if self.is_gpt2 else f".layers.{layer}."
        return [name for name in self.tensors if block in name]

    def in_layer(self, name: str, layer: int) -> str:
        """The same tensor's name in another layer."""
        return name.replace(f".{self.layer}.", f".{layer}.", 1)

    def write(self, folder: Path) -> Path:
        """Write it, with whatever else lay beside it."""
        folder.mkdir(parents=True)
        for path in self.folder.iterdir():
            if path.suffix in (".json", ".model", ".txt") and path.name != "config.json":
                shutil.copy(path, folder)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(
            {name: t.contiguous() for name, t in self.tensors.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        return folder


@dataclass(frozen=True)
class Fault:
    """A fault by name.

    change: what it does, False where it cannot be done to this checkpoint; layers and words: where.
    """

    name: str
    change: Callable[[Files], Any]
    words: tuple[str, ...]
    layers: tuple[int, ...] = (LAYER,)

    def named(self, layer: int = LAYER) -> str:
        """Words of a verdict that say what happened, where it was put into a layer."""
        return NAMED[self.name].format(layer=layer, behind=layer + 1)


def _swap_layers(f: Files) -> None:
    for name in f.of_layer(f.layer):
        other = f.in_layer(name, f.layer + 1)
        f.tensors[name], f.tensors[other] = f.tensors[other], f.tensors[name]


def _repeat_layer(f: Files) -> None:
    for name in f.of_layer(f.layer):
        f.tensors[f.in_layer(name, f.layer + 1)] = f.tensors[name].clone()


def _head_rows(f: Files) -> torch.Tensor:
    """W_O with rows by head, (heads, d_head, d_model) or, in Llama, (d_model, heads, d_head): a
    view that can be written.
    """
    weight = f["W_O"]
    return (
        weight.view(f.n_heads, -1, weight.shape[1])
        if f.is_gpt2
        else weight.view(weight.shape[0], f.n_heads, -1)
    )


def _dead_head(f: Files) -> None:
    rows = _head_rows(f)
    (rows[1] if f.is_gpt2 else rows[:, 1]).zero_()


def _shuffled_heads(f: Files) -> None:
    rows = _head_rows(f)
    turned = rows.roll(1, 0 if f.is_gpt2 else 1).reshape(f["W_O"].shape)
    f["W_O"] = turned


def _times(part: str, times: float) -> Callable[[Files], Any]:
    def change(f: Files) -> Any:
        try:
            f[part] = f[part] * times
        except KeyError:
            return False
        return True

    return change


def _fill(part: str, value: float) -> Callable[[Files], Any]:
    def change(f: Files) -> Any:
        try:
            f[part] = torch.full_like(f[part], value)
        except KeyError:
            return False
        return True

    return change


def _transposed(f: Files) -> None:
    f["W_O"] = f["W_O"].T


def _folded_twice(f: Files) -> None:
    gain = f["ln2"]
    f["W_in"] = f["W_in"] * (gain[:, None] if f.is_gpt2 else gain[None])


def _rows_permuted(f: Files) -> None:
    f["embed"] = f["embed"].roll(1, 0)


def _other_revision(f: Files) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in f.of_layer(f.layer):
        weight = f.tensors[name]
        if weight.dim() > 1:
            noise = torch.randn(weight.shape, generator=generator) * weight.float().std()
            f.tensors[name] = (weight.float() + 0.05 * noise).to(weight.dtype)


def _one_value(value: float) -> Callable[[Files], None]:
    def change(f: Files) -> None:
        f["W_out"][3, 4] = value

    return change


def _wrong_scale(f: Files) -> None:
    """int8 by rows, whose scales were shifted by one row."""
    weight = f["W_out"].float()
    scale = weight.abs().amax(1, keepdim=True) / 127
    f["W_out"] = ((weight / scale).round() * scale.roll(1, 0)).to(f["W_out"].dtype)


def _untied(f: Files) -> None:
    """The head of a model that ties it, or the tying of one that does not."""
    f.config["tie_word_embeddings"] = not f.config.get("tie_word_embeddings", False)
    f.tensors.pop("lm_head.weight", None)


def _head_of_another(f: Files) -> Any:
    """A head of its own in the file, while the configuration says that it is tied."""
    if not f.config.get("tie_word_embeddings", False):
        return False
    f.tensors["lm_head.weight"] = f["embed"].roll(1, 0).clone()
    return True


def _config(gpt2: dict[str, Any] | None, llama: dict[str, Any] | None) -> Callable[[Files], Any]:
    def change(f: Files) -> Any:
        entries = gpt2 if f.is_gpt2 else llama
        if entries is None:
            return False
        f.config.update(entries)
        return True

    return change


def _half_the_heads(f: Files) -> None:
    if f.is_gpt2:
        f.config["n_head"] //= 2
    else:
        f.config["num_attention_heads"] //= 2
        f.config["num_key_value_heads"] //= 2
        f.config["head_dim"] = 2 * f.config.get(
            "head_dim", f.config["hidden_size"] // f.n_heads // 2
        )


def _short_vocabulary(f: Files) -> None:
    rows = f["embed"].shape[0] * 3 // 4
    f["embed"] = f["embed"][:rows]
    if "lm_head.weight" in f.tensors:
        f.tensors["lm_head.weight"] = f.tensors["lm_head.weight"][:rows]
    f.config["vocab_size"] = rows


def _positions_off(f: Files) -> Any:
    if not f.is_gpt2:
        return False
    f["position"] = f["position"].roll(2, 0)
    return True


def _grouped_heads(f: Files) -> Any:
    """Heads of keys and values in another order, as when groups are expanded by tiling instead of
    repeating.
    """
    if f.is_gpt2:
        return False
    for part in ("W_K", "W_V"):
        weight = f[part]
        heads = int(f.config["num_key_value_heads"])
        f[part] = weight.view(heads, -1, weight.shape[1]).roll(1, 0).reshape(weight.shape)
    return True


def _rotary_layout(f: Files) -> Any:
    """Queries and keys with the pairs of a rotation side by side instead of half a head apart."""
    if f.is_gpt2:
        return False
    for part in ("W_Q", "W_K"):
        weight = f[part]
        heads = int(f.config["num_attention_heads" if part == "W_Q" else "num_key_value_heads"])
        f[part] = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    return True


def _queries_for_keys(f: Files) -> Any:
    if not f.is_gpt2:
        return False
    for part in ("qkv", "b_qkv"):
        q, k, v = f[part].chunk(3, -1)
        f[part] = torch.cat([k, q, v], -1)
    return True


def _gate_for_up(f: Files) -> Any:
    if f.is_gpt2:
        return False
    f["W_in"], f["W_gate"] = f["W_gate"], f["W_in"]
    return True


def _norms_swapped(f: Files) -> None:
    f["ln1"], f["ln2"] = f["ln2"], f["ln1"]


def _final_norm(f: Files) -> None:
    f["final"] = torch.ones_like(f["final"])


def _truncated(f: Files) -> None:
    for name in f.of_layer(f.n_layers - 1):
        del f.tensors[name]


def _one_layer_short(f: Files) -> None:
    _truncated(f)
    f.config["n_layer" if f.is_gpt2 else "num_hidden_layers"] -= 1


def _layer_unread(f: Files) -> None:
    f.config["n_layer" if f.is_gpt2 else "num_hidden_layers"] -= 1


FAULTS = [
    Fault("layers in the wrong order", _swap_layers, ("attn", "mlp", "norm"), (LAYER, LAYER + 1)),
    Fault("a layer twice", _repeat_layer, ("attn", "mlp", "norm"), (LAYER + 1,)),
    Fault("a head zeroed", _dead_head, ("attn",)),
    Fault("heads in another order", _shuffled_heads, ("attn",)),
    Fault("a square matrix transposed", _transposed, ("attn",)),
    Fault("W_out with its sign turned", _times("W_out", -1), ("mlp",)),
    Fault("W_in ×1.1", _times("W_in", 1.1), ("mlp",)),
    Fault("W_O ×1.1", _times("W_O", 1.1), ("attn",)),
    Fault("a norm's gain reset", _fill("ln2", 1), ("norm",)),
    Fault("a norm's gain folded twice", _folded_twice, ("mlp",)),
    Fault("a bias dropped", _fill("b_in", 0), ("mlp",)),
    Fault("norms of attention and MLP swapped", _norms_swapped, ("norm",)),
    Fault("the last norm's gain dropped", _final_norm, ("norm",), ()),
    Fault("rows of the embedding permuted", _rows_permuted, ("embed",), ()),
    Fault("a layer of another revision", _other_revision, ("attn", "mlp")),
    Fault("overflow of fp16", _one_value(float("inf")), ("mlp", str(LAYER))),
    Fault("NaN", _one_value(float("nan")), ("mlp", str(LAYER))),
    Fault("int8 with scales of the wrong rows", _wrong_scale, ("mlp",)),
    Fault(
        "tying of embedding and head turned round",
        _untied,
        ("lm_head", "tie_word_embeddings", "head"),
        (),
    ),
    Fault("a head of its own that is ignored", _head_of_another, ("lm_head",), ()),
    Fault("wrong ε", _config({"layer_norm_epsilon": 1e-3}, {"rms_norm_eps": 1e-3}), ("eps",), ()),
    Fault(
        "wrong rope base",
        _config(None, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        ("rope_parameters", "rope_theta"),
        (),
    ),
    Fault(
        "wrong activation",
        _config({"activation_function": "gelu"}, {"hidden_act": "gelu"}),
        ("activ", "hidden_act"),
        (),
    ),
    Fault(
        "scores not scaled",
        _config({"scale_attn_weights": False}, None),
        ("scale_attn_weights",),
        (),
    ),
    Fault("wrong head count", _half_the_heads, ("n_head", "num_attention_heads", "do not fit"), ()),
    Fault("vocabulary cut", _short_vocabulary, ("vocab_size", "embed", "wte", "token id"), ()),
    Fault("positions off by 2", _positions_off, ("wpe",), ()),
    Fault("grouped heads in the wrong order", _grouped_heads, ("attn",)),
    Fault("rotary halves interleaved", _rotary_layout, ("attn",)),
    Fault("queries for keys", _queries_for_keys, ("attn",)),
    Fault("gate for up", _gate_for_up, ("mlp",)),
    Fault("the last layer's tensors missing", _truncated, ("lacks",), ()),
    Fault("one layer fewer in the configuration", _layer_unread, ("config",), ()),
    Fault("one layer fewer altogether", _one_layer_short, ("n_layer", "num_hidden_layers"), ()),
]


NAMED = {
    "layers in the wrong order": "layers {layer} and {behind} exchanged",
    "a layer twice": "layer {behind} holds what layer {layer} held",
    "a head zeroed": "head 1: all zero",
    "heads in another order": "heads moved by 1",
    "a square matrix transposed": "transposed",
    "W_out with its sign turned": "sign turned",
    "W_in ×1.1": "×1.1",
    "W_O ×1.1": "×1.1",
    "a norm's gain reset": "every number is 1",
    "a norm's gain folded twice": "a factor of its own",
    "a bias dropped": "all zero",
    "norms of attention and MLP swapped": "exchanged",
    "the last norm's gain dropped": "every number is 1",
    "rows of the embedding permuted": "rows moved by 1",
    "a layer of another revision": "moved by 0.0",
    "overflow of fp16": "NaN or Inf",
    "NaN": "NaN or Inf",
    "int8 with scales of the wrong rows": "each row × a factor of its own",
    "tying of embedding and head turned round": "lm_head",
    "a head of its own that is ignored": "lm_head.weight: new",
    "wrong ε": "_eps",
    "wrong rope base": "rope_theta",
    "wrong activation": "act",
    "scores not scaled": "scale_attn_weights True in the baseline, now False",
    "wrong head count": "head",
    "vocabulary cut": "rows",
    "positions off by 2": "rows moved by 2",
    "grouped heads in the wrong order": "heads moved by 1",
    "rotary halves interleaved": "as rotary layouts differ",
    "queries for keys": "in another order: 0 holds what 1 held",
    "gate for up": "exchanged",
    "the last layer's tensors missing": "lacks",
    "one layer fewer in the configuration": "layers that its config.json does not have",
    "one layer fewer altogether": "missing",
}


@dataclass(frozen=True)
class Verdict:
    """What a comparison with the baseline says of a checkpoint: what laws say of it, the layers
    whose tensors they name, and the verdict's own sentence.
    """

    found: bool
    says: str
    layers: tuple[int, ...] = ()
    sentence: str = ""

    def locates(self, fault: Fault) -> bool:
        """Whether it names the fault's part, and no tensor of another layer."""
        return (
            self.found
            and set(self.layers) <= set(fault.layers)
            and any(word in self.says for word in fault.words)
        )


def compare_with(old: Record, folder: Path, before: Path | None = None) -> Verdict:
    """Measure a folder on the baseline's prompts, and compare; before: the baseline's folder, whose
    tensors are read beside the other's.
    """
    try:
        new = streamgauge.measure(folder, rows=rows_to_share(old), neighbours="none")
    except StreamgaugeError as error:
        return Verdict(True, str(error), sentence=str(error))
    compared = differences(old, new)
    changes = before and read_both(open_checkpoint(before), open_checkpoint(folder), old)
    sentence = judge(old, new, compared, changes or None).says
    broken = [line for lines in new.integrity.values() for line in lines]
    if "stream" in new.metadata["failed"]:
        layers = {int(layer) for line in broken for layer in re.findall(r"\.(\d+)\.", line)}
        return Verdict(True, "; ".join(broken), tuple(layers), sentence)
    found = {kind: beyond(own) for kind, own in compared.items()}
    # A configuration that differs explains what else does; then weights; then whatever they do.
    for kind in ("config", "weights", "activations", "predictions", "norms"):
        if found.get(kind):
            named = tuple(sorted({one.layer for one in found[kind] if one.layer is not None}))
            says = "; ".join(map(str, found[kind][:5] + found.get("weights", [])[:5]))
            return Verdict(True, says, named, sentence)
    return Verdict(False, "", sentence=sentence)


def _as(dtype: torch.dtype) -> Callable[[Files], None]:
    def change(f: Files) -> None:
        f.tensors = {name: t.to(dtype) for name, t in f.tensors.items()}

    return change


def _keys_reversed(f: Files) -> None:
    f.tensors = dict(reversed(f.tensors.items()))


def _tied_twice(f: Files) -> Any:
    if not f.config.get("tie_word_embeddings", False):
        return False
    f.tensors["lm_head.weight"] = f["embed"].clone()
    return True


def _more_metadata(f: Files) -> None:
    f.config |= {
        "_name_or_path": "somewhere/else",
        "transformers_version": "4.0.0",
        "use_cache": False,
    }


def reshard(folder: Path, target: Path, parts: int = 3) -> Path:
    """The same checkpoint in several files with an index."""
    files = Files(folder)
    files.write(target)
    (target / "model.safetensors").unlink()
    names = sorted(files.tensors)
    weight_map = {
        name: f"model-{1 + i * parts // len(names):05d}-of-{parts:05d}.safetensors"
        for i, name in enumerate(names)
    }
    for shard in sorted(set(weight_map.values())):
        save_file(
            {n: files.tensors[n] for n in names if weight_map[n] == shard},
            target / shard,
            {"format": "pt"},
        )
    (target / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return target


HARMLESS: dict[str, Callable[[Files], Any]] = {
    "keys in another order": _keys_reversed,
    "stored as bf16": _as(torch.bfloat16),
    "stored as fp16": _as(torch.float16),
    "stored as fp32": _as(torch.float32),
    "a tied head written twice": _tied_twice,
    "other metadata": _more_metadata,
}
