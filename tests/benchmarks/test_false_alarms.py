"""How often theorems fail on sound weights: random models of all architectures and many scales,
widths and depths. Never.
"""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from tests import models
from tests.conftest import Audit

SEEDS = 12
Auditing = Callable[..., Audit]


def _random(name: str, seed: int) -> Any:
    """Every parameter far from its default; seeds differ in the scale of the weights, a tenth of
    the usual to five times it.
    """
    model = models.random_model(name, seed)
    scale = 0.1 * 50 ** (seed / (SEEDS - 1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def _initialised(name: str, seed: int) -> Any:
    """As it is before training, 1 to 24 layers deep and 16 to 256 wide."""
    draw = np.random.default_rng(seed)
    depth, heads, width = (
        int(draw.integers(1, 25)),
        int(draw.choice([1, 2, 4])),
        int(draw.choice([16, 64, 144, 256])),
    )
    torch.manual_seed(seed)
    if name == "gpt2":
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(**models.GPT2 | {"n_layer": depth, "n_embd": width, "n_head": heads})
        ).float()
    shape = {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 3 * width,
    }
    config = {"llama": tf.LlamaConfig, "gpt-neox": tf.GPTNeoXConfig}[name](**models.LLAMA | shape)
    return tf.AutoModelForCausalLM.from_config(config).float()


def _no_failures(
    build: Callable[[str, int], Any], name: str, audit: Auditing, folder: Path
) -> None:
    saved = [models.save(build(name, seed), folder / f"{name}-{seed}") for seed in range(SEEDS)]
    found = audit(*(word for path in saved for word in ("--model", path)), "-m", "theorem")
    print(name, dict(collections.Counter((row["law"], row["outcome"]) for row in found.rows)))
    assert len({row["model"] for row in found.rows}) == SEEDS
    assert not [row for row in found.rows if row["outcome"] in ("fail", "error")]


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_no_theorem_fails_on_random_weights(name: str, audit: Auditing, tmp_path: Path) -> None:
    _no_failures(_random, name, audit, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox"])
def test_no_theorem_fails_before_training(name: str, audit: Auditing, tmp_path: Path) -> None:
    _no_failures(_initialised, name, audit, tmp_path)
