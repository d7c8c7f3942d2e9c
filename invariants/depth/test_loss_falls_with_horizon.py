"""The further back layers can read, the better the model predicts: loss falls as the layer horizon
grows.

rise = largest increase of the mean loss from one horizon that was tried to the next, over its
standard error across prompts where there are several; below 3.29, which noise exceeds once in 2,000
steps.
Source: Turner, 'Effective layer horizon', experiments by Miller, chart of gpt2-xl.
Applies to: gpt2-xl.
"""

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.horizons import DEFAULT
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_loss_falls_with_horizon(record: Record, band: Band, check) -> None:
    k, loss = record.array("horizon/k"), record.array(f"horizon/loss.{DEFAULT.name}")
    steps = np.diff(loss, axis=0)
    n_prompts = steps.shape[1]
    error = (
        steps.std(1, ddof=1) / np.sqrt(n_prompts)
        if n_prompts > 1
        else np.full(len(steps), np.finfo(float).tiny)
    )
    rises = np.where(steps.mean(1) == 0, 0, steps.mean(1) / np.maximum(error, np.finfo(float).tiny))
    worst = int(rises.argmax())
    of = f"from horizon {k[worst]} to {k[worst + 1]}: {steps[worst].mean():+.3f} nats"
    check(rises[worst], within=band, what="largest rise of the loss", unit="standard errors", of=of)
