"""Activations are the baseline's: norms of the stream, of attn_out and of mlp_out, layer by layer.

size = root mean square over tokens of the difference of log norms, on prompts of the same tokens;
allowed is what errors of the size of the two dtypes' rounding on every weight, and fp32 arithmetic
in another order, do to this model: the baseline's `rounding` group measured it, and an F quantile
leaves one false alarm in a thousand comparisons of two models.
Source: Satterthwaite 1946 (degrees of freedom); Higham 2002, §4.2 (sums in another order).
Applies to: audits with --baseline that share prompts.
"""

import pytest

from streamgauge.compare import compare_activations, refuse_where_free, verdict
from streamgauge.numerics.bands import below
from streamgauge.record import Record

ALLOWED = below(1, "measured effect of rounding, F quantile at a family-wise 1e-3")


@pytest.mark.regression
def test_activations(record: Record, baseline: Record, same: str | None, check) -> None:
    refuse_where_free(same, "activations")
    found = compare_activations(baseline, record, rewritten=same == "function")
    check(within=ALLOWED, **verdict(found))
