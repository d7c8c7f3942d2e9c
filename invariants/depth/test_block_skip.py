"""Every block is worth its place: without any one of them, later blocks reading what it read, the
model predicts worse.

rise = smallest over blocks of the rise of the mean loss, nats a token, when that block alone is
left out and every later one is run anew.
Source: song17122328/llama-pruning, layer_importance_loss.json, of two models.
Applies to: the two models that it was measured of. It costs half a forward pass for each block, so
it is not measured here; `predictions/best_of_its_neighbours` leaves out sublayers where that might
help.
"""

import pytest

from streamgauge.numerics.bands import Band
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_block_skip(record: Record, band: Band, check) -> None:
    by_layer = record.array("block_skip/loss").astype(float).mean(1)
    of = f"layer {by_layer.argmin()}, the largest {by_layer.max():.2f} in layer {by_layer.argmax()}"
    check(
        by_layer.min(),
        within=band,
        what="smallest rise of the loss without a block",
        unit="nats a token",
        of=of,
    )
