"""Heads of a circuit carry its task: patching them back brings back more of it than patching
others, and norms say which.

R = mean |score| over a circuit's heads / mean over all other heads. score: the part of the clean
prompts' advantage (log odds of the right answer against the wrong one) that a head's clean output,
put into the corrupted run, brings back. Noted beside it: how often heads drawn at random reach R,
and how many heads of the circuit lie in the upper quarter of all both by σ₁(W_OV) and by |score|.
Source: mechanistic-validity, B05 Norm Trajectory (its reading 'high norm and high activation
patching score').
Applies to: no model by a published number; measured on models with a known circuit whose task has
prompt pairs.
"""

import numpy as np
import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.numerics.circuits import Circuit, compared, head_mask
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_circuit_patching(record: Record, circuits: list[Circuit], band: Band, check) -> None:
    measured = [circuit for circuit in circuits if f"patching/{circuit.task}" in record.arrays]
    if not measured:
        record.array(f"patching/{circuits[0].task}")  # says why there is none
        raise NotApplicable("no task of this model's circuits was measured")
    for circuit in measured:
        scores, norms = (
            np.abs(record.array(f"patching/{circuit.task}")),
            record.array("weights/W_OV_spectral"),
        )
        ratio, of = compared(scores, circuit)
        high = (
            (scores > np.quantile(scores, 0.75))
            & (norms > np.quantile(norms, 0.75))
            & head_mask(norms.shape, circuit.heads)
        )
        named = ", ".join(f"{layer}.{head}" for layer, head in np.argwhere(high)) or "none"
        pairs = int(record.array(f"patching/{circuit.task}.n_pairs")[0])
        of = f"{of}; high by norm and by score: {named}; {pairs} prompt pairs"
        check(
            ratio,
            within=band,
            what=f"patching score of {circuit.task}'s heads over all others'",
            of=of,
        )
