"""No block stands twice: a model trained as a whole has other weights in each of its layers.

Runs of two blocks or more, in order, whose every matrix equals that of a block two or more layers
before. Models whose depth was scaled up by repeating blocks have them, and say so here; a single
block that equals another, which copies that went wrong leave, is `weights/integrity`'s.
Source: Kim et al. 2023 (SOLAR: layers 24 to 39 start as layers 8 to 23), who made theirs so.
Applies to: every checkpoint.
"""

import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_repeated_blocks(record: Record, band: Band, check) -> None:
    found = record.integrity.get("repeated")
    if found is None:
        raise NotApplicable("blocks were not all read when this record was made")
    check(len(found), within=band, what="runs of repeated blocks", of="; ".join(found) or "none")
