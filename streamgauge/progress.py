"""Progress of long work: a bar with the time that is left on a terminal, now and then a plain line
elsewhere.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
INTERVAL = 20.0  # seconds between plain lines


def track(items: Iterable[T], what: str, show: bool) -> Iterator[T]:
    """The items, and on stderr how far they are, if it is to be shown."""
    if not show:
        yield from items
        return
    if sys.stderr.isatty() or in_notebook():
        from tqdm.auto import tqdm

        yield from tqdm(items, what, leave=False)
        return
    yield from _lines(list(items), what)


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this, where progress is wanted and a bar can be shown."""
    return "ipykernel" in sys.modules


def _lines(items: list[T], what: str) -> Iterator[T]:
    started = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said > INTERVAL:
            left = (now - started) / done * (len(items) - done)
            print(
                f"streamgauge: {what}: {done} of {len(items)}, about {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            said = now
        yield item
