"""Records on disk, found again by what they were made from: weights, prompts, settings and
instrument.
"""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

from streamgauge.checkpoints.files import Checkpoint, default_store
from streamgauge.checkpoints.hashes import remembered_sha256
from streamgauge.checkpoints.prompts import read_prompts
from streamgauge.checkpoints.untrusted import TEXTS
from streamgauge.errors import RecordError, StoreError
from streamgauge.numerics.rows import Prompts
from streamgauge.record import Record, write_whole
from streamgauge.remote import fetch, forget, is_url, prepare_url, send

__all__ = ["Store", "default_store", "prepare_folder", "prepare_report"]

# The way keys are made; records made by that instrument are found, and gain what they lack.
KEY = "instrument 1"


def prepare_folder(folder: Path, what: str, option: str) -> None:
    """Make a folder and see that it can be written.

    Raises StoreError, which says what it is and the option to change.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ".writable", b"")
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"{what} {folder} cannot be written ({error.strerror}); name another with {option}."
        ) from error


REPORT = ("rows.jsonl", "report.html", "summary.md", "card.md", "report.sarif", "badge.svg")
OURS = ".streamgauge"  # lies in a folder whose reports are streamgauge's to replace


def prepare_report(folder: Path, option: str) -> None:
    """Make a folder for a report.

    Raises StoreError where it cannot be written, or holds such files of somebody else.
    """
    foreign = (
        [name for name in REPORT if (folder / name).exists()]
        if not (folder / OURS).exists()
        else []
    )
    if foreign:
        raise StoreError(
            f"{folder / foreign[0]} was not written by streamgauge; name another folder with "
            f"{option}."
        )
    prepare_folder(folder, "the report", option)
    (folder / OURS).touch()


@dataclass(frozen=True)
class Store:
    """A folder of records. Processes may share it: files appear whole or not at all.

    url: where records are instead, as fsspec names it (s3://…), for machines that share them; what
    a machine needs for itself, hashes and conversions, stays in the folder.
    """

    folder: Path
    url: str | None = None

    @classmethod
    def at(cls, place: str | Path | None) -> "Store":
        """The store in a folder or behind a URL, by default in the platform's cache folder."""
        if isinstance(place, str) and is_url(place):
            return cls(default_store(), place.rstrip("/"))
        return cls(default_store() if not place else Path(place).expanduser())

    def __str__(self) -> str:
        return self.url or str(self.folder)

    def prepare(self, option: str = "--store") -> None:
        """Make the folder and see that it can be written. Raises StoreError."""
        prepare_folder(self.folder, "the store", option)
        if self.url:
            prepare_url(self.url, option)

    def find(self, key: str) -> Record | None:
        """The record that is kept under a key; None for a damaged one, which is deleted."""
        path = self._path(key)
        if not self.url and not path.is_file():
            return None
        try:
            return fetch(self._address(key)) if self.url else Record.load(path)
        except RecordError:
            if self.url:
                forget(self._address(key))
            path.unlink(missing_ok=True)
            return None

    def keep(self, key: str, record: Record) -> None:
        """Keep a record under a key; where there is no room for it, that is said and no more."""
        try:
            if self.url:
                send(self._address(key), record)
            else:
                record.save(self._path(key))
        except StoreError as error:
            warnings.warn(f"streamgauge: {error} The record is used and not kept.", stacklevel=4)

    def _address(self, key: str) -> str:
        return f"{self.url}/records/{key}.safetensors"

    def _path(self, key: str) -> Path:
        return self.folder / "records" / f"{key}.safetensors"

    def key(
        self,
        checkpoint: Checkpoint,
        prompts: Path | None,
        device: str,
        rows: Prompts | None = None,
        precision: float | None = None,
    ) -> str:
        """What a measurement depends on, as one hash."""
        beside_weights = [p for p in sorted(checkpoint.folder.iterdir()) if p.suffix in TEXTS]
        parts = [
            self.weights_sha256(checkpoint),
            *(
                f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}"
                for p in beside_weights
                if p.is_file()
            ),
            rows.sha256()
            if rows
            else hashlib.sha256("\n".join(read_prompts(prompts)).encode()).hexdigest(),
            f"built-in {prompts is None}",
            f"device {device}",
            KEY,
            *_beside(checkpoint),
            *([] if precision is None else [f"precision {precision}"]),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def weights_sha256(self, checkpoint: Checkpoint) -> str:
        """The hash, remembered by path, size and time of change: gigabytes are not read again on
        every run.
        """
        return remembered_sha256(checkpoint.own_files, self.folder / "hashes")


def _beside(checkpoint: Checkpoint) -> list[str]:
    """Files beside the weights that may hold others, which a record speaks of too."""
    files = checkpoint.own_files
    if any(path.suffix != ".safetensors" for path in files):
        return []  # a folder of GGUF files is a folder of models
    others = [
        path
        for path in sorted(files[0].parent.iterdir())
        if path.suffix in (".safetensors", ".bin") and path.is_file() and path not in files
    ]
    return [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in others]
