"""A small update has a small effect: taking a sublayer's output out of the final residual changes
predictions by its size.

With the last norm's scale kept, KL(full ‖ without) ≤ (R · size)² / 2, size = ‖out‖ / scale, where R
is the largest norm of a row of the unembedding with the last norm's gain folded in and the mean row
taken away; each prediction, each sublayer. With the scale as it comes out, size is replaced by 2
size / (1 + scale without / scale). So a sublayer that writes nothing has no effect. The log odds of
two predictions differ by no more than ±R times what the normalised residual moves; Hoeffding's
lemma bounds the logarithm of a bounded variable's moment generating function by its squared range
over 8; and two vectors' directions differ by no more than twice their distance over the sum of
their lengths.
Source: Hoeffding 1963, lemma 1; Dunkl and Williams 1964 (directions); pythia_tools notes 2023 ask
for the effect.
Applies to: every model whose blocks only add to the stream.
"""

import numpy as np
import pytest

from streamgauge.numerics.bands import below
from streamgauge.numerics.rounding import UNIT
from streamgauge.record import Record


@pytest.mark.theorem
def test_effect_bound(record: Record, check) -> None:
    largest = float(record.array("sublayer_effect/largest_row")[0])
    d_model = record.metadata["d_model"]
    for kind in ("attn", "mlp"):
        if f"sublayer_effect/{kind}_size" not in record.arrays:
            continue
        layers, size = record.rows(f"sublayer_effect/{kind}_size")
        _, share = record.rows(f"sublayer_effect/{kind}_share")
        # The squared scale without over the squared scale: less than this it cannot be, whatever
        # the norm's epsilon.
        shrunk = np.maximum(0, 1 - 2 * np.maximum(share, 0) + size**2 / d_model)
        moved = {"frozen_kl": size, "kl": 2 * size / (1 + np.sqrt(shrunk))}
        # Log odds are inner products of d_model terms in fp32, of vectors no longer than R and
        # √d_model, less a logarithm of their sum, which is below 20 for any vocabulary.
        rounding = 2 * UNIT * (d_model * largest * d_model**0.5 + 4 * 20)
        bound = below(
            1,
            "Hoeffding 1963, Dunkl and Williams 1964, and rounding of log odds in fp32 (Higham "
            "2002, §3.5)",
        )
        for name, distance in moved.items():
            _, kl = record.rows(f"sublayer_effect/{kind}_{name}")
            excess = kl / ((largest * distance) ** 2 / 2 + rounding)
            layer = layers[int(excess.max(1).argmax())]
            scale = "scale kept" if name == "frozen_kl" else "scale as it is"
            of = f"largest at layer {layer}; {scale}"
            what = f"KL without {kind}_out over its bound"
            check(excess.max(), within=bound, what=what, of=of)
