"""How the cost of an audit's parts grows with layers, width, tokens and heads: fitted exponents
beside their theory.

python -m tests.benchmarks.scaling
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers as tf

from streamgauge import measure
from streamgauge.numerics.rows import Prompts

GROUPS = ("stream", "weights", "random_input")
REPEATS = 3


@dataclass(frozen=True)
class Shape:
    """What is varied."""

    layers: int = 6
    width: int = 768
    tokens: int = 2048
    heads: int = 12


# What is varied, over which values, and the exponent that operation counts predict of each part,
# for large values.
SERIES = (
    ("layers", (3, 6, 12, 24), {"prompts": 1, "weights": 1, "random_input": 1}),
    (
        "width",
        (384, 768, 1536),
        {"prompts": 2, "weights": 3, "random_input": 2},
    ),  # W_in W_out is a product of d³
    ("tokens", (1024, 2048, 4096, 8192), {"prompts": 1, "weights": 0, "random_input": 0}),
    ("heads", (6, 12, 24), {"prompts": 0, "weights": 0, "random_input": 0}),
)


def seconds(shape: Shape) -> dict[str, float]:
    """By part, the least of a few runs."""
    config = tf.GPT2Config(
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        vocab_size=1000,
        n_positions=64,
    )
    ids = np.random.default_rng(0).integers(1000, size=(shape.tokens // 64, 64)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        tf.GPT2LMHeadModel(config).save_pretrained(folder)
        runs = [
            measure(Path(folder), rows=Prompts(ids, "benchmark", None), groups=GROUPS)
            for _ in range(REPEATS)
        ]
    return {
        part: min(run.metadata["seconds_by_part"][part] for run in runs)
        for part in ("prompts", "weights", "random_input")
    }


def main() -> None:
    print(
        "| varied | over | part | seconds | exponent, fitted | by operation counts "
        "|\n|---|---|---|---|---|---|"
    )
    for name, values, theory in SERIES:
        found = [seconds(replace(Shape(), **{name: value})) for value in values]
        for part, expected in theory.items():
            times = [one[part] for one in found]
            slope = np.polyfit(np.log(values), np.log(times), 1)[0]
            listed = ", ".join(f"{t:.2f}" for t in times)
            print(
                f"| {name} | {', '.join(map(str, values))} | {part} | {listed} | {slope:.2f} | "
                f"{expected} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
