"""Records that machines share: a store behind a URL, and measuring on a Ray cluster of one node.
tests/real kills one of two, and audits.
"""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import psutil
import pytest

from fixtures import distribution
from streamgauge import cluster
from streamgauge.cluster import Asked, Job, job_of, measured
from streamgauge.errors import NotInstalledError, NotMeasured, StoreError
from streamgauge.record import Record
from streamgauge.store import Store
from tests import models
from tests.records import sound_record

Running = Callable[..., Any]
NODES = [{"CPU": 4.0, "memory": 8e9}, {"CPU": 2.0, "memory": 3e9, "GPU": 1.0}]


@pytest.fixture
def far() -> Iterator[Store]:
    """A store in fsspec's own memory."""
    yield Store.at("memory://fleet/records")
    fsspec.filesystem("memory").store.clear()


def test_a_record_is_found_again_behind_a_url(far: Store) -> None:
    far.prepare()
    assert far.find("a") is None
    record = sound_record()
    far.keep("a", record)
    found = far.find("a")
    assert found is not None and found.metadata == record.metadata
    assert str(far) == "memory://fleet/records"
    assert fsspec.filesystem("memory").find("/fleet") == ["/fleet/records/records/a.safetensors"]


def test_a_damaged_record_behind_a_url_is_none(far: Store) -> None:
    far.keep("a", sound_record())
    files, name = fsspec.filesystem("memory"), "/fleet/records/records/a.safetensors"
    content = bytearray(files.cat_file(name))
    content[-20] ^= 1
    files.pipe_file(name, bytes(content))
    assert far.find("a") is None
    assert not files.exists(name)


@pytest.mark.parametrize(
    ("url", "said"),
    [("nowhere://x", "Protocol not known: nowhere"), ("file:///proc/nothing", "is out of reach")],
)
def test_a_store_that_cannot_be_reached(url: str, said: str, run_streamgauge: Running) -> None:
    with pytest.raises(StoreError, match=said):
        Store.at(url).prepare()
    done = run_streamgauge("measure", "fixtures/bundled/pystdlib-3m", "--store", url)
    assert done.returncode == 1
    assert said in done.stderr and "name another with --store" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_says_what_it_takes(tmp_path: Path) -> None:
    model = models.gpt2(3)
    job = job_of("m", models.save(model, tmp_path / "m"))
    assert job.size == 4 * sum(p.numel() for p in model.parameters())
    assert (job.memory, job.processors) == (2e9, 1)  # a small block beside 1.5 GB
    large = Job("m", "m", size=13e9, memory=2.6e9)
    assert large.processors == 4
    assert cluster._needs(large, NODES, "cpu") == {"num_cpus": 4, "memory": 2_600_000_000}
    assert cluster._needs(large, NODES, "cuda")["num_gpus"] == 1
    assert isinstance(cluster._needs(large, NODES[:1], "cuda"), NotMeasured)
    refused = cluster._needs(Job("m", "m", memory=9e9), NODES, "cpu")
    assert str(refused) == "it needs 9.0 GB, and the cluster's largest node has 8.0."
    assert job_of("x", "owner/name", "step1") == Job("x", "owner/name", "step1")


def test_workers_wait_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that fit measure at once, a third waits; one that is too large for all goes alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(distribution, "WAIT", 0.01)
    whole = psutil.virtual_memory().total
    config = SimpleNamespace(workerinput={"testrunuid": "x"})
    other = tmp_path / "streamgauge-x" / f"{os.getppid()}.bytes"  # of a process that lives
    stale = other.with_name("99999999.bytes")
    other.parent.mkdir()
    stale.write_text(str(whole))
    entered = threading.Event()

    def enter(memory: float) -> None:
        monkeypatch.setattr(distribution, "size_and_memory", lambda checkpoint: (0, memory))
        with distribution.room_for(config, None):
            entered.set()

    for taken, memory, waits in ((0.5, 0.4, False), (0.7, 0.4, True), (0.1, 1.5, True)):
        entered.clear()
        other.write_text(str(taken * whole))
        thread = threading.Thread(target=enter, args=(memory * whole,))
        thread.start()
        assert entered.wait(0.3) != waits
        other.unlink()
        thread.join(5)
        assert entered.is_set()
    assert sorted(path.name for path in other.parent.glob("*.bytes")) == [stale.name]


@pytest.mark.parametrize(
    ("told", "worker", "seen"),
    [(None, "gw0", "0"), (None, "gw3", "1"), ("4,7,9", "gw2", "9"), ("", "gw0", "")],
)
def test_each_worker_has_a_gpu(
    told: str | None, worker: str, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(distribution, "GPUS", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told or "")
    if told is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    option = SimpleNamespace(device="cuda")
    worker_input = {"workercount": 4, "workerid": worker}
    distribution.pytest_configure(SimpleNamespace(option=option, workerinput=worker_input))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_nodes_are_told_whole_paths() -> None:
    asked = Asked(Store(Path("store")), measuring={"prompts": Path("p.txt"), "device": "cpu"})
    told = cluster._from_anywhere(asked)
    assert told.store.folder == Path.cwd() / "store"
    assert told.measuring == {"prompts": Path.cwd() / "p.txt", "device": "cpu"}
    assert cluster._from_anywhere(Asked(Store.at("s3://x"))).store.url == "s3://x"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ray", "-n", "2"], "leave out -n"),
        (["--ray=127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_is_said(options: list[str], said: str, run_pytest: Running) -> None:
    done = run_pytest("invariants", "--model=fixtures/bundled/pystdlib-3m", *options)
    assert done.returncode == 4
    assert said in done.stderr and "INTERNALERROR" not in done.stdout + done.stderr


def test_without_ray_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(NotInstalledError, match=r"install 'streamgauge\[cluster\]'"):
        list(measured([], Asked(Store.at("memory://x")), ""))


def test_measure_takes_many_models_into_a_store(run_streamgauge: Running, tmp_path: Path) -> None:
    for n in (1, 2):
        models.save(models.gpt2(n, seed=n), tmp_path / f"m{n}")
    names = [tmp_path / "m1", tmp_path / "nowhere", tmp_path / "m2"]
    asked = ("measure", *names, "--store", tmp_path / "store", "--neighbours", "none")
    done = run_streamgauge(*asked)
    assert done.returncode == 1
    assert "2 measured, 0 were there, 1 could not be measured" in done.stdout
    assert f"{tmp_path / 'nowhere'}: " in done.stderr
    again = run_streamgauge(*asked, "-o", tmp_path / "by name")
    assert "0 measured, 2 were there, 1 could not be" in again.stdout
    named = {path.name: Record.load(path) for path in (tmp_path / "by name").iterdir()}
    assert named.keys() == {"m1.safetensors", "m2.safetensors"}
    assert named["m2.safetensors"].n_layers == 2
    mine = tmp_path / "mine" / "m1.safetensors"
    mine.parent.mkdir()
    mine.write_text("somebody's")
    twice = ("measure", names[0], names[0], *asked[4:], "-o", mine.parent)
    done = run_streamgauge(*twice)
    assert done.returncode == 1 and mine.read_text() == "somebody's"
    assert "Traceback" not in done.stderr
    mine.unlink()
    assert run_streamgauge(*twice).returncode == 0
    assert [path.name for path in mine.parent.iterdir()] == ["m1.safetensors"]
    for wrong in (["-o", tmp_path / "r.safetensors"], []):
        done = run_streamgauge("measure", *names, *wrong)
        assert done.returncode == 4 and "--store" in done.stderr
