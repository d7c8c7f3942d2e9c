"""Records under a URL that fsspec knows, as s3://bucket/folder, where machines share them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamgauge.errors import StoreError, first_line
from streamgauge.record import Record


def is_url(text: str) -> bool:
    """Whether a text names a place by its protocol rather than a folder."""
    return "://" in text


def prepare_url(url: str, option: str) -> None:
    """See that records can be written there. Raises StoreError, which says what stands against it
    and the option to change.
    """
    with _reaching(url, f"name another with {option}"):
        files, place = _place(f"{url}/.writable")
        files.makedirs(place.rpartition("/")[0], exist_ok=True)
        files.pipe_file(place, b"")
        files.rm_file(place)


def fetch(url: str) -> Record | None:
    """The record there, None where there is none.

    Raises RecordError where it is damaged, StoreError where the place is out of reach.
    """
    with _reaching(url, "try again"):
        files, place = _place(url)
        try:
            content = files.cat_file(place)
        except FileNotFoundError:
            return None
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "record.safetensors"
        local.write_bytes(content)
        return Record.load(local)


def send(url: str, record: Record) -> None:
    """Write a record there: stores of objects show the whole one or none, and of one that was cut
    elsewhere its hash tells. Raises StoreError.
    """
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "record.safetensors"
        record.save(local)
        content = local.read_bytes()
    with _reaching(url, "try again"):
        files, place = _place(url)
        files.makedirs(place.rpartition("/")[0], exist_ok=True)
        files.pipe_file(place, content)


def forget(url: str) -> None:
    """Take away what is there. Raises StoreError."""
    with _reaching(url, "try again"):
        files, place = _place(url)
        if files.exists(place):
            files.rm_file(place)


def _place(url: str) -> tuple[Any, str]:
    import fsspec

    files, place = fsspec.core.url_to_fs(url)
    # Other machines write there too.
    files.invalidate_cache()
    return files, str(place)


@contextmanager
def _reaching(url: str, what_to_do: str) -> Iterator[None]:
    """What fsspec and its protocols raise, in one sentence."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        place = url.rpartition("/")[0]
        raise StoreError(
            f"the store {place} is out of reach ({first_line(error)}); {what_to_do}."
        ) from error
