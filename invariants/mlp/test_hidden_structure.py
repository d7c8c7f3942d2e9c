"""Hidden activations use some number of directions: 1 ≤ participation ratio ≤ effective rank ≤ number of sequences.

With σ the singular values of the sequences x d_mlp matrix of hidden activations at one position and p = σ² / Σσ²: participation
ratio = 1 / Σp², effective rank = exp(entropy of σ / Σσ). Every layer; the numbers by layer are on the page.
Source: pythia_tools notes 2023 ask for both; Roy and Vetterli 2007 (effective rank); the inequalities hold because entropies
fall with their order and rise as a distribution is flattened.
Applies to: models with dense MLPs, and prompts of two tokens or more.
"""

import numpy as np
import pytest

from streamgauge.bands import below
from streamgauge.record import Record

UNIT = 2.0**-53  # rounding of fp64


@pytest.mark.theorem
def test_hidden_structure(record: Record, check) -> None:
    values = record.array("neurons/singular_values")
    n = values.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = values**2 / (values**2).sum(1, keepdims=True), values / values.sum(1, keepdims=True)
        participation = 1 / (p**2).sum(1)
        effective = np.exp(-np.where(q == 0, 0, q * np.log(q)).sum(1))
    rounding = below(1 + 8 * n * UNIT, f"sums of {n} terms in fp64 (Higham 2002, §4.2)")
    layer = int(effective.argmin())
    of = f"layers 0 to {len(values) - 1}; smallest effective rank {effective[layer]:.3g} at layer {layer}"
    check((1 / participation).max(), within=rounding, what="1 over the participation ratio", of=of)
    check((participation / effective).max(), within=rounding, what="participation ratio over effective rank", of=of)
    check(effective.max() / n, within=rounding, what="effective rank over the number of sequences", of=of)
