"""Sublayers see direction only: their outputs do not change when the stream they read is scaled, or
shifted under LayerNorm.

Each norm of the model reads α·x + c in place of x, with α in 2⁻¹⁰ to 2¹⁰ and (LayerNorm) a constant
c up to 4 root mean squares drawn for each layer and token, on one prompt and on sequences that
hypothesis draws; inputs are large, so that the norm's epsilon does not count. The error of attn_out
and mlp_out is the relative perturbation of the norms' inputs that would change them as much: it
must be rounding.
Source: definition of LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019); Heimersheim
and Turner 2023 rest their argument on it.
Applies to: sublayers that read the stream through a norm.
"""

import pytest

from streamgauge.numerics.bands import below
from streamgauge.numerics.rounding import scale_rounding
from streamgauge.record import Record


@pytest.mark.theorem
def test_scale_blindness(record: Record, check, check_draws) -> None:
    d_model, shift = record.metadata["d_model"], float(record.array("sublayers/largest_shift")[0])
    bound = below(
        scale_rounding(d_model, shift),
        f"shift, mean and variance are sums of {d_model} terms up to {1 + shift:g} root mean "
        "squares, fp32 (Higham 2002, §4.2)",
    )
    for name in ("attn", "mlp"):
        if f"sublayers/{name}_scale_error" not in record.arrays:
            continue
        layers, error = record.rows(f"sublayers/{name}_scale_error")
        layer = layers[int(error.max(1).argmax())]
        of = f"{error.shape[1]} draws a layer, largest at layer {layer}"
        check(
            error.max(),
            within=bound,
            what=f"change of {name}_out, as a relative change of the norms' inputs",
            of=of,
        )
    check_draws("scale_blindness")
