"""What turned one tensor into another, told from all its numbers: a factor, an offset, another
order of its rows, a rotation, a range of zeros, rounding …
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from streamgauge.compare.rounding import UNIT

CHUNK = 2**20  # numbers that are taken to fp64 at once
FEW = 0.1  # is left of a difference, relative to the tensor, where it was rounded to few bits
ROUGH = 0.3  # is left of a matrix that was rounded to four bits, at most
MOST = 0.9  # of a tensor's numbers may lie in a range of it that differs
SAMPLE = 2**16  # numbers by whose errors rounding is told
MATCHED = 2**14  # rows at most that are looked for one by one
PROBES = 64  # rows whose angles tell a rotation
RANKS = 64  # of a difference at most that is called low
LISTED = 3  # rows, blocks or numbers that are named
# As numpy calls what safetensors calls otherwise.
UNITS = {
    "float64": UNIT["F64"],
    "float32": UNIT["F32"],
    "float16": UNIT["F16"],
    "bfloat16": UNIT["BF16"],
}
EIGHT_BITS = UNIT["F8_E4M3"]


@dataclass(frozen=True)
class Relation:
    """What became of a tensor.

    kind: one word by which findings are put together (`same`, `rounded`, `factor`, `offset` …);
    says: the sentence; size: ‖new - old‖ / ‖old‖; cosine: of the two as vectors; factor: what every
    number was multiplied by, where that is what happened; inner: of `rows` the kind of what became
    of them.
    """

    kind: str
    says: str
    size: float
    cosine: float = 1.0
    factor: float | None = None
    inner: str = ""

    @property
    def is_same(self) -> bool:
        """Whether nothing but the rounding of a dtype happened."""
        return self.kind in ("same", "rounded to a dtype")


@dataclass(frozen=True)
class _Moments:
    """Sums over all numbers of two tensors and of their difference, in fp64."""

    old: float
    new: float
    both: float
    moved: float
    total_moved: float
    count: int

    @property
    def size(self) -> float:
        if self.old == 0:
            return float(self.new > 0)
        return float(np.sqrt(self.moved / self.old))

    @property
    def cosine(self) -> float:
        length = np.sqrt(self.old * self.new)
        return float(self.both / length) if length else float(self.old == self.new)


def relation(old: np.ndarray, new: np.ndarray, d_head: int = 0) -> Relation:
    """How a tensor of the old checkpoint became that of the new, of the same shape.

    Both as their files hold them, so that what a dtype rounds is told from what is not rounding.
    d_head: how many rows, or columns, are one head, where they are.
    """
    old, new = np.atleast_1d(old), np.atleast_1d(new)
    same = Relation("same", "unchanged", 0.0)
    if old.dtype == new.dtype and np.array_equal(old, new):
        return same
    if _is_cast(old, new):
        return Relation("rounded to a dtype", f"the same as {new.dtype}", _moments(old, new).size)
    if not np.isfinite(new).all() or not np.isfinite(old).all():
        # NaN equals nothing, itself included.
        is_same = old.dtype == new.dtype and old.tobytes() == new.tobytes()
        return same if is_same else _not_finite(old, new)
    moments = _moments(old, new)
    base = Relation("moved", _moved(moments), moments.size, moments.cosine)
    if not moments.old or not moments.new:
        says = "all zero" if not moments.new else "was all zero"
        return replace(base, kind="zero" if not moments.new else "moved", says=says)
    for told in _TOLD:
        found = told(old, new, moments)
        if found is not None:
            return _with_heads(replace(base, **found), d_head)
    return base


def _with_heads(found: Relation, d_head: int) -> Relation:
    """Rows and columns by the heads that they are."""
    if d_head < 2:
        return found

    def shifted(match: re.Match[str]) -> str:
        by = int(match.group(1))
        return match.group() if by % d_head else f"heads moved by {by // d_head}"

    def whole(match: re.Match[str]) -> str:
        first, last = int(match.group(1)), int(match.group(2)) + 1
        if first % d_head or last % d_head:
            return match.group()
        heads = range(first // d_head, last // d_head)
        return f"head {heads[0]}" if len(heads) == 1 else f"heads {heads[0]} to {heads[-1]}"

    says = re.sub(rf"blocks of {d_head} (?:row|column)s", "heads", found.says)
    says = re.sub(r"(?:row|column)s moved by (-?\d+)", shifted, says)
    says = re.sub(r"[\d,]+ of [\d,]+ (?:row|column)s differ \((\d+) to (\d+)\)", whole, says)
    return replace(found, says=says)


def unit(*arrays: np.ndarray) -> float:
    """Unit roundoff of the coarsest dtype; 8-bit floats have that of E4M3."""
    return max(UNITS.get(str(array.dtype), EIGHT_BITS) for array in arrays)


Told = dict[str, Any] | None  # of `Relation`: what a relation says, None where it is not the one


def _is_cast(old: np.ndarray, new: np.ndarray) -> bool:
    """Whether one is the other rounded to its dtype."""
    if old.dtype == new.dtype or not (_is_float(old) and _is_float(new)):
        return False
    # What overflowed, or fell to zero altogether, is another tensor.
    if np.isfinite(old).all() != np.isfinite(new).all() or old.any() != new.any():
        return False
    with np.errstate(over="ignore"):
        return bool(
            np.array_equal(old.astype(new.dtype), new) or np.array_equal(new.astype(old.dtype), old)
        )


def _is_float(array: np.ndarray) -> bool:
    """Whether it holds floats; those of ml_dtypes are of numpy's kind V."""
    return array.dtype.kind in "fV"


