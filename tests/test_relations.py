"""What turned one tensor into another: every relation made and told, and what is none of them."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from streamgauge.compare.matching import matched_names
from streamgauge.compare.relations import relation
from streamgauge.compare.tensors import Tensors, compare_tensors

DICE = np.random.default_rng(0)
A = (0.02 * DICE.normal(size=(96, 64))).astype(np.float32)
GAIN = (1 + 0.1 * DICE.normal(size=64)).astype(np.float32)
EXPERTS = DICE.normal(size=(8, 16, 16)).astype(np.float32)
SQUARE = A[:64]
BASIS = np.linalg.qr(DICE.normal(size=(64, 64)))[0].astype(np.float32)
Change = Callable[[np.ndarray], np.ndarray]


def changed(place: object, value: object) -> Change:
    """A copy in which something stands otherwise."""

    def change(a: np.ndarray) -> np.ndarray:
        b = a.copy()
        b[place] = value(a) if callable(value) else value  # type: ignore[index]
        return b

    return change


def in_flat(start: int, stop: int, value: object) -> Change:
    def change(a: np.ndarray) -> np.ndarray:
        b = a.copy()
        b.reshape(-1)[start:stop] = value(a.reshape(-1)) if callable(value) else value
        return b

    return change


def fp8(a: np.ndarray) -> np.ndarray:
    return a.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def to_blocks(a: np.ndarray, levels: int) -> np.ndarray:
    """Rounded in blocks of 32, as GGUF's simplest formats are."""
    blocks = a.reshape(-1, 32)
    step = np.abs(blocks).max(1, keepdims=True) / levels
    return (np.round(blocks / step) * step).reshape(a.shape).astype(np.float32)


def low_rank(rank: int) -> np.ndarray:
    left, right = DICE.normal(size=(96, rank)), DICE.normal(size=(rank, 64))
    return (0.001 * left @ right).astype(np.float32)


