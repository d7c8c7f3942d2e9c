"""What a comparison says of two records, computed once more from made-up ones."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from streamgauge.compare import beyond, differences
from streamgauge.compare.activations import compare_activations
from streamgauge.compare.all_kinds import table
from streamgauge.compare.difference import Difference, nearest_layers, summary, verdict
from streamgauge.compare.norms import compare_norms
from streamgauge.compare.predictions import compare_predictions
from streamgauge.compare.weights import compare_weights
from streamgauge.errors import NotApplicable
from streamgauge.numerics.sketches import sketch_of_ones
from streamgauge.record import Record
from tests.records import D_MODEL, N_HEADS, made_up, replaced

N_LAYERS = 11
UNITS = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}


def named(record: Record, dtype: str) -> Record:
    """The record, with the dtype of its tensors, and heads' sketches."""
    tables = [row | {"dtype": dtype} for row in record.metadata["parameters"]]
    dice = np.random.default_rng(11)
    heads = {f"weights/{name}": dice.uniform(1, 2, (N_LAYERS, N_HEADS)) for name in ("W_V", "W_O")}
    heads["sketch/W_Q"] = dice.normal(size=(N_LAYERS, N_HEADS, 16))
    return Record(
        record.arrays | heads,
        record.metadata | {"parameters": tables, "stored_dtype": dtype},
    )


OLD = named(made_up(N_LAYERS), "F32")


def across(vector: np.ndarray) -> np.ndarray:
    """Of the same length, at right angles to it."""
    pairs = vector.reshape(-1, 2)
    return np.stack([-pairs[:, 1], pairs[:, 0]], 1).ravel()


def only(found: list[Difference], name: str, layer: int, head: int | None = None) -> Difference:
    (one,) = [d for d in found if (d.name, d.layer, d.head) == (name, layer, head)]
    return one


# ---- Weights


def allowed_of(dtype: str, numbers: float, norm: float) -> float:
    """One rounding of the coarser dtype, and what fp16 cannot write of small numbers."""
    small = 2.0**-25 * numbers**0.5 / norm if dtype != "F32" else 0.0
    return UNITS[dtype] + small


@pytest.mark.parametrize("dtype", UNITS)
def test_a_tensor_may_move_by_a_rounding_of_the_coarser_dtype(dtype: str) -> None:
    before, norm = OLD.array("sketch/parameters"), OLD.array("sketch/norms")[3]
    after = before.copy()
    after[3] += np.linspace(-1, 1, 16)
    new = replaced(named(OLD, dtype), {"sketch/parameters": after})
    one = only(compare_weights(OLD, new), "h.3.mlp.c_fc.weight", 3)
    sizes = sorted(np.abs(np.linspace(-1, 1, 16)))
    assert one.size == pytest.approx(max(sizes[-4] / 7, sizes[-1] / 40) / norm)
    assert one.allowed == pytest.approx(allowed_of(dtype, D_MODEL**2, norm), rel=1e-12)
    assert one.excess == pytest.approx(one.size / one.allowed)
    others = [d for d in compare_weights(OLD, new) if d.layer != 3]
    assert {d.says for d in others} == {"unchanged"} and not any(d.size for d in others)


@pytest.mark.parametrize("dtype", UNITS)
def test_a_head_may_move_by_two_roundings(dtype: str) -> None:
    moved = OLD.array("sketch/W_Q").copy()
    moved[2, 1] += 1
    new = replaced(named(OLD, dtype), {"sketch/W_Q": moved})
    one, norm = only(compare_weights(OLD, new), "W_Q", 2, 1), OLD.array("weights/W_Q_raw")[2, 1]
    assert one.size == pytest.approx(1 / 7 / norm)
    wanted = UNITS[dtype] + allowed_of(dtype, D_MODEL**2, norm)
    assert one.allowed == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: 1.1 * s[4], "×1.1"),
        (lambda s: -s[4], "sign turned, ×-1"),
        (lambda s: 0 * s[4], "all zero"),
        (lambda s: s[7], "holds what h.7.mlp.c_fc.weight held"),
        (lambda s: s[2], "holds what h.2.mlp.c_fc.weight held"),
        (lambda s: np.nan * s[4], "not finite"),
        (
            lambda s: s[4] + 3,
            f"moved by about {3 / OLD.array('sketch/norms')[4]:.2g} times its norm",
        ),
        (
            lambda s: 676.7 * (s[4] + 0.02 * across(s[4])),
            "×676.7, rounded to few bits",
        ),
        (lambda s: s[4] + 0.25 * sketch_of_ones((D_MODEL, D_MODEL)), "every number larger by 0.25"),
        (lambda s: s[4], "unchanged"),
    ],
)
def test_what_happened_to_a_tensor_is_said(change: Any, says: str) -> None:
    sketches = OLD.array("sketch/parameters").copy()
    sketches[4] = change(sketches)
    new = replaced(OLD, {"sketch/parameters": sketches})
    one = only(compare_weights(OLD, new), "h.4.mlp.c_fc.weight", 4)
    assert one.says == says and one.part == "mlp"
    assert (one.excess > 1) == (says != "unchanged")


