"""Position 0 lives on a plateau of its own: halfway through, BOS outgrows every text token, and
loses norm at the end.

ratio = min over prompts of ‖resid at position 0‖ / max over text tokens of ‖resid‖, both at half
depth; > 1. Then ‖resid at position 0‖ after its last measured layer / its largest over all layers;
< 1.
Source: Heimersheim and Turner 2023, figure 2, and the published norms of the GPT-2 family.
Applies to: models for which it was published, with BOS or, as GPT-2 and DialoGPT are published
too, an ordinary token there.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_position_0(record: Record, band: Band, check) -> None:
    first = record.array("stream/position") == 0
    resid, middle = record.resid, record.n_layers // 2
    if not first.any() or not record.is_text.any() or np.isnan(resid[middle]).all():
        raise NotApplicable("position 0, or text behind it, was not measured at half depth")
    is_bos = bool(record.array("stream/is_bos")[first].all())
    ratio = resid[middle, first].min() / resid[middle, record.is_text].max()
    check(
        ratio,
        within=band,
        what="norm of position 0 over the largest of any text token",
        of=f"layer {middle}, {'BOS' if is_bos else 'an ordinary token'} at position 0",
    )
    norms = resid[:, first].mean(1)
    if not np.isnan(norms).any():
        falls = replace(band, low=0.0, high=1.0)
        check(
            norms[-1] / norms.max(),
            within=falls,
            what="last norm of position 0 over its largest",
            of="all layers",
        )
