"""Predictions are the baseline's: the loss of each token, and the tokens of the prompts.

size = root mean square over tokens of the difference of losses, nats; allowed is what rounding does
to them, measured in the baseline's `rounding` group. Prompts that come out in other tokens are a
difference of their own. How many of the most likely tokens agree is noted.
Source: Satterthwaite 1946 (degrees of freedom); Higham 2002, §4.2 (sums in another order).
Applies to: audits with --baseline that share prompts.
"""

import pytest

from streamgauge.compare import compare_predictions, refuse_where_free, verdict
from streamgauge.numerics.bands import below
from streamgauge.record import Record

ALLOWED = below(1, "measured effect of rounding, F quantile at a family-wise 1e-3")


@pytest.mark.regression
def test_predictions(record: Record, baseline: Record, same: str | None, check) -> None:
    refuse_where_free(same, "predictions")
    found = compare_predictions(baseline, record, rewritten=same == "function")
    check(within=ALLOWED, **verdict(found))
