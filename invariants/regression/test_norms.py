"""Norms of weights are the baseline's, by layer and head.

Relative difference of each norm, of W_OV, W_QK and W_in W_out too; allowed is what rounding of the
two dtypes can do to it: that of a matrix and its gain, and in products the errors of both factors,
each no larger than the factor's norm. Which way a norm moved is said, and is no failure by itself:
training moves norms both ways.
Source: triangle inequality; Higham 2002, §2.1 (unit roundoff) and §3.5 (products).
Applies to: audits with --baseline and without --same.
"""

import pytest

from streamgauge.compare import compare_norms, refuse_where_free, verdict
from streamgauge.numerics.bands import below
from streamgauge.record import Record

ALLOWED = below(1, "rounding of the two dtypes (Higham 2002, §3.5)")


@pytest.mark.regression
def test_norms(record: Record, baseline: Record, same: str | None, check) -> None:
    refuse_where_free(same, "norms")
    check(within=ALLOWED, **verdict(compare_norms(baseline, record)))
