"""Names of tensors, and what they say of where a tensor belongs."""

import re

LAYER = re.compile(r"\.(?:h|layers?|blocks?)\.(\d+)\.")

# What lies beside a language model.
BESIDE = re.compile(r"vision|visual|image|audio|speech|multi_modal|projector")


def layer_of(name: str) -> int | None:
    """The layer in a tensor's name, None where it has none."""
    found = LAYER.search(f".{name}")
    return int(found.group(1)) if found else None


def role_of(name: str) -> str:
    """A tensor's name with N for the number of its layer: what it is in every layer."""
    return LAYER.sub(".N.", f".{name}", count=1)[1:]


def block_of(name: str) -> str | None:
    """The path of the block that a tensor lies in, as `model.layers.3`; None outside of blocks."""
    found = LAYER.search(f".{name}")
    return f".{name}"[1 : found.end() - 1] if found else None


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to, by its name."""
    inside = LAYER.sub(".", f".{name}").lower()
    if any(word in inside for word in ("norm", "ln_", "ln1", "ln2")):
        return "norm"
    if layer_of(name) is None:
        return "head" if "head" in inside or "embed_out" in inside else "embed"
    return "attn" if "att" in inside else "mlp"
