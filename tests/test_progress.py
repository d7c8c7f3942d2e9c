"""What is said while a model is measured: its name, how far it is, and when the whole audit will be
over.
"""

from collections.abc import Iterator

import pytest

from streamgauge import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until it is moved, and no terminal."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False)
    return now


def ticking(clock: list[float], items: Iterator[int], seconds: float) -> None:
    for _ in items:
        clock[0] += seconds


def test_what_is_left_is_of_the_whole_audit(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        progress,
        "PARTS",
        {"blocks": 46.0, "predictions": 20.0, "screening repairs": 22.0, "racing repairs": 48.0},
    )
    with progress.auditing("a-model") as audit:
        audit.parts = list(progress.PARTS)
        ticking(clock, progress.track(range(10), "blocks", True), 9.2)  # twice what PARTS say
        ticking(clock, progress.track(range(4), "predictions", True), 10.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("streamgauge: a-model: blocks: 3 of 10, about ")
    ahead = 2 * sum(seconds for name, seconds in progress.PARTS.items() if name != "blocks")
    assert f"about {7 * 9.2 + ahead:.0f} s left in all" in lines[0]
    # Behind the blocks the pace is known: what remains of this part, and the repairs.
    assert lines[-1].startswith("streamgauge: a-model: predictions: 3 of 4")
    assert f"about {10 + 2 * (22 + 48):.0f} s left in all" in lines[-1]


def test_work_that_is_no_part_of_an_audit_speaks_for_itself(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.auditing("a-model") as audit:
        audit.parts = ["blocks"]
        ticking(clock, progress.track(range(4), "dequantising", True), 30.0)
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "streamgauge: dequantising: 1 of 4, about 90 s left"


def test_nothing_is_said_where_nothing_is_to_be_shown(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    ticking(clock, progress.track(range(4), "blocks", False), 30.0)
    assert capsys.readouterr().err == ""
