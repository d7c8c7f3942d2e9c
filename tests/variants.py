"""Tiny random models of configurations that change what a model computes, one entry at a time, and
of language models that vision lies beside.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADED = TEXT | {"head_dim": 16}
GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128, "vocab_size": 512}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
FALCON = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512}
FALCON |= {"bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
QWEN_VISION |= {"out_hidden_size": 64}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
GRANITE = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0}
GRANITE |= {"attention_multiplier": 0.5, "logits_scaling": 8.0}
PARTS = {"original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, **PARTS},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **PARTS},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0, **PARTS},
}


def _rope(name: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": name, "rope_theta": 1e4, **more}}


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    return _rope("default", mrope_section=list(sections), **more)


CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2 scale_attn_weights=False": lambda: tf.GPT2Config(**GPT2, scale_attn_weights=False),
    "gpt2 scale_attn_by_inverse_layer_idx": lambda: tf.GPT2Config(
        **GPT2, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt2 reorder_and_upcast_attn": lambda: tf.GPT2Config(**GPT2, reorder_and_upcast_attn=True),
    **{
        f"llama rope {name}": lambda name=name, more=more: tf.LlamaConfig(
            **HEADED, **_rope(name, **more)
        )
        for name, more in ROPES.items()
    },
    "llama biases": lambda: tf.LlamaConfig(**HEADED, attention_bias=True, mlp_bias=True),
    "llama tied": lambda: tf.LlamaConfig(**HEADED, tie_word_embeddings=True),
    "falcon alibi": lambda: tf.FalconConfig(**FALCON, alibi=True),
    "falcon new decoder": lambda: tf.FalconConfig(
        **FALCON, num_kv_heads=2, new_decoder_architecture=True
    ),
    "falcon sequential": lambda: tf.FalconConfig(**FALCON, parallel_attn=False, multi_query=False),
    "gemma2 caps": lambda: tf.Gemma2Config(
        **HEADED,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=4,
        sliding_window=4,
    ),
    "granite multipliers": lambda: tf.GraniteConfig(**TEXT, **GRANITE),
    "mistral sliding window": lambda: tf.MistralConfig(**HEADED, sliding_window=4),
    "cohere logit scale, qk-norm": lambda: tf.CohereConfig(
        **TEXT, logit_scale=0.3, use_qk_norm=True
    ),
    "stablelm qk-norm": lambda: tf.StableLmConfig(**TEXT, qk_layernorm=True, use_qkv_bias=True),
    "phi qk-norm": lambda: tf.PhiConfig(**TEXT, qk_layernorm=True),
    "olmo clipped": lambda: tf.OlmoConfig(**TEXT, clip_qkv=0.5),
    "opt post-norm": lambda: tf.OPTConfig(
        **{k: v for k, v in TEXT.items() if k not in ("intermediate_size", "num_key_value_heads")},
        ffn_dim=128,
        do_layer_norm_before=False,
        word_embed_proj_dim=32,
    ),
    "rwkv rescaled": lambda: tf.RwkvConfig(
        hidden_size=64,
        num_hidden_layers=12,
        attention_hidden_size=64,
        intermediate_size=128,
        vocab_size=512,
        context_length=128,
    ),
    "mistral3, vision beside": lambda: tf.Mistral3Config(
        text_config=tf.MistralConfig(**HEADED),
        vision_config=tf.PixtralVisionConfig(**VISION, head_dim=16),
    ),
    "qwen2.5-vl, vision beside": lambda: tf.Qwen2_5_VLConfig(
        text_config=HEADED | _mrope(2, 3, 3),
        vision_config=QWEN_VISION | {"fullatt_block_indexes": [1]},
    ),
    "qwen3-vl, vision beside": lambda: tf.Qwen3VLConfig(
        text_config=HEADED | _mrope(3, 3, 2),
        vision_config=QWEN_VISION | {"deepstack_visual_indexes": [1]},
    ),
    "gemma3, vision beside": lambda: tf.Gemma3Config(
        text_config=HEADED | {"sliding_window": 8}, vision_config=VISION, mm_tokens_per_image=4
    ),
    "qwen3.5, vision beside": lambda: tf.Qwen3_5Config(
        text_config=HEADED | LINEAR | _mrope(1, 1, 0, partial_rotary_factor=0.25),
        vision_config=QWEN_VISION,
    ),
    "llama4, vision beside": lambda: tf.Llama4Config(
        text_config=HEADED | {"num_local_experts": 4, "intermediate_size_mlp": 128},
        vision_config=VISION
        | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    ),
}


def build(name: str, folder: Path) -> Path:
    """Write a checkpoint of random weights, gains and biases too. Returns its folder."""
    config, generator = CONFIGS[name](), torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = _class_of(config)(config).float().eval()
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def _class_of(config: Any) -> Any:
    """The class with all parts, of a language model that others lie beside."""
    for auto in (tf.AutoModelForImageTextToText, tf.AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ValueError(f"transformers has no model of {type(config).__name__}")


def plain(folder: Path) -> Any:
    """The model as transformers opens it, in fp32, with eager attention."""
    config = tf.AutoConfig.from_pretrained(folder)
    causal = type(config) in tf.AutoModelForCausalLM._model_mapping
    auto = tf.AutoModelForCausalLM if causal else tf.AutoModelForImageTextToText
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    if hasattr(model, "rwkv"):  # which halves weights for fp16's sake, as measuring does not
        model.config.rescale_every = model.rwkv.config.rescale_every = 0
    return model
