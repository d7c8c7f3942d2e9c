"""What a GGUF file declares, walked over without a copy of it: readers make an object of every
entry, and a stranger's file may declare any number.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from streamgauge.errors import CheckpointError

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
WIDTHS = {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 10: 8, 11: 8, 12: 8}  # bytes, by type
MOST = {"tensors": 200_000, "keys": 10_000, "elements of arrays": 2**22}


def refuse_vast(path: Path) -> None:
    """Raise CheckpointError for a file that is no GGUF, that ends before what it declares, or that
    declares more entries than any model has.
    """
    with path.open("rb") as file:
        _Walk(path, file, path.stat().st_size).keys()


@dataclass
class _Walk:
    """Reads a header from its beginning, as far as the last key."""

    path: Path
    file: BinaryIO
    size: int
    elements: int = 0

    def keys(self) -> None:
        if self.file.read(4) != MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF file; copy it again.")
        version = self._number("<I")
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path} is of version {version} of GGUF, and 2 and 3 can be read; convert "
                "the model again."
            )
        tensors, keys = self._number("<Q"), self._number("<Q")
        self._refuse_more(tensors, "tensors")
        self._refuse_more(keys, "keys")
        for _ in range(keys):
            self._value(STRING)
            self._value(self._number("<I"))

    def _value(self, kind: int) -> None:
        if kind == ARRAY:
            inner, count = self._number("<I"), self._number("<Q")
            self.elements += count
            self._refuse_more(self.elements, "elements of arrays")
            if inner == STRING:
                for _ in range(count):
                    self._value(STRING)
            else:
                self._skip(self._width(inner) * count)
        elif kind == STRING:
            self._skip(self._number("<Q"))
        else:
            self._skip(self._width(kind))

    def _width(self, kind: int) -> int:
        if kind not in WIDTHS:
            raise CheckpointError(
                f"{self.path} holds a value of a type, {kind}, that cannot be read; copy it again."
            )
        return WIDTHS[kind]

    def _number(self, form: str) -> int:
        raw = self.file.read(struct.calcsize(form))
        if len(raw) < struct.calcsize(form):
            raise self._truncated()
        return int(struct.unpack(form, raw)[0])

    def _skip(self, length: int) -> None:
        if self.file.tell() + length > self.size:
            raise self._truncated()
        self.file.seek(length, 1)

    def _truncated(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is truncated: it ends before what it declares; copy it again."
        )

    def _refuse_more(self, count: int, what: str) -> None:
        if count > MOST[what]:
            raise CheckpointError(
                f"{self.path} declares {count:,} {what}, more than any model has; refused."
            )