TOLD: dict[str, tuple[np.ndarray, Change, str, str]] = {
    "nothing": (A, np.copy, "same", "unchanged"),
    "bf16": (A, lambda a: a.astype(ml_dtypes.bfloat16), "rounded to a dtype", "bfloat16"),
    "fp16": (A, lambda a: a.astype(np.float16), "rounded to a dtype", "float16"),
    "a factor": (A, lambda a: a * np.float32(1.1), "factor", "×1.1"),
    "a factor behind FP8": (A, lambda a: fp8(a * 676.7), "factor", "rounded to about 3 bits"),
    "a sign": (A, np.negative, "sign", "sign turned"),
    "FP8 with a scale": (A, lambda a: fp8(a * 77) / 77, "few bits", "rounded, off by 0.02"),
    "eight bits": (A, lambda a: to_blocks(a, 127), "few bits", "rounded, off by 0.005"),
    "four bits": (A, lambda a: to_blocks(a, 7), "few bits", "rounded, off by 0.09"),
    "one added": (GAIN, lambda g: g + 1, "offset", "every number larger by 1"),
    "one added in bf16": (
        GAIN.astype(ml_dtypes.bfloat16),
        lambda g: g + ml_dtypes.bfloat16(1),
        "offset",
        "every number larger by 1",
    ),
    "reset": (GAIN, np.ones_like, "constant", "every number is 1"),
    "all zero": (A, np.zeros_like, "zero", "all zero"),
    "rows moved": (A, lambda a: np.roll(a, 1, 0), "order", "rows moved by 1"),
    "rows moved back": (A, lambda a: np.roll(a, -3, 0), "order", "rows moved by -3"),
    "rows shuffled": (A, lambda a: a[DICE.permutation(96)], "order", "all 96 rows there"),
    "columns shuffled": (A, lambda a: a[:, DICE.permutation(64)], "order", "all 64 columns"),
    "two rows": (A, changed([3, 9], lambda a: a[[9, 3]]), "order", "rows 3 and 9 exchanged"),
    "heads": (
        A,
        lambda a: a.reshape(6, 16, 64)[[0, 2, 1, 3, 5, 4]].reshape(96, 64),
        "order",
        "heads in another order: 1 holds what 2 held, 2 holds what 1 held",
    ),
    "interleaved": (
        A,
        lambda a: a.reshape(6, 2, 8, 64).swapaxes(1, 2).reshape(96, 64),
        "order",
        "the pairs of each block of 16 rows side by side",
    ),
    "apart again": (
        A,
        lambda a: a.reshape(6, 8, 2, 64).swapaxes(1, 2).reshape(96, 64),
        "order",
        "half a block apart",
    ),
    "experts": (
        EXPERTS,
        changed([1, 2], lambda e: e[[2, 1]]),
        "order",
        "experts 1 and 2 exchanged",
    ),
    "an expert": (EXPERTS, changed(5, 0), "rows", "1 of 8 experts differ (5): all zero"),
    "transposed": (SQUARE, lambda a: a.T.copy(), "transposed", "transposed"),
    "rotated": (A, lambda a: a @ BASIS, "rotated", "rows keep their lengths and angles"),
    "rotated in fp16": (
        A.astype(np.float16),
        lambda a: (a.astype(np.float32) @ BASIS).astype(np.float16),
        "rotated",
        "rows keep their lengths",
    ),
    "rotated from the left": (SQUARE, lambda a: BASIS @ a, "rotated", "columns keep their lengths"),
    "a gain folded": (A, lambda a: a * GAIN, "columns scaled", "each column × a factor of its own"),
    "rows scaled": (A, lambda a: a * np.linspace(0.5, 2, 96)[:, None], "rows scaled", "0.5 to 2"),
    "rows scaled, rounded": (
        A,
        lambda a: to_blocks(a, 127) * np.linspace(0.5, 2, 96, dtype=np.float32)[:, None],
        "rows scaled",
        "of it left over",
    ),
    "centred": (A, lambda a: a - a.mean(1, keepdims=True), "centred", "each row less its mean"),
    "a row": (A, changed(5, 0), "rows", "1 of 96 rows differ (5): all zero"),
    "a column": (A, changed((slice(None), 7), lambda a: 3 * a[:, 7]), "rows", "(7): ×3"),
    "a head": (A, changed(slice(16, 32), 0), "rows", "head 1: all zero"),
    "a page": (A, in_flat(100, 1124, 0), "range", "(4,096 bytes) are zero"),
    "most of it": (A, in_flat(100, 5000, 0), "range", "4,900 numbers from [1, 36] on"),
    "a page of its own": (
        A,
        in_flat(2100, 3124, lambda flat: flat[100:1124]),
        "range",
        "hold what those from [1, 36] on held",
    ),
    "one number": (A, changed((3, 4), 7.5), "numbers", "one number, at [3, 4]"),
    "one bit": (A, changed((3, 4), lambda a: -a[3, 4]), "numbers", "one bit turned"),
    "rotary layout, eight bits": (
        A,
        lambda a: to_blocks(a.reshape(6, 8, 2, 64).swapaxes(1, 2).reshape(96, 64), 127),
        "order",
        "half a block apart, as rotary layouts differ, and rounded",
    ),
    "columns shuffled, four bits": (
        A,
        lambda a: to_blocks(a[:, DICE.permutation(64)], 7),
        "order",
        "all 64 columns there, in another order, and rounded",
    ),
    "rows shuffled, some of them zero, eight bits": (
        np.vstack([A, np.zeros((8, 64), np.float32)]),
        lambda a: to_blocks(a[DICE.permutation(104)] + np.float32(1e-30), 127),
        "order",
        "all 104 rows there, in another order, and rounded",
    ),
    "half of it zero": (
        A,
        lambda a: a * (DICE.random(a.shape) < 0.5).astype(np.float32),
        "pruned",
        "of its numbers are zero now",
    ),
    "an adapter": (A, lambda a: a + low_rank(3), "low rank", "by a matrix of about rank 3"),
    "an adapter in bf16": (
        A.astype(ml_dtypes.bfloat16),
        lambda a: (a.astype(np.float32) + low_rank(2)).astype(a.dtype),
        "low rank",
        "by a matrix of about rank 2",
    ),
    "NaN": (A, changed((1, 1), np.nan), "not finite", "1 of 6,144 numbers are NaN or Inf"),
}


