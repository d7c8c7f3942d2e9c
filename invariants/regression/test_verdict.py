"""The checkpoint is to the baseline what it is meant to be: the same weights, or with --same the
same function in other weights, the same model trained further, or a quantisation of it.

value = 1 where the verdict on the two is none that is accepted, 0 where it is. The verdict is read
off what became of the tensors, of configuration, tokenizer, activations and losses: by every number
of both where both checkpoints are at hand, as `python -m streamgauge diff` does, by sketches of the
tensors and by tokens where one of the two is a record alone.
Source: the bounds of the other regression laws, which it rests on.
Applies to: audits with --baseline.
"""

import pytest

from streamgauge.compare import ACCEPTED, Contents, differences, judge
from streamgauge.numerics.bands import below
from streamgauge.record import Record

ALLOWED = below(0.5, "what the regression laws allow, of sketches, tokens, activations and losses")


@pytest.mark.regression
def test_verdict(
    record: Record, baseline: Record, contents: Contents, same: str | None, check
) -> None:
    found = judge(baseline, record, differences(baseline, record), *contents)
    other = next((f"--same {one}" for one in ACCEPTED if one and found.passes(one)), None)
    check(
        0.0 if found.passes(same) else 1.0,
        within=ALLOWED,
        what="verdicts that are not accepted",
        of=found.says,
        details=[one.says for one in found.found],
        says=f"{found.says}; accepted is {' or '.join(ACCEPTED[same])}"
        + (f", and this with {other}" if other else ""),
    )
