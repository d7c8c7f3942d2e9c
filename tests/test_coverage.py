"""Every phenomenon of the sources has its law: the list by name, so that none is lost when files
move.
"""

from typing import Any

import numpy as np

from streamgauge.laws import laws

# What the sources observe or prove, by part of the model, and the laws that assert it.
COVERED = {
    "instrument: same function": ["instrument/same_function"],
    "residual: growth rate": ["residual/growth_rate"],
    "residual: exponential": ["residual/exponential"],
    "residual: super-exponential": ["residual/super_exponential"],
    "residual: decrease": ["residual/decrease"],
    "residual: fast start": ["residual/fast_start"],
    "residual: every token grows": ["residual/every_token_grows"],
    "residual: position 0": ["residual/position_0"],
    "residual: padding": ["residual/padding"],
    "residual: spread": ["residual/spread"],
    "residual: moments": ["residual/moments"],
    "residual: additivity": ["residual/additivity"],
    "sublayers: contribution bound": ["sublayers/contribution_bound"],
    "sublayers: both grow": ["sublayers/both_grow", "attention/fall_off"],
    "sublayers: alignment": ["sublayers/addition_law", "sublayers/alignment"],
    "sublayers: scale blindness": ["sublayers/scale_blindness"],
    "sublayers: hard-coded growth": ["attention/hard_coded_growth", "mlp/hard_coded_growth"],
    "attention: OV growth": ["attention/ov_growth"],
    "attention: Frobenius is the random response": ["attention/frobenius_is_random_response"],
    "attention: output bias": ["attention/output_bias", "attention/last_output_bias"],
    "attention: random sum": ["attention/random_sum"],
    "attention: amplification bound": ["attention/amplification_bound"],
    "MLP: random-input growth": ["mlp/random_input_growth"],
    "MLP: component norms": ["mlp/component_norms"],
    "MLP: activation rate": [
        "mlp/activation_rate",
        "mlp/random_activation_rate",
        "mlp/resampled_activation_rate",
    ],
    "MLP: hidden structure": ["mlp/hidden_structure"],
    "weights: writing grows, reading does not": ["weights/writing_grows", "weights/reading_stays"],
    "weights: embedding norm": ["weights/embedding_norm"],
    "stream: fits the dtype it is stored in": ["residual/fits_dtype"],
    "weights: integrity": ["weights/integrity", "weights/gains_vary", "weights/repeated_blocks"],
    "attention: spectral trajectory": [
        "attention/circuit_norms",
        "attention/circuit_spectral",
        "attention/circuit_patching",
        "attention/spectral_trajectory",
    ],
    "depth: earlier outputs fade": ["depth/earlier_outputs_fade"],
    "attention: causality": ["attention/causality"],
    "symmetries of weights": [
        "mlp/neurons_have_no_order",
        "attention/heads_have_no_order",
        "attention/value_basis_is_free",
    ],
    "outputs: what must not matter": [
        "predictions/rows_are_apart",
        "predictions/cache_changes_nothing",
        "predictions/any_attention_kernel",
    ],
    "predictions: better than counting": ["predictions/beats_unigram"],
    "predictions: lowest loss among its neighbours": ["predictions/best_of_its_neighbours"],
    "regression: a baseline": [
        f"regression/{kind}"
        for kind in (
            *("config", "weights", "norms", "activations", "predictions"),
            *("verdict", "loss", "movement"),
        )
    ],
    "depth: layer horizon": ["depth/layer_horizon", "depth/loss_falls_with_horizon"],
    "depth: sublayer effect": ["depth/effect_bound"],
    "depth: block influence": ["depth/block_influence"],
    "depth: a block left out": ["depth/block_skip"],
    "depth: update norms": ["depth/update_norms_rise"],
    "weights: gain share": ["attention/gain_share", "mlp/gain_share"],
}


def test_no_phenomenon_is_without_its_law() -> None:
    listed = [law for covering in COVERED.values() for law in covering]
    assert len(listed) == len(set(listed))
    assert set(listed) == {law.id for law in laws()}


def test_equal_inputs_may_have_unequal_outputs() -> None:
    """The post's toy example, its outputs corrected: sigmoid(0) is one half."""
    reading = 100 * np.array([[-1, 1, -1, 1], [-1, 0, 1, 0]])
    x, y = np.array([-1, 1, -1, 1]) / 2, np.array([-1, 1, 1, 1]) / 2

    def neurons(stream: np.ndarray) -> Any:
        return 1 / (1 + np.exp(-(reading @ stream)))

    assert np.linalg.norm(x) == np.linalg.norm(y) == 1
    np.testing.assert_allclose(neurons(x), [1, 0.5], atol=1e-12)
    np.testing.assert_allclose(neurons(y), [1, 1], atol=1e-12)
    assert np.linalg.norm(neurons(y)) > np.linalg.norm(neurons(x))
