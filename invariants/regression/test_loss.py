"""A model that was trained further predicts no worse than it did: the rise of its mean loss stays
below what the adopter allows.

rise = mean loss - the baseline's, nats a token, over the prompts that both were measured on.
Source: the adopter's own band, in streamgauge.toml.
Applies to: audits with --baseline and --same trained; without a band the rise is noted.
"""

import pytest

from streamgauge.compare import mean_losses
from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.record import Record


@pytest.mark.regression
def test_loss(record: Record, baseline: Record, same: str | None, band: Band, check) -> None:
    if same != "trained":
        raise NotApplicable("regression/predictions holds losses to the baseline's")
    before, after, count = mean_losses(baseline, record)
    of = f"{before:.4f} nats in the baseline, now {after:.4f}; {count:,} tokens"
    check(after - before, within=band, what="rise of the loss", unit="nats a token", of=of)
