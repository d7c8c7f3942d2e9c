"""Heads of a circuit do not stand out by their weights: the ratio of their mean ‖W_OV‖_F to all
others' is the published one.

R = mean ‖W_OV‖_F over a circuit's heads / mean over all other heads; R above 1.5 would be
substantial. Each circuit that is known of the model is checked; how often heads drawn at random
reach R, anywhere and from the same layers, is noted beside it.
Source: mechanistic-validity, B05 Norm Trajectory (gpt2: ioi 1.019, sva 1.240; the published
trajectories are Frobenius norms).
Applies to: models with a circuit in circuits.toml whose ratio was published.
"""

import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import between
from streamgauge.numerics.circuits import Circuit, compared
from streamgauge.record import Record

# Published with three digits behind the point, of norms that two measurements gave alike to four.
DIGITS = 0.0015


@pytest.mark.phenomenon
def test_circuit_norms(record: Record, circuits: list[Circuit], check) -> None:
    norms = record.array("weights/W_OV_frobenius")
    published = [circuit for circuit in circuits if circuit.ratio is not None]
    if not published:
        raise NotApplicable("no ratio is published for the circuits of this model")
    for circuit in published:
        ratio, of = compared(norms, circuit)
        wanted = circuit.ratio or 0.0
        within = between(wanted - DIGITS, wanted + DIGITS, circuit.source)
        check(
            ratio, within=within, what=f"‖W_OV‖_F of {circuit.task}'s heads over all others'", of=of
        )
