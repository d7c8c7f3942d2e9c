"""What a measurement cost: seconds by part, bytes read, peak memory."""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Self

from streamgauge.engine.memory import private_bytes

INTERVAL = 0.05  # seconds between looks at memory


class Accounts:
    """Kept while its context lasts, during which a thread looks at this process's memory.

    peak_private_bytes: memory that is this process's own, mapped files left out. read_bytes: what
    came from storage, which is less than the files hold where the system had them in its cache;
    None where the system does not say.
    """

    def __init__(self) -> None:
        import psutil

        self.process = psutil.Process()
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak_private_bytes = 0
        self.peaks: dict[str, int] = defaultdict(int)  # by part
        self._part = ""
        self._started, self._read = time.monotonic(), self._read_bytes()
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._watch.join()

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count the time to a part."""
        started, self._part = time.monotonic(), part
        try:
            yield
        finally:
            self._part = ""
            self.seconds[part] += time.monotonic() - started

    def sums(self) -> dict[str, Any]:
        """Up to now, as the record's metadata keeps them."""
        read = self._read_bytes()
        return {
            "seconds": round(time.monotonic() - self._started, 3),
            "seconds_by_part": {part: round(seconds, 3) for part, seconds in self.seconds.items()},
            "peak_private_bytes": self.peak_private_bytes,
            "peak_private_bytes_by_part": dict(self.peaks),
            "read_bytes": None if read is None or self._read is None else read - self._read,
        }

    def _look(self) -> None:
        while True:
            part, now = self._part, private_bytes()
            self.peaks[part] = max(self.peaks[part], now)
            self.peak_private_bytes = max(self.peak_private_bytes, now)
            if self._closed.wait(INTERVAL):
                return

    def _read_bytes(self) -> int | None:
        import psutil

        try:
            return int(self.process.io_counters().read_bytes)
        except (
            AttributeError,
            RuntimeError,
            psutil.Error,
        ):  # not every system counts, nor lets every process see
            return None
