"""Changes of a whole checkpoint: other entries of its configuration, for which transformers builds
another skeleton around the same mapped weights, and other tables of tokens and positions.
"""

import contextlib
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamgauge.checkpoints.untrusted import strange
from streamgauge.engine.bridge import without_memory
from streamgauge.engine.mapped import Change, Mapped
from streamgauge.engine.probe import quiet
from streamgauge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# Values that checkpoints really have, by entries of a configuration that conversions lose.
USUAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
        (1e-5, 1e-6),
    ),
    **dict.fromkeys(
        ("hidden_act", "hidden_activation", "activation_function"),
        ("silu", "gelu", "gelu_pytorch_tanh", "relu"),
    ),
    "scale_attn_weights": (True, False),
    "scale_attn_by_inverse_layer_idx": (True, False),
    "attn_logit_softcapping": (None, 50.0),
    "final_logit_softcapping": (None, 30.0),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
}
ROPE_BASES = (1e4, 1e5, 5e5, 1e6)
ROPE_FACTORS = (4.0, 8.0)
SAME = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh", "swish": "silu"}
POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)\.weight$")
STEPS = {"position": (1, -1, 2, -2), "token": (1, -1)}  # rows by which tables are moved


@dataclass(frozen=True)
class Variant:
    """A change by its name. entries: of the configuration. change: of tables. scale: what embedded
    tokens are multiplied by.
    """

    name: str
    entries: dict[str, Any] = field(default_factory=dict)
    change: Change | None = None
    scale: float = 1.0


def variants_of(mapped: Mapped) -> list[Variant]:
    """What can be changed of this model."""
    config = mapped.model.config.get_text_config()
    entries = [*_usual(config), *_rope(config), *_heads(config)]
    named = [Variant(_said(change), change) for change in entries]
    return [*named, *_tables(mapped)]


def _said(change: dict[str, Any]) -> str:
    """As `config.json with rope_theta 10000`."""
    shown = {"rope_parameters": lambda v: ", ".join(f"{k} {x}" for k, x in v.items())}
    parts = [shown[k](v) if k in shown else f"{k} {v}" for k, v in change.items()]
    return f"config.json with {', '.join(parts)}"


def _usual(config: Any) -> Iterator[dict[str, Any]]:
    missing = object()
    for name, values in USUAL.items():
        own = getattr(config, name, missing)
        for value in values if own is not missing else ():
            same = SAME.get(own, own) if isinstance(own, str) else own
            if value != same:
                yield {name: value}
    own = getattr(config, "query_pre_attn_scalar", None)
    value = config.hidden_size // config.num_attention_heads if own else None
    if own != value:
        yield {"query_pre_attn_scalar": value}


def _rope(config: Any) -> Iterator[dict[str, Any]]:
    own = getattr(config, "rope_parameters", None)
    if not isinstance(own, dict) or "rope_theta" not in own:
        return
    for base in ROPE_BASES:
        if base != own["rope_theta"]:
            yield {"rope_parameters": own | {"rope_theta": base}}
    if own.get("rope_type", "default") != "default":
        yield {"rope_parameters": {"rope_theta": own["rope_theta"], "rope_type": "default"}}
        return
    for factor in ROPE_FACTORS:
        yield {"rope_parameters": own | {"rope_type": "linear", "factor": factor}}


