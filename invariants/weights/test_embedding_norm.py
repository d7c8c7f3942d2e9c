"""Embeddings have the norm that their initialisation gave them, or a little more.

norm = root mean square over text tokens of ‖resid_pre 0‖. small_init draws W_E with standard
deviation √(2 / 5d), which makes it √(2/5) = 0.632 at any width.
Source: pythia_tools notes 2023 (0.64 for a Pythia); removing-layer-norm, pythia-70m: 0.689 over one
OpenWebText sample.
Applies to: pythia-70m.
"""

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_embedding_norm(record: Record, band: Band, check) -> None:
    resid = record.text_resid[0].astype(float)
    check(
        np.sqrt((resid**2).mean()),
        within=band,
        what="norm of the embedding",
        of=f"root mean square of {record.count_text}",
    )