def test_tensors_that_only_one_has_are_differences() -> None:
    rows = [dict(row) for row in OLD.metadata["parameters"]]
    rows[1]["name"], rows[2]["shape"] = "h.1.other", [D_MODEL, 8]
    new = Record(OLD.arrays, OLD.metadata | {"parameters": rows})
    found = {d.name: d for d in beyond(compare_weights(OLD, new))}
    assert found["h.1.mlp.c_fc.weight"].says == "missing, the baseline has it"
    assert found["h.1.other"].says == "new, the baseline has none"
    assert found["h.2.mlp.c_fc.weight"].says == "shape (64, 64) in the baseline, now (64, 8)"
    assert {d.excess for d in found.values()} == {2.0} and len(found) == 3


# ---- Norms


@pytest.mark.parametrize("dtype", UNITS)
def test_norms_may_change_by_what_rounding_does_to_them(dtype: str) -> None:
    arrays = {
        "weights/W_out_raw": OLD.array("weights/W_out_raw").copy(),
        "weights/W_OV_spectral": OLD.array("weights/W_OV_spectral").copy(),
    }
    arrays["weights/W_out_raw"][5] *= 1.25
    arrays["weights/W_OV_spectral"][6, 2] *= 0.5
    found = compare_norms(OLD, replaced(named(OLD, dtype), arrays))
    one, norm = only(found, "‖W_out_raw‖", 5), OLD.array("weights/W_out_raw")[5]
    assert one.size == pytest.approx(0.25) and one.part == "mlp"
    assert one.says == f"{norm:.4g} in the baseline, now {1.25 * norm:.4g} (+25.00%)"
    own = 2 * UNITS[dtype] + D_MODEL**0.5 * UNITS["F32"]
    small = 2.0**-25 * 4 * D_MODEL if dtype != "F32" else 0.0
    assert one.allowed == pytest.approx(own + small / norm, rel=1e-12)
    head, before = only(found, "‖W_OV_spectral‖", 6, 2), OLD.array("weights/W_OV_spectral")[6, 2]
    assert head.size == pytest.approx(0.5) and head.part == "attn" and "(-50.00%)" in head.says
    factors = OLD.arrays["weights/W_V"][6, 2] * OLD.arrays["weights/W_O"][6, 2]
    wanted = 2 * own * factors / before + small / before
    assert head.allowed == pytest.approx(wanted, rel=1e-12)


def test_norms_of_tensors_are_compared_too() -> None:
    norms = OLD.array("sketch/norms").copy()
    norms[8] *= 1.5
    one = only(
        compare_norms(OLD, replaced(OLD, {"sketch/norms": norms})), "‖h.8.mlp.c_fc.weight‖", 8
    )
    assert one.size == pytest.approx(0.5) and one.allowed == UNITS["F32"]


# ---- Activations and predictions


def f_quantile(draws: np.ndarray) -> float:
    """Of mean squares, at one false alarm in a thousand comparisons of two models."""
    squares = draws**2
    scatter = max(column.var(ddof=1) / column.mean() ** 2 for column in squares.T)
    freedom = max(1.0, 2 / max(scatter, 1e-3))
    level = 1 - 1e-3 / (3 * (N_LAYERS + 1) + 1)
    return float(stats.f.ppf(level, freedom, len(draws) * freedom))


@pytest.mark.parametrize("dtype", UNITS)
def test_activations_may_change_by_what_rounding_was_seen_to_do(dtype: str) -> None:
    moved = OLD.array("stream/attn_out").copy()
    change = np.where(moved[4] == 0, 0, np.where(np.arange(48) % 2, 0.03, -0.01))
    moved[4] *= np.exp(change)
    found = compare_activations(OLD, replaced(named(OLD, dtype), {"stream/attn_out": moved}))
    one, draws = only(found, "‖attn_out‖", 4), OLD.array("rounding/attn_out")
    size = np.sqrt((change**2).mean())
    assert one.size == pytest.approx(size, rel=1e-5) and one.part == "attn"
    before, after = OLD.array("stream/attn_out")[4].astype(float), moved[4].astype(float)
    single = np.sqrt(np.mean((np.exp(change) - 1) ** 2))
    assert one.says == (
        f"mean norm {before.mean():.4g} in the baseline, now {after.mean():.4g} "
        f"(×{after.mean() / before.mean():.4g}); single tokens change by {single:.2%}, "
        "root mean square over 48"
    )
    weights = 0.0 if dtype == "F32" else UNITS[dtype]
    noise = np.sqrt(weights**2 + D_MODEL * UNITS["F32"] ** 2)
    wanted = np.sqrt(f_quantile(draws) * (draws[:, 4] ** 2).mean()) * noise + 4 * UNITS["F32"]
    assert one.allowed == pytest.approx(wanted, rel=1e-6)
    assert len(found) == 3 * N_LAYERS + 1 and sum(d.size > 0 for d in found) == 1


