"""What became of two checkpoints' tensors, put together: one fault is one finding."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from streamgauge.compare.tensors import Change
from streamgauge.numerics.names import layer_of, role_of

NAMED = 2  # tensors that a finding names with what became of them
LISTED = 3  # and without


@dataclass(frozen=True)
class Finding:
    """One thing that happened, to one tensor or to many: its kind (see `Relation`), a sentence, the
    layers, and what it is made of.
    """

    kind: str
    says: str
    changes: tuple[Change, ...]

    @property
    def layers(self) -> list[int]:
        """The layers it is in, in order."""
        return sorted({change.layer for change in self.changes if change.layer is not None})


def findings(changes: list[Change]) -> list[Finding]:
    """What happened, the first of the forward pass first. Tensors that hold what they held are left
    out.
    """
    changed = sorted((c for c in changes if not c.relation.is_same), key=place)
    sizes = _layer_sizes(changes)
    found = _whole_layers(changed)
    taken = {change.name for finding in found for change in finding.changes}
    found += _exchanged([change for change in changed if change.name not in taken])
    taken = {change.name for finding in found for change in finding.changes}
    groups: dict[tuple[str, str], list[Change]] = defaultdict(list)
    for change in changed:
        if change.name not in taken:
            groups[_key(change)].append(change)
    found += [Finding(kind, _say(own, sizes), tuple(own)) for (kind, _), own in groups.items()]
    return sorted(found, key=lambda finding: place(finding.changes[0]))


def place(change: Change) -> tuple[int, int, str]:
    """Where the forward pass comes to a tensor."""
    return place_of(change.layer, change.part, change.name)


def place_of(layer: int | None, part: str, name: str) -> tuple[int, int, str]:
    """Where the forward pass comes to something: the embedding, then layer by layer the first norm,
    attention, the second norm and the MLP, then the last norm and the head.
    """
    if layer is None:
        return (-1, 0, name) if part == "embed" else (10**6, int(part == "head"), name)
    if part == "norm":
        second = any(
            word in name for word in ("ln_2", "ln2", "post_attention", "ffn", "feedforward")
        )
        return (layer, 2 * second, name)
    return (layer, {"attn": 1, "mlp": 3}.get(part, 0), name)


def _layer_sizes(changes: list[Change]) -> dict[int, int]:
    sizes: dict[int, int] = defaultdict(int)
    for change in changes:
        if change.layer is not None:
            sizes[change.layer] += 1
    return sizes


def _key(change: Change) -> tuple[str, str]:
    """By what changes are one: their kind, and the factor or sentence that they share."""
    told = change.relation
    if told.factor is not None:
        return told.kind, f"{told.factor:.3g}"
    return told.kind, told.says if told.kind in ("sign", "transposed", "zero", "offset") else ""


def _exchanged(changed: list[Change]) -> list[Finding]:
    """Tensors that hold what the other held."""
    held = {c.name: c for c in changed if c.relation.kind == "held"}
    found = []
    for name, change in held.items():
        other = held.get(_held_by(change))
        if other is not None and _held_by(other) == name and name < other.name:
            says = f"{change.where} and {other.name} exchanged"
            found.append(Finding("exchanged", says, (change, other)))
    return found


def _held_by(change: Change) -> str:
    """The tensor whose numbers one holds."""
    return change.relation.says.removeprefix("holds what ").removesuffix(" held")


def _whole_layers(changed: list[Change]) -> list[Finding]:
    """Layers all of whose tensors that differ hold what another layer's held."""
    by_layer: dict[int, list[Change]] = defaultdict(list)
    for change in changed:
        if change.layer is not None:
            by_layer[change.layer].append(change)
    held: dict[int, int] = {}
    for layer, own in by_layer.items():
        # Vectors may be alike, or differ too little to be told apart; matrices tell.
        others = {_layer_held(change) for change in own if change.is_matrix}
        if len(others) == 1 and (other := others.pop()) is not None:
            held[layer] = other
    found: list[Finding] = []
    for layer, other in held.items():
        own = by_layer[layer]
        if held.get(other) == layer and layer < other:
            both = tuple(own + by_layer[other])
            found.append(Finding("layers", f"layers {layer} and {other} exchanged", both))
        elif held.get(other) != layer:
            says = f"layer {layer} holds what layer {other} held ({len(own)} tensors)"
            found.append(Finding("layers", says, tuple(own)))
    return found


def _layer_held(change: Change) -> int | None:
    """The layer whose tensor of the same name a tensor holds."""
    if change.relation.kind != "held":
        return None
    other = _held_by(change)
    return layer_of(other) if role_of(other) == role_of(change.name) else None


def _say(own: list[Change], sizes: dict[int, int]) -> str:
    """One finding in words: where, and what."""
    if len(own) == 1:
        return str(own[0])
    said = {change.relation.says for change in own}
    if len(said) == 1 or own[0].relation.factor is not None:
        what = own[0].relation.says
    else:
        first, *rest = (f"{c.where}: {c.relation.says}" for c in own[:NAMED])
        what = "; ".join([first, *rest]) + ("; …" if len(own) > NAMED else "")
        amounts = [c.relation.size for c in own if np.isfinite(c.relation.size)]
        if own[0].relation.kind in ("moved", "few bits") and amounts:
            most = max(own, key=lambda c: c.relation.size)
            word = "moved" if own[0].relation.kind == "moved" else "rounded, off"
            what = (
                f"{word} by {np.min(amounts):.2g} to {np.max(amounts):.2g} times their norms, "
                f"the most {most.where}"
            )
    return f"{_where(own, sizes)}: {what}"


def _where(own: list[Change], sizes: dict[int, int]) -> str:
    """Some tensors in words: all of a layer, one name in many layers, or how many they are."""
    layers = sorted({c.layer for c in own if c.layer is not None})
    outside = sum(c.layer is None for c in own)
    roles = {role_of(c.name) for c in own}
    if len(layers) == 1 and not outside and len(own) <= LISTED:
        return f"layer {layers[0]}, {' and '.join(role.split('.N.')[-1] for role in sorted(roles))}"
    if len(layers) == 1 and not outside:
        count = f"all {len(own)}" if len(own) == sizes[layers[0]] else f"{len(own)}"
        return f"layer {layers[0]}, {count} tensors"
    span = f"{len(layers)} layers" if layers else ""
    if len(layers) == 1:
        span = f"layer {layers[0]}"
    if len(layers) > 1:
        span = f"layers {layers[0]} to {layers[-1]}"
    if len(roles) == 1 and layers:
        return f"{span}, {roles.pop().split('.N.')[-1]} of {len(own)}"
    return (
        f"{len(own)} tensors"
        + (f" of {span}" if span else "")
        + (f" and {outside} outside of them" if outside and span else "")
    )
