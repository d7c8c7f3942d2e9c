"""What undoes the faults that conversions make: for each kind of change in
`streamgauge.numerics.neighbours` what a held block's parts are then.

Each function takes a block's parts and gives new values of some, or nothing where the block has no
such parts.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, permutations
from typing import TYPE_CHECKING

from streamgauge.engine.parts import Parts, Values
from streamgauge.numerics.neighbours import NORMS

if TYPE_CHECKING:
    import torch

SMALL = 1e-3  # of the largest gain, below which one is not divided by
Repair = Callable[[Parts], Values]


def _sign(role: str, parts: Parts) -> Values:
    if role == "W_in" and "W_gate" in parts:
        return {}  # the same function as with W_out's sign turned
    return {role: -parts[role]} if role in parts else {}


def _transposed(role: str, parts: Parts) -> Values:
    square = role in parts and parts[role].shape[0] == parts[role].shape[1]
    return {role: parts[role].T} if square else {}


def _exchanged(pairs: dict[str, str], parts: Parts) -> Values:
    """Parts from others' places, by role, with the biases that all have."""
    needed = {*pairs, *pairs.values()}
    if not needed <= parts.places.keys() or len({parts[role].shape for role in needed}) > 1:
        return {}
    if any(_is_constant(parts[role]) for role in needed):
        return {}  # a gain that was reset: it is lost, and not in another's place
    biases = {_bias(to): _bias(of) for to, of in pairs.items()}
    if {*biases, *biases.values()} <= parts.places.keys():
        pairs = pairs | biases
    return {to: parts[of] for to, of in pairs.items()}


def _is_constant(values: "torch.Tensor") -> bool:
    return bool(values.min() == values.max())


def _gains(one: str, other: str, parts: Parts) -> Values:
    """The gains alone of two norms that have biases as well."""
    if not {one, other, _bias(one), _bias(other)} <= parts.places.keys():
        return {}
    if _is_constant(parts[one]) or _is_constant(parts[other]):
        return {}
    return {one: parts[other], other: parts[one]}


def _bias(role: str) -> str:
    return f"b_{role[2:]}" if role.startswith("W_") else f"{role} bias"


def _by_head(roles: dict[str, int], turn: Callable[["torch.Tensor"], "torch.Tensor"]) -> Repair:
    """Heads in another order. roles: along which axis heads lie; turn: acts on (heads, …)."""

    def change(parts: Parts) -> Values:
        if not parts.n_kv:
            return {}
        values = {}
        for role, axis in roles.items():
            for name in (role, _bias(role)) if axis == 0 else (role,):
                if name in parts:
                    value = parts[name].movedim(axis, 0)
                    heads = value.reshape(-1, parts.d_head, *value.shape[1:])
                    values[name] = turn(heads).reshape(value.shape).movedim(0, axis)
        return values

    return change


def _grouped(tiled: bool, parts: Parts) -> Values:
    """Query heads, and W_O's, from the order in which groups take turns, or into it."""
    group = parts.n_heads // parts.n_kv if parts.n_kv else 0
    if group < 2 or parts.n_kv < 2:
        return {}
    shape = (parts.n_kv, group) if tiled else (group, parts.n_kv)

    def turn(heads: "torch.Tensor") -> "torch.Tensor":
        return heads.reshape(*shape, *heads.shape[1:]).transpose(0, 1)

    return _by_head({"W_Q": 0, "W_O": 1}, turn)(parts)


def _rotary(pairs: bool, parts: Parts) -> Values:
    """The two coordinates that a rotation mixes side by side, or half a head apart."""
    if parts.d_head % 2 or not parts.rotary:
        return {}
    shape = (2, -1) if pairs else (-1, 2)

    def turn(heads: "torch.Tensor") -> "torch.Tensor":
        return heads.reshape(len(heads), *shape, *heads.shape[2:]).transpose(1, 2)

    return _by_head({"W_Q": 0, "W_K": 0}, turn)(parts)


def _gain(norm: str, step: float, parts: Parts) -> Values:
    return {norm: parts[norm] + step} if norm in parts else {}


def _unfolded(role: str, parts: Parts) -> Values:
    """One of the two matrices that read through ln2 without its gain, which conversions fold into
    both or neither; where it is next to nothing nothing can be told of it.
    """
    if not {"W_in", "W_gate", "ln2"} <= parts.places.keys() or _is_constant(parts["ln2"]):
        return {}
    gain = parts["ln2"] + parts.added["ln2"]
    usable = gain.abs() > SMALL * gain.abs().max()
    return {role: parts[role] / gain.where(usable, gain.new_ones(()))}


def _no_gain(norm: str, parts: Parts) -> Values:
    """A gain of 1 where the norm has one: what is stored is less by what the norm adds to it."""
    import torch

    return {norm: torch.full_like(parts[norm], 1 - parts.added[norm])} if norm in parts else {}


REPAIRS: dict[str, Repair] = {
    **{f"{role} sign": partial(_sign, role) for role in ("W_O", "W_in", "W_out")},
    **{
        f"{role} transposed": partial(_transposed, role)
        for role in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out")
    },
    "W_gate W_in": partial(_exchanged, {"W_gate": "W_in", "W_in": "W_gate"}),
    **{
        f"Q K V from {''.join(order)}": partial(
            _exchanged, {f"W_{to}": f"W_{of}" for to, of in zip("QKV", order, strict=True)}
        )
        for order in permutations("QKV")
        if order != tuple("QKV")
    },
    "rotary from pairs": partial(_rotary, False),
    "rotary to pairs": partial(_rotary, True),
    "heads from tiled": partial(_grouped, False),
    "heads to tiled": partial(_grouped, True),
    **{
        f"{what} heads {step}": _by_head(roles, turn)
        for what, roles in (("W_O", {"W_O": 1}), ("W_K and W_V", {"W_K": 0, "W_V": 0}))
        for step, turn in (
            ("up", lambda heads: heads.roll(1, 0)),
            ("down", lambda heads: heads.roll(-1, 0)),
            ("reversed", lambda heads: heads.flip(0)),
        )
    },
    **{
        f"{one} {other}": partial(_exchanged, {one: other, other: one})
        for one, other in combinations(NORMS, 2)
    },
    **{
        f"{one} {other} gains": partial(_gains, one, other) for one, other in combinations(NORMS, 2)
    },
    **{
        f"{norm} gain {step}": partial(_gain, norm, by)
        for norm in NORMS
        for step, by in (("+1", 1.0), ("-1", -1.0))
    },
    **{f"{norm} gain as 1": partial(_no_gain, norm) for norm in NORMS},
    **{f"{role} over ln2": partial(_unfolded, role) for role in ("W_in", "W_gate")},
}


def repaired(kind: str, parts: Parts) -> Values:
    """New values of parts; none where the block has no such parts, or they stay what they are."""
    import torch

    values = REPAIRS[kind](parts)
    changes = any(not torch.equal(value, parts[role]) for role, value in values.items())
    return values if changes else {}


def repairs_of(parts: Parts) -> Iterator[str]:
    """The kinds of change that this block can have and that change something."""
    return (kind for kind in REPAIRS if repaired(kind, parts))
