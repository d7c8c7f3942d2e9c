"""Curves show the record's numbers: each is computed once more from a made-up record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reports.compared import compared
from reports.curves import line, numbers, quantiles
from reports.figures import figures
from reports.render import badge
from reports.summary import summary
from streamgauge.record import Record
from tests.records import D_MODEL, made_up, replaced

N_LAYERS, WINDOW = 11, [2, 9]
RECORD = replaced(made_up(N_LAYERS), {"weights/ln1_gain": np.ones((N_LAYERS, D_MODEL))})
A = RECORD.arrays
TEXT = (A["stream/position"] > 0) & ~A["stream/is_padding"]
FIRST = A["stream/position"] == 0
PRE, POST, ATTN, MLP = (
    A[f"stream/{name}"] for name in ("resid_pre", "resid_post", "attn_out", "mlp_out")
)
RESID = np.vstack([PRE, POST[-1:]])
SHADED = {  # figures over a law's window
    "Residual stream": "residual/growth_rate",
    "Growth factor": "residual/growth_rate",
    "Correlated or not": "residual/growth_rate",
    "What the sublayers add": "sublayers/both_grow",
    "Attention's weights and output": "attention/ov_growth",
    "MLP on random input": "mlp/random_input_growth",
    "MLP components": "mlp/component_norms",
    "Activation rate": "mlp/activation_rate",
}
LINEAR = {"Ratio to the baseline", "Growth factor", "Layer horizon", "Patching scores of heads"}


def median(norms: np.ndarray, tokens: np.ndarray = TEXT) -> np.ndarray:
    return np.array([np.median(row[tokens]) for row in norms])


def steps(norms: np.ndarray) -> np.ndarray:
    return norms[1:] / norms[:-1]


def whole(name: str) -> np.ndarray:
    """Norm of a layer's heads together, or of its matrix."""
    values = A[f"weights/{name}"]
    return np.array([np.sqrt((layer**2).sum()) for layer in values])


def per_layer(values: np.ndarray) -> np.ndarray:
    """Standard deviations of the stream behind each block over the growth rate to the layer."""
    rate = (np.median(PRE[9, TEXT]) / np.median(PRE[2, TEXT])) ** (1 / 7)
    return median(values) / (D_MODEL**0.5 * rate ** np.arange(1, N_LAYERS + 1))


def entropy_rank(values: np.ndarray) -> float:
    share = values / values.sum()
    return float(np.prod(share**-share))


def mean_loss(name: str) -> np.ndarray:
    return np.average(A[f"horizon/{name}"], axis=-1, weights=A["horizon/tokens"])


def spectral(name: str) -> dict[str, Any]:
    norms, whole = A[f"weights/{name}_spectral"], A[f"weights/{name}_frobenius"]
    rank = [
        np.mean([(f / s) ** 2 for f, s in zip(*rows, strict=True)])
        for rows in zip(whole, norms, strict=True)
    ]
    return {
        f"below σ₁({name}), all heads": norms.min(1),
        f"σ₁({name}), all heads": norms.max(1),
        f"σ₁({name}), mean over heads": [sum(row) / len(row) for row in norms],
        f"stable rank of {name}": rank,
    }


def band(tokens: np.ndarray, share: float) -> list[float]:
    return [np.quantile(row[TEXT], share) for row in tokens]


