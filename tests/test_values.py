"""What each law says, computed once more by another way from made-up numbers.

The record is of a model that nobody claims anything of, and too shallow for what is claimed of all:
phenomena then note every value and assert none. Formulas are those of the laws' docstrings, written
as plainly as they can be.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq

from streamgauge.laws import laws
from streamgauge.numerics.draws import LAWS
from streamgauge.record import Record
from tests.conftest import ROOT, Audit
from tests.records import D_MODEL, DRAWN, DRAWN_ALONE, made_up, replaced, sound_record

N_LAYERS, FIRST, LAST = 11, 2, 9  # 10% to 85% of the depth, ends included
WINDOW = np.arange(FIRST, LAST + 1)
CIRCUIT = ((0, 3), (5, 3), (9, 3))
CIRCUITS = """
[[circuit]]
model = "somebody's"
task = "own"
heads = ["0.3", "5.3", "9.3"]
source = "the test's own"
"""
RECORD = made_up(N_LAYERS)
A = RECORD.arrays
TEXT = (A["stream/position"] > 0) & ~A["stream/is_padding"]
PRE, POST, ATTN, MLP = (
    A[f"stream/{name}"] for name in ("resid_pre", "resid_post", "attn_out", "mlp_out")
)
RESID = np.vstack([PRE, POST[-1:]])
UNIT = 2.0**-24


def slope(values: np.ndarray) -> float:
    """Of the log over the window's layers, by least squares."""
    return float(np.polyfit(WINDOW, np.log(values[WINDOW]), 1)[0])


def text_slope(norms: np.ndarray) -> float:
    """The mean slope of text tokens."""
    return float(np.mean([slope(column) for column in norms[:, TEXT].T]))


def geometric(values: np.ndarray) -> float:
    """Geometric mean."""
    return float(np.prod(values.ravel() ** (1 / values.size)))


def circuit_ratio(values: np.ndarray) -> float:
    """Mean over the circuit's heads over the mean of all others."""
    inside = [values[place] for place in CIRCUIT]
    outside = [values[place] for place in np.ndindex(values.shape) if place not in CIRCUIT]
    return float(np.mean(inside) / np.mean(outside))


def effective_rank(values: np.ndarray) -> float:
    """Exponential of the entropy of singular values."""
    share = values / values.sum()
    return float(np.prod(share**-share))


def horizon(prompts: Any = (0, 1, 2, 3, 4, 5, 6, 7)) -> float:
    """Where the excess loss of some prompts, tokens counted alike, falls to a tenth of a nat."""
    k, weight = A["horizon/k"], A["horizon/tokens"][list(prompts)]
    loss = A["horizon/loss.dropped.recomputed.mean.everywhere"] - A["horizon/clean_loss"]
    excess = np.average(loss[:, list(prompts)], axis=1, weights=weight)
    first = next(n for n in range(len(k)) if excess[n] <= 0.1)
    if first == 0:
        return float(k[0])
    return float(np.interp(-0.1, -excess[[first - 1, first]], k[[first - 1, first]]))


def rises() -> list[float]:
    """Of the loss from one horizon to the next, in standard errors over prompts."""
    steps = np.diff(A["horizon/loss.dropped.recomputed.mean.everywhere"], axis=0)
    return [float(s.mean() / (s.std(ddof=1) / len(s) ** 0.5)) for s in steps]


def steepest() -> str:
    k, loss = A["horizon/k"], A["horizon/loss.dropped.recomputed.mean.everywhere"].mean(1)
    at = rises().index(max(rises()))
    return f"from horizon {k[at]} to {k[at + 1]}: {loss[at + 1] - loss[at]:+.3f} nats"


def counted() -> float:
    """Mean loss below that of counting tokens in the other prompts."""
    tokens = A["prediction/token"].reshape(8, 6)[:, 1:]
    losses = A["prediction/loss"].reshape(8, 6)[:, :-1]
    names, better = set(tokens.ravel()), []
    for prompt in range(8):
        others = np.delete(tokens, prompt, axis=0).ravel().tolist()
        for token, loss in zip(tokens[prompt], losses[prompt], strict=True):
            chance = (others.count(token) + 1) / (len(others) + len(names))
            better.append(-np.log(chance) - loss)
    return float(np.mean(better))


def kl_over_bound(kind: str, name: str) -> np.ndarray:
    """(n_layers, n_pred), one by one."""
    size, share, kl = (A[f"sublayer_effect/{kind}_{of}"] for of in ("size", "share", name))
    row, found = A["sublayer_effect/largest_row"][0], np.empty(size.shape)
    for at in np.ndindex(size.shape):
        left = 1 - 2 * share[at] + size[at] ** 2 / D_MODEL
        scale = 1.0 if name == "frozen_kl" else 2 / (1 + np.sqrt(left))
        slack = 2 * UNIT * (D_MODEL * row * np.sqrt(D_MODEL) + 80)
        found[at] = kl[at] / ((row * size[at] * scale) ** 2 / 2 + slack)
    return found


