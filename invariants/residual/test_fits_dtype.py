"""What flows through the stream fits into the dtypes that the checkpoint says it is run in.

max |x| over resid_pre, resid_mid, resid_post, attn_out and mlp_out of every token of the prompts,
by layer, over the largest number of the dtype: that the weights are stored in, where it is a float
format, and that config.json names. 1 or more is Inf there: fp16 ends at 65,504. Measured in fp32,
raw; what overflows inside of a sublayer alone is not seen.
Source: IEEE 754-2019, table 3.5; bfloat16 shares fp32's exponents.
Applies to: checkpoints that name a float dtype; weights that were dequantised are judged by
config.json alone, and beside fp16 where that names none, with nothing asserted.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.record import Record

LARGEST = {"F16": 65504.0, "BF16": 2.0**127 * (2 - 2.0**-7), "F32": 2.0**127 * (2 - 2.0**-23)}


def dtypes_of(record: Record) -> list[str]:
    """The dtypes in which the model may be run as it is."""
    stored = str(record.metadata.get("stored_dtype")).split(", ")
    # Beside codes of few bits, what is stored in a float format says nothing of the whole.
    files = stored if set(stored) <= set(LARGEST) else []
    named = {*files, str(record.metadata.get("config_dtype"))}
    return sorted(named & set(LARGEST))


@pytest.mark.phenomenon
def test_fits_dtype(record: Record, band: Band, check) -> None:
    layers, largest = record.rows("stream/largest")
    dtypes = dtypes_of(record)
    if not dtypes:
        why = "neither its weights nor config.json name a float dtype that it is run in"
        band, dtypes = replace(band, unclaimed=why), ["F16"]
    narrow = min(dtypes, key=LARGEST.__getitem__)
    by_layer = largest.astype(float).max(1)
    over = [n for n, size in zip(layers, by_layer, strict=True) if size >= LARGEST[narrow]]
    worst = layers[int(np.argmax(by_layer))]
    where = f"layer {over[0]} first" if over else f"layer {worst}, where it is {by_layer.max():.4g}"
    check(
        by_layer.max() / LARGEST[narrow],
        within=band,
        what=f"largest activation over the largest number of {narrow}",
        of=where,
        details=[f"layer {n}: {size:.4g}" for n, size in zip(layers, by_layer, strict=True)],
    )
