"""A small update has a small effect: taking a sublayer's output out of the final residual changes predictions by its size.

With the last norm's scale kept, KL(full ‖ without) ≤ (R · ‖out‖ / scale)² / 2, where R is the largest norm of a row of the
unembedding with the last norm's gain folded in and the mean row taken away; each prediction, each sublayer. So a sublayer
that writes nothing has no effect. The log odds of two predictions differ by no more than ±R ‖out‖ / scale, and Hoeffding's
lemma bounds the logarithm of a bounded variable's moment generating function by its squared range over 8.
Source: Hoeffding 1963, lemma 1; pythia_tools notes 2023 ask for the effect.
Applies to: every model whose blocks only add to the stream.
"""

import pytest

from streamgauge.bands import below
from streamgauge.record import Record

UNIT = 2.0**-24  # rounding of fp32


@pytest.mark.theorem
def test_effect_bound(record: Record, check) -> None:
    largest = float(record.array("sublayer_effect/largest_row")[0])
    d_model = record.metadata["d_model"]
    for kind in ("attn", "mlp"):
        kl, size = record.array(f"sublayer_effect/{kind}_frozen_kl"), record.array(f"sublayer_effect/{kind}_size")
        # Log odds are inner products of d_model terms in fp32, of vectors no longer than R and √d_model, less a logarithm of
        # their sum, which is below 20 for any vocabulary.
        rounding = 2 * UNIT * (d_model * largest * d_model**0.5 + 4 * 20)
        excess = kl / ((largest * size) ** 2 / 2 + rounding)
        layer = int(excess.max(1).argmax())
        bound = below(1, "Hoeffding 1963, and rounding of log odds in fp32 (Higham 2002, §3.5)")
        check(excess.max(), within=bound, what=f"KL without {kind}_out over its bound", of=f"largest at layer {layer}")
