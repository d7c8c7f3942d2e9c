"""Position 0 lives on a plateau of its own: halfway through, BOS outgrows every text token, and
loses norm at the end.

ratio = min over prompts of ‖resid at position 0‖ / max over text tokens of ‖resid‖, both at half
depth; > 1. Then ‖resid at position 0‖ after its last measured layer / its largest over all layers;
< 1.
Source: Heimersheim and Turner 2023, figure 2, and the published norms of the GPT-2 family.
Applies to: models for which it was published, with BOS at position 0.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_position_0(record: Record, band: Band, check) -> None:
    is_bos = record.array("stream/is_bos").astype(bool)
    resid, middle = record.resid, record.n_layers // 2
    if not is_bos.any() or np.isnan(resid[middle]).all():
        raise NotApplicable("no BOS token at position 0, or not measured at half depth")
    ratio = resid[middle, is_bos].min() / resid[middle, record.is_text].max()
    check(
        ratio,
        within=band,
        what="norm of BOS over the largest of any text token",
        of=f"layer {middle}",
    )
    bos = resid[:, is_bos].mean(1)
    if not np.isnan(bos).any():
        falls = replace(band, low=0.0, high=1.0)
        check(
            bos[-1] / bos.max(),
            within=falls,
            what="last norm of BOS over its largest",
            of="all layers",
        )
