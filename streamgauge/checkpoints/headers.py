"""What safetensors files say of their tensors before any is read, and single tensors with numpy."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamgauge.errors import CheckpointError


@dataclass(frozen=True)
class Header:
    """A tensor's name, its file, its shape, and its dtype as safetensors spells it: `F16`."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str


def headers(files: Iterable[Path]) -> Iterator[Header]:
    """Of every tensor in the files. Raises CheckpointError for a damaged one."""
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                yield Header(name, path, tuple(part.get_shape()), part.get_dtype())


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises CheckpointError for a damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or corrupt ({error}); copy the checkpoint again."
        ) from error


def read_tensor(path: Path, name: str) -> np.ndarray:
    """One tensor as numpy; bf16 comes as ml_dtypes.bfloat16.

    Raises CheckpointError where it is not there.
    """
    import ml_dtypes  # noqa: F401  importing it teaches safetensors' numpy side about bf16

    with opened(path) as file:
        array: np.ndarray = file.get_tensor(name)
        return array


def read_raw(path: Path, name: str) -> bytes:
    """One tensor's bytes, whatever its dtype, of a file that was seen to be whole."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + begin)
        return file.read(end - begin)
