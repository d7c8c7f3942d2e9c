"""Random input moves attention more than text does: ‖Σ_heads x W_OV‖ on random x lies far above
‖attn_out‖.

ratio = mean ‖Σ_heads x W_V W_O‖ over normalised Gaussian x / mean ‖attn_out‖ over text tokens,
geometric mean over the window.
Source: Heimersheim and Turner 2023, a figure (gpt2-xl: about 5 times).
Applies to: gpt2-xl.
"""

from dataclasses import replace

import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import mean_ratio, measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_random_sum(record: Record, band: Band, check) -> None:
    random, attn = record.array("random_input/attn_norm"), record.text("stream/attn_out")
    window = measured_window(attn, band.window)
    check(
        mean_ratio(random, attn.mean(1), window),
        within=replace(band, layers=window),
        what="answer to random input over ‖attn_out‖",
        of=f"mean of {record.count_text}",
    )
