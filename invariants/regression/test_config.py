"""The configuration is the baseline's: every entry that says something about the function the model
computes.

Differing entries of config.json as transformers reads it, one level deep; names, versions and
dtypes do not count.
Source: a wrong head count, epsilon, rope base or activation leaves every tensor as it was.
Applies to: audits with --baseline.
"""

import pytest

from streamgauge.compare import compare_config, verdict
from streamgauge.numerics.bands import below
from streamgauge.record import Record

ALLOWED = below(1, "equal entries")


@pytest.mark.regression
def test_config(record: Record, baseline: Record, check) -> None:
    check(within=ALLOWED, **verdict(compare_config(baseline, record)))
