"""Small random models of real architectures, and a slow reference that reads their streams by plain
forward hooks.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf

from streamgauge.engine.blockwise import Batch, Blockwise, by_layer
from streamgauge.engine.forward import Found, Group, walk
from streamgauge.engine.mapped import Mapped

tf.logging.set_verbosity_error()
tf.utils.logging.disable_progress_bar()

VOCABULARY, WIDTH, HEADS, CONTEXT = 97, 32, 4, 64
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "vocab_size": VOCABULARY}
LLAMA = IDS | {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
}
GROUPED = LLAMA | {"num_key_value_heads": 2}
GPT2 = IDS | {"n_embd": WIDTH, "n_layer": 3, "n_head": HEADS, "n_positions": CONTEXT}
ALTERNATING = {
    "attention_types": [[["global", "local"], 2]],
    "window_size": 8,
    "num_layers": 4,
    "num_heads": HEADS,
    "hidden_size": WIDTH,
}


@dataclass(frozen=True)
class Architecture:
    """A configuration, and where a plain Hugging Face model of it keeps blocks, attention, MLP and
    norms after them.
    """

    config: Callable[[], Any]
    blocks: str
    attn: str
    mlp: str
    post_attn: str | None = None
    post_mlp: str | None = None
    adds_inside: tuple[str, ...] = ()  # sublayers that add the stream to what they write
    multiplier: float = 1.0


def _llama(config: Callable[[], Any], **more: Any) -> Architecture:
    return Architecture(config, "model.layers", "self_attn", "mlp", **more)


SANDWICH = {"post_attn": "post_attention_layernorm", "post_mlp": "post_feedforward_layernorm"}
ARCHITECTURES = {
    "gpt2": Architecture(lambda: tf.GPT2Config(**GPT2), "transformer.h", "attn", "mlp"),
    "gpt-neo": Architecture(
        lambda: tf.GPTNeoConfig(**IDS, **ALTERNATING, max_position_embeddings=CONTEXT),
        "transformer.h",
        "attn",
        "mlp",
    ),
    "gpt-neox-parallel": Architecture(
        lambda: tf.GPTNeoXConfig(**LLAMA, use_parallel_residual=True),
        "gpt_neox.layers",
        "attention",
        "mlp",
    ),
    "gpt-neox-sequential": Architecture(
        lambda: tf.GPTNeoXConfig(**LLAMA, use_parallel_residual=False),
        "gpt_neox.layers",
        "attention",
        "mlp",
    ),
    "gpt-j": Architecture(
        lambda: tf.GPTJConfig(**GPT2, rotary_dim=4), "transformer.h", "attn", "mlp"
    ),
    "opt": Architecture(
        lambda: tf.OPTConfig(**LLAMA, ffn_dim=48, word_embed_proj_dim=WIDTH),
        "model.decoder.layers",
        "self_attn",
        "fc2",
    ),
    "phi": _llama(lambda: tf.PhiConfig(**LLAMA)),
    "llama": _llama(lambda: tf.LlamaConfig(**GROUPED)),
    "mistral": _llama(lambda: tf.MistralConfig(**GROUPED)),
    "qwen2": _llama(lambda: tf.Qwen2Config(**GROUPED)),
    "qwen3": _llama(lambda: tf.Qwen3Config(**GROUPED, head_dim=16)),
    "gemma2": _llama(lambda: tf.Gemma2Config(**GROUPED, head_dim=8), **SANDWICH),
    "gemma3": _llama(lambda: tf.Gemma3TextConfig(**GROUPED, head_dim=8), **SANDWICH),
    "mixtral": _llama(lambda: tf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "falcon": Architecture(
        lambda: tf.FalconConfig(
            **IDS, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS
        ),
        "transformer.h",
        "self_attention",
        "mlp",
    ),
    "phi3": _llama(lambda: tf.Phi3Config(**GROUPED)),
    "bloom": Architecture(
        lambda: tf.BloomConfig(**IDS, hidden_size=WIDTH, n_layer=3, n_head=HEADS),
        "transformer.h",
        "self_attention",
        "mlp",
        adds_inside=("attn_out", "mlp_out"),
    ),
    "mpt": Architecture(
        lambda: tf.MptConfig(**IDS, d_model=WIDTH, n_layers=3, n_heads=HEADS),
        "transformer.blocks",
        "attn",
        "ffn",
        adds_inside=("mlp_out",),
    ),
    "granite": _llama(
        lambda: tf.GraniteConfig(**GROUPED, residual_multiplier=0.22), multiplier=0.22
    ),
    "olmo2": _llama(lambda: tf.Olmo2Config(**GROUPED), **SANDWICH),
}


def random_model(name: str, seed: int = 0) -> Any:
    """A model whose every parameter, gains and biases too, is far from its default."""
    torch.manual_seed(seed)
    model = (
        tf.AutoModelForCausalLM.from_config(
            ARCHITECTURES[name].config(), attn_implementation="eager"
        )
        .float()
        .eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def blockwise(model: Any) -> Blockwise:
    """A model in memory, as checkpoints are measured."""
    return Blockwise(Mapped.of(model))


def bridge(model: Any) -> Any:
    """TransformerLens's raw bridge around a model in memory, by its own means."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


