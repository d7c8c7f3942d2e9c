"""Norm gains are trained: none is one constant where the same norms of other layers are not.

Count of norms whose gain is the same in every coordinate although other layers' gains vary; the one
behind the last layer counts too; 0. Where all layers' gains are constant the model is untrained or
its norms have no gain, and nothing is wrong.
Source: conversions that miss a tensor leave its initial value, which for gains is a constant.
Applies to: every model with norms before its sublayers.
"""

import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_gains_vary(record: Record, band: Band, check) -> None:
    found = record.integrity.get("reset")
    if found is None:
        raise NotApplicable("no norm gain varies: the model is untrained, or its norms have none")
    check(
        len(found),
        within=band,
        what="gains that are constant",
        of="; ".join(found[:3]) or "all norms",
    )
