"""Progress of long work: a bar with the time that is left on a terminal, now and then a plain line
elsewhere; of a whole audit where one is under way.
"""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
INTERVAL = 20.0  # seconds between plain lines
# What parts of an audit take beside each other, seconds of SmolLM2-135M on two cores; what the
# audited model takes is told from those of its parts that are over.
PARTS = {"blocks": 11.5, "predictions": 3.4, "screening repairs": 17.0, "racing repairs": 55.0}


class Audit:
    """A whole audit of one model, in parts of PARTS that follow each other, once they are known."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.parts: Sequence[str] = ()
        self.taken: dict[str, float] = {}  # seconds, or an estimate for the part under way

    def left(self, part: str, elapsed: float, share: float) -> float:
        """Seconds until its end, when so much of a part is done in so many seconds."""
        self.taken[part] = elapsed / share
        pace = sum(self.taken.values()) / sum(PARTS[name] for name in self.taken)
        ahead = [name for name in self.parts if name not in self.taken]
        return self.taken[part] - elapsed + pace * sum(PARTS[name] for name in ahead)


_audits: list[Audit] = []  # under way; of several, one within another, the last counts


@contextlib.contextmanager
def auditing(model: str) -> Iterator[Audit]:
    """Let what is tracked meanwhile name the model, and say when all parts will be over."""
    _audits.append(Audit(model))
    try:
        yield _audits[-1]
    finally:
        _audits.pop()


def track(items: Iterable[T], what: str, show: bool) -> Iterator[T]:
    """The items, and on stderr how far they are, if it is to be shown."""
    if not show:
        yield from items
        return
    whole = list(items)
    if sys.stderr.isatty() or in_notebook():
        yield from _bar(whole, what)
    else:
        yield from _lines(whole, what)


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this, where progress is wanted and a bar can be shown."""
    return "ipykernel" in sys.modules


def _audit_of(what: str) -> Audit | None:
    """The audit that a part belongs to."""
    audit = _audits[-1] if _audits else None
    return audit if audit and what in audit.parts else None


def _bar(items: list[T], what: str) -> Iterator[T]:
    from tqdm.auto import tqdm

    audit, started = _audit_of(what), time.monotonic()
    with tqdm(items, f"{audit.model}: {what}" if audit else what, leave=False) as bar:
        for done, item in enumerate(bar, 1):
            yield item
            if audit:
                left = audit.left(what, time.monotonic() - started, done / len(items))
                bar.set_postfix_str(f"about {left:.0f} s left in all")


def _lines(items: list[T], what: str) -> Iterator[T]:
    audit = _audit_of(what)
    started = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said > INTERVAL and done:
            left, of = (now - started) / done * (len(items) - done), what
            if audit:
                left = audit.left(what, now - started, done / len(items))
                of = f"{audit.model}: {what}"
            in_all = " in all" if audit else ""
            print(
                f"streamgauge: {of}: {done} of {len(items)}, about {left:.0f} s left{in_all}",
                file=sys.stderr,
                flush=True,
            )
            said = now
        yield item
    if audit and items:
        audit.left(what, time.monotonic() - started, 1.0)