def _heads(config: Any) -> Iterator[dict[str, Any]]:
    """Twice as many heads half as wide, and the other way round."""
    try:
        heads = getattr(config, "num_attention_heads", None) or 0
        width = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
        groups = getattr(config, "num_key_value_heads", None)
    except strange():
        return  # layers differ, and the configuration says so
    if not heads:
        return
    own = "n_head" if hasattr(config, "n_head") else "num_attention_heads"
    for double in (True, False):
        if (width if double else heads) % 2 or (groups and not double and groups % 2):
            continue
        change = {own: heads * 2 if double else heads // 2}
        if hasattr(config, "head_dim"):
            change["head_dim"] = width // 2 if double else width * 2
        if groups:
            change["num_key_value_heads"] = groups * 2 if double else groups // 2
        yield change


def _tables(mapped: Mapped) -> Iterator[Variant]:
    model, stored = mapped.model, mapped.stored
    names = {id(module): path for path, module in model.named_modules()}
    embedding = mapped.embedding
    head = f"{names.get(id(model.get_output_embeddings()))}.weight"
    positions = [name for name in stored if POSITIONS.search(name)]
    for what, tables in (("position", positions), ("token", [embedding])):
        for step in STEPS[what] if tables else ():
            rows = f"{step} row{'s' * (abs(step) > 1)}"
            yield Variant(
                f"the {what} table moved by {rows}", change=_moved(mapped, tables[0], step)
            )
    own = head in stored and stored[head].data_ptr() != stored[embedding].data_ptr()
    if own and stored[head].shape == stored[embedding].shape:
        yield Variant("the head tied to the embedding", change=_instead(mapped, head, embedding))
    root = model.config.get_text_config().hidden_size ** 0.5
    yield Variant(f"embedded tokens times {root:.4g}", scale=root)
    yield Variant(f"embedded tokens over {root:.4g}", scale=1 / root)


def _moved(mapped: Mapped, table: str, step: int) -> Change:
    """A table with its rows moved, whatever uses it."""
    import torch

    whole = mapped.stored[table]

    def change(
        name: str, values: "torch.Tensor", rows: "torch.Tensor | None", room: Any
    ) -> "torch.Tensor":
        if mapped.stored[name].data_ptr() != whole.data_ptr():
            return values
        asked = torch.arange(len(whole)) if rows is None else rows.to(whole.device)
        return whole[(asked - step) % len(whole)].to(values.device, values.dtype)

    return change


def _instead(mapped: Mapped, table: str, other: str) -> Change:
    """One table in the place of another."""

    def change(
        name: str, values: "torch.Tensor", rows: "torch.Tensor | None", room: Any
    ) -> "torch.Tensor":
        if name != table:
            return values
        whole = mapped.stored[other]
        found = whole if rows is None else whole[rows.to(whole.device)]
        return found.to(values.device, values.dtype)

    return change


@contextlib.contextmanager
def in_place(mapped: Mapped, variant: Variant) -> Iterator[Mapped]:
    """The model with a variant's entries, tables and scale. Raises CheckpointError where
    transformers can build none.
    """
    if variant.entries:
        yield _skeleton_with(mapped, variant.entries)
        return
    embedding = mapped.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: output * variant.scale)
    try:
        with mapped.changes() as use:
            use(variant.change)
            yield mapped
    finally:
        handle.remove()


def with_attention(mapped: Mapped, implementation: str) -> Mapped | None:
    """The model with transformers' other implementation of attention; None where it has no such
    one, or that cannot do what the configuration asks for.
    """
    plain = mapped.model
    supported = getattr(plain, f"_supports_{implementation}", False)
    capped = getattr(plain.config.get_text_config(), "attn_logit_softcapping", None)
    return _skeleton_with(mapped, {}, implementation) if supported and not capped else None


def _skeleton_with(mapped: Mapped, entries: dict[str, Any], attention: str = "eager") -> Mapped:
    plain = mapped.model
    config = copy.deepcopy(plain.config)
    try:
        for name, value in entries.items():
            setattr(config.get_text_config(), name, value)
        with without_memory():
            skeleton = type(plain)._from_config(config, attn_implementation=attention).eval()
    except strange() as error:
        raise CheckpointError(str(error)) from error
    kept = plain.state_dict(keep_vars=True)
    for name, buffer in plain.named_buffers():
        if name in kept:
            path, _, attribute = name.rpartition(".")
            skeleton.get_submodule(path)._buffers[attribute] = buffer
    other = Mapped(skeleton, mapped.stored, str(mapped.device))
    other.lender = mapped
    return other


def logits_of(mapped: Mapped, ids: "torch.Tensor", every: int = 1) -> "torch.Tensor":
    """Of a plain forward pass, at all positions but the last, or at every so-manyth of them, (rows,
    (positions - 1) // every, d_vocab). Only these are unembedded.
    """
    import torch

    at, head = slice(every - 1, -1, every), mapped.model.get_output_embeddings()
    if head is None:
        raise CheckpointError("it has no unembedding of its own")
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][:, at], *args[1:]))
    try:
        with torch.no_grad():
            output = mapped.model(input_ids=ids, **quiet(mapped.model))
    finally:
        handle.remove()
    logits: torch.Tensor = output.logits.float()
    return logits
