"""Safetensors that were made of weights in another format, once, and what is known of those."""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from streamgauge.checkpoints.hashes import remembered_sha256
from streamgauge.checkpoints.untrusted import read_json
from streamgauge.errors import StoreError

if TYPE_CHECKING:
    import torch

VERSION = 1  # raise it whenever a change alters what conversions write
SHARD = 2**28  # bytes of tensors that are in memory before they are written
INDEX = "model.safetensors.index.json"
SAID = "converted_from.json"


@dataclass
class Origin:
    """What a converted checkpoint was made of.

    format: `GGUF`, `GPTQ`. done: how, in words. dtypes: what the files hold, by the name that the
    tensor has now: `Q4_1`. rounding: how far rounding to that grid is taken to have moved the
    tensor, relative to its norm, likewise; none for what is stored in a float format. unread: lines
    of what lies in the files and nothing reads. files: where they are.
    """

    format: str
    done: str = ""
    dtypes: dict[str, str] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    files: tuple[Path, ...] = ()


class Writer:
    """Writes tensors as shards of safetensors, one after the other, so that few are in memory."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        self.folder, self.origin = folder, origin
        self._waiting: dict[str, torch.Tensor] = {}
        self._map: dict[str, str] = {}

    def add(
        self, name: str, tensor: "torch.Tensor", dtype: str, rounding: float | None = None
    ) -> None:
        """Write a tensor. dtype, rounding: see Origin."""
        self.origin.dtypes[name] = dtype
        if rounding is not None and math.isfinite(rounding):
            self.origin.rounding[name] = rounding
        self._waiting[name] = tensor.contiguous()
        if sum(t.numel() * t.element_size() for t in self._waiting.values()) >= SHARD:
            self._flush()

    def close(self) -> None:
        """Write what is left, the index, and what it was made of."""
        self._flush()
        index = {"metadata": {}, "weight_map": self._map}
        (self.folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
        said = {key: value for key, value in asdict(self.origin).items() if key != "files"}
        (self.folder / SAID).write_text(json.dumps(said), encoding="utf-8")

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not self._waiting:
            return
        shard = f"model-{len(set(self._map.values())) + 1:05d}.safetensors"
        try:
            save_file(self._waiting, self.folder / shard, {"format": "pt"})
        except SafetensorError as error:  # no room, as a rule
            raise StoreError(
                f"{self.folder.parent} cannot be written ({error}), where safetensors made of "
                f"{self.origin.format} would be kept; name another store."
            ) from error
        self._map |= dict.fromkeys(self._waiting, shard)
        self._waiting = {}


def convert_once(
    store: Path,
    name: str,
    origin: Origin,
    make: Callable[[Writer], None],
    beside: Sequence[Path] = (),
) -> Path:
    """The folder with the safetensors that `make` writes of `origin.files`, made if need be.

    beside: files that the conversion reads too, as config.json. Files appear whole or not at all;
    processes may share the store. Raises StoreError where it cannot be written.
    """
    digest = remembered_sha256(origin.files, store / "hashes")
    said = [path.read_bytes() for path in beside if path.is_file()]
    parts = [digest.encode(), origin.format.encode(), str(VERSION).encode(), *said]
    parts += [path.name.encode() for path in beside]
    key = hashlib.sha256(b"\n".join(parts)).hexdigest()[:32]
    target = store / "converted" / key / name
    if (target / SAID).is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
        folder.chmod(target.parent.stat().st_mode & 0o777)  # as other folders of the store
    except OSError as error:
        raise StoreError(
            f"{target.parent} cannot be written ({error.strerror}), where safetensors made of "
            f"{origin.format} would be kept; name another store."
        ) from error
    try:
        writer = Writer(folder, origin)
        make(writer)
        writer.close()
        folder.replace(target)
    except OSError as error:
        if (target / SAID).is_file():  # another process was faster
            return target
        raise StoreError(
            f"{origin.files[0]} cannot be converted into {target.parent} ({error.strerror}); name "
            "another store."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def origin_of(folder: Path, files: tuple[Path, ...]) -> Origin:
    """What was said of a conversion when it was made."""
    return Origin(**read_json(folder / SAID), files=files)


def texts_beside(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The files of a checkpoint that go with its weights, but for indices of these."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in endings and not path.name.endswith(".index.json") and path.is_file()
    ]
