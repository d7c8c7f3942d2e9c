"""Two checkpoints' tensors, number by number: which is which, and what became of each.

Two tensors are in memory at once, one of each checkpoint.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from streamgauge.compare.matching import matched_names
from streamgauge.compare.relations import Relation, relation, unit
from streamgauge.numerics.names import layer_of, part_of

FUSED = ("qkv", "c_attn", "query_key_value", "Wqkv")
SAMPLES = 64  # numbers by which a tensor is known again
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensors:
    """One checkpoint's tensors: shapes by name, and how one is read as its file holds it.

    d_head: how many rows or columns of an attention matrix a head has, where that is known.
    """

    shapes: Mapping[str, Shape]
    read: Callable[[str], np.ndarray]
    d_head: int | None = None


@dataclass(frozen=True)
class Change:
    """What became of one tensor of the baseline, or of one that it does not have."""

    name: str
    relation: Relation
    shape: Shape = ()

    @property
    def layer(self) -> int | None:
        """Its layer, None outside of blocks."""
        return layer_of(self.name)

    @property
    def part(self) -> str:
        """Its part of the model, as `attn`."""
        return part_of(self.name)

    @property
    def is_matrix(self) -> bool:
        """Whether it is one, or a batch of them; by its name where no shape is known."""
        if self.shape:
            return len(self.shape) > 1
        return self.part != "norm" and not self.name.endswith("bias")

    @property
    def where(self) -> str:
        """Layer, part and name in words."""
        layer = "" if self.layer is None else f"layer {self.layer} "
        return f"{layer}{self.part} {self.name}"

    def __str__(self) -> str:
        return f"{self.where}: {self.relation.says}"


def compare_tensors(
    old: Tensors, new: Tensors, names: Iterable[str] | None = None
) -> Iterator[Change]:
    """Every tensor of the two, as it comes; the ones that only one has at the end.

    names: those of the old, by what shows how far they are.
    """
    pairs = matched_names(old.shapes, new.shapes)
    samples: dict[str, np.ndarray] = {}
    unknown: list[Change] = []
    for name in names or list(old.shapes):
        if name not in pairs:
            continue
        before = old.read(name)
        samples[name] = _sample(before)
        change = _compare(name, before, new.read(pairs[name]), old.d_head)
        # A matrix that moved less than this is no other matrix; gains are all alike.
        if change.relation.kind == "moved" and (before.ndim < 2 or change.relation.size > 0.3):
            unknown.append(change)
        else:
            yield change
    for change in unknown:
        yield _held_elsewhere(change, samples, old, new.read(pairs[change.name]))
    lost = [name for name in old.shapes if name not in pairs]
    extra = [name for name in new.shapes if name not in set(pairs.values())]
    yield from _unmatched(old, new, lost, extra, pairs)


def _compare(name: str, before: np.ndarray, after: np.ndarray, d_head: int | None) -> Change:
    if before.shape != after.shape:
        return Change(name, _resized(before, after), before.shape)
    # Where queries, keys and values are one matrix its rows are not heads of one kind.
    whole = part_of(name) != "attn" or any(word in name for word in FUSED)
    return Change(name, relation(before, after, 0 if whole else d_head or 0), before.shape)


def _resized(before: np.ndarray, after: np.ndarray) -> Relation:
    """A tensor of another shape; of tables with rows of one length, what became of common rows."""
    shapes = f"shape {list(before.shape)} in the baseline, now {list(after.shape)}"
    if before.ndim != 2 or after.ndim != 2 or before.shape[1] != after.shape[1]:
        if before.size == after.size and np.array_equal(before.reshape(-1), after.reshape(-1)):
            return Relation("rounded to a dtype", f"{shapes}, the same numbers", 0.0)
        return Relation("shape", shapes, 1.0, 0.0)
    rows = min(len(before), len(after))
    inner = relation(before[:rows], after[:rows])
    is_longer = len(after) > len(before)
    kind = ("padded" if is_longer else "cut") if inner.is_same else "shape"
    if is_longer and inner.kind in ("moved", "few bits", "low rank", "rows"):
        kind = inner.kind  # of a table that got tokens more while it was trained
    says = f"{shapes}; the {rows:,} rows that both have: {inner.says}"
    return Relation(kind, says, inner.size, inner.cosine, inner=inner.inner)


def _sample(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(-1)
    if not flat.size:
        return np.zeros(SAMPLES)
    places = np.linspace(0, flat.size - 1, SAMPLES).astype(int)
    return np.asarray(flat[places], np.float64)


def _held_elsewhere(
    change: Change, samples: dict[str, np.ndarray], old: Tensors, after: np.ndarray
) -> Change:
    """A tensor that is what another of the baseline was, up to rounding."""
    own = _sample(after)
    size = float(np.linalg.norm(own))
    for name, values in samples.items():
        if old.shapes[name] != change.shape or name == change.name:
            continue
        if np.linalg.norm(values - own) <= max(0.02, 4 * unit(after)) * size:
            told = relation(old.read(name), after)
            if told.is_same or told.size < min(0.05, change.relation.size / 3):
                says = f"holds what {name} held"
                return replace(change, relation=replace(change.relation, kind="held", says=says))
    return change


def _unmatched(
    old: Tensors, new: Tensors, lost: list[str], extra: list[str], pairs: dict[str, str]
) -> Iterator[Change]:
    """Tensors that one of the two alone has: written twice, put together from parts, or gone."""
    lost, extra = list(lost), list(extra)
    for one, single, many, parts in ((new, extra, old, lost), (old, lost, new, extra)):
        for name in list(single):
            found = _parts_of(name, one, many, parts)
            if found:
                single.remove(name)
                for part in found:
                    parts.remove(part)
                says = f"the same numbers as {', '.join(found)}"
                yield Change(name, Relation("fused", says, 0.0), one.shapes[name])
    for name in lost:
        twin = _twin(name, old, old, list(pairs))
        says = f"missing, the same as {twin} in the baseline" if twin else "missing"
        yield Change(name, _alone("missing", says, bool(twin)), old.shapes[name])
    for name in extra:
        twin = _twin(name, new, new, list(pairs.values()))
        says = f"new, the same as {twin}" if twin else "new, the baseline has none"
        yield Change(name, _alone("new", says, bool(twin)), new.shapes[name])


def _alone(kind: str, says: str, is_twin: bool) -> Relation:
    return Relation("same", says, 0.0) if is_twin else Relation(kind, says, 1.0, 0.0)


def _twin(name: str, own: Tensors, other: Tensors, names: list[str]) -> str | None:
    """Another tensor that holds the same, as a tied head does that is written twice."""
    same = [n for n in names if other.shapes[n] == own.shapes[name]]
    if not same or layer_of(name) is not None:
        return None
    values = own.read(name)
    return next((n for n in same if np.array_equal(other.read(n), values)), None)


def _parts_of(name: str, own: Tensors, other: Tensors, names: list[str]) -> tuple[str, ...]:
    """Tensors of the other checkpoint that make up this one, one behind the other."""
    shape, layer = own.shapes[name], layer_of(name)
    if len(shape) > 2:
        return ()
    near = [n for n in names if layer_of(n) == layer and len(other.shapes[n]) == len(shape)]
    for count in (2, 3):
        for some in itertools.permutations(near[:8], count):
            for axis in range(len(shape)):
                if _stacked([other.shapes[n] for n in some], axis) != shape:
                    continue
                whole = np.concatenate([other.read(n) for n in some], axis)
                if np.array_equal(whole, own.read(name)):
                    return some
    return ()


def _stacked(shapes: list[Shape], axis: int) -> Shape | None:
    """The shape of tensors one behind the other along an axis, None where they do not fit."""
    rest = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    if len(rest) > 1:
        return None
    length = sum(shape[axis] for shape in shapes)
    return (*shapes[0][:axis], length, *shapes[0][axis + 1 :])
