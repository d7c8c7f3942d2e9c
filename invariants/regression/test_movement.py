"""A model that was trained further moved no farther than the adopter allows.

movement = median over matrices of ‖new - old‖_F / ‖old‖_F; by every number of both where both
checkpoints are at hand, else by sketches, each of which knows it to about a fifth. The matrix that
moved most is said beside it, with its layer.
Source: the adopter's own band, in streamgauge.toml.
Applies to: audits with --baseline and --same trained; without a band the movement is noted.
"""

import pytest

from streamgauge.compare import Contents, movement
from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.record import Record


@pytest.mark.regression
def test_movement(
    record: Record, baseline: Record, contents: Contents, same: str | None, band: Band, check
) -> None:
    if same != "trained":
        raise NotApplicable("regression/weights holds the weights to the baseline's")
    median, of = movement(baseline, record, contents[0])
    check(median, within=band, what="median movement of the matrices", unit="norms", of=of)
