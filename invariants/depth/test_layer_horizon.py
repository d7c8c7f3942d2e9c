"""Layers of a large model read no further back than a horizon: the last k layers' outputs are
enough to predict as well.

horizon = smallest k whose loss is within 0.1 nat of the clean loss, interpolated, where every layer
n ≥ k and the final output read the outputs of the last k layers alone, others and the embedding
replaced by their means, errors compounding.
Source: Turner, 'Effective layer horizon', experiments by Miller (gpt2-xl: loss 8.9 at 0, 5.1 at 10,
3.3 at 26, 3.14 clean, read off a chart; gpt2: none to speak of).
Applies to: gpt2-xl, and gpt2, where it is claimed that there is none.
"""

import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.horizons import DEFAULT, effective_horizon, horizon_interval
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_layer_horizon(record: Record, band: Band, check) -> None:
    k, loss = record.array("horizon/k"), record.array(f"horizon/loss.{DEFAULT.name}")
    clean, tokens = record.array("horizon/clean_loss"), record.array("horizon/tokens")
    low, high = horizon_interval(k, loss, clean, tokens)
    of = (
        f"of {record.n_layers} layers; 95% interval {low:.1f} to {high:.1f} over {len(clean)} "
        "prompts"
    )
    check(
        effective_horizon(k, loss, clean, tokens),
        within=band,
        what="effective layer horizon",
        unit="layers",
        of=of,
    )