@pytest.mark.parametrize("name", TOLD)
def test_every_relation_is_told(name: str) -> None:
    old, change, kind, says = TOLD[name]
    found = relation(old, change(old), 16)
    assert found.kind == kind and says in found.says, found
    assert found.is_same == (kind in ("same", "rounded to a dtype"))


@pytest.mark.parametrize(
    ("old", "change", "size"),
    [
        (A, lambda a: a + 0.001 * DICE.normal(size=a.shape).astype(np.float32), 0.05),
        (A, lambda a: 0.02 * DICE.normal(size=a.shape).astype(np.float32), 1.41),
        (A, lambda a: a * (1 + 0.05 * DICE.normal(size=a.shape).astype(np.float32)), 0.05),
        (GAIN, lambda g: g + 0.1 * DICE.normal(size=64).astype(np.float32), 0.1),
        (SQUARE, lambda a: (a + a.T) / 2, 0.7),
    ],
)
def test_what_is_none_of_them_is_said_to_have_moved(
    old: np.ndarray, change: Change, size: float
) -> None:
    new = change(old)
    found = relation(old, new, 16)
    assert found.kind == "moved", found
    exact = np.linalg.norm(new.astype(float) - old) / np.linalg.norm(old.astype(float))
    assert found.size == pytest.approx(exact, rel=1e-6)
    assert found.size == pytest.approx(size, rel=0.2)
    assert f"moved by {exact:.3g} times its norm" in found.says


def test_the_size_is_that_of_all_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are divided."""
    monkeypatch.setattr("streamgauge.compare.relations.CHUNK", 1000)
    new = A * GAIN
    found = relation(A, new)
    assert found.kind == "columns scaled"
    assert found.size == pytest.approx(np.linalg.norm(new - A) / np.linalg.norm(A), rel=1e-6)
    cosine = float((new * A).sum() / np.linalg.norm(new) / np.linalg.norm(A))
    assert found.cosine == pytest.approx(cosine, rel=1e-6)


def test_odd_arrays_end_in_no_traceback() -> None:
    """Counters, empty tensors, integers, NaN on both sides, what overflows and what vanishes."""
    count = np.array(100, np.int64)
    assert relation(count, count).is_same and not relation(count, count + 1).is_same
    empty = np.zeros((0, 4), np.float32)
    assert relation(empty, empty).is_same
    bad = A.copy()
    bad[2, 2] = np.nan
    assert relation(bad, bad.copy()).is_same
    assert relation(bad, 1.5 * bad).kind == "not finite"
    assert "finite now" in relation(bad, A).says
    assert not relation(A, np.zeros(A.shape, np.int8)).is_same
    with np.errstate(over="ignore"):
        assert not relation(A * 1e7, (A * 1e7).astype(np.float16)).is_same
    assert not relation(A * 1e-9, (A * 1e-9).astype(np.float16)).is_same
    one, other = (DICE.integers(0, 2, (64, 1024)).astype(bool) for _ in range(2))
    assert relation(one, other).kind == "moved"


@pytest.mark.parametrize("value", [3e38, 1e30, -3e38])
def test_one_enormous_number_beside_noise_ends_in_a_sentence(value: float) -> None:
    noisy = A + 0.001 * DICE.normal(size=A.shape).astype(np.float32)
    noisy[3, 4] = value
    for dtype in (np.float32, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            found = relation(A.astype(dtype), noisy.astype(dtype))
        assert found.kind in ("moved", "low rank") and found.size > 1e20


def test_a_difference_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tables are not held a second time."""
    whole = relation(A, A + low_rank(3))
    monkeypatch.setattr("streamgauge.compare.relations.CHUNK", 640)
    assert relation(A, A + low_rank(3)).kind == whole.kind == "low rank"
    turned = to_blocks(A[DICE.permutation(96)], 127)
    assert "all 96 rows there" in relation(A, turned).says


