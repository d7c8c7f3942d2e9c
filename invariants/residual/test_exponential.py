"""The residual stream's growth is exponential: log norm against layer is a straight line.

R² of the least-squares line through the log norm, averaged over tokens, over a window of layers,
position 0 left out; counted negative where the line falls.
Source: Heimersheim and Turner 2023 (gpt2-xl: 0.999 over layers 5 to 41, from the authors' data).
Applies to: models of which a source shows it. It is no general law: of the 27 models in arXiv
2605.15572, medians over elements, ten lie below 0.9 (gemma-2b 0.50, Qwen2.5-1.5B 0.69). Not to
root-mean-square norms, which a few tokens with massive activations dominate.
"""

from dataclasses import replace

import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import log_linear_r2, measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_exponential(record: Record, band: Band, check) -> None:
    record.require_typical()
    resid = record.text_resid
    window = measured_window(resid, band.window)
    r2 = log_linear_r2(resid, window)
    check(
        r2,
        within=replace(band, layers=window),
        what="R² of a straight line through the log norm",
        of=f"mean log norm of {record.count_text}",
    )