def _moments(old: np.ndarray, new: np.ndarray) -> _Moments:
    sums = np.zeros(5)  # in the order of the fields
    before, after = old.reshape(-1), new.reshape(-1)
    for start in range(0, before.size, CHUNK):
        a, b = (x[start : start + CHUNK].astype(np.float64) for x in (before, after))
        d = b - a
        sums += [a @ a, b @ b, a @ b, d @ d, d.sum()]
    one, other, both, moved, total_moved = map(float, sums)
    return _Moments(one, other, both, moved, total_moved, before.size)


def _moved(moments: _Moments) -> str:
    return f"moved by {moments.size:.3g} times its norm, cosine {moments.cosine:.3f}"


def _not_finite(old: np.ndarray, new: np.ndarray) -> Relation:
    places = np.argwhere(~np.isfinite(new))
    if not len(places):
        return Relation("not finite", "held NaN or Inf, and is finite now", float("nan"), 0.0)
    said = f"the first at {_place(places[0])}"
    says = f"{len(places):,} of {new.size:,} numbers are NaN or Inf, {said}"
    if not np.isfinite(old).all():
        says += "; the baseline has some too"
    return Relation("not finite", says, float("nan"), float("nan"))


def _place(index: np.ndarray) -> str:
    return f"[{', '.join(str(int(n)) for n in index)}]"


def _constant(old: np.ndarray, new: np.ndarray, moments: _Moments) -> Told:
    first = new.flat[0]
    if new.size > 1 and (new == first).all() and not (old == old.flat[0]).all():
        return {"kind": "constant", "says": f"every number is {float(first):.4g}"}
    return None


def _somewhere(old: np.ndarray, new: np.ndarray, moments: _Moments) -> Told:
    """A change of a few numbers, of a range of them, or of few rows or columns."""
    differs = (old != new).reshape(-1)
    count = int(differs.sum())
    if count > MOST * differs.size:
        return None
    first, last = int(differs.argmax()), differs.size - 1 - int(differs[::-1].argmax())
    if count == 1:
        return _one_number(old, new, first)
    is_range = 2 * count > last - first + 1 and last - first + 1 < MOST * differs.size
    width = old.shape[-1]
    if is_range and (old.ndim < 2 or first % width or (last + 1) % width):
        return _range(old, new, first, last) or _order(old, new, moments) or _rest(old, first, last)
    if count > differs.size // 2:
        return None
    if old.ndim < 2:
        return {"kind": "numbers", "says": f"{count:,} of {old.size:,} numbers differ"}
    return _few_rows(old, new, "row") or (
        _few_rows(old.T, new.T, "column") if old.ndim == 2 else None
    )


