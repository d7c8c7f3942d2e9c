"""What is measured is what transformers computes: each block's output, and the logits, are those of
its own forward pass on the same weights.

‖found - transformers'‖ over ‖what the block adds‖, for every block: of the walk over the blocks,
through which all streams are measured, and of TransformerLens's bridge, by whose names heads are
read. Allowed is what rounding explains: eight sums of d_model terms in another order, enlarged as
the block enlarges a small change of its input, which is measured beside.
Source: definition of the model by its own code. Higham 2002, §4.2 (sums).
Applies to: every checkpoint; the bridge where TransformerLens has one.
"""

import numpy as np
import pytest

from streamgauge.numerics.bands import below
from streamgauge.numerics.rounding import other_order
from streamgauge.record import Record

BOUND = below(1, "eight sums of d_model terms in another order, fp32 (Higham 2002, §4.2)")


@pytest.mark.theorem
def test_same_function(record: Record, check) -> None:
    gain, d_model = record.array("instrument/gain"), record.metadata["d_model"]
    allowed = other_order(gain, d_model)
    differences = {"the walk over the blocks": record.array("instrument/block_error")}
    if "instrument/bridge_error" in record.arrays:
        differences["TransformerLens"] = record.array("instrument/bridge_error")
    for what, error in differences.items():
        layer = int((error / allowed).argmax())
        of = f"largest at layer {layer}, which differs by {error[layer]:.2g}"
        check((error / allowed).max(), within=BOUND, what=f"difference of {what}", of=of)
    logits = float(record.array("instrument/logits_error")[0])
    # What the last block is off by goes through one more norm and one more product.
    last = float(np.sum(allowed))
    check(logits / last, within=BOUND, what="difference of the logits", of="two rows of tokens")
