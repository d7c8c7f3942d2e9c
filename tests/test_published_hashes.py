"""--verify: weights held to the sha256 that is published for them, before any is read."""

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamgauge.__main__ import main
from streamgauge.checkpoints.files import open_checkpoint
from streamgauge.checkpoints.published_hashes import verify
from streamgauge.errors import CheckpointError
from tests import models
from tests.conftest import Audit

NAME = "model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.gpt2(2), tmp_path_factory.mktemp("sound") / "checkpoint")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / NAME).read_bytes()).hexdigest()


def statement(folder: Path) -> dict[str, Any]:
    subject = {"name": NAME, "digest": {"sha256": digest(folder)}}
    return {"_type": "https://in-toto.io/Statement/v1", "subject": [subject]}


def envelope(folder: Path) -> dict[str, Any]:
    return {"payload": base64.b64encode(json.dumps(statement(folder)).encode()).decode()}


def of_the_hub(folder: Path) -> None:
    note = folder / ".cache" / "huggingface" / "download" / f"{NAME}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'c' * 40}\n{digest(folder)}\n1700000000.0\n")


WAYS: dict[str, Callable[[Path], Any]] = {
    "SHA256SUMS": lambda f: (f / "SHA256SUMS").write_text(f"{digest(f)}  {NAME}\nno line\n"),
    "binary mode": lambda f: (f / "checksums.txt").write_text(f"{digest(f).upper()} *./{NAME}\n"),
    "beside": lambda f: (f / f"{NAME}.sha256").write_text(digest(f)),
    "in-toto": lambda f: (f / "model.intoto.json").write_text(json.dumps(statement(f), indent=1)),
    "in-toto lines": lambda f: (f / "model.intoto.jsonl").write_text(
        f"{json.dumps(envelope(f))}\n{json.dumps(envelope(f))}\n"
    ),
    "sigstore": lambda f: (f / "model.sig").write_text(json.dumps({"dsseEnvelope": envelope(f)})),
    "the hub's download": of_the_hub,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_published_hash_is_kept_or_the_file_is_refused(way: str, folder: Path) -> None:
    WAYS[way](folder)
    assert verify(folder) == 1
    assert open_checkpoint(folder, verify=True).files
    content = bytearray((folder / NAME).read_bytes())
    content[-1] ^= 1
    (folder / NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged, or another file"):
        open_checkpoint(folder, verify=True)
    assert open_checkpoint(folder).files  # nobody asked


def test_what_the_cache_of_the_hub_holds_is_named_by_its_hash(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots"
    blobs.mkdir(parents=True)
    snapshot = snapshot / ("c" * 40)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        name = digest(folder) if path.name == NAME else "0" * 40
        name = name if path.name == NAME else f"{name}{path.name}"
        shutil.copy(path, blobs / name)
        (snapshot / path.name).symlink_to(blobs / name)
    assert verify(snapshot) == 1
    (blobs / digest(folder)).write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="and the hub says"):
        verify(snapshot)


def test_a_folder_without_hashes_cannot_be_verified(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text("nothing here\n")
    (folder / "model.sig").write_text("[1")
    (folder / "x.intoto.json").write_text(json.dumps({"subject": [{"name": NAME}, 3]}))
    with pytest.raises(CheckpointError, match="no sha256 is published for the weights"):
        verify(folder)


def test_a_file_that_is_listed_and_missing_is_named(folder: Path) -> None:
    lines = f"{digest(folder)}  {NAME}\n{'0' * 64}  model-2.safetensors\n{'1' * 64}  README.md\n"
    (folder / "SHA256SUMS").write_text(lines)
    with pytest.raises(CheckpointError, match=r"lacks model-2.safetensors, for which a sha256"):
        verify(folder)


def test_an_audit_and_a_command_verify_first(
    folder: Path, audit: Callable[..., Audit], capfd: pytest.CaptureFixture[str]
) -> None:
    WAYS["SHA256SUMS"](folder)
    assert audit("--model", folder, "--verify", "-k", "integrity").exit == 0
    with (folder / NAME).open("r+b") as file:
        file.truncate((folder / NAME).stat().st_size // 2)
    found = audit("--model", folder, "--verify", "-k", "integrity")
    assert found.exit == 1 and "is damaged, or another file" in found.output
    assert main(["measure", str(folder), "-o", str(folder / "x.safetensors"), "--verify"]) == 1
    assert "SHA256SUMS says" in capfd.readouterr().err