def _one_number(old: np.ndarray, new: np.ndarray, flat: int) -> Told:
    before, after = old.flat[flat], new.flat[flat]
    place = _place(np.array(np.unravel_index(flat, old.shape)))
    says = f"one number, at {place}: {float(before):.4g} in the baseline, now {float(after):.4g}"
    if old.dtype == new.dtype:
        bits = int.from_bytes(before.tobytes(), "little") ^ int.from_bytes(
            after.tobytes(), "little"
        )
        says += ", one bit turned" if bits.bit_count() == 1 else ""
    return {"kind": "numbers", "says": says}


def _range(old: np.ndarray, new: np.ndarray, first: int, last: int) -> Told:
    numbers = last - first + 1
    own = new.reshape(-1)[first : last + 1]
    start = _place(np.array(np.unravel_index(first, old.shape)))
    where = f"{numbers:,} numbers from {start} on ({numbers * new.dtype.itemsize:,} bytes)"
    if not own.any():
        return {"kind": "range", "says": f"{where} are zero"}
    if (own == own[0]).all():
        return {"kind": "range", "says": f"{where} are all {float(own[0]):.4g}"}
    flat = old.reshape(-1)
    for at in _places(flat, own):
        if np.array_equal(flat[at : at + numbers], own):
            other = _place(np.array(np.unravel_index(int(at), old.shape)))
            return {"kind": "range", "says": f"{where} hold what those from {other} on held"}
    return None


