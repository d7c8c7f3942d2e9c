"""This process's memory: how much is its own, and when what it has freed goes back to the system."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

KEPT = 8 * 10**8  # bytes of its own that a process may have before it gives back what is free
LARGE, NEVER = 2**25, 2**30  # the size from which the C library maps a piece by itself: by default at most, and here
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as glibc's mallopt counts


def private_bytes() -> int:
    """Memory that is this process's own, mapped files left out."""
    import psutil

    process = psutil.Process()
    if sys.platform == "linux":
        memory = process.memory_info()
        return int(memory.rss - memory.shared)
    return int(process.memory_full_info().uss)


def give_back() -> None:
    """Let the C library return memory that is free, where there is much: between small objects it would keep a block's worth
    for every block. What is returned and needed again costs a fault a page, so it is not done each time."""
    if private_bytes() > KEPT:
        with contextlib.suppress(OSError, AttributeError):  # glibc has this
            ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def reused() -> Iterator[None]:
    """Let the C library use large pieces again, which it would map anew each time: a tenth of the time of an audit."""
    _map_from(NEVER)
    try:
        yield
    finally:
        _map_from(LARGE)


def _map_from(size: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, size)
        library.mallopt(M_TRIM_THRESHOLD, 2 * size - 1)  # twice, as glibc has it; it must fit an int
