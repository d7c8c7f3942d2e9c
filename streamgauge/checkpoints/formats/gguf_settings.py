"""What a GGUF file says of the function that its model computes, and transformers does not read."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamgauge.checkpoints.converted import Origin
from streamgauge.errors import CheckpointError

# Keys of a file beside those that transformers reads, and what its configurations call them.
SAME: dict[str, tuple[str, ...]] = {
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.sliding_window": ("sliding_window",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_eps"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}
# Keys that say nothing of the function, or nothing that shapes and other keys do not say.
NO_FUNCTION = re.compile(
    r"context_length$|attention\.causal$|vocab_size$|tensor_data_layout$|use_parallel_residual$"
    r"|^feed_forward_length$|nextn_predict_layers$|^rope\."  # read below
)
# Keys that make another function of a model whose configuration has no word for them.
FUNCTION = re.compile(r"softcapping$|_scale$|attention\.scale$|clamp_kqv$|max_alibi_bias$|window$")
ROPE_READ = {"dimension_count", "freq_base", "freq_base_swa", "scale_linear"}
ROPE_READ |= {"scaling.type", "scaling.factor", "scaling.finetuned"}
# Keys of a kind of scaling beside those, and what transformers calls them.
ORIGINAL = {"scaling.original_context_length": "original_max_position_embeddings"}
ROPE_KINDS: dict[str, dict[str, str]] = {
    "linear": ORIGINAL,
    "yarn": ORIGINAL
    | {"scaling.yarn_beta_fast": "beta_fast", "scaling.yarn_beta_slow": "beta_slow"},
}
ROPE_FACTORS, LONG_FACTORS = "rope_freqs.weight", "rope_factors_long.weight"
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8192}
# llama.cpp knows the largest Gemmas by their depth, and scales their attention by d_model over
# n_heads.
LARGEST_GEMMAS = {"gemma2": 46, "gemma3": 62}


@dataclass(frozen=True)
class Settings:
    """What is read of a file. fields: its keys. names: of its tensors. factors: of rotary
    frequencies, by the tensor that holds them.
    """

    name: str
    architecture: str
    fields: dict[str, Any]
    names: set[str]
    factors: dict[str, np.ndarray]
    in_parts: bool


def complete(config: Any, file: Settings, origin: Origin) -> None:
    """Let a configuration say what the file says and transformers did not read of it.

    Raises CheckpointError for what changes the function and cannot be said.
    """
    from transformers.integrations import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    arch, text, fields = file.architecture, config.get_text_config(), file.fields
    if file.in_parts and text.model_type not in ("falcon", "bloom"):
        config.tie_word_embeddings = "output.weight" not in file.names  # transformers saw one part
    if arch in LARGEST_GEMMAS and fields.get(f"{arch}.block_count") == LARGEST_GEMMAS[arch]:
        text.query_pre_attn_scalar = text.hidden_size // text.num_attention_heads
    if arch in GGUF_CONFIG_ARCHS:
        return  # read as a whole
    biased = [f"attn_{part}.bias" for part in ("q", "output")]
    if all(any(name.endswith(bias) for name in file.names) for bias in biased):
        text.attention_bias = True
    read = set(GGUF_CONFIG_MAPPING.get(text.model_type.removesuffix("_text"), ()))
    for key in [key for key in fields if key.startswith(f"{arch}.")]:
        short, value = key.removeprefix(f"{arch}."), fields[key]
        called = next((name for name in SAME.get(short, ()) if hasattr(text, name)), None)
        if short in read or NO_FUNCTION.search(short):
            continue
        if called:
            setattr(text, called, value)
        elif FUNCTION.search(short) and value:
            raise _unheeded(file, f"{key} = {value}")
        else:
            origin.done += f"; nothing reads its {key} = {str(value)[:60]}"
    _complete_rope(text, file)


def _unheeded(file: Settings, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file.name} has {what}, which transformers does not read from GGUF: it would "
        "run another function; name the checkpoint that the file was made of."
    )


def _complete_rope(config: Any, file: Settings) -> None:
    """Rotary positions: their base, how many dimensions they turn, and how they are scaled, by keys
    or by a factor for each frequency, of which those of Llama 3 are told.
    """
    arch = f"{file.architecture}.rope."
    said = {k.removeprefix(arch): v for k, v in file.fields.items() if k.startswith(arch)}
    every = getattr(config, "rope_parameters", None)
    if not every:
        return
    rope = every.get("full_attention", every)  # where kinds of layers have their own
    if "freq_base" in said:
        rope["rope_theta"] = float(said["freq_base"])
    if "freq_base_swa" in said and "sliding_attention" in every:
        every["sliding_attention"]["rope_theta"] = float(said["freq_base_swa"])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = said.get("dimension_count", head)
    if "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = turned / head
    elif turned != head:
        raise _unheeded(file, f"{arch}dimension_count = {turned} of heads of {head}")
    factor = said.get("scaling.factor", said.get("scale_linear"))
    kind = str(said.get("scaling.type", "none" if factor in (None, 1.0) else "linear"))
    if kind in ROPE_KINDS:
        rope |= {"rope_type": kind, "factor": float(factor or 1.0)}
        rope |= {name: said[key] for key, name in ROPE_KINDS[kind].items() if key in said}
    elif kind != "none":
        raise _unheeded(file, f"{arch}scaling.type = {kind}")
    known = {*ROPE_READ, *ROPE_KINDS.get(kind, {})}
    for key in sorted(set(said) - known):
        if said[key] != 1.0:  # factors of 1 change nothing
            raise _unheeded(file, f"{arch}{key} = {said[key]}")
    if LONG_FACTORS in file.factors:
        raise _unheeded(file, f"a tensor {LONG_FACTORS}")
    factors = file.factors.get(ROPE_FACTORS)
    if factors is not None and not _as_llama_3(config, rope, factors):
        raise _unheeded(file, f"factors in {ROPE_FACTORS} that are not Llama 3's")


def _as_llama_3(config: Any, rope: dict[str, Any], factors: np.ndarray) -> bool:
    """Let a configuration scale frequencies as Llama 3 does, where that gives these factors."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if np.allclose(factors, 1):
        return True
    plain = rope["rope_theta"] ** -(np.arange(len(factors)) / len(factors))
    for factor in (8.0, 16.0, 32.0, 64.0):
        rope |= {"rope_type": "llama3", "factor": factor, **LLAMA_3}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        if len(scaled) == len(plain) and np.allclose(plain / scaled.numpy(), factors, rtol=1e-4):
            return True
    return False