def _places(flat: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Where numbers may stand in a tensor: where some of them do, the first thousand places."""
    room = flat.size - len(own) + 1
    places = np.arange(room)
    for offset in np.unique(np.linspace(0, len(own) - 1, 16).astype(int)):
        places = places[flat[places + offset] == own[offset]]
    return places[:1000]


def _rest(old: np.ndarray, first: int, last: int) -> Told:
    """A range of which no more is known."""
    start = _place(np.array(np.unravel_index(first, old.shape)))
    size = (last - first + 1) * old.dtype.itemsize
    says = f"{last - first + 1:,} numbers from {start} on ({size:,} bytes) differ, and nothing else"
    return {"kind": "range", "says": says}


def _few_rows(old: np.ndarray, new: np.ndarray, word: str) -> Told:
    """Where less than half of the rows (or of the experts of a batch) differ: which, and how."""
    word = "expert" if old.ndim > 2 and word == "row" else word
    one, other = old.reshape(len(old), -1), new.reshape(len(new), -1)
    rows = np.flatnonzero((one != other).any(1))
    if len(rows) > len(one) // 2:
        return None
    where = f"{len(rows):,} of {len(one):,} {word}s differ ({_numbers(rows)})"
    order = _permutation(one[rows], other[rows])
    if order is not None and _is_order(order):
        whole = np.arange(len(one))
        whole[rows] = rows[order]
        return {"kind": "order", "says": _say_order(whole, word)}
    held = _permutation(one, other[rows])
    if held is not None:
        says = f"{where}: they hold what {word}s {', '.join(map(str, held[:LISTED]))} held"
        return {"kind": "order", "says": says}
    inner = relation(one[rows], other[rows])
    says = inner.says if inner.kind != "numbers" else "in single numbers"
    if inner.kind == "rows":  # whose numbers would be those of another count
        says = f"moved by {inner.size:.3g} times their norm"
    return {"kind": "rows", "says": f"{where}: {says}", "inner": inner.kind}


def _numbers(rows: np.ndarray) -> str:
    """Which rows: a stretch of them, or the first."""
    if len(rows) > LISTED and rows[-1] - rows[0] + 1 == len(rows):
        return f"{rows[0]} to {rows[-1]}"
    return ", ".join(map(str, rows[:LISTED])) + (" …" if len(rows) > LISTED else "")


def _factor(old: np.ndarray, new: np.ndarray, moments: _Moments) -> Told:
    times = moments.both / moments.old
    rest = moments.new - times * moments.both  # ‖new - times old‖²
    left = float(np.sqrt(max(rest, 0.0) / moments.new))
    if left > FEW or abs(times - 1) < 3 * left or abs(times - 1) < unit(old, new):
        return None
    rounded = ""
    if left > 2 * unit(old, new):
        rounded = f", {left:.2g} of it left over"
        if _looks_rounded(old, new, times):
            rounded = f", rounded to about {_bits(left)} bits"
    sign = "sign turned" if times < 0 else ""
    says = ", ".join(word for word in (sign, f"×{times:.4g}" if times != -1 else "") if word)
    return {"kind": "sign" if times < 0 else "factor", "says": says + rounded, "factor": times}


def _bits(left: float) -> int:
    """Of a mantissa, rounding to which is off by so much, root mean square: a step of 2^-bits of
    the power of two below, uniform, over numbers that are 1.5 times that on average.
    """
    return max(0, round(float(-np.log2(left * np.sqrt(12) * 1.5))))


def _dead_lines(old: np.ndarray, new: np.ndarray, moments: _Moments) -> Told:
    """Rows or columns that are zero and were not, whatever happened to the others."""
    if old.ndim != 2:
        return None
    for axis, word in ((1, "row"), (0, "column")):
        dead = np.flatnonzero(~new.any(axis) & old.any(axis))
        if len(dead):
            count = new.shape[1 - axis]
            says = f"{len(dead):,} of {count:,} {word}s differ ({_numbers(dead)}): all zero"
            return {"kind": "rows", "says": f"{says}, and others moved as well", "inner": "zero"}
    return None


def _few_bits(old: np.ndarray, new: np.ndarray, moments: _Moments) -> Told:
    """Rounded to few levels."""
    if moments.size > FEW * 3 or not _looks_rounded(old, new):
        return None
    return {"kind": "few bits", "says": f"rounded, off by {moments.size:.3g} times its norm"}


def _looks_rounded(old: np.ndarray, new: np.ndarray, times: float = 1.0) -> bool:
    """Whether the new is so many times the old, and within blocks of 32 the error is as uniform as
    rounding makes it, of its own size or relative to each number's power of two.
    """
    if old.ndim < 2 or old.shape[-1] < 32:
        return False
    rows = old.reshape(-1, old.shape[-1]), new.reshape(-1, new.shape[-1])
    # A few thousand blocks tell the two apart.
    some = np.unique(np.linspace(0, len(rows[0]) - 1, max(1, SAMPLE // old.shape[-1])).astype(int))
    a, b = (x[some].astype(np.float64) for x in rows)
    a *= times
    width = a.shape[1] // 32 * 32
    a, d = a[:, :width].reshape(-1, 32), (b - a)[:, :width].reshape(-1, 32)
    sizes = np.log2(np.maximum(np.abs(a), np.sqrt((a**2).mean()) / 256))
    # Numbers were scaled before they were rounded, and the powers of two with them.
    relative = (d / 2.0 ** np.floor(sizes + shift) for shift in np.arange(8) / 8)
    return bool(LEAST < min(map(_kurtosis, (d, *relative))) < UNIFORM)


# Of 32 uniform numbers the fourth moment over the squared second is 1.8 on average, of Gaussian
# ones 2.8: the middle tells them apart by many blocks.
UNIFORM = 2.3
LEAST = 1.5  # a step of one size for all numbers, as Adam's first, has 1


def _kurtosis(blocks: np.ndarray) -> float:
    squares = blocks * blocks
    second = squares.mean(1)
    moved = second > 0
    if not moved.any():
        return float("inf")
    return float(((squares * squares).mean(1)[moved] / second[moved] ** 2).mean())


def _offset(old: np.ndarray, new: np.ndarray, moments: _Moments) -> Told:
    added = moments.total_moved / moments.count
    left = moments.moved - moments.count * added**2
    scale = float(np.sqrt((moments.old + moments.new) / moments.count))
    if moments.count < 2 or abs(added) < 4 * unit(old, new) * scale:
        return None
    if np.sqrt(max(left, 0.0) / moments.count) > max(0.01 * abs(added), 2 * unit(old, new) * scale):
        return None
    if left >= moments.new - moments.both**2 / moments.old:
        return None  # a factor leaves less
    word = "larger" if added > 0 else "smaller"
    return {"kind": "offset", "says": f"every number {word} by {abs(added):.4g}"}


def _pruned(old: np.ndarray, new: np.ndarray, moments: _Moments) -> Told:
    """Numbers here and there that are zero now, and nothing else."""
    differs = old != new
    count = int(differs.sum())
    if old.ndim < 2 or new[differs].any():
        return None
    return {"kind": "pruned", "says": f"{count / old.size:.2%} of its numbers are zero now"}


def _low_rank(old: np.ndarray, new: np.ndarray, moments: _Moments) -> Told:
    """Moved by a matrix of low rank, as adapters move it: a few random directions find all of the
    difference, but for what the dtype rounds. Some rows tell whether it can be.

    Source: Halko, Martinsson and Tropp 2011, algorithm 4.1.
    """
    if old.ndim != 2 or min(old.shape) < 8:
        return None
    most = min(RANKS, min(old.shape) // 4)
    # A number was rounded once, by half a unit at most; fp32 makes the rest.
    share = unit(old, new) ** 2 * moments.new / moments.moved + 1e-8
    some = np.random.default_rng(0).choice(len(old), min(2 * RANKS, len(old)), replace=False)
    rows = new[some].astype(np.float64) - old[some].astype(np.float64)
    sizes = np.linalg.eigvalsh(rows @ rows.T)
    if share > 0.25 or sizes[:-most].sum() > 2 * share * sizes.sum():
        return None
    scale = np.float32(np.sqrt(moments.moved / moments.count))  # so that no square overflows
    draws = np.random.default_rng(0).standard_normal((old.shape[1], most + 8), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        found = np.concatenate([d @ draws for _, d in _differences(old, new, scale)])
        if not np.isfinite(found).all():
            return None
        basis = np.linalg.qr(found)[0]
        inside = sum(basis[place].T @ d for place, d in _differences(old, new, scale))
        outside = sum(
            float(np.square(d - basis[place] @ inside, dtype=np.float64).sum())
            for place, d in _differences(old, new, scale)
        )
    if not np.isfinite(inside).all():
        return None
    outside /= moments.count
    # What is left without the smaller ones has to be what rounding leaves.
    squares = np.linalg.svd(inside, compute_uv=False).astype(np.float64) ** 2 / moments.count
    left = outside + np.cumsum(squares[::-1])[::-1]
    rank = int((left > share).sum())
    if not outside <= share or not 0 < rank <= most:
        return None
    return {"kind": "low rank", "says": f"{_moved(moments)}, by a matrix of about rank {rank}"}


def _differences(
    old: np.ndarray, new: np.ndarray, scale: np.float32
) -> Iterator[tuple[slice, np.ndarray]]:
    """What was added, over a scale, in fp32: some rows at a time."""
    rows = max(1, CHUNK // old.shape[1])
    for start in range(0, len(old), rows):
        place = slice(start, start + rows)
        yield place, (new[place].astype(np.float32) - old[place].astype(np.float32)) / scale


def _order(old: np.ndarray, new: np.ndarray, moments: _Moments) -> Told:
    """All rows, or all columns, in another order; of a batch of matrices the matrices."""
    if abs(moments.new / moments.old - 1) > 4 * unit(old, new):
        return None  # no order changes a norm
    word = {1: "number", 2: "row"}.get(old.ndim, "expert")
    rows = _permutation(old.reshape(len(old), -1), new.reshape(len(new), -1))
    if rows is not None and _is_order(rows):
        return {"kind": "order", "says": _say_order(rows, word)}
    if old.ndim == 2:
        columns = _permutation(old.T, new.T)
        if columns is not None and _is_order(columns):
            return {"kind": "order", "says": _say_order(columns, "column")}
    return None


def _order_rounded(old: np.ndarray, new: np.ndarray, moments: _Moments) -> Told:
    """All rows, or all columns, of a matrix in another order and rounded, as of a quantised one
    whose converter put them there.
    """
    if old.ndim != 2 or moments.cosine > 0.99 or max(old.shape) > MATCHED:
        return None
    if abs(moments.new / moments.old - 1) > FEW:
        return None  # no order changes a norm, and rounding does not by much
    for a, b, word in ((old, new, "row"), (old.T, new.T, "column")):
        order = _nearest(a, b)
        if order is None or not _is_order(order) or (order == np.arange(len(order))).all():
            continue
        left = float(np.sqrt(_moments(a[order], b).moved / moments.old))
        if left < ROUGH:
            return {"kind": "order", "says": f"{_say_order(order, word)}, and rounded"}
    return None


def _nearest(old: np.ndarray, new: np.ndarray) -> np.ndarray | None:
    """Which row of the old is the most like each of the new, (rows,), by their angles in a few
    random directions; None where the first rows show that none is like any. Rows of zeros are each
    other's in their order.
    """
    directions = np.random.default_rng(0).standard_normal((old.shape[1], PROBES), np.float32)
    step = max(1, CHUNK // old.shape[1])

    def projected(x: np.ndarray) -> np.ndarray:
        parts = (x[n : n + step].astype(np.float32) for n in range(0, len(x), step))
        return np.concatenate([part @ directions for part in parts])

    one, other = projected(old), projected(new)
    norms = [np.linalg.norm(x, axis=1)[:, None] for x in (one, other)]
    zeros = [np.flatnonzero(norm == 0) for norm in norms]
    if len(zeros[0]) != len(zeros[1]):
        return None
    one, other = (x / np.maximum(norm, 1e-30) for x, norm in zip((one, other), norms, strict=True))
    first = other[norms[1][:, 0] > 0][:PROBES]
    if not len(first) or ((first @ one.T).max(1) < 1 - FEW).any():
        return None
    parts = [other[n : n + PROBES] @ one.T for n in range(0, len(other), PROBES)]
    order = np.concatenate([part.argmax(1) for part in parts])
    order[zeros[1]] = zeros[0]
    return order


def _permutation(old: np.ndarray, new: np.ndarray) -> np.ndarray | None:
    """Where each row of the new was in the old, (rows,); None unless every one is found."""
    if old.dtype != new.dtype:
        coarser = max((old.dtype, new.dtype), key=lambda d: UNITS.get(str(d), EIGHT_BITS))
        old, new = old.astype(coarser), new.astype(coarser)
    for row in new[:: max(1, len(new) // 4)]:  # most are none, and some rows tell
        if not any(np.array_equal(old[n], row) for n in np.flatnonzero(old[:, 0] == row[0])[:64]):
            return None
    places: dict[int, list[int]] = {}
    for n, row in enumerate(old):
        places.setdefault(hash(row.tobytes()), []).append(n)
    found = []
    for row in new:
        own = places.get(hash(row.tobytes()))
        if not own or not np.array_equal(old[own[0]], row):
            return None
        found.append(own.pop(0) if len(own) > 1 else own[0])
    return np.array(found)


def _is_order(found: np.ndarray) -> bool:
    """Whether each row is there once; rows that are alike are told apart by their order."""
    return len(np.unique(found)) == len(found)


def _say_order(order: np.ndarray, word: str) -> str:
    """An order of rows in words: exchanged, moved, blocks of them, or the two halves of each block
    one by one, as rotary layouts differ.
    """
    count = len(order)
    moved = np.flatnonzero(order != np.arange(count))
    if len(moved) == 2:
        return f"{word}s {moved[0]} and {moved[1]} exchanged"
    shifts = np.unique((order - np.arange(count)) % count)
    if len(shifts) == 1:
        by = int(-shifts[0]) % count
        return f"{word}s moved by {by if by <= count // 2 else by - count}"
    block = max(
        (g for g in range(2, count // 2 + 1) if count % g == 0 and _in_blocks(order, g)), default=0
    )
    if block:
        heads = order[::block] // block
        other = np.flatnonzero(heads != np.arange(len(heads)))
        said = ", ".join(f"{n} holds what {heads[n]} held" for n in other[:LISTED])
        more = " …" if len(other) > LISTED else ""
        return f"blocks of {block} {word}s in another order: {said}{more}"
    for size in (g for g in range(4, count + 1, 2) if count % g == 0):
        halves = np.arange(size).reshape(2, -1).T.ravel()
        for pattern, says in ((halves, "side by side"), (np.argsort(halves), "half a block apart")):
            whole = (np.arange(0, count, size)[:, None] + pattern).ravel()
            if np.array_equal(order, whole):
                return f"the pairs of each block of {size} {word}s {says}, as rotary layouts differ"
    return f"all {count:,} {word}s there, in another order"


def _in_blocks(order: np.ndarray, size: int) -> bool:
    """Whether rows keep their places within blocks of a size."""
    return bool(((order.reshape(-1, size) - order[::size, None]) == np.arange(size)).all())


def _turned(old: np.ndarray, new: np.ndarray, moments: _Moments) -> Told:
    if old.ndim == 2 and old.shape[0] == old.shape[1]:
        same = np.array_equal(old.T, new) or _is_cast(old.T, new)
        return {"kind": "transposed", "says": "transposed"} if same else None
    return None


def _centred(old: np.ndarray, new: np.ndarray, moments: _Moments) -> Told:
    """Each row, or each column, less its mean."""
    if old.ndim > 2 or moments.size > 1:
        return None
    a, b = (x.reshape(-1, x.shape[-1]) for x in (old, new))
    for axis, word in ((1, "row"), (0, "column")):
        mean = a.mean(axis, dtype=np.float64, keepdims=True)
        if axis == 0 and len(a) == 1:
            continue  # a vector is one row
        left = 0.0
        for start, (one, other) in _parts(a, b):
            own = mean[start : start + len(one)] if axis else mean
            left += float(((other - (one - own)) ** 2).sum())
        left = float(np.sqrt(left / moments.new))
        if left < 3 * unit(old, new) and left < moments.size / 5:
            return {"kind": "centred", "says": f"each {word} less its mean"}
    return None


def _scaled(old: np.ndarray, new: np.ndarray, moments: _Moments) -> Told:
    """Each row, or each column, by a factor of its own."""
    if old.ndim != 2 or min(old.shape) < 2:
        return None
    for axis, word in ((1, "row"), (0, "column")):
        products = [((a * a).sum(axis), (a * b).sum(axis)) for _, (a, b) in _parts(old, new)]
        own, both = (
            np.concatenate(sums) if axis else np.sum(sums, axis=0)
            for sums in zip(*products, strict=True)
        )
        times = both / np.maximum(own, 1e-300)
        # ‖b - c a‖² = ‖b‖² - c a·b, row by row or column by column.
        left = float(np.sqrt(max(0.0, 1 - (times * both).sum() / moments.new)))
        # Any small move is small: factors must explain it.
        exact = left < 3 * unit(old, new) + 1e-7 and left < moments.size / 5
        # Factors that explain most of a difference, and leave what rounding leaves.
        if exact or left < min(FEW, moments.size / 5):
            says = f"each {word} × a factor of its own, {times.min():.3g} to {times.max():.3g}"
            says += "" if exact else f", {left:.2g} of it left over"
            return {"kind": f"{word}s scaled", "says": says}
    return None


def _parts(old: np.ndarray, new: np.ndarray) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """Rows of two matrices in fp64, as many as there is room for at once, and where they start."""
    rows = max(1, CHUNK // old.shape[1])
    for start in range(0, len(old), rows):
        some = slice(start, start + rows)
        yield start, (old[some].astype(np.float64), new[some].astype(np.float64))


def _rotated(old: np.ndarray, new: np.ndarray, moments: _Moments) -> Told:
    """Rows that keep their lengths and angles, or columns that do."""
    if old.ndim != 2 or moments.cosine > 0.99 or not (_is_float(old) and _is_float(new)):
        return None
    for a, b, word in ((old, new, "rows"), (old.T, new.T, "columns")):
        probes = _probes(len(a))
        one, other = (x[probes].astype(np.float64) for x in (a, b))
        grams = one @ one.T, other @ other.T
        off = float(np.linalg.norm(grams[1] - grams[0]) / np.linalg.norm(grams[0]))
        # Strangers' angles differ by the root of two over the width.
        strangers = np.sqrt(2 * len(probes) / a.shape[1])
        if off < min(6 * unit(old, new), strangers / 10) and a.shape[1] > 1:
            return {"kind": "rotated", "says": f"rotated: {word} keep their lengths and angles"}
    return None


@cache
def _probes(count: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).choice(count, min(PROBES, count), replace=False))


# In this order: what explains a difference exactly goes before what explains most of it.
_TOLD = (
    _constant,
    _somewhere,
    _pruned,
    _offset,
    _factor,
    _order,
    _turned,
    _centred,
    _order_rounded,
    _dead_lines,
    _scaled,
    _low_rank,
    _few_bits,
    _rotated,
)