def influence(layers: slice) -> float:
    """Mean block influence of some layers over text tokens."""
    return float(np.mean(A["stream/block_influence"][layers][:, TEXT]))


def spread() -> float:
    """Widest log ratio of the outer quantiles of text tokens, as a part of all growth."""
    widest = 0.0
    for layer in WINDOW:
        low, high = np.quantile(RESID[layer, TEXT], [0.05, 0.95])
        widest = max(widest, np.log(high / low))
    return float(widest / np.mean(np.log(RESID[LAST, TEXT] / RESID[FIRST, TEXT])))


def bend() -> float:
    """How fast the mean log growth rises, over the steps between layers of the window."""
    steps = np.diff(np.log(RESID[:, TEXT]).mean(1))[FIRST:LAST]
    return float(np.polyfit(WINDOW[:-1] + 0.5, steps, 1)[0])


def left_over() -> np.ndarray:
    """What the law of addition leaves, relative to the raw vectors."""
    products = A["stream/pre_dot_attn"] + A["stream/mid_dot_mlp"]
    left = POST**2 - PRE**2 - ATTN**2 - MLP**2 - 2 * products
    return np.asarray(np.abs(left) / ((PRE + ATTN + MLP) * A["sublayers/raw_norm"]))


def moments() -> list[float]:
    """Both relative to the raw vectors, where these are larger than the centred ones."""
    larger = np.maximum(1, A["sublayers/raw_norm"] / (PRE + ATTN + MLP))
    scale = np.abs((PRE**2 / D_MODEL + 1e-5) / A["stream/ln1_scale"] ** 2 - 1)
    return [np.max(scale / larger), np.max(A["stream/ln1_residual"] / larger)]


def instrument() -> list[float]:
    """Over eight sums of d_model terms, as much as a block enlarges them."""
    allowed = 8 * D_MODEL**0.5 * UNIT * A["instrument/gain"]
    layers = [np.max(A[f"instrument/{name}_error"] / allowed) for name in ("block", "bridge")]
    return [*layers, A["instrument/logits_error"][0] / allowed.sum()]


def scale_errors() -> list[float]:
    errors = [float(A[f"sublayers/{kind}_scale_error"].max()) for kind in ("attn", "mlp")]
    return [*errors, drawn("scale_blindness")]


def drawn(law: str) -> float:
    return float(A[f"draws/{law}"].max())


def over_stream(name: str) -> float:
    return float(np.exp(slope(A[f"weights/{name}"]) - text_slope(RESID)))


def place_of_resampled() -> float:
    firing = A["neurons/activation_rate"][:, TEXT].mean(1)
    resampled, gaussian = (
        geometric((A[f"random_input/{name}_activation_rate"] / firing)[WINDOW])
        for name in ("resampled", "mlp")
    )
    return float(np.log(resampled) / np.log(gaussian))


def heads(name: str) -> np.ndarray:
    return A[f"weights/{name}"]


