"""This process's memory: how much is its own, when what is freed goes back to the system, and when
it is searched for cycles.
"""

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator

KEPT = 8 * 10**8  # bytes of its own that a process may have before it gives back what is free
GROWN = 2**27  # and by how much more than the last time
# From this size the C library maps a piece by itself: the most that it comes to by default.
MAPPED = 2**25
RARELY = 10_000  # as the garbage collector counts
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as glibc's mallopt counts


def private_bytes() -> int:
    """Memory that is this process's own, mapped files left out."""
    import psutil

    process = psutil.Process()
    if sys.platform == "linux":
        memory = process.memory_info()
        return int(memory.rss - memory.shared)
    return int(process.memory_full_info().uss)


# Only glibc has what is asked of it here.
LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None
_left = 0  # bytes of its own that the process had when it last gave back


def give_back() -> None:
    """Let the C library return memory that is free, where there is much: between small objects it
    would keep a block's worth for every block. What is returned and needed again costs a fault a
    page, so it is not done each time.
    """
    global _left
    if LIBRARY is None or not hasattr(LIBRARY, "malloc_trim"):
        return
    now = private_bytes()
    _left = min(_left, now)
    if now > max(KEPT, _left + GROWN):
        LIBRARY.malloc_trim(0)
        _left = private_bytes()


@contextlib.contextmanager
def reused() -> Iterator[None]:
    """Let the C library use again what is freed, which it would return and fetch anew each time: a
    tenth of an audit's time.

    Afterwards its thresholds are where a process that frees large pieces brings them by default.
    Where torch has taken no memory yet, it is told to ask for large pages as well, which come with
    a fault for 2 MB and not for 4 kB: a twentieth more.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _keep(2**30)
    try:
        yield
    finally:
        _keep(2 * MAPPED)


@contextlib.contextmanager
def searched_rarely() -> Iterator[None]:
    """Let Python look through old objects for cycles rarely, through young ones as ever.

    Half a million objects of modules and configurations come, and stay, while a checkpoint is
    opened; to look through all of them again and again takes a second.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(*thresholds[:2], RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def _keep(free: int) -> None:
    """At the end of the heap, where it can be returned."""
    if LIBRARY is not None and hasattr(LIBRARY, "mallopt"):
        LIBRARY.mallopt(M_MMAP_THRESHOLD, MAPPED)
        LIBRARY.mallopt(M_TRIM_THRESHOLD, free)
