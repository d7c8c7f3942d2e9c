"""Hashes that were published for a checkpoint's files: those of the hub, files of checksums beside
them, and in-toto statements. Weights are held to them before any is read.
"""

import base64
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from streamgauge.checkpoints.hashes import SHA256, sha256_of
from streamgauge.errors import CheckpointError

WEIGHTS = (".safetensors", ".gguf", ".bin")
SUMS = re.compile(r"(sha256sums?|checksums?)(\.txt|\.sha256)?|.*\.sha256", re.IGNORECASE)
STATEMENTS = (".intoto.json", ".intoto.jsonl", ".sigstore.json", ".sig")
LINE = re.compile(r"\s*([0-9a-fA-F]{64})(?:\s+\*?(\S.*?))?\s*")
LIMIT = 2**24  # bytes of a file of hashes


def verify(folder: Path, files: Iterable[Path] | None = None) -> int:
    """Hold weight files, by default all of a folder, to the sha256 published for each. Returns how
    many there were.

    Raises CheckpointError for one that has another, for one that is listed and missing, and where
    no hash was published for any.
    """
    weights = sorted(
        path for path in files or folder.iterdir() if path.suffix in WEIGHTS and path.is_file()
    )
    published = _published(folder, weights)
    held = {path.name for path in weights}
    missing = [name for name in published if name.endswith(WEIGHTS) and name not in held]
    if missing and files is None:
        raise CheckpointError(
            f"{folder} lacks {min(missing)}, for which a sha256 is published; download it again."
        )
    wanted = [path for path in weights if path.name in published]
    if not wanted:
        raise CheckpointError(
            f"no sha256 is published for the weights in {folder}: neither the hub's, nor a file "
            "SHA256SUMS or NAME.sha256, nor an in-toto statement; leave out --verify."
        )
    for path in wanted:
        found = sha256_of([path])
        for source, digest in published[path.name]:
            if found != digest:
                raise CheckpointError(
                    f"{path} is damaged, or another file: its sha256 is {found[:12]}…, and "
                    f"{source} says {digest[:12]}…; download it again."
                )
    return len(wanted)


def _published(folder: Path, weights: Iterable[Path]) -> dict[str, list[tuple[str, str]]]:
    """By a file's name: who says its sha256, and what they say."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path in weights:
        # The hub's cache names what it keeps by the sha256 that the hub gave.
        if path.is_symlink() and SHA256.fullmatch(name := path.resolve().name):
            found[path.name].append(("the hub", name))
        note = folder / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
        if note.is_file() and len(lines := _text(note).split()) > 1 and SHA256.fullmatch(lines[1]):
            found[path.name].append(("the hub", lines[1]))
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            continue
        if SUMS.fullmatch(path.name):
            for name, digest in _sums(path):
                found[name].append((path.name, digest))
        elif path.name.endswith(STATEMENTS):
            for name, digest in _subjects(path):
                found[name].append((path.name, digest))
    return found


def _text(path: Path) -> str:
    """A small file's text; nothing of a large one."""
    with path.open("rb") as file:
        content = file.read(LIMIT + 1)
    return content.decode(errors="replace") if len(content) <= LIMIT else ""


def _sums(path: Path) -> Iterator[tuple[str, str]]:
    """Lines `sha256  name`, as sha256sum writes them; NAME.sha256 may hold the hash alone."""
    for line in _text(path).splitlines():
        match = LINE.fullmatch(line)
        if match:
            name = match.group(2) or path.name.removesuffix(".sha256")
            yield Path(name).name, match.group(1).lower()


def _subjects(path: Path) -> Iterator[tuple[str, str]]:
    """The subjects of in-toto statements, plain, in a DSSE envelope, or in a Sigstore bundle."""
    for line in [_text(path), *_text(path).splitlines()]:
        try:
            statement = _statement(json.loads(line))
            for subject in statement.get("subject", []):
                digest = subject["digest"].get("sha256", "")  # it may be of another algorithm
                if SHA256.fullmatch(digest):
                    yield Path(subject["name"]).name, digest
        except (ValueError, KeyError, TypeError, AttributeError):
            continue


def _statement(said: Any) -> dict[str, Any]:
    envelope = said.get("dsseEnvelope", said)
    if "payload" in envelope:
        said = json.loads(base64.b64decode(envelope["payload"]))
    return dict(said)
