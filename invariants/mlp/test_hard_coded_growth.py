"""The growth of mlp_out is in the weights: the MLP answers random input, the same at every layer,
with growing norms.

share = slope of log mean ‖MLP(x)‖ over normalised Gaussian x / slope of log ‖mlp_out‖ over text
tokens, least squares over the window: the part of the log growth that inputs which know nothing of
the layer reproduce. 1 is all of it.
Source: Heimersheim and Turner 2023, theory 1 against theory 2 (gpt2-xl: 'a big chunk', no number).
Applies to: models whose mlp_out grows over the window; claimed of gpt2-xl.
"""

from dataclasses import replace

import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import measured_window, reproduced_share
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_hard_coded_growth(record: Record, band: Band, check) -> None:
    random, error = record.array("random_input/mlp_norm"), record.array("random_input/mlp_error")
    outputs = record.text("stream/mlp_out")
    window = measured_window(outputs, band.window)
    share = reproduced_share(
        random, error, outputs, record.array("stream/prompt")[record.is_text], window
    )
    of = f"95% interval {share.interval.low:.3f} to {share.interval.high:.3f}, {record.count_text}"
    check(
        share.value,
        within=replace(band, layers=window),
        what="share of the growth of mlp_out that random input reproduces",
        of=of,
    )