def test_losses_are_compared_token_by_token() -> None:
    loss = OLD.array("prediction/loss").astype(float)
    change = np.where(np.arange(48) % 6 == 5, 0, np.where(np.arange(48) % 2, 0.3, -0.1))
    first = OLD.array("prediction/first").copy()
    first[:12] = 1
    new = replaced(OLD, {"prediction/loss": loss + change, "prediction/first": first})
    one, tokens = compare_predictions(OLD, new)
    predicted = np.arange(48) % 6 != 5  # nothing is predicted behind the last token of a prompt
    assert one.size == pytest.approx(np.sqrt((change[predicted] ** 2).mean()))
    assert one.says.startswith(
        f"{loss[predicted].mean():.4f} nats in the baseline, "
        f"now {(loss + change)[predicted].mean():.4f}"
    )
    assert one.says.endswith("75.0% of most likely tokens agree")
    draws = OLD.array("rounding/loss")
    noise = D_MODEL**0.5 * UNITS["F32"]
    wanted = np.sqrt(f_quantile(draws) * (draws[:, 0] ** 2).mean()) * noise + 4 * UNITS["F32"]
    assert one.allowed == pytest.approx(wanted, rel=1e-6)
    assert tokens.size == 0 and tokens.says == "8 of 8 prompts of the baseline have the same tokens"


def test_one_prompt_in_other_tokens_is_a_difference() -> None:
    tokens = OLD.array("prediction/token").copy()
    tokens[7] += 1
    one = compare_predictions(OLD, replaced(OLD, {"prediction/token": tokens}))[-1]
    assert one.size == pytest.approx(1 / 8) and one.excess == pytest.approx(2)
    assert one.says == "7 of 8 prompts of the baseline have the same tokens"


def test_a_router_in_another_dtype_has_no_bound() -> None:
    config = OLD.metadata["config"] | {"num_local_experts": 8}
    old = Record(OLD.arrays, OLD.metadata | {"config": config})
    assert compare_activations(old, old)
    with pytest.raises(NotApplicable, match="routers choose other experts"):
        compare_activations(old, named(old, "BF16"))
    one = Record(OLD.arrays, OLD.metadata | {"config": config | {"num_local_experts": 1}})
    assert compare_activations(one, named(one, "BF16"))


# ---- In words


def difference(layer: int | None, size: float, head: int | None = None) -> Difference:
    return Difference("W", "attn", size, 0.5, f"moved by {size}", layer, head)


def test_the_largest_is_said_first_and_the_rest_is_counted() -> None:
    found = [difference(n, size) for n, size in enumerate((0.4, 1.0, 3.0, 0.6, 2.0, 0.5))]
    assert [d.layer for d in beyond(found)] == [2, 4, 1, 3]
    assert summary(found) == (
        "4 of 6 differ, layers 1 to 4: layer 2 attn W: moved by 3.0; layer 4 attn W: moved by 2.0; "
        "layer 1 attn W: moved by 1.0; 1 more"
    )
    assert summary(found[:1]) == "1 compared"
    said = verdict(found)
    assert said["value"] == 6 and len(said["details"]) == 4
    assert nearest_layers(found[2:3]) == "layer 2"
    assert nearest_layers([difference(None, 1)]) == "no layer"
    assert str(difference(3, 1.0, 2)) == "layer 3 attn head 2 W: moved by 1.0"


def test_what_nothing_allows_is_infinite() -> None:
    assert Difference("W", "attn", np.nan, 1.0, "").excess == np.inf
    assert Difference("W", "attn", 1e-30, 0.0, "").excess == np.inf
    assert Difference("W", "attn", 0.0, 0.0, "").excess == 0
    assert len(verdict([difference(0, 1.0 + n) for n in range(60)])["details"]) == 50


def test_a_table_lists_so_many_of_a_kind() -> None:
    found = {"weights": [difference(n, 1.0 + n) for n in range(3)], "norms": [difference(1, 0.1)]}
    lines, differs = table(found, 2)
    assert differs and lines == [
        "weights: 3 of 3 differ, layers 0 to 2",
        "  layer 2 attn W  moved by 3.0  (6.0× what is allowed)",
        "  layer 1 attn W  moved by 2.0  (4.0× what is allowed)",
        "  1 more; --all prints them",
        "norms: 0 of 1 differ; the most: layer 1 attn W: moved by 0.1 (0.2× what is allowed)",
        "not compared, for want of data in one of the two: config, activations, predictions",
    ]
    lines, differs = table({"norms": found["norms"]}, None)
    assert not differs and lines[0].startswith("norms: 0 of 1 differ; the most: layer 1 attn W")
    assert table({"norms": [difference(1, 0.0)]}, None)[0][0] == "norms: 0 of 1 differ"
    assert len(table(found, None)[0]) == 6


def test_a_record_differs_from_itself_in_nothing() -> None:
    found = differences(OLD, OLD)
    assert set(found) == {"config", "weights", "norms", "activations", "predictions"}
    assert not [d for kind in found.values() for d in kind if d.size]
