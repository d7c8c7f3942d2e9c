"""The stream starts fast: the first two blocks multiply the norm that the embedding gave it.

factor = ‖resid_pre 2‖ / ‖resid_pre 0‖, geometric mean over tokens, position 0 left out; multiplied
means at least doubled.
Source: Heimersheim and Turner 2023, figure 1, and the published norms of the GPT-2 family (gpt2-xl:
1.84 to 49.7).
Applies to: the models for which it was published; others exist that shrink in block 0.
"""

import numpy as np
import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.record import Record

BLOCKS = 2


@pytest.mark.phenomenon
def test_fast_start(record: Record, band: Band, check) -> None:
    resid = record.text_resid
    record.require_text()
    if len(resid) <= BLOCKS or np.isnan(resid[[0, BLOCKS]]).all(1).any():
        raise NotApplicable(f"layers 0 and {BLOCKS} are not covered by this record")
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.exp(np.log(resid[BLOCKS] / resid[0]).mean())
    check(
        factor, within=band, what="norm after two blocks over the embedding's", of=record.count_text
    )
