"""Tensors and heads of two records by their sketches: how far each moved, what it looks like."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from streamgauge.compare.difference import Difference
from streamgauge.compare.matching import with_names_of
from streamgauge.compare.relations import Relation
from streamgauge.compare.rounding import layer_rounding, subnormal, tensor_rounding
from streamgauge.numerics.names import layer_of, part_of
from streamgauge.numerics.sketches import HEADS, factor, moved, sketch_of_ones, surely_moved
from streamgauge.record import Record

FEW_BITS = 2.0**-7  # is left of a difference where a factor was rounded to bf16 or less
SAME = 0.05  # two tensors are one, up to a factor, when less than this is left of their difference


def compare_weights(old: Record, new: Record) -> list[Difference]:
    """Every tensor by its sketch, and heads by theirs.

    Raises NotApplicable where a record has no sketches.
    """
    new = with_names_of(old, new)
    tables = [tensors_of(record) for record in (old, new)]
    rounding = tensor_rounding(old, new)
    found = list(_unmatched(*tables))
    shared = [
        name
        for name in tables[0]
        if name in tables[1] and tables[0][name].shape == tables[1][name].shape
    ]
    for name in shared:
        before, after = tables[0][name], tables[1][name]
        others = {
            n: t.sketch for n, t in tables[0].items() if n != name and t.shape == before.shape
        }
        size, told = _judge(before.sketch, after.sketch, before.norm, others, before.shape)
        allowed = rounding[name] + subnormal(
            rounding[name], float(np.sqrt(np.prod(before.shape))), before.norm
        )
        found.append(
            Difference(
                name,
                part_of(name),
                size,
                allowed if before.norm else 0.5,
                told.says,
                layer_of(name),
                relation=told,
            )
        )
    return found + list(_heads(old, new))


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    norm: float
    sketch: np.ndarray


def tensors_of(record: Record) -> dict[str, _Tensor]:
    """Shape, norm and sketch of each tensor, by name."""
    sketches, norms = record.array("sketch/parameters"), record.array("sketch/norms")
    rows = zip(record.metadata["parameters"], norms, sketches, strict=True)
    return {
        row["name"]: _Tensor(tuple(row["shape"]), float(norm), values) for row, norm, values in rows
    }


def _unmatched(before: dict[str, _Tensor], after: dict[str, _Tensor]) -> Iterator[Difference]:
    """Tensors that only one of the two has, or that have another shape now."""
    for name in sorted(set(before) | set(after)):
        if name not in after:
            kind, says = "missing", "missing, the baseline has it"
        elif name not in before:
            kind, says = "new", "new, the baseline has none"
        elif before[name].shape != after[name].shape:
            kind = "shape"
            says = f"shape {before[name].shape} in the baseline, now {after[name].shape}"
        else:
            continue
        told = Relation(kind, says, 1.0, 0.0)
        yield Difference(name, part_of(name), 1.0, 0.5, says, layer_of(name), relation=told)


def _judge(
    before: np.ndarray,
    after: np.ndarray,
    norm: float,
    others: dict[str, np.ndarray],
    shape: tuple[int, ...] | None = None,
) -> tuple[float, Relation]:
    """Relative difference of two sketches, as it is judged, and what it looks like."""
    size = float(surely_moved(before, after)) / norm if norm else float(np.abs(after).max() > 0)
    if size == 0:
        return size, Relation("same", "unchanged", 0.0)
    kind, says = _looks_like(before, after, norm, others, shape)
    lengths = float(np.linalg.norm(before) * np.linalg.norm(after))
    about = float(moved(before, after)) / norm if norm else 1.0
    cosine = float(before @ after) / lengths if lengths else 0.0
    times = factor(before, after)[0] if kind in ("factor", "sign") else None
    return size, Relation(kind, says, about, cosine, times)


def _looks_like(
    before: np.ndarray,
    after: np.ndarray,
    norm: float,
    others: dict[str, np.ndarray],
    shape: tuple[int, ...] | None,
) -> tuple[str, str]:
    """A relation's kind and its sentence."""
    if not np.isfinite(after).all():
        return "not finite", "not finite"
    if not after.any():
        return "zero", "all zero"
    times, rest = factor(before, after)
    if rest < min(SAME * abs(times), abs(times - 1) / 3):
        rounded = ", rounded to few bits" if rest > FEW_BITS * abs(times) else ""
        says = f"×{times:.4g}{rounded}"
        return ("factor", says) if times > 0 else ("sign", f"sign turned, {says}")
    twin = next((name for name, values in others.items() if _is_same(values, after)), None)
    if twin and rest >= SAME:
        return "held", f"holds what {twin} held"
    if not norm:
        return "moved", "was all zero"
    if shape is not None:
        added, left = factor(sketch_of_ones(shape), after - before)
        if left < SAME * abs(added):
            word = "larger" if added > 0 else "smaller"
            return "offset", f"every number {word} by {abs(added):.4g}"
    return "moved", f"moved by about {float(moved(before, after)) / norm:.2g} times its norm"


def _is_same(before: np.ndarray, after: np.ndarray) -> bool:
    size = float(np.linalg.norm(before))
    return size > 0 and float(np.linalg.norm(after - before)) < SAME * size


def _heads(old: Record, new: Record) -> Iterator[Difference]:
    # A folded matrix carries the error of a gain too.
    by_layer, gains = layer_rounding(old, new), layer_rounding(old, new, "norm")
    for name in HEADS:
        before, after = (record.arrays.get(f"sketch/{name}") for record in (old, new))
        norms = old.arrays.get(f"weights/{name}_raw")
        if before is None or after is None or norms is None or before.shape != after.shape:
            continue
        for layer, head in np.argwhere(~np.isnan(norms)):  # where a layer has such a head
            others = {f"head {h}": before[layer, h] for h in range(norms.shape[1]) if h != head}
            norm, rounding = float(norms[layer, head]), float(by_layer[layer])
            size, told = _judge(before[layer, head], after[layer, head], norm, others)
            # No head has more than d_model² numbers.
            allowed = (
                rounding + float(gains[layer]) + subnormal(rounding, old.metadata["d_model"], norm)
            )
            yield Difference(
                name, "attn", size, allowed if norm else 0.5, told.says, int(layer), int(head)
            )
