"""The store under stress: processes at once, kill -9 while writing, a full disk, damaged records,
clocks that jump.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import streamgauge
from streamgauge.checkpoints.files import open_checkpoint
from streamgauge.record import Record
from streamgauge.store import Store
from tests import models
from tests.conftest import ROOT
from tests.records import sound_record

KILLS = 20
DAMAGES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.gpt2(2), tmp_path_factory.mktemp("stressed") / "model")


def test_two_processes_measure_the_same_model_at_once(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "invariants",
        "-q",
        "-p",
        "no:cacheprovider",
        "--model",
        str(folder),
    ]
    command += [
        "--store",
        str(tmp_path / "store"),
        "-k",
        "additivity or integrity",
        "--neighbours",
        "none",
    ]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    (path,) = (tmp_path / "store" / "records").iterdir()
    assert Record.load(path).n_layers == 2


WRITER = """
import sys
from tests.records import sound_record
from streamgauge.record import Record
path, number = sys.argv[1], 0
print("ready", flush=True)
while True:
    number += 1
    sound_record(serial=number).save(path)
"""


def test_kill_9_in_the_middle_of_a_write(tmp_path: Path) -> None:
    path, rng = tmp_path / "record.safetensors", random.Random(0)
    sound_record(serial=0).save(path)
    for _ in range(KILLS):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        record = Record.load(path)
        np.testing.assert_array_equal(record.resid_pre, sound_record().resid_pre)


def test_a_full_disk_loses_no_measurement(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    store.prepare()

    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(UserWarning, match="No space left on device.*used and not kept"):
        record = streamgauge.measure(open_checkpoint(folder), store=store)
    assert record.n_layers == 2
    monkeypatch.undo()
    assert not [path for path in store.folder.rglob("*") if path.is_file()]
    again = streamgauge.measure(open_checkpoint(folder), store=store)
    np.testing.assert_array_equal(again.resid_pre, record.resid_pre)


def test_damage_is_noticed_wherever_it_is(folder: Path, tmp_path: Path) -> None:
    """Cut or overwritten at random: the record is refused, or it is what it was; never something
    else without a word.
    """
    from streamgauge.errors import RecordError

    path, rng = tmp_path / "record.safetensors", random.Random(0)
    sound = sound_record()
    sound.save(path)
    content = path.read_bytes()
    refused = 0
    for number in range(DAMAGES):
        start = rng.randrange(len(content))
        damaged = (
            content[:start]
            if number % 2
            else content[:start] + rng.randbytes(16) + content[start + 16 :]
        )
        path.write_bytes(damaged)
        try:
            found = Record.load(path)
        except RecordError:
            refused += 1
            continue
        assert all(
            np.array_equal(found.arrays[name], sound.arrays[name], equal_nan=True)
            for name in sound.arrays
        )
    assert refused >= DAMAGES // 2


def test_weights_changed_under_the_same_time_are_noticed(folder: Path, tmp_path: Path) -> None:
    """A clock that jumped back, or a tool that keeps times: same path, size and time of change,
    other weights.
    """
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    store = Store(tmp_path / "store")
    store.prepare()
    first = streamgauge.measure(open_checkpoint(copy), store=store)
    weights = copy / "model.safetensors"
    before = weights.stat()
    tensors: dict[str, Any] = load_file(weights)
    tensors["transformer.wte.weight"] = 2 * tensors["transformer.wte.weight"]
    content = tmp_path / "changed.safetensors"
    save_file(tensors, content, metadata={"format": "pt"})
    with weights.open("r+b") as file:  # in place: the inode stays
        file.write(content.read_bytes())
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size and weights.stat().st_ino == before.st_ino
    second = streamgauge.measure(open_checkpoint(copy), store=store)
    assert first.metadata["weights_sha256"] != second.metadata["weights_sha256"]
