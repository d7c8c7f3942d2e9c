"""Heads of a circuit have larger spectral norms than others: substantial where the ratio of means
exceeds 1.5.

R = mean σ₁ over a circuit's heads / mean over all other heads, for W_OV and for W_QK (its part
without positions, where these are rotary). Noted beside it: how often heads drawn at random reach
R, anywhere and from the same layers, since late layers are larger anyway.
Source: mechanistic-validity, B05 Norm Trajectory, which asks for these norms and published none of
them.
Applies to: no model by a published number; measured on every model with a known circuit.
"""

import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.circuits import Circuit, compared
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_circuit_spectral(record: Record, circuits: list[Circuit], band: Band, check) -> None:
    for name in ("W_OV", "W_QK"):
        if name == "W_OV" or f"weights/{name}_spectral" in record.arrays:
            for circuit in circuits:
                ratio, of = compared(record.array(f"weights/{name}_spectral"), circuit)
                check(
                    ratio,
                    within=band,
                    what=f"σ₁({name}) of {circuit.task}'s heads over all others'",
                    of=of,
                )
