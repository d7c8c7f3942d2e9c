"""The weights are the baseline's: every tensor, and every head's part of W_Q, W_K, W_V and W_O.

size = what ‖new - old‖_F / ‖old‖_F surely exceeds, by 16 sketches of each tensor; allowed is the
unit roundoff of the coarser dtype where the two differ, and one rounding of fp32 where they do not.
What happened is told apart: a factor, a turned sign, zero, what another tensor or head held, or how
far it moved.
Source: Khinchine's and Markov's inequalities (see `streamgauge.groups.sketch`): less than one false
alarm in 10⁷ tensors.
Applies to: audits with --baseline and without --same of a record with sketches.
"""

import pytest

from streamgauge.compare import compare_weights, refuse_where_free, verdict
from streamgauge.numerics.bands import below
from streamgauge.record import Record

ALLOWED = below(
    1, "rounding of the two dtypes; for sketches Khinchine and Markov, less than 1e-7 a tensor"
)


@pytest.mark.regression
def test_weights(record: Record, baseline: Record, same: str | None, check) -> None:
    refuse_where_free(same, "weights")
    check(within=ALLOWED, **verdict(compare_weights(baseline, record)))
