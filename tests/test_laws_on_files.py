"""What laws about a checkpoint's own matrices say, computed once more from the model itself."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamgauge.numerics.convention import random_inputs
from tests import models
from tests.conftest import Audit

WIDTH, HEADS = models.WIDTH, models.HEADS
D_HEAD = WIDTH // HEADS


def by_head(value: np.ndarray, output: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(heads, d_model, d_head) and (heads, d_head, d_model), of matrices that map rows; heads of a
    group share their values.
    """
    own = [value[:, n : n + D_HEAD] for n in range(0, value.shape[1], D_HEAD)]
    V = [own[head * len(own) // HEADS] for head in range(HEADS)]
    return np.array(V), output.reshape(HEADS, D_HEAD, WIDTH)


def gpt2_heads(block: Any) -> tuple[np.ndarray, np.ndarray]:
    """Gain folded in; the mean taken away that LayerNorm takes away."""
    value = block.attn.c_attn.weight.double().numpy()[:, 2 * WIDTH :]
    value = block.ln_1.weight.double().numpy()[:, None] * value
    output = block.attn.c_proj.weight.double().numpy()
    return by_head(value - value.mean(0), output - output.mean(1, keepdims=True))


def llama_heads(block: Any) -> tuple[np.ndarray, np.ndarray]:
    """Gain folded in; RMSNorm takes no mean away."""
    value = block.self_attn.v_proj.weight.double().numpy().T
    value = block.input_layernorm.weight.double().numpy()[:, None] * value
    return by_head(value, block.self_attn.o_proj.weight.double().numpy().T)


MODELS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], bool]] = {
    "gpt2": (lambda model: model.transformer.h, gpt2_heads, True),
    "llama": (lambda model: model.model.layers, llama_heads, False),
}


@pytest.fixture(params=MODELS)
def heads(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The folder of a random model, each block's W_V and W_O by head, and whether norms centre."""
    blocks, read, centres = MODELS[request.param]
    model = models.random_model(request.param)
    with models.torch.no_grad():
        found = [read(block) for block in blocks(model)]
    return {"folder": models.save(model, tmp_path / "model"), "heads": found, "centres": centres}


def test_responses_are_those_of_the_matrices(
    heads: dict[str, Any], audit: Callable[..., Audit]
) -> None:
    row = audit("--model", heads["folder"], "-k", "random_response").rows[0]
    wanted, edges = [], []
    total = len(heads["heads"]) * HEADS
    for layer, (V, O) in enumerate(heads["heads"]):  # noqa: E741
        x = random_inputs(256, WIDTH, heads["centres"], seed=layer)
        for head in range(HEADS):
            W = V[head] @ O[head]
            squares = np.linalg.svd(W, compute_uv=False) ** 2
            squares *= WIDTH / (WIDTH - 1) if heads["centres"] else 1
            wanted.append(np.mean(np.sum((x @ W) ** 2, axis=1)) / squares.sum())
            # Laurent and Massart's lemma at one false alarm in a million models.
            t = math.log(2 * total / 1e-6)
            off = 2 * math.sqrt((squares**2).sum() * t / 256) + 2 * squares.max() * t / 256
            edges.append(off / squares.sum())
    *found, drawn = [value["value"] for value in row["values"]]
    assert 0 < drawn < 1  # the worst of the draws, in tolerances
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    worst = min(range(total), key=lambda n: edges[n] - abs(wanted[n] - 1))
    assert row["of"] == f"layer {worst // HEADS}, head {worst % HEADS}"
    np.testing.assert_allclose(row["band"], [1 - edges[worst], 1 + edges[worst]], rtol=1e-6)


def test_amplification_is_that_of_the_matrices(
    heads: dict[str, Any], audit: Callable[..., Audit]
) -> None:
    row = audit("--model", heads["folder"], "-k", "amplification_bound").rows[0]
    wanted, where = [], []
    for layer, (V, O) in enumerate(heads["heads"]):  # noqa: E741
        ratios: dict[str, list[float]] = {"spectral": [], "frobenius": [], "gain": []}
        for head in range(HEADS):
            W = V[head] @ O[head]
            spectral, frobenius = np.linalg.norm(W, 2), np.linalg.norm(W)
            x, gains = np.random.default_rng(layer).standard_normal((8, WIDTH)), []
            for _ in range(3):
                x = x / np.linalg.norm(x, axis=1, keepdims=True)
                gains.append(np.linalg.norm(x @ W, axis=1).max())
                x = x @ W @ W.T
            ratios["spectral"].append(spectral / frobenius)
            ratios["frobenius"].append(frobenius / spectral / math.sqrt(D_HEAD))
            ratios["gain"].append(max(gains) / spectral)
        for values in ratios.values():
            wanted.append(max(values))
            where.append(f"layer {layer}, head {values.index(max(values))}")
    *fixed, drawn = row["values"]
    np.testing.assert_allclose([value["value"] for value in fixed], wanted, rtol=1e-6)
    assert [value["of"] for value in fixed] == where
    assert max(wanted[2::3]) < drawn["value"] <= 1
    assert row["band"] == [None, pytest.approx(1 + 8 * WIDTH * D_HEAD * 2.0**-53, rel=1e-15)]