def test_rows_that_are_lost_or_twice_are_no_order() -> None:
    for order in (np.maximum(np.arange(96) - 1, 0), DICE.integers(0, 96, 96)):
        assert "all 96 rows there" not in relation(A, A[order]).says


def test_a_range_is_looked_for_in_time() -> None:
    """Of numbers that stand everywhere, as those of few bits do."""
    few = (DICE.integers(-2, 3, (512, 1024)) / 4).astype(np.float32)
    new = few.copy()
    new.reshape(-1)[100:200_100] = few.reshape(-1)[300_000:500_000]
    found = relation(few, new)
    assert "hold what those from [292, " in found.says


# ---- Which tensor is which


def tensors(**arrays: np.ndarray) -> Tensors:
    named = {name.replace("__", "."): values for name, values in arrays.items()}
    return Tensors({name: x.shape for name, x in named.items()}, named.__getitem__)


def says(old: Tensors, new: Tensors) -> dict[str, str]:
    return {c.name: c.relation.says for c in compare_tensors(old, new) if not c.relation.is_same}


def test_a_wrapper_s_prefix_is_no_difference() -> None:
    ends = [f"layers.{n}.mlp.up.weight" for n in range(3)] + ["embed_tokens.weight", "norm.weight"]
    inside = [f"model.language_model.{end}" for end in ends] + ["lm_head.weight"]
    plain = [f"model.{end}" for end in ends] + ["lm_head.weight"]
    wanted = dict(zip(inside, plain, strict=True))
    assert matched_names(inside, plain) == wanted
    beside = [*inside, *(f"model.vision_tower.layers.{n}.mlp.up.weight" for n in range(2))]
    assert matched_names(beside, plain) == wanted
    assert matched_names(["h.0.w", "wte.weight"], ["transformer.h.0.w", "transformer.wte.weight"])
    assert matched_names(["a.weight"], ["b.weight"]) == {}
    old = [f"model.layers.{n}.block_sparse_moe.gate.weight" for n in range(4)]
    new = [name.replace("block_sparse_moe", "mlp") for name in old]
    assert matched_names(old, new) == dict(zip(old, new, strict=True))


def test_rows_that_both_tables_have_are_compared() -> None:
    old, table = tensors(embed=A), np.vstack([A, A[:4]])
    assert says(old, tensors(embed=table)) == {
        "embed": "shape [96, 64] in the baseline, now [100, 64]; the 96 rows that both have: "
        "unchanged"
    }
    table = table.copy()
    table[7] = 0
    (line,) = says(old, tensors(embed=table)).values()
    assert line.endswith("the 96 rows that both have: 1 of 96 rows differ (7): all zero")


def test_tensors_put_together_or_written_twice_are_the_same() -> None:
    parts = tensors(h__0__q=A, h__0__k=A[:32], h__0__v=2 * A[:32], embed=SQUARE)
    whole = tensors(h__0__qkv=np.vstack([A, A[:32], 2 * A[:32]]), embed=SQUARE)
    assert says(parts, whole) == {"h.0.qkv": "the same numbers as h.0.q, h.0.k, h.0.v"}
    assert says(whole, parts) == {"h.0.qkv": "the same numbers as h.0.q, h.0.k, h.0.v"}
    assert says(whole, tensors(h__0__qkv=np.vstack([A, A[:32], A[:32]]), embed=SQUARE))
    assert not says(tensors(embed=A), tensors(embed=A, head=A.copy()))
    assert says(tensors(embed=A), tensors(embed=A, head=2 * A)) == {
        "head": "new, the baseline has none"
    }
    assert says(tensors(embed=A, h__0__w=A), tensors(embed=A)) == {"h.0.w": "missing"}


def test_what_another_tensor_held_is_known_again() -> None:
    layers = {f"h__{n}__w": DICE.normal(size=(32, 32)).astype(np.float32) for n in range(4)}
    turned = layers | {"h__1__w": layers["h__2__w"].astype(np.float16).astype(np.float32)}
    assert says(tensors(**layers), tensors(**turned)) == {"h.1.w": "holds what h.2.w held"}
