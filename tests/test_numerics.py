"""The arithmetic behind laws, on numbers that can be followed by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from streamgauge.errors import NotApplicable, NotMeasured
from streamgauge.numerics import sketches
from streamgauge.numerics.bands import Band, default_window
from streamgauge.numerics.circuits import trajectory
from streamgauge.numerics.convention import (
    expand_heads,
    fold_reading,
    fold_writing,
    ov_norms,
    product_eigenvalues,
    product_rounding,
    random_inputs,
    response_tolerance,
)
from streamgauge.numerics.growth import (
    bootstrap_rate,
    curvature,
    growth_rates,
    log_linear_r2,
    log_slopes,
    mean_rate,
    mean_ratio,
    measured_window,
    reproduced_share,
    resampled_means,
)
from streamgauge.numerics.horizons import (
    all_variants,
    default_grid,
    effective_horizon,
    horizon_interval,
    variants_of,
)
from streamgauge.numerics.matrices import strided
from streamgauge.numerics.names import block_of, layer_of, part_of
from streamgauge.numerics.rounding import other_order
from streamgauge.numerics.rows import Prompts
from streamgauge.numerics.unigram import unigram_loss
from tests.records import sound_record

# ---- Bands


@pytest.mark.parametrize(
    ("low", "high", "value", "margin"),
    [
        (1.0, 2.0, 1.25, 0.25),
        (1.0, 2.0, 1.9, 0.1),
        (1.0, 2.0, 0.5, -0.5),
        (1.0, 2.0, 2.25, -0.25),
        (1.0, 2.0, 1.0, 0.0),
        (None, 2.0, -50.0, 52.0),
        (1.0, None, 51.0, 50.0),
        (None, None, 3.0, math.inf),
        (1.0, 2.0, math.nan, -math.inf),
        (1.0, None, math.inf, -math.inf),
        (math.nan, None, 3.0, -math.inf),
    ],
)
def test_a_margin_is_the_distance_to_the_nearer_bound(
    low: float | None, high: float | None, value: float, margin: float
) -> None:
    band = Band(low, high, "the test's own")
    assert band.margin(value) == pytest.approx(margin)
    assert (value in band) == (margin > 0)  # the bounds themselves are outside


def test_bands_say_what_they_allow() -> None:
    assert str(Band(None, 2.0, "")) == "below 2" and str(Band(1.5, None, "")) == "above 1.5"
    assert str(Band(1.5, 2.0, "")) == "1.5 to 2"
    assert str(Band(None, None, "", unclaimed="nobody says so")) == "nobody says so"
    with pytest.raises(ValueError, match="names no layers"):
        Band(1.0, 2.0, "").window  # noqa: B018


@pytest.mark.parametrize(
    ("n_layers", "window"),
    [(12, (2, 10)), (16, (2, 13)), (20, (2, 17)), (48, (5, 40)), (1, (1, 0))],
)
def test_the_default_window_is_10_to_85_percent(n_layers: int, window: tuple[int, int]) -> None:
    assert default_window(n_layers) == window


# ---- Growth


def norms_at(*layers: int, n: int = 21) -> np.ndarray:
    """Two tokens, measured at these layers alone."""
    norms = np.full((n, 2), np.nan)
    norms[list(layers)] = 1.0
    return norms


def test_a_window_may_lack_a_quarter_at_its_ends() -> None:
    assert measured_window(norms_at(4, 10, 12, 19), (4, 20)) == (4, 19)
    assert measured_window(norms_at(4, 16), (4, 20)) == (4, 16)  # 12 of 16
    assert measured_window(norms_at(*range(33), n=33), (4, 40)) == (4, 32)  # beyond the depth
    with pytest.raises(NotApplicable, match="layers 4 to 20 are not covered"):
        measured_window(norms_at(4, 15), (4, 20))
    with pytest.raises(NotApplicable, match="not covered"):
        measured_window(norms_at(), (4, 20))
    with pytest.raises(NotApplicable, match="from layer 4 to 4 leaves no room"):
        measured_window(norms_at(4), (4, 4))
    with pytest.raises(NotMeasured, match="no token but those at position 0"):
        measured_window(np.ones((21, 0)), (4, 20))


def test_one_token_that_was_measured_makes_a_layer_measured() -> None:
    norms = norms_at(4, 20)
    norms[20, 0] = np.nan
    assert measured_window(norms, (4, 20)) == (4, 20)
    assert np.isnan(growth_rates(norms, (4, 20))[0]) and growth_rates(norms, (4, 20))[1] == 1


def test_growth_of_two_tokens() -> None:
    norms = np.outer(1.0 * 2 ** np.arange(5), [1, 1]) * np.array(
        [[1, 1], [1, 1], [1, 1], [1, 1], [1, 4]]
    )
    rates = growth_rates(norms, (0, 4))
    np.testing.assert_allclose(rates, [2, 2 * 4**0.25])
    assert mean_rate(rates) == pytest.approx(2 * 4**0.125)
    assert math.isnan(mean_rate(np.array([1.0, np.nan])))


def test_slopes_leave_out_layers_that_were_not_measured() -> None:
    norms = np.outer(1.1 ** np.arange(9), [1.0, 2.0])
    norms[[2, 5]] = np.nan
    np.testing.assert_allclose(log_slopes(norms, (1, 8)), np.log(1.1))
    assert log_linear_r2(norms, (1, 8)) == pytest.approx(1)
    assert log_linear_r2(1 / norms, (1, 8)) == pytest.approx(-1)
    assert log_linear_r2(np.ones((9, 2)), (1, 8)) == 0
    bent = np.exp(0.05 * np.arange(9) ** 2)[:, None] * np.ones(2)
    bent[[2, 5]] = np.nan
    assert curvature(bent, (0, 8), 0.01)[0] == pytest.approx(0.1)


def test_curvature_by_chance_is_a_t_test() -> None:
    dice = np.random.default_rng(3)
    norms = np.exp(np.cumsum(dice.normal(0.05, 0.02, 15)))[:, None]
    slope, by_chance = curvature(norms, (2, 14), 0.01)
    found = stats.linregress(np.arange(2, 14) + 0.5, np.diff(np.log(norms[2:, 0])))
    assert slope == pytest.approx(found.slope)
    assert by_chance == pytest.approx(stats.t.ppf(0.99, 10) * found.stderr)
    assert curvature(norms, (2, 5), 0.01)[0] is not None
    with pytest.raises(NotApplicable, match="layers 2 to 4 are too few"):
        curvature(norms, (2, 4), 0.01)


def test_ratios_are_geometric_means_ends_included() -> None:
    assert mean_ratio(np.array([9.0, 2, 8, 9]), np.ones(4), (1, 2)) == pytest.approx(4)


def test_prompts_are_drawn_whole() -> None:
    values, prompts = np.array([1.0, 1, 1, 5]), np.array([7, 7, 7, 9])
    means = resampled_means(values, prompts, 4000)
    # Both once (half of the draws), or one of them twice.
    np.testing.assert_allclose(sorted(set(means)), [1, 2, 5])
    assert np.mean(means == 2) == pytest.approx(0.5, abs=0.03)
    rate = bootstrap_rate(np.array([1.1, 1.1, 1.2]), np.array([0, 0, 1]))
    assert (rate.low, rate.high) == pytest.approx((1.1, 1.2))


def test_a_share_of_growth_needs_growth() -> None:
    outputs = np.outer(1.1 ** np.arange(8), np.ones(6))
    prompts, still = np.arange(6), np.ones(8)
    share = reproduced_share(1.05 ** np.arange(8), 0 * still, outputs, prompts, (1, 6))
    assert share.value == pytest.approx(np.log(1.05) / np.log(1.1))
    assert (share.interval.low, share.interval.high) == pytest.approx((share.value, share.value))
    with pytest.raises(NotApplicable, match="layers 1 to 6 cannot be told from none"):
        reproduced_share(still, 0 * still, np.ones((8, 6)), prompts, (1, 6))


# ---- Heads and the convention


def test_a_trajectory_is_flat_where_its_slope_cannot_be_told_from_none() -> None:
    dice = np.random.default_rng(5)
    norms = np.exp(0.05 * np.arange(10) + dice.normal(0, 0.1, 10))[:, None]
    found, known = trajectory(norms), stats.linregress(np.arange(10), np.log(norms[:, 0]))
    assert found.slope == pytest.approx(known.slope) and found.error == pytest.approx(known.stderr)
    assert found.peak == norms.argmax()
    for scale, reading in ((1, "rises"), (-1, "falls"), (0, "flat")):
        tilted = np.exp(scale * 0.2 * np.arange(10) + dice.normal(0, 0.1, 10))[:, None]
        assert trajectory(tilted).reading == reading
    edge = stats.t.ppf(0.975, 1)
    x, scatter = np.array([-1.0, 0, 1]), np.array([1.0, -2, 1]) / math.sqrt(6)
    for part, reading in ((0.99, "flat"), (1.01, "rises")):
        slope = part * edge / math.sqrt(2)
        assert trajectory(np.exp(slope * x + scatter)[:, None]).reading == reading
    with pytest.raises(NotApplicable, match="2 layers are too few"):
        trajectory(norms[:2])
    with pytest.raises(NotMeasured, match="all heads of layer 1 are zero"):
        trajectory(np.array([[1.0], [0], [1]]))


def test_folding_is_gain_then_centring() -> None:
    weight, gain = np.array([[[1.0], [2], [6]]]), np.array([1.0, 2, 3])
    np.testing.assert_allclose(fold_reading(weight, gain, False)[0, :, 0], [1, 4, 18])
    np.testing.assert_allclose(
        fold_reading(weight, gain, True)[0, :, 0], np.array([1, 4, 18]) - 23 / 3
    )
    np.testing.assert_allclose(fold_writing(weight.swapaxes(1, 2), True)[0, 0], [-2, -1, 3])
    np.testing.assert_allclose(fold_writing(weight, False), weight)
    kv = np.arange(2.0)[:, None, None]
    assert expand_heads(kv, 6).ravel().tolist() == [0, 0, 0, 1, 1, 1]
    assert expand_heads(kv, 2) is kv


def test_norms_of_products_are_those_of_the_products() -> None:
    dice = np.random.default_rng(0)
    V, O = dice.normal(size=(3, 20, 4)), dice.normal(size=(3, 4, 20))  # noqa: E741
    V[2, :, 3] = V[2, :, 2]  # not of full rank
    frobenius, spectral = ov_norms(V, O)
    np.testing.assert_allclose(frobenius, np.linalg.norm(V @ O, axis=(1, 2)))
    np.testing.assert_allclose(spectral, np.linalg.norm(V @ O, ord=2, axis=(1, 2)))
    squares = product_eigenvalues(V.swapaxes(1, 2) @ V, O @ O.swapaxes(1, 2))
    wanted = np.linalg.svd(V @ O, compute_uv=False)[:, :4][:, ::-1] ** 2
    np.testing.assert_allclose(squares, wanted, atol=1e-9 * wanted.max())
    assert product_rounding(768, 64) == 8 * 768 * 64 * 2.0**-53


def test_random_inputs_are_what_a_norm_makes_of_gaussians() -> None:
    centred, plain = (random_inputs(500, 30, centres, seed=1) for centres in (True, False))
    np.testing.assert_allclose((centred**2).mean(1), 1)
    np.testing.assert_allclose(centred.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose((plain**2).mean(1), 1)
    assert np.abs(plain.mean(1)).max() > 0.1
    assert (random_inputs(3, 30, True, seed=2) != centred[:3]).all()


def test_the_tolerance_of_responses_is_the_lemma_s() -> None:
    """2 |a| √t + 2 max(a) t, with a = eigenvalues / n and t = log(2 / rate)."""
    eigenvalues, t = np.array([3.0, 4.0]), math.log(2 / 1e-3)
    wanted = 2 * 5 * math.sqrt(t) / math.sqrt(100) + 2 * 4 * t / 100
    assert response_tolerance(eigenvalues, 100, 1e-3) == pytest.approx(wanted)


def test_the_rounding_of_another_order() -> None:
    np.testing.assert_allclose(
        other_order(np.array([0.5, 3.0]), 64), 8 * 8 * 2.0**-24 * np.array([1, 3])
    )


def test_a_place_outside_of_its_tensor_is_none() -> None:
    array = np.arange(12.0).reshape(3, 4)
    view = strided(array, {"shape": [2, 2], "strides": [4, 1], "offset": 6})
    np.testing.assert_array_equal(view, [[6, 7], [10, 11]])
    for change in ({"offset": 7}, {"offset": -1}, {"strides": [4, -1]}, {"shape": [3, 2]}):
        place = {"shape": [2, 2], "strides": [4, 1], "offset": 6} | change
        assert strided(array, place) is None


# ---- Horizons


def test_the_grid_and_its_variants() -> None:
    assert default_grid(16) == [0, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 17]
    assert default_grid(4)[-2:] == [4, 5]
    names = [variant.name for variant in all_variants(20)]
    assert len(names) == len(set(names)) == 13
    assert names[0] == "dropped.recomputed.mean.everywhere"
    assert names[-1] == "dropped.recomputed.mean.from-20"
    assert {n for n in names if n.endswith("final")} == {
        f"{e}.clean.{f}.final" for e in ("dropped", "kept") for f in ("mean", "zero")
    }
    assert variants_of("all", 48)[-1].first == 20 and len(variants_of("default", 48)) == 1


def test_the_horizon_is_interpolated_and_nan_where_none_is_near_enough() -> None:
    k, clean, tokens = np.array([0, 4, 8]), np.array([1.0, 3.0]), np.array([3, 1])
    loss = np.array([[3.0, 5.0], [1.2, 3.2], [1.0, 3.0]])
    assert effective_horizon(k, loss, clean, tokens) == pytest.approx(4 + 4 * 0.1 / 0.2)
    weighted = np.array([[3.0, 5.0], [1.4, 3.0], [1.0, 3.0]])  # 0.3 more, 3 tokens of 4
    assert effective_horizon(k, weighted, clean, tokens) == pytest.approx(4 + 4 * 0.2 / 0.3)
    assert effective_horizon(k, loss * 0 + clean, clean, tokens) == 0
    assert math.isnan(effective_horizon(k, loss + 1, clean, tokens))
    assert math.isnan(effective_horizon(k, loss * np.nan, clean, tokens))


def test_an_interval_of_horizons_is_open_where_prompts_lie_beyond_all() -> None:
    k, clean, tokens = np.array([0, 4]), np.ones(8), np.ones(8)
    loss = np.array([clean + 2, clean])
    loss[1, 3] = 2.0  # an eighth of the tokens: one draw of it is 0.125 nats, which is too much
    low, high = horizon_interval(k, loss, clean, tokens)
    assert 3.5 < low < 4 and high == math.inf


# ---- Names, rows, counting, sketches


@pytest.mark.parametrize(
    ("name", "layer", "block", "part"),
    [
        ("transformer.h.3.attn.c_attn.weight", 3, "transformer.h.3", "attn"),
        ("model.layers.12.mlp.up_proj.weight", 12, "model.layers.12", "mlp"),
        ("model.layers.0.input_layernorm.weight", 0, "model.layers.0", "norm"),
        ("h.7.ln_2.bias", 7, "h.7", "norm"),
        ("gpt_neox.layers.1.attention.dense.weight", 1, "gpt_neox.layers.1", "attn"),
        ("blocks.5.ln1.w", 5, "blocks.5", "norm"),
        ("model.embed_tokens.weight", None, None, "embed"),
        ("lm_head.weight", None, None, "head"),
        ("embed_out.weight", None, None, "head"),
        ("model.norm.weight", None, None, "norm"),
    ],
)
def test_a_tensor_s_name_says_where_it_belongs(
    name: str, layer: int | None, block: str | None, part: str
) -> None:
    assert (layer_of(name), block_of(name), part_of(name)) == (layer, block, part)


def test_batches_are_of_one_length_and_about_so_many_tokens() -> None:
    prompts = Prompts([[0] * n for n in (3, 2, 3, 3, 2, 9)], "the test's own", None)
    assert list(prompts.batches(6)) == [[1, 4], [0, 2], [3], [5]]
    assert list(prompts.batches(5)) == [[1, 4], [0], [2], [3], [5]]


def test_counting_leaves_out_what_it_predicts() -> None:
    rows = [np.array([9, 1, 1, 2]), np.array([9, 1, 3])]
    # Of the first row's tokens the other has 1 once, 2 never; one more for each of three seen.
    others = [2 / 5, 2 / 5, 1 / 5, 3 / 6, 1 / 6]
    np.testing.assert_allclose(unigram_loss(rows), -np.log(others))


def test_sketches_tell_a_factor() -> None:
    old = np.random.default_rng(0).normal(size=16)
    assert sketches.factor(old, 2 * old) == pytest.approx((2, 0), abs=1e-12)
    across = np.random.default_rng(1).normal(size=16)
    across -= old * (across @ old) / (old @ old)
    c, left = sketches.factor(old, 2 * old + across)
    assert c == pytest.approx(2)
    assert left == pytest.approx(np.linalg.norm(across) / np.linalg.norm(old))
    assert math.isnan(sketches.factor(0 * old, old)[0])
    assert sketches.moved(old, old + 3) == pytest.approx(3)
    assert sketches.surely_moved(np.zeros(16), np.arange(16.0)) == pytest.approx(12 / 7)
    assert sketches.surely_moved(np.zeros(16), 80.0 * (np.arange(16) == 3)) == pytest.approx(2)


def test_signs_are_frozen() -> None:
    """Sketches of this year are compared with those of any other."""
    signs = sketches.signs(5, 0)
    assert signs.shape == (16, 5) and set(signs.ravel()) == {-1, 1} and signs.dtype == np.int8
    assert signs[:2].tolist() == [[-1, -1, -1, -1, -1], [-1, 1, -1, 1, -1]]
    assert (sketches.signs(5, 1) != signs).any()


def test_a_mean_rate_of_norms_is_refused() -> None:
    with pytest.raises(ValueError, match="one rate a token, as growth_rates"):
        mean_rate(np.ones((16, 40)))


def test_a_record_in_a_notebook_says_shapes_and_what_is_not_there() -> None:
    record = sound_record(model="<b>")
    record.metadata["absent"] = {"stream/other_out": "there <is> none"}
    made = record._repr_html_()
    assert "<td>stream/resid_pre</td><td>17 × 40</td>" in made or "16 × " in made
    assert "stream/other_out: there &lt;is&gt; none" in made and "<b> " not in made