def bridge_mlp(block: Any, x: torch.Tensor) -> torch.Tensor:
    """What a block of a bridge says that its MLP makes of x, through the norm behind it."""
    if block.mlp.name is None:  # OPT keeps the two layers on the block itself
        output = block.mlp.out(block.original_component.activation_fn(getattr(block.mlp, "in")(x)))
    elif "residual" in inspect.signature(block.mlp.original_component.forward).parameters:
        output = block.mlp(x, x.new_zeros(()).expand_as(x))  # BLOOM and MPT add the stream inside
    else:
        output = block.mlp(x)
    output = output[0] if isinstance(output, tuple) else output
    return block.ln2_post(output) if "ln2_post" in block.submodules else output


def measure_group(model: Blockwise, *groups: Group) -> Found:
    """What the last of a few groups finds, after a walk with all of them."""
    walk(model, {str(number): group for number, group in enumerate(groups)})
    return groups[-1].found()


def run(model: Blockwise, ids: Any, hooks: Any = ()) -> Batch:
    """Take rows of one length through all blocks."""
    batch, hooked = model.enter(ids), by_layer(hooks, model.n_layers)
    for layer in range(model.n_layers):
        model.step(batch, layer, hooked[layer])
    return batch


def gpt2(n_layers: int = 12, seed: int = 0) -> Any:
    """A random GPT-2 deep enough for the laws about growth."""
    torch.manual_seed(seed)
    return tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2 | {"n_layer": n_layers})).float().eval()


def save(model: Any, folder: Path) -> Path:
    """Write a checkpoint folder without a tokenizer."""
    model.save_pretrained(folder)
    return folder


def planted_gpt2(rate: float, n_layers: int = 24) -> Any:
    """A random GPT-2 whose biases let every token's norm grow by `rate` a layer.

    All tokens share a direction u; the MLP of layer n adds (rate - 1) · rate^n · size · u, and
    random weights a little.
    """
    model, size = gpt2(n_layers), 10.0
    direction = torch.randn(WIDTH)
    direction = direction - direction.mean()
    direction = direction / direction.norm()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1e-2).add_(size * direction)
        model.transformer.wpe.weight.mul_(1e-2)
        for layer, block in enumerate(model.transformer.h):
            block.attn.c_proj.weight.mul_(1e-3)
            block.mlp.c_proj.weight.mul_(1e-3)
            block.mlp.c_proj.bias.copy_((rate - 1) * rate**layer * size * direction)
    return model


def _first(output: Any) -> torch.Tensor:
    return (
        output[0] if isinstance(output, tuple) else output
    ).clone()  # Falcon adds to it in place


def reference_norms(
    model: Any, name: str, ids: torch.Tensor, *, centred: bool
) -> dict[str, np.ndarray]:
    """Norms of resid_pre, resid_post, attn_out and mlp_out by plain forward hooks, and the block
    influence: (layers, tokens), tokens row by row.
    """
    seen = _reference(model, name, ids)
    n_layers = 1 + max(layer for _, layer in seen)
    vectors = {
        kind: _stacked([seen[kind, n] for n in range(n_layers)], centred)
        for kind in ("resid_pre", "resid_post", "attn_out", "mlp_out")
    }
    cosine = torch.cosine_similarity(vectors["resid_pre"], vectors["resid_post"], dim=-1)
    norms = {kind: x.norm(dim=-1).numpy() for kind, x in vectors.items()}
    return norms | {"block_influence": 1 - cosine.numpy()}


def reference_outputs(
    model: Any, name: str, ids: torch.Tensor
) -> dict[tuple[str, int], torch.Tensor]:
    """What attention ("attn") and MLP ("mlp") of each layer add to the stream, by plain forward
    hooks.
    """
    seen = _reference(model, name, ids)
    return {
        (kind.removesuffix("_out"), layer): x.reshape(*ids.shape, -1)
        for (kind, layer), x in seen.items()
        if "out" in kind
    }


def _reference(model: Any, name: str, ids: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    where = ARCHITECTURES[name]
    seen: dict[tuple[str, int], torch.Tensor] = {}
    handles = []
    for layer, block in enumerate(model.get_submodule(where.blocks)):
        attn = block.get_submodule(where.post_attn or where.attn)
        mlp = getattr(block, where.post_mlp or where.mlp, None) or block.moe

        def keep_input(module: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
            seen["resid_pre", layer] = _first(args or (kwargs["hidden_states"],))

        def keep(kind: str, layer: int = layer) -> Callable[..., None]:
            return lambda module, args, output: seen.__setitem__((kind, layer), _first(output))

        handles.append(block.register_forward_pre_hook(keep_input, with_kwargs=True))
        handles += [
            m.register_forward_hook(keep(k))
            for k, m in (("attn_out", attn), ("mlp_out", mlp), ("resid_post", block))
        ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    for (kind, layer), x in list(seen.items()):
        if kind in ("attn_out", "mlp_out"):
            seen[kind, layer] = x * where.multiplier
    for layer in range(1 + max(layer for _, layer in seen)):
        if "attn_out" in where.adds_inside:
            seen["attn_out", layer] = seen["attn_out", layer] - seen["resid_pre", layer]
        if "mlp_out" in where.adds_inside:
            seen["mlp_out", layer] = (
                seen["mlp_out", layer] - seen["resid_pre", layer] - seen["attn_out", layer]
            )
    return seen


def _stacked(activations: list[torch.Tensor], centred: bool) -> torch.Tensor:
    stacked = torch.stack([x.reshape(-1, x.shape[-1]) for x in activations]).double()
    if centred:
        stacked = stacked - stacked.mean(-1, keepdim=True)
    return stacked
