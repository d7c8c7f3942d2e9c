"""How long the kernels take, each beside the obvious way, in one run."""

from typing import Any

import numpy as np
import pytest
import torch

from streamgauge.engine.pieces import frobenius_norm, sketch
from streamgauge.numerics.convention import ov_norms
from streamgauge.numerics.growth import growth_rates

HEADS, D_MODEL, D_HEAD = 12, 768, 64


@pytest.fixture(scope="module")
def weights() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.standard_normal((HEADS, D_MODEL, D_HEAD)), draw.standard_normal(
        (HEADS, D_HEAD, D_MODEL)
    )


@pytest.mark.benchmark(group="norms of W_OV, one layer of gpt2")
def test_ov_norms_by_gram_matrices(benchmark: Any, weights: tuple[np.ndarray, np.ndarray]) -> None:
    benchmark(ov_norms, *weights)


@pytest.mark.benchmark(group="norms of W_OV, one layer of gpt2")
def test_ov_norms_by_dense_products(benchmark: Any, weights: tuple[np.ndarray, np.ndarray]) -> None:
    def dense() -> tuple[np.ndarray, np.ndarray]:
        product = weights[0] @ weights[1]
        return np.linalg.norm(product, axis=(1, 2)), np.linalg.norm(product, 2, axis=(1, 2))

    expected = benchmark.pedantic(dense, rounds=1)
    for found, dense_norms in zip(ov_norms(*weights), expected, strict=True):
        np.testing.assert_allclose(found, dense_norms, rtol=1e-10)


@pytest.mark.benchmark(group="state of a tensor, 10 million numbers")
@pytest.mark.parametrize("kernel", [sketch, frobenius_norm])
def test_reading_a_tensor(benchmark: Any, kernel: Any) -> None:
    benchmark(kernel, torch.randn(6400, 1600))


@pytest.mark.benchmark(group="growth rates")
def test_growth_rates_of_a_large_model(benchmark: Any) -> None:
    norms = np.random.default_rng(0).uniform(1, 2, (97, 2000))
    benchmark(growth_rates, norms, (10, 81))
