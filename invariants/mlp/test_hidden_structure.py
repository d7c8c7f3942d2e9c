"""Hidden activations use some number of directions, fewer than there are sequences: effective rank
and participation ratio.

With σ the singular values of the sequences x d_mlp matrix of hidden activations at one position and
p = σ² / Σσ²: effective rank = exp(entropy of σ / Σσ), participation ratio = 1 / Σp². The value is
the smallest effective rank over the window's layers, 0 where nothing fires; both numbers by layer
are on the page.
Source: pythia_tools notes 2023 ask for both, without numbers; Roy and Vetterli 2007 (effective
rank).
Applies to: models with dense MLPs, and prompts of two tokens or more; a report, claimed of none
until you declare a band.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_hidden_structure(record: Record, band: Band, check) -> None:
    values = record.array("neurons/singular_values")
    first, last = measured_window(values, band.window)
    effective = [_effective_rank(row) for row in values[first : last + 1]]
    layer = int(np.argmin(effective))
    squares = values[first + layer] ** 2
    participation = squares.sum() ** 2 / max((squares**2).sum(), np.finfo(float).tiny)
    of = (
        f"{values.shape[1]} sequences, layer {first + layer}, where the participation ratio is "
        f"{participation:.3g}"
    )
    check(
        effective[layer],
        within=replace(band, layers=(first, last)),
        what="smallest effective rank",
        of=of,
    )


def _effective_rank(values: np.ndarray) -> float:
    if not values.any():
        return 0.0
    share = values / values.sum()
    return float(
        np.exp(-np.where(share == 0, 0, share * np.log(np.where(share == 0, 1, share))).sum())
    )