EFFECTS = [(kind, name) for kind in ("attn", "mlp") for name in ("frozen_kl", "kl")]
VALUES: dict[str, Callable[[], list[Any]]] = {
    "instrument/same_function": instrument,
    "residual/additivity": lambda: [
        A["stream/additivity_error"].max(),
        drawn("additivity"),
    ],
    "residual/moments": moments,
    "residual/growth_rate": lambda: [
        geometric((RESID[LAST] / RESID[FIRST])[TEXT]) ** (1 / (LAST - FIRST))
    ],
    "residual/every_token_grows": lambda: [
        min((RESID[LAST] / RESID[FIRST])[TEXT]) ** (1 / (LAST - FIRST))
    ],
    "residual/exponential": lambda: [
        np.corrcoef(WINDOW, np.log(RESID[:, TEXT]).mean(1)[WINDOW])[0, 1] ** 2
    ],
    "residual/super_exponential": lambda: [bend()],
    "residual/spread": lambda: [spread()],
    "residual/fast_start": lambda: [geometric((RESID[2] / RESID[0])[TEXT])],
    "residual/decrease": lambda: [geometric((RESID[11] / RESID[9])[TEXT]) ** (1 / 2)],
    "residual/padding": lambda: [
        min(geometric(A["padding/resid"][1]), geometric(A["padding/resid"][11]))
        / min(geometric(row) for row in A["padding/resid"][1:])
    ],
    "residual/position_0": lambda: [
        RESID[5, A["stream/is_bos"]].min() / RESID[5, TEXT].max(),
        RESID[11, A["stream/is_bos"]].mean() / max(RESID[:, A["stream/is_bos"]].mean(1)),
    ],
    "sublayers/addition_law": lambda: [left_over().max()],
    "sublayers/contribution_bound": lambda: [
        np.max((np.abs(POST - PRE) - ATTN - MLP) / (PRE + ATTN + MLP))
    ],
    "sublayers/alignment": lambda: [
        geometric((POST / np.sqrt(PRE**2 + ATTN**2 + MLP**2))[FIRST:LAST, TEXT])
    ],
    "sublayers/both_grow": lambda: [np.exp(text_slope(ATTN)), np.exp(text_slope(MLP))],
    "sublayers/scale_blindness": scale_errors,
    "attention/fall_off": lambda: [np.exp(text_slope(ATTN) - text_slope(PRE))],
    "attention/causality": lambda: [
        A["prediction/later_changes"].max(),
        drawn("causality"),
        A["prediction/future_weight"].max(),
        A["prediction/row_sum_error"].max(),
    ],
    "attention/ov_growth": lambda: [
        (heads("W_OV_frobenius")[LAST].mean() / heads("W_OV_frobenius")[FIRST].mean()) ** (1 / 7)
    ],
    "attention/output_bias": lambda: [
        max(heads("b_O")[layer] / ATTN[layer, TEXT].mean() for layer in WINDOW)
    ],
    "attention/last_output_bias": lambda: [heads("b_O")[-1] / np.median(heads("b_O")[:-1])],
    "attention/random_sum": lambda: [
        geometric((A["random_input/attn_norm"] / ATTN[:, TEXT].mean(1))[WINDOW])
    ],
    "attention/hard_coded_growth": lambda: [slope(A["random_input/attn_norm"]) / text_slope(ATTN)],
    "attention/gain_share": lambda: [
        1 - slope(heads("W_OV_raw_frobenius").mean(1)) / slope(heads("W_OV_frobenius").mean(1))
    ],
    "attention/circuit_spectral": lambda: [
        circuit_ratio(heads("W_OV_spectral")),
        circuit_ratio(heads("W_QK_spectral")),
    ],
    "attention/circuit_patching": lambda: [circuit_ratio(A["patching/own"])],
    "attention/spectral_trajectory": lambda: [
        np.polyfit(range(N_LAYERS), np.log(heads(name).mean(1)), 1)[0]
        for name in ("W_OV_spectral", "W_QK_spectral")
    ],
    "mlp/hard_coded_growth": lambda: [slope(A["random_input/mlp_norm"]) / text_slope(MLP)],
    "mlp/gain_share": lambda: [1 - slope(heads("W_in_raw")) / slope(heads("W_in"))],
    "mlp/random_input_growth": lambda: [
        np.exp(slope(A["random_input/mlp_norm"])),
        geometric((A["random_input/mlp_norm"] / MLP[:, TEXT].mean(1))[WINDOW]),
    ],
    "mlp/component_norms": lambda: [
        over_stream(name) for name in ("W_in", "W_in_W_out", "b_in_W_out", "b_out")
    ],
    "mlp/activation_rate": lambda: [np.exp(slope(A["neurons/activation_rate"][:, TEXT].mean(1)))],
    "mlp/random_activation_rate": lambda: [
        geometric(
            (A["random_input/mlp_activation_rate"] / A["neurons/activation_rate"][:, TEXT].mean(1))[
                WINDOW
            ]
        )
    ],
    "mlp/resampled_activation_rate": lambda: [place_of_resampled()],
    "mlp/hidden_structure": lambda: [
        min(effective_rank(A["neurons/singular_values"][layer]) for layer in WINDOW)
    ],
    "weights/writing_grows": lambda: [heads("W_out_raw")[-1] / heads("W_out_raw")[0]],
    "weights/reading_stays": lambda: [heads("W_in_raw")[-1] / heads("W_in_raw")[0]],
    "weights/embedding_norm": lambda: [np.linalg.norm(RESID[0, TEXT]) / TEXT.sum() ** 0.5],
    "weights/gains_vary": lambda: [1],
    "weights/repeated_blocks": lambda: [0],
    "residual/fits_dtype": lambda: [A["stream/largest"].max() / (2 - 2.0**-23) / 2.0**127],
    "weights/integrity": lambda: [0] * 9,
    "depth/earlier_outputs_fade": lambda: [
        np.exp(slope((A["sublayers/pre_dot_mlp_0"] / (PRE * MLP[0]))[:, TEXT].mean(1)))
    ],
    "depth/layer_horizon": lambda: [horizon()],
    "depth/loss_falls_with_horizon": lambda: [max(rises())],
    "depth/update_norms_rise": lambda: [
        geometric((MLP[-1] / MLP[0])[TEXT]),
        geometric((ATTN[-1] / ATTN[0])[TEXT]),
    ],
    "depth/block_influence": lambda: [influence(slice(0, 5)) / influence(slice(6, 11))],
    "depth/block_skip": lambda: [min(np.mean(row) for row in A["block_skip/loss"])],
    "depth/effect_bound": lambda: [kl_over_bound(kind, name).max() for kind, name in EFFECTS],
    "predictions/beats_unigram": lambda: [counted()],
    "predictions/best_of_its_neighbours": lambda: [highest_fall()],
    **{law: lambda name=name: [drawn(name)] for law, name in DRAWN_ALONE.items()},
}
ELSEWHERE = {  # laws about files and about baselines, and one that needs a published number
    "attention/frobenius_is_random_response",
    "attention/amplification_bound",
    "attention/circuit_norms",
} | {law.id for law in laws() if law.id.startswith("regression/")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Verdict rows by law."""
    folder = tmp_path_factory.mktemp("made-up")
    RECORD.save(folder / "record.safetensors")
    (folder / "circuits.toml").write_text(CIRCUITS)
    record = ["--record", folder / "record.safetensors", "--circuits", folder / "circuits.toml"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *record,
        "--report",
        folder,
        "-p",
        "no:cacheprovider",
    ]
    subprocess.run(command, cwd=ROOT, env=os.environ, check=False, capture_output=True)
    lines = Path(folder, "rows.jsonl").read_text().splitlines()
    return {row["law"]: row for row in map(json.loads, lines)}


def highest_fall() -> float:
    """The lowest of what changes may lower the loss by, all together but for one time in 1000: by
    Hall's transformation of t, put the other way round by a search for the root.
    """
    names = ("change", "error", "rows", "skew")
    change, error, n, skew = (A[f"neighbours/{name}"].astype(float) for name in names)
    bounds = []
    for i in range(len(change)):
        c, q = skew[i] / n[i] ** 0.5, stats.t.ppf(1 - 1e-3 / 2 / len(change), n[i] - 1)

        def transformed(t: float, c: float = c) -> float:
            return t + c * t**2 / 3 + c**2 * t**3 / 27 + c / 6

        t = brentq(lambda t, q=q, f=transformed: f(t) + q, -1e3, 1e3)
        bounds.append(change[i] - t * error[i])
    return float(min(bounds))


def largest(values: np.ndarray, layers: Any = range(N_LAYERS)) -> int:
    """The layer of the largest value, (n_layers, …)."""
    return max(layers, key=lambda layer: values[layer].max())


# Words that stand beside the values, in their order.
SAID: dict[str, Callable[[], list[str]]] = {
    "instrument/same_function": lambda: [
        f"layer {largest(A['instrument/block_error'] / A['instrument/gain'])}, which differs by",
        f"layer {largest(A['instrument/bridge_error'] / A['instrument/gain'])}, which differs by",
        "two rows of tokens",
    ],
    "residual/growth_rate": lambda: ["mean of 39 tokens, position 0 left out"],
    "residual/position_0": lambda: ["layer 5", "all layers"],
    "residual/spread": lambda: [
        f"widest at layer {largest(outer(), WINDOW)}, where 95% over 5% is "
        f"{outer()[WINDOW].max():.3f}"
    ],
    "sublayers/addition_law": lambda: [f"largest at layer {largest(left_over())}"],
    "sublayers/contribution_bound": lambda: [
        f"layer {largest((np.abs(POST - PRE) - ATTN - MLP) / (PRE + ATTN + MLP))}"
    ],
    "sublayers/scale_blindness": lambda: [
        *(
            f"4 draws a layer, largest at layer {largest(A[f'sublayers/{kind}_scale_error'])}"
            for kind in ("attn", "mlp")
        ),
        "10 of 10 drawn sequences, largest at layer 2",
    ],
    "mlp/neurons_have_no_order": lambda: ["4 of 10 drawn sequences, largest at layer 2"],
    "predictions/rows_are_apart": lambda: ["10 of 10 drawn sequences, largest"],
    "attention/causality": lambda: [
        f"behind {largest(A['prediction/later_changes'], range(N_LAYERS + 1))} layers",
        "10 of 10 drawn sequences, largest at layer 2",
        f"layer {largest(A['prediction/future_weight'])}",
        f"layer {largest(A['prediction/row_sum_error'])}",
    ],
    "attention/output_bias": lambda: [
        f"layer {largest(heads('b_O') / ATTN[:, TEXT].mean(1), WINDOW)}, mean of 39 tokens"
    ],
    "attention/last_output_bias": lambda: ["11 layers"],
    "attention/gain_share": lambda: [f"{np.exp(slope(heads('W_OV_frobenius').mean(1))):.4f}"],
    "attention/spectral_trajectory": lambda: [
        f"largest at layer {largest(heads(name).mean(1))} of 11"
        for name in ("W_OV_spectral", "W_QK_spectral")
    ],
    "mlp/gain_share": lambda: [f"{np.exp(slope(heads('W_in'))):.4f}"],
    "mlp/component_norms": lambda: [f"{np.exp(text_slope(RESID)):.4f}"] * 4,
    "mlp/activation_rate": lambda: [
        f"{A['neurons/activation_rate'][FIRST, TEXT].mean():.3f} at layer 2, "
        f"{A['neurons/activation_rate'][LAST, TEXT].mean():.3f} at layer 9"
    ],
    "mlp/hidden_structure": lambda: [participation()],
    "weights/gains_vary": lambda: ["layer 4: ln_1"],
    "depth/earlier_outputs_fade": lambda: [
        f"from {mlp_0()[FIRST]:.3f} at layer 2 to {mlp_0()[LAST]:.3f} at layer 9; the stream grows "
        f"by {np.exp(text_slope(RESID)):.4f}"
    ],
    "depth/layer_horizon": lambda: ["of 11 layers; 95% interval"],
    "depth/effect_bound": lambda: [
        f"layer {largest(kl_over_bound(kind, name))}; "
        + ("scale kept" if name == "frozen_kl" else "scale as it is")
        for kind, name in EFFECTS
    ],
    "depth/loss_falls_with_horizon": lambda: [steepest()],
    "predictions/beats_unigram": lambda: [
        f"{losses():.3f} nats against {losses() + counted():.3f}, 40 tokens"
    ],
    "attention/circuit_patching": lambda: [
        f"3 heads; not substantial; as large by chance: {chance(A['patching/own']):.2f}"[:-1],
    ],
    "attention/circuit_spectral": lambda: [
        f"3 heads; not substantial; as large by chance: {chance(heads(name)):.2f}"[:-1]
        for name in ("W_OV_spectral", "W_QK_spectral")
    ],
    **{
        law: lambda: ["39 tokens"]
        for law in (
            "residual/super_exponential",
            "residual/every_token_grows",
            "residual/exponential",
            "residual/decrease",
            "residual/fast_start",
            "sublayers/alignment",
            "attention/fall_off",
            "attention/random_sum",
            "mlp/random_activation_rate",
            "weights/embedding_norm",
        )
    },
    **{
        law: lambda: ["39 tokens", "39 tokens"]
        for law in ("sublayers/both_grow", "depth/update_norms_rise")
    },
}


def losses() -> float:
    return float(A["prediction/loss"].reshape(8, 6)[:, :-1].mean())


def chance(values: np.ndarray) -> float:
    """How often three heads of the whole model have a ratio at least as large: of all triples."""
    wanted, found = circuit_ratio(values), []
    for triple in itertools.combinations(values.ravel(), 3):
        found.append(sum(triple) / 3 / ((values.sum() - sum(triple)) / (values.size - 3)) >= wanted)
    return float(np.mean(found))


def outer() -> np.ndarray:
    """The ratio of the outer quantiles of text tokens, layer by layer."""
    low, high = np.quantile(RESID[:, TEXT], [0.05, 0.95], axis=1)
    return np.asarray(high / low)


def mlp_0() -> np.ndarray:
    """The part of the stream that the first mlp_out is, layer by layer."""
    return np.asarray((A["sublayers/pre_dot_mlp_0"] / (PRE * MLP[0]))[:, TEXT].mean(1))


def participation() -> str:
    values = A["neurons/singular_values"]
    layer = min(WINDOW, key=lambda n: effective_rank(values[n]))
    ratio = (values[layer] ** 2).sum() ** 2 / (values[layer] ** 4).sum()
    return f"8 sequences, layer {layer}, where the participation ratio is {ratio:.3g}"


@pytest.mark.parametrize("law", VALUES)
def test_a_law_says_what_its_formula_gives(law: str, rows: dict[str, dict[str, Any]]) -> None:
    found = [value["value"] for value in rows[law]["values"]]
    np.testing.assert_allclose(found, VALUES[law](), rtol=1e-6, err_msg=str(rows[law]))


@pytest.mark.parametrize("law", SAID)
def test_a_law_says_what_it_looked_at(law: str, rows: dict[str, dict[str, Any]]) -> None:
    for value, said in zip(rows[law]["values"], SAID[law](), strict=True):
        assert said in value["of"]


def interval(text: str) -> tuple[float, float]:
    low, high = re.findall(r"interval (\S+) to (\S+?)(?:,| |$)", text)[0]
    return float(low), float(high)


def resampled(of: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """2.5% and 97.5% of a number when the prompts are drawn with replacement."""
    dice = np.random.default_rng(99)
    found = [of(dice.integers(0, 8, 8)) for _ in range(4000)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def tokens_of(prompts: np.ndarray) -> np.ndarray:
    """Indices of the text tokens of prompts, one after the other."""
    return np.concatenate([np.flatnonzero((A["stream/prompt"] == p) & TEXT) for p in prompts])


def share_of(kind: str, out: np.ndarray) -> Callable[[np.ndarray], float]:
    """Of the growth of random input's answers in that of some prompts' outputs, the answers drawn
    within their errors.
    """
    dice = np.random.default_rng(98)
    slopes = {token: slope(out[:, token]) for token in np.flatnonzero(TEXT)}

    def share(prompts: np.ndarray) -> float:
        noise = A[f"random_input/{kind}_error"] * dice.standard_normal(N_LAYERS)
        answers = A[f"random_input/{kind}_norm"] + noise
        return slope(answers) / float(np.mean([slopes[t] for t in tokens_of(prompts)]))

    return share


RATES = np.log(RESID[LAST] / RESID[FIRST]) / (LAST - FIRST)
INTERVALS: dict[str, Callable[[np.ndarray], float]] = {
    "residual/growth_rate": lambda prompts: float(np.exp(RATES[tokens_of(prompts)].mean())),
    "attention/hard_coded_growth": share_of("attn", ATTN),
    "mlp/hard_coded_growth": share_of("mlp", MLP),
    "depth/layer_horizon": horizon,
}


@pytest.mark.parametrize("law", INTERVALS)
def test_intervals_are_those_of_resampled_prompts(
    law: str, rows: dict[str, dict[str, Any]]
) -> None:
    found, wanted = interval(rows[law]["values"][0]["of"]), resampled(INTERVALS[law])
    np.testing.assert_allclose(found, wanted, atol=0.15 * (wanted[1] - wanted[0]))


def test_windows_are_the_depth_s_steady_part(rows: dict[str, dict[str, Any]]) -> None:
    others = {"residual/decrease": [9, 11], "residual/padding": [1, 11]}
    for law, row in rows.items():
        assert row["layers"] in (None, others.get(law, [FIRST, LAST])), law
    assert sum(row["layers"] is not None for row in rows.values()) == 24


def test_heads_that_stand_out_twice_are_named(rows: dict[str, dict[str, Any]]) -> None:
    scores, norms = A["patching/own"], heads("W_OV_spectral")
    twice = [
        f"{layer}.{head}"
        for layer, head in CIRCUIT
        if scores[layer, head] > np.quantile(scores, 0.75)
        and norms[layer, head] > np.quantile(norms, 0.75)
    ]
    assert 0 < len(twice) < len(CIRCUIT)
    said = rows["attention/circuit_patching"]["values"][0]["of"]
    assert said.endswith(f"high by norm and by score: {', '.join(twice)}; 8 prompt pairs")


def test_rows_claim_what_the_law_s_file_says_first(rows: dict[str, dict[str, Any]]) -> None:
    for law, row in rows.items():
        folder, name = law.split("/")
        text = (ROOT / "invariants" / folder / f"test_{name}.py").read_text()
        assert row["claim"] == " ".join(text[3:].split("\n\n")[0].split()), law


def test_every_law_on_a_record_is_computed_once_more() -> None:
    assert set(VALUES) | ELSEWHERE == {law.id for law in laws()}


# ---- Where theorems begin to fail: at what their sources derive, not a hundredth beside it


SOUND = sound_record(n_layers=N_LAYERS)


def array(name: str, bound: float) -> Callable[[float], dict[str, np.ndarray]]:
    """One array whose largest error is a part of the bound."""

    def make(part: float) -> dict[str, np.ndarray]:
        values = SOUND.arrays[name].astype(float) * 0
        values.flat[-1] = part * bound
        return {name: values}

    return make


def scale_off(part: float) -> dict[str, np.ndarray]:
    pre = SOUND.arrays["stream/resid_pre"].astype(float)
    scale = np.sqrt(pre**2 / D_MODEL + 1e-5)
    scale[3, 7] /= np.sqrt(1 + part * 3 * D_MODEL * UNIT)
    return {"stream/ln1_scale": scale}


def scale_off_behind_a_mean(part: float) -> dict[str, np.ndarray]:
    """Raw vectors three times as large as centred ones may be off by three times as much."""
    raw = 3 * SOUND.arrays["sublayers/raw_norm"].astype(float)
    return scale_off(3 * part) | {"sublayers/raw_norm": raw}


def straight() -> dict[str, np.ndarray]:
    """A stream in fp64, of which the law of addition and the bound of contributions hold exactly:
    outputs along the stream, half each.
    """
    pre, post = (SOUND.arrays[f"stream/resid_{name}"].astype(float) for name in ("pre", "post"))
    out = (post - pre) / 2
    found = {"resid_pre": pre, "resid_post": post, "pre_dot_attn": pre * out}
    found |= {"attn_out": np.abs(out), "mlp_out": np.abs(out), "mid_dot_mlp": (pre + out) * out}
    raw = {"sublayers/raw_norm": pre + 2 * np.abs(out)}
    return {f"stream/{name}": values for name, values in found.items()} | raw


def product_off(part: float) -> dict[str, np.ndarray]:
    arrays = straight()
    size = arrays["sublayers/raw_norm"] ** 2
    arrays["stream/pre_dot_attn"][3, 7] += part * 3 * D_MODEL * UNIT * size[3, 7] / 2
    return arrays


def output_too_small(part: float) -> dict[str, np.ndarray]:
    arrays = straight()
    arrays["stream/mlp_out"][3, 7] -= part * D_MODEL * UNIT * arrays["sublayers/raw_norm"][3, 7]
    return arrays


def kl_of(kind: str, name: str) -> Callable[[float], dict[str, np.ndarray]]:
    """A KL of a part of what it may be, where nothing else is known of the final residual."""
    size, row, slack = 0.5, 2.0, 2 * UNIT * (D_MODEL * 2.0 * D_MODEL**0.5 + 4 * 20)
    scale = 1.0 if name == "frozen_kl" else 2 / (1 + np.sqrt(1 + size**2 / D_MODEL))
    return array(f"sublayer_effect/{kind}_{name}", (row * size * scale) ** 2 / 2 + slack)


EDGES: list[tuple[str, str, Callable[[float], dict[str, np.ndarray]]]] = [
    (
        "instrument/same_function",
        "the walk over the blocks",
        array("instrument/block_error", 8 * D_MODEL**0.5 * UNIT * 2),
    ),
    (
        "instrument/same_function",
        "TransformerLens",
        array("instrument/bridge_error", 8 * D_MODEL**0.5 * UNIT * 2),
    ),
    (
        "instrument/same_function",
        "the logits",
        array("instrument/logits_error", N_LAYERS * 8 * D_MODEL**0.5 * UNIT * 2),
    ),
    ("residual/additivity", "the sum", array("stream/additivity_error", 8 * UNIT)),
    ("residual/moments", "the norm's scale", scale_off),
    ("residual/moments", "the norm's scale", scale_off_behind_a_mean),
    ("residual/moments", "does not explain", array("stream/ln1_residual", 3 * D_MODEL * UNIT)),
    ("sublayers/addition_law", "the addition law", product_off),
    ("sublayers/contribution_bound", "beyond the contributions", output_too_small),
    (
        "sublayers/scale_blindness",
        "attn_out",
        array("sublayers/attn_scale_error", 3 * D_MODEL * UNIT * (1 + 4)),
    ),
    (
        "sublayers/scale_blindness",
        "mlp_out",
        array("sublayers/mlp_scale_error", 3 * D_MODEL * UNIT * (1 + 4)),
    ),
    (
        "attention/causality",
        "later tokens",
        array("prediction/later_changes", (N_LAYERS + 1) * D_MODEL * UNIT),
    ),
    *((law, LAWS[name], array(f"draws/{name}", 1.0)) for law, name in DRAWN.items()),
    ("attention/causality", "a later position", array("prediction/future_weight", UNIT)),
    ("attention/causality", "attention rows", array("prediction/row_sum_error", 4 * 6 * UNIT)),
    *(
        ("depth/effect_bound", f"without {kind}_out", kl_of(kind, name))
        for kind in ("attn", "mlp")
        for name in ("frozen_kl", "kl")
    ),
]


@pytest.mark.parametrize(
    ("law", "what", "make"), EDGES, ids=[f"{law}-{what}" for law, what, _ in EDGES]
)
def test_a_theorem_fails_from_its_bound_on(
    law: str,
    what: str,
    make: Callable[[float], dict[str, np.ndarray]],
    audit: Callable[..., Audit],
    tmp_path: Path,
) -> None:
    folder, name = law.split("/")
    for part, outcome in ((0.999, "pass"), (1.001, "fail")):
        replaced(SOUND, make(part)).save(tmp_path / "it.safetensors")
        found = audit(
            "--record", tmp_path / "it.safetensors", laws=f"invariants/{folder}/test_{name}.py"
        )
        row = found.row(law)
        assert row["outcome"] == outcome, row
    assert what in row["values"][-1]["what"] and row["value"] == row["values"][-1]["value"]


@pytest.mark.parametrize("law", ["weights/gains_vary", "weights/integrity"])
def test_three_faults_are_named_of_however_many(
    law: str, audit: Callable[..., Audit], tmp_path: Path
) -> None:
    kind = "reset" if law == "weights/gains_vary" else "alike"
    faults = RECORD.metadata["integrity"] | {kind: [f"tensor {n}" for n in range(4)]}
    Record(A, RECORD.metadata | {"integrity": faults}).save(tmp_path / "it.safetensors")
    law_file = f"invariants/weights/test_{law.split('/')[1]}.py"
    check = audit("--record", tmp_path / "it.safetensors", laws=law_file).rows[0]["values"][-1]
    assert check["value"] == 4 and check["of"] == "tensor 0; tensor 1; tensor 2"


@pytest.mark.parametrize(("step", "rises"), [(0.0, 0.0), (0.5, np.inf), (-0.5, -np.inf)])
def test_a_loss_that_moves_alike_for_all_prompts(
    step: float, rises: float, audit: Callable[..., Audit], tmp_path: Path
) -> None:
    name = "horizon/loss.dropped.recomputed.mean.everywhere"
    loss = 3 + step * np.arange(len(A["horizon/k"]))[:, None] + 0 * A[name]
    replaced(RECORD, {name: loss}).save(tmp_path / "it.safetensors")
    law = "invariants/depth/test_loss_falls_with_horizon.py"
    value = audit("--record", tmp_path / "it.safetensors", laws=law).rows[0]["value"]
    assert value == rises or (abs(rises) == np.inf and (value is None or value * rises > 1e9))


def test_every_theorem_is_held_to_its_bound() -> None:
    on_files = {
        f"attention/{law}" for law in ("frobenius_is_random_response", "amplification_bound")
    }
    counts = {"weights/integrity"}  # none or some
    theorems = {law.id for law in laws() if law.kind == "theorem"}
    assert {law for law, *_ in EDGES} | on_files | counts == theorems


@pytest.mark.parametrize("b_O", [[0.0, 0, 0, 1], [0.0, 0, 1, 1], [1.0]])
def test_a_leap_needs_biases_to_leap_from(
    b_O: list[float], audit: Callable[..., Audit], tmp_path: Path
) -> None:
    made = replaced(sound_record(n_layers=len(b_O)), {"weights/b_O": np.array(b_O)})
    made.save(tmp_path / "it.safetensors")
    law = "invariants/attention/test_last_output_bias.py"
    row = audit("--record", tmp_path / "it.safetensors", laws=law).rows[0]
    assert row["reason"] == "no layer before the last has a bias in attention, or few have"


@pytest.mark.parametrize("side", [-1, 1])
def test_a_circuit_s_ratio_is_held_to_the_digits_it_was_published_with(
    side: int, audit: Callable[..., Audit], tmp_path: Path
) -> None:
    RECORD.save(tmp_path / "it.safetensors")
    ratio = circuit_ratio(heads("W_OV_frobenius"))
    for part, outcome in ((0.99, "pass"), (1.01, "fail")):
        said = f"ratio = {ratio + side * part * 0.0015}\n"
        (tmp_path / "circuits.toml").write_text(CIRCUITS + said)
        given = ["--record", tmp_path / "it.safetensors", "--circuits", tmp_path / "circuits.toml"]
        row = audit(*given, laws="invariants/attention/test_circuit_norms.py").rows[0]
        assert row["outcome"] == outcome and row["value"] == pytest.approx(ratio)


def test_a_sum_of_more_terms_may_be_off_by_more(
    audit: Callable[..., Audit], tmp_path: Path
) -> None:
    sound = sound_record(sublayers=[[{}, {}], [{}, {}, {}, {}, {}]])
    for part, outcome in ((0.999, "pass"), (1.001, "fail")):
        error = np.full((16, 48), part * (4 + 2 * 5) * UNIT)
        replaced(sound, {"stream/additivity_error": error}).save(tmp_path / "it.safetensors")
        law = "invariants/residual/test_additivity.py"
        assert (
            audit("--record", tmp_path / "it.safetensors", laws=law).rows[0]["outcome"] == outcome
        )