WEDGE = np.median(RESID[2, TEXT])
# Title, then each curve by name, the lower edge of a region as "below" its name.
CURVES: dict[str, Callable[[], dict[str, Any]]] = {
    "Residual stream": lambda: {
        "below 5% to 95% of tokens": band(RESID, 0.05),
        "5% to 95% of tokens": band(RESID, 0.95),
        "median token": median(RESID),
        "position 0": median(RESID, FIRST),
        "padding": np.median(A["padding/resid"], axis=1),
        "slowest the band allows": [WEDGE * 1.2**n for n in range(8)],
        "fastest the band allows": [WEDGE * 1.4**n for n in range(8)],
    },
    "Growth factor": lambda: {
        "median token": steps(median(RESID)),
        "position 0": steps(median(RESID, FIRST)),
    },
    "What the sublayers add": lambda: {
        "attn_out": median(ATTN),
        "mlp_out": median(MLP),
        "resid_pre": median(PRE),
    },
    "Correlated or not": lambda: {
        "below from uncorrelated to fully correlated": per_layer(
            np.sqrt(PRE**2 + ATTN**2 + MLP**2)
        ),
        "from uncorrelated to fully correlated": per_layer(PRE + ATTN + MLP),
        "measured": per_layer(POST),
    },
    "Attention's weights and output": lambda: {
        "heads": A["weights/W_OV_frobenius"].ravel(),
        "‖W_OV‖, mean over heads": [row.mean() for row in A["weights/W_OV_frobenius"]],
        "‖b_O‖": A["weights/b_O"],
        "attn_out, median token": median(ATTN),
        "sum of heads on random input": A["random_input/attn_norm"],
    },
    "MLP on random input": lambda: {
        "random input": A["random_input/mlp_norm"],
        "mlp_out, median token": median(MLP),
    },
    "MLP components": lambda: {
        "‖W_in‖": A["weights/W_in"],
        "‖W_in W_out‖": A["weights/W_in_W_out"],
        "‖b_in W_out‖": A["weights/b_in_W_out"],
        "‖b_out‖": A["weights/b_out"],
        "the stream, for its slope": median(RESID),
    },
    "Activation rate": lambda: {
        "below 5% to 95% of tokens": band(A["neurons/activation_rate"], 0.05),
        "5% to 95% of tokens": band(A["neurons/activation_rate"], 0.95),
        "median token": median(A["neurons/activation_rate"]),
        "random input": A["random_input/mlp_activation_rate"],
        "resampled resid_mid": A["random_input/resampled_activation_rate"],
    },
    "Hidden structure": lambda: {
        "effective rank": [entropy_rank(row) for row in A["neurons/singular_values"]],
        "participation ratio": [
            sum(row**2) ** 2 / sum(row**4) for row in A["neurons/singular_values"]
        ],
    },
    "Reading and writing matrices": lambda: {
        f"‖{name}‖": whole(f"{name}_raw") for name in ("W_Q", "W_K", "W_V", "W_in", "W_O", "W_out")
    },
    "Layer horizon": lambda: {
        "dropped.recomputed.mean.everywhere": mean_loss("loss.dropped.recomputed.mean.everywhere")
    },
    "What each block changes": lambda: {
        "below 5% to 95% of tokens": band(A["stream/block_influence"], 0.05),
        "5% to 95% of tokens": band(A["stream/block_influence"], 0.95),
        "median token": median(A["stream/block_influence"]),
        "rise of the loss without the block": [np.mean(row) for row in A["block_skip/loss"]],
    },
    "What each sublayer is worth": lambda: {
        "without attn_out": A["sublayer_effect/attn_kl"].mean(1),
        "without mlp_out": A["sublayer_effect/mlp_kl"].mean(1),
        "attn_out, scale kept": A["sublayer_effect/attn_frozen_kl"].mean(1),
        "mlp_out, scale kept": A["sublayer_effect/mlp_frozen_kl"].mean(1),
    },
    "Spectral norms of heads": lambda: spectral("W_OV") | spectral("W_QK"),
    "Patching scores of heads": lambda: {"own": A["patching/own"].ravel()},
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Figures by title, of a model all of whose laws have a window and a band."""
    path = tmp_path_factory.mktemp("figures") / "record.safetensors"
    RECORD.save(path)
    row = {"record": str(path), "baseline": None, "band": [1.2, 1.4], "layers": WINDOW}
    rows = [row | {"law": law} for law in sorted(set(SHADED.values()))]
    return {figure["layout"]["title"]["text"]: figure for figure in figures(rows)}


def curves(figure: dict[str, Any]) -> dict[str, Any]:
    """By name; the lower edge of a region is nameless and stands before the upper."""
    found, nameless = {}, None
    for curve in figure["data"]:
        if "name" not in curve:
            nameless = curve
            continue
        if nameless is not None:
            found[f"below {curve['name']}"] = nameless
            assert curve["fill"] == "tonexty" and nameless["showlegend"] is False
            nameless = None
        found[curve["name"]] = curve
    return found


@pytest.mark.parametrize("title", CURVES)
def test_curves_show_the_record(title: str, drawn: dict[str, dict[str, Any]]) -> None:
    found, wanted = curves(drawn[title]), CURVES[title]()
    assert list(found) == list(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name]["y"], values, rtol=1e-4, err_msg=name)


def test_every_figure_is_computed_once_more(drawn: dict[str, dict[str, Any]]) -> None:
    assert set(drawn) == set(CURVES)


@pytest.mark.parametrize("title", CURVES)
def test_curves_stand_at_their_layers(title: str, drawn: dict[str, dict[str, Any]]) -> None:
    special = {
        "slowest the band allows": range(2, 10),
        "fastest the band allows": range(2, 10),
        "heads": np.repeat(range(N_LAYERS), 4),
        "own": A["weights/W_OV_spectral"].ravel(),
        "dropped.recomputed.mean.everywhere": A["horizon/k"],
    }
    for name, curve in curves(drawn[title]).items():
        start = {"Growth factor": 0.5, "Correlated or not": 1}.get(title, 0)
        wanted = special.get(name, np.arange(len(curve["y"])) + start)
        np.testing.assert_allclose(curve["x"], list(wanted), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("title", CURVES)
def test_axes_and_windows(title: str, drawn: dict[str, dict[str, Any]]) -> None:
    layout = drawn[title]["layout"]
    assert (layout["yaxis"].get("type") == "log") == (title not in LINEAR)
    shaded = [shape for shape in layout["shapes"] if shape["type"] == "rect"]
    assert [[s["x0"], s["x1"], s["y0"], s["y1"]] for s in shaded] == (
        [[*WINDOW, 0, 1]] if title in SHADED else []
    )


def test_the_correlation_s_axis_says_what_it_is(drawn: dict[str, dict[str, Any]]) -> None:
    figure = drawn["Correlated or not"]
    assert figure["layout"]["yaxis"]["title"]["text"] == "standard deviation / rate^layer"
    rate = (np.median(PRE[9, TEXT]) / np.median(PRE[2, TEXT])) ** (1 / 7)
    assert (
        figure["read"].startswith("Standard deviation of") and f"by {rate:.4f} to" in figure["read"]
    )


def test_the_band_is_drawn_where_it_is_asked_for(drawn: dict[str, dict[str, Any]]) -> None:
    layout = drawn["Growth factor"]["layout"]
    lines = [shape for shape in layout["shapes"] if shape["type"] == "line"]
    assert [[s["x0"], s["x1"], s["y0"], s["y1"]] for s in lines] == [
        [*WINDOW, 1.2, 1.2],
        [*WINDOW, 1.4, 1.4],
    ]
    inside = steps(median(RESID))[2:9]
    low, high = layout["yaxis"]["range"]
    assert min(0.9, *inside) - 0.1 < low < min(0.9, *inside)
    assert max(1.1, *inside) < high < max(1.1, *inside) + 0.1


def test_the_horizon_s_figure_has_the_model_as_it_is(drawn: dict[str, dict[str, Any]]) -> None:
    (published,) = drawn["Layer horizon"]["data"]
    assert published["visible"] is True  # other variants wait for a click
    (clean,) = drawn["Layer horizon"]["layout"]["shapes"]
    assert clean["y0"] == clean["y1"] == pytest.approx(mean_loss("clean_loss"))
    assert (clean["xref"], clean["x0"], clean["x1"]) == ("paper", 0, 1)


def test_heads_are_named_in_their_order(drawn: dict[str, dict[str, Any]]) -> None:
    for title, name in (
        ("Attention's weights and output", "heads"),
        ("Patching scores of heads", "own"),
    ):
        said = curves(drawn[title])[name]["text"]
        assert said[:5] == [*(f"layer 0, head {h}" for h in range(4)), "layer 1, head 0"]
        assert len(said) == 4 * N_LAYERS


def many_tokens(path: Path) -> dict[str, Any]:
    """The row of a record with enough tokens for histograms."""
    tiled = {
        name: np.tile(values, (1, 4) if values.ndim == 2 else 4)
        for name, values in A.items()
        if name.startswith("stream/")
    }
    Record(tiled, RECORD.metadata).save(path)
    return {"law": "any", "record": str(path), "baseline": None, "band": None, "layers": None}


def test_histograms_count_every_text_token(tmp_path: Path) -> None:
    made = figures([many_tokens(tmp_path / "many.safetensors")])
    (figure,) = [f for f in made if f["layout"]["title"]["text"] == "Norms by layer"]
    assert [c["name"] for c in figure["data"]] == [f"layer {n}" for n in (0, 2, 4, 6, 8, 11)]
    logs = np.log10(RESID[:, TEXT])
    edges = np.array(figure["data"][0]["x"])
    assert edges[0] == pytest.approx(logs[[0, 2, 4, 6, 8, 11]].min(), rel=1e-4) and len(edges) == 60
    width = edges[1] - edges[0]
    for curve in figure["data"]:
        layer = int(curve["name"].split()[1])
        assert sum(curve["y"]) == 4 * TEXT.sum()
        middle = np.average(edges + width / 2, weights=curve["y"])
        assert middle == pytest.approx(logs[layer].mean(), abs=width / 2)
    colours = [curve["line"]["color"] for curve in figure["data"]]
    assert colours[0] == "rgb(210,119,180)" and colours[-1] == "rgb(20,119,180)"


def test_a_figure_is_left_out_where_there_is_nothing_to_draw(tmp_path: Path) -> None:
    kept = {name: values for name, values in A.items() if name.startswith("stream/")}
    path = tmp_path / "stream.safetensors"
    Record(kept, RECORD.metadata).save(path)
    row = {"law": "any", "record": str(path), "baseline": None, "band": None, "layers": None}
    made = figures([row])
    titles = [figure["layout"]["title"]["text"] for figure in made]
    assert titles == [
        "Residual stream",
        "Growth factor",
        "What the sublayers add",
        "Correlated or not",
        "What each block changes",
    ]
    # Nor does this record tell d_model.
    assert made[3]["layout"]["yaxis"]["title"]["text"] == "norm / rate^layer"
    measured = curves(made[3])["measured"]["y"]
    rate = (np.median(PRE[10, TEXT]) / np.median(PRE[0, TEXT])) ** (1 / 10)
    np.testing.assert_allclose(measured, median(POST) / rate ** np.arange(1, 12), rtol=1e-4)
    assert figures([row | {"record": None}]) == figures([row | {"record": "nowhere"}]) == []


# ---- Two models


OTHER = made_up(N_LAYERS, seed=8).arrays


def test_this_model_is_drawn_over_its_baseline_and_not_the_other_way_round() -> None:
    over, ratio = (curves(figure) for figure in compared(A, OTHER))
    before = median(np.vstack([OTHER["stream/resid_pre"], OTHER["stream/resid_post"][-1:]]))
    np.testing.assert_allclose(over["the stream"]["y"], median(RESID), rtol=1e-4)
    np.testing.assert_allclose(over["the stream, baseline"]["y"], before, rtol=1e-4)
    np.testing.assert_allclose(ratio["the stream"]["y"], median(RESID) / before, rtol=1e-4)
    np.testing.assert_allclose(
        ratio["attn_out"]["y"], median(ATTN) / median(OTHER["stream/attn_out"]), rtol=1e-4
    )
    np.testing.assert_allclose(over["‖W_Q‖"]["y"], whole("W_Q_raw"), rtol=1e-4)
    assert (
        over["‖W_OV‖, baseline"]["line"]["dash"] == "dot" and "dash" not in over["‖W_OV‖"]["line"]
    )
    assert list(over)[::2] == list(ratio)


@pytest.mark.parametrize(("part", "drawn"), [(0.9e-3, False), (1.1e-3, True), (-1.1e-3, True)])
def test_what_looks_the_same_is_not_drawn(part: float, drawn: bool) -> None:
    moved = A["weights/W_out_raw"].copy()
    moved[4] *= 1 + part
    found = compared(A | {"weights/W_out_raw": moved}, A)
    assert [list(curves(figure)) for figure in found] == (
        [["‖W_out‖", "‖W_out‖, baseline"], ["‖W_out‖"]] if drawn else []
    )


def test_a_model_of_another_depth_is_compared_where_it_can_be() -> None:
    assert compared(A, made_up(9).arrays) == []


# ---- Pieces


def test_numbers_have_five_digits_and_none_where_there_is_none() -> None:
    values = np.array([123456.0, 1.2345678, 0, np.nan, np.inf])
    assert numbers(values) == [123460.0, 1.2346, 0.0, None, None]


def test_what_was_not_measured_is_left_out_of_a_line() -> None:
    norms = np.array([[1.0, 3.0], [np.nan, np.nan], [5.0, np.nan]])
    np.testing.assert_array_equal(quantiles(norms)[1], [2, np.nan, 5])
    drawn = line(np.arange(3), quantiles(norms)[1], "it", "#000")
    assert drawn["x"] == [0, 2] and drawn["y"] == [2, 5] and drawn["mode"] == "lines+markers"


def outcomes(**count: int) -> list[dict[str, Any]]:
    row = {"model": "it", "law": "a/law", "reason": "why", "source": "", "reproduce": "pytest"}
    return [row | {"outcome": outcome} for outcome, n in count.items() for _ in range(n)]


@pytest.mark.parametrize(
    ("rows", "says", "colour"),
    [
        (
            outcomes(**{"pass": 5, "not_applicable": 3, "known_failure": 1}),
            "5 laws hold",
            "#2e7d32",
        ),
        (outcomes(**{"pass": 5, "fail": 2, "not_applicable": 3}), "2 of 7 fail", "#c62828"),
        (outcomes(**{"pass": 5, "error": 1}), "1 of 6 fail", "#c62828"),
        (outcomes(**{"pass": 4, "fail": 2, "error": 3}), "5 of 9 fail", "#c62828"),
    ],
)
def test_a_badge_counts_what_fails(rows: list[dict[str, Any]], says: str, colour: str) -> None:
    assert says in badge(rows) and colour in badge(rows)


def test_a_summary_counts_each_outcome_in_its_column() -> None:
    rows = outcomes(
        **{"pass": 5, "fail": 2, "error": 1, "unusual": 7, "known_failure": 3, "not_applicable": 4}
    )
    other = [row | {"model": "other"} for row in outcomes(**{"pass": 6})]
    head, line, *cells = summary(rows + other).splitlines()[2:6]
    titles = "holds | fails | not measured | unusual | fails as known | not applicable"
    assert head == f"| model | {titles} |"
    assert cells == ["| it | 5 | 2 | 1 | 7 | 3 | 4 |", "| other | 6 | 0 | 0 | 0 | 0 | 0 |"]
    assert line.count("---:") == 6


def test_a_summary_says_a_cause_once() -> None:
    one = outcomes(**{"error": 1})
    assert "## a/law could not be measured on it" in summary(one)
    two = [*one, one[0] | {"law": "b/law"}, one[0] | {"law": "c/law", "reason": "other"}]
    assert "## 2 laws could not be measured on it" in summary(two)
    assert "## c/law could not be measured on it" in summary(two)
