"""The sha256 of weight files, remembered beside records: gigabytes are not read again on every
run.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from streamgauge.record import write_whole

SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256_of(files: Sequence[Path]) -> str:
    """The sha256 of a file, or of the lines `sha256 name` of several."""
    return together(digests_of(files))


def digests_of(files: Sequence[Path]) -> dict[str, str]:
    """The sha256 of each file, by its name."""
    return {path.name: _sha256(path) for path in files}


def together(digests: dict[str, str]) -> str:
    """The one hash of several files."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digest} {name}\n" for name, digest in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def remembered_sha256(files: Sequence[Path], folder: Path) -> str:
    """The same, kept in a folder by the files' paths, sizes and times of change."""
    stats = [(p, p.resolve().stat()) for p in files]
    # A time of change can be set, and a clock that jumps may give one twice; that of the inode
    # cannot be set.
    identity = [
        (str(p.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for p, s in stats
    ]
    note = folder / hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    if note.is_file() and SHA256.fullmatch(noted := note.read_text()):
        return noted
    digest = sha256_of(files)
    with contextlib.suppress(OSError):  # not remembered: read again next time
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(note, digest.encode())
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
