"""Deeper blocks turn the stream less: what a block reads and what it leaves point the same way in
the second half of the depth more than in the first.

ratio = mean block influence over the first half of the blocks / over the second half; the block
influence of a layer is 1 - cos(resid_pre, resid_post), mean over text tokens.
Source: Men et al. 2024, 'ShortGPT', arXiv 2403.03853, who drop the layers of least influence; the
numbers are of two others, who measured five models.
Applies to: these five, as a direction; elsewhere the value is noted.
"""

import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_block_influence(record: Record, band: Band, check) -> None:
    influence = record.array("stream/block_influence")
    record.require_text()
    by_layer = influence[:, record.is_text].astype(float).mean(1)
    half = len(by_layer) // 2
    if not half:
        raise NotApplicable("one block has no deeper half")
    ratio = by_layer[:half].mean() / by_layer[len(by_layer) - half :].mean()
    of = f"least in layer {by_layer.argmin()}, {by_layer.min():.3f}; {record.count_text}"
    check(ratio, within=band, what="block influence of the first half over the second's", of=of)
