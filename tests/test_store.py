"""Records are found again by what they were made from; a warm run is light; an interrupted one
loses nothing finished.
"""

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamgauge
from streamgauge.checkpoints.files import open_checkpoint
from streamgauge.errors import NotMeasured, RecordError, StoreError, UnknownModelError
from streamgauge.measure import GROUPS, Wanted, current_groups, measure
from streamgauge.record import Record
from streamgauge.store import Store
from tests import models
from tests.conftest import ROOT, Audit
from tests.records import sound_record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.gpt2(12), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "a store")
    store.prepare()
    return store


def records(store: Store) -> list[Path]:
    return sorted((store.folder / "records").glob("*.safetensors"))


def test_round_trip(tmp_path: Path) -> None:
    record = sound_record()
    record.save(tmp_path / "r.safetensors")
    loaded = Record.load(tmp_path / "r.safetensors")
    assert loaded.metadata == record.metadata
    assert loaded.arrays.keys() == record.arrays.keys()
    for name, array in record.arrays.items():
        np.testing.assert_array_equal(loaded.arrays[name], array)
    assert [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]


def test_a_checkpoint_file_is_no_record(folder: Path) -> None:
    with pytest.raises(RecordError, match="is not a streamgauge record"):
        Record.load(folder / "model.safetensors")


def test_second_time_comes_from_the_store(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(open_checkpoint(folder), store=store)
    module = importlib.import_module("streamgauge.measure")
    monkeypatch.setattr(module, "_measure", lambda *a, **k: pytest.fail("measured again"))
    second = measure(open_checkpoint(folder), store=store)
    assert second.metadata == first.metadata


def marked(store: Store, name: str) -> Record:
    """The one stored record, with one of its arrays changed, so that measuring it anew shows."""
    (path,) = records(store)
    record = Record.load(path)
    record.arrays[name] = 3 * record.arrays[name]
    record.save(path)
    return record


def test_a_folder_of_records_can_be_named_and_gains_groups(folder: Path, tmp_path: Path) -> None:
    """A notebook's way: some groups now, others later, none lost and none measured twice."""
    path = tmp_path / "new" / "store"
    first = measure(folder, store=path, groups=["weights"])
    assert set(first.groups) == {"instrument", "weights"} and "stream/resid_pre" not in first.arrays
    marked(Store(path), "weights/W_OV_frobenius")
    both = measure(folder, store=str(path), groups=["stream"])
    assert set(both.groups) == {"instrument", "weights", "stream"}
    np.testing.assert_array_equal(
        both.array("weights/W_OV_frobenius"), 3 * first.array("weights/W_OV_frobenius")
    )
    marked(Store(path), "stream/resid_pre")
    again = measure(folder, store=path, groups=["weights", "stream"])
    np.testing.assert_array_equal(again.resid_pre, 3 * both.resid_pre)
    assert len(records(Store(path))) == 1


def test_what_is_stored_is_kept_whatever_is_asked_for_next(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(folder, store=store, groups=["horizon", "weights"])
    (path,) = records(store)
    record = Record.load(path)
    record.metadata["groups"] |= {"patching": GROUPS["patching"]}
    record.metadata["tasks_sha256"] = "of some task"
    record.arrays["patching/own"] = np.ones((12, models.HEADS))
    record.save(path)
    found = measure(folder, store=store, groups=["padding", "patching"], horizons="all")
    assert {"horizon", "weights", "padding", "patching"} <= set(found.groups)
    assert found.metadata["tasks_sha256"] == "of some task" and "patching/own" in found.arrays
    assert set(Record.load(path).arrays) == set(found.arrays)
    # What an older instrument measured may be wrong, and is not handed on.
    monkeypatch.setitem(GROUPS, "weights", 99)
    assert "weights" not in measure(folder, store=store, groups=["neurons"]).groups


def test_processes_that_add_to_one_record_lose_nothing(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("streamgauge.measure")
    real, others = module._measure, []

    def slow(asked: Any, *more: Any) -> Record:
        record = real(asked, *more)
        if not others:  # another process is done in the meantime
            others.append(True)
            measure(folder, store=store, groups=["weights"])
        return record

    monkeypatch.setattr(module, "_measure", slow)
    found = measure(folder, store=store, groups=["padding"])
    assert set(found.groups) == {"instrument", "weights", "padding"}
    assert set(Record.load(records(store)[0]).groups) == set(found.groups)


def test_a_store_that_cannot_be_written_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"the store .*file.* cannot be written .* with store="):
        measure(folder, store=tmp_path / "file" / "store")


def test_a_home_is_a_home(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    measure(folder, store="~/records", groups=["weights"])
    assert len(records(Store(tmp_path / "records"))) == 1


def test_what_matters_makes_another_record(folder: Path, store: Store, tmp_path: Path) -> None:
    keys = {
        store.key(open_checkpoint(folder), None, "cpu"),
        store.key(open_checkpoint(folder), None, "cuda"),
    }
    (tmp_path / "prompts.txt").write_text("word\n")
    keys.add(store.key(open_checkpoint(folder), tmp_path / "prompts.txt", "cpu"))
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert store.key(open_checkpoint(copy), None, "cpu") in keys
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    keys.add(store.key(open_checkpoint(copy), None, "cpu"))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    keys.add(store.key(open_checkpoint(copy), None, "cpu"))
    assert len(keys) == 5
    given = open_checkpoint(folder)
    keys |= {store.key(given, None, "cpu", precision=p) for p in (None, 0.1, 0.2)}
    assert len(keys) == 7  # none is as before


def test_a_damaged_record_is_measured_again(folder: Path, store: Store) -> None:
    first = measure(open_checkpoint(folder), store=store)
    os.truncate(records(store)[0], 1000)
    again = measure(open_checkpoint(folder), store=store)
    np.testing.assert_array_equal(again.resid_pre, first.resid_pre)
    assert Record.load(records(store)[0]).metadata == again.metadata


WITHOUT_TORCH = """
import sys, time, pytest
start = time.monotonic()
code = pytest.main(sys.argv[1:])
heavy = [m for m in ("torch", "transformers", "transformer_lens") if m in sys.modules]
print(f"heavy: {heavy}, seconds: {time.monotonic() - start:.2f}, code: {int(code)}")
"""


def test_a_stored_record_is_asserted_without_torch(folder: Path, store: Store) -> None:
    import subprocess

    def run() -> str:
        arguments = [
            "invariants",
            "--model",
            str(folder),
            "--store",
            str(store.folder),
            "-p",
            "no:cacheprovider",
            "-q",
        ]
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.splitlines()[-1]

    assert "torch" in run()
    assert "heavy: []" in run()


def test_collection_imports_nothing_heavy() -> None:
    import subprocess

    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT_TORCH,
            "invariants",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "heavy: []" in done.stdout and "code: 0" in done.stdout


def test_interrupting_keeps_finished_records(
    folder: Path, audit: Callable[..., Audit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = models.save(models.gpt2(3, seed=1), tmp_path / "other")
    module = importlib.import_module("streamgauge.measure")
    real = module._measure

    def interrupted(asked: Any, *more: Any) -> Record:
        if asked.checkpoint.folder == other:
            raise KeyboardInterrupt
        return real(asked, *more)

    monkeypatch.setattr(module, "_measure", interrupted)
    found = audit("--model", folder, "--model", other)
    assert found.exit == 2
    assert len(records(Store(tmp_path / "store"))) == 1
    assert {row["model"] for row in found.rows} == {folder.name}
    assert (tmp_path / "report" / "report.html").is_file()


def test_activations_are_whole_vectors_kept_on_disk(folder: Path, store: Store) -> None:
    from streamgauge.activations import stored_activations

    checkpoint = open_checkpoint(folder)
    record = measure(checkpoint, store=store)
    hooks = ["blocks.3.hook_resid_pre", "blocks.5.attn.hook_out"]
    found = stored_activations(store, checkpoint, hooks, prompts=None, device="cpu", limit=2**30)
    resid = np.asarray(found[hooks[0]])
    assert isinstance(found[hooks[0]], np.memmap) and resid.shape == (
        record.resid_pre.shape[1],
        models.WIDTH,
    )
    centred = resid - resid.mean(-1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(centred, axis=-1), record.resid_pre[3], rtol=1e-5)


def test_activations_beyond_the_limit_are_an_error(folder: Path, store: Store) -> None:
    from streamgauge.activations import stored_activations

    checkpoint = open_checkpoint(folder)
    with pytest.raises(NotMeasured, match="more than the limit of 1,000"):
        stored_activations(
            store, checkpoint, ["blocks.3.hook_resid_pre"], prompts=None, device="cpu", limit=1000
        )
    assert not list(store.folder.glob("activations/*/*.npy"))
    with pytest.raises(UnknownModelError, match=r"no hook 'blocks.99.hook_resid_pre'"):
        stored_activations(
            store, checkpoint, ["blocks.99.hook_resid_pre"], prompts=None, device="cpu", limit=1000
        )


def _as_measured_by_the_first_instrument(record: Record) -> Record:
    """Its stream marked by a factor that no measurement gives; norms of W_OV alone of the weights,
    and no groups named.
    """
    first = {name: array for name, array in record.arrays.items() if name.startswith("stream/")}
    first["stream/resid_pre"] = 3 * first["stream/resid_pre"]
    first |= {
        f"weights/{name}": record.array(f"weights/{name}")
        for name in ("W_OV_frobenius", "W_OV_spectral", "ln1_gain")
    }
    metadata = {name: value for name, value in record.metadata.items() if name != "groups"}
    metadata["absent"] = {
        name: why for name, why in metadata["absent"].items() if name.startswith("stream")
    }
    return Record(first, metadata | {"instrument": 1})


def test_a_record_of_the_first_instrument_gains_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GROUPS, "stream", 1)  # as if that group had never changed
    checkpoint = open_checkpoint(models.save(models.gpt2(3), tmp_path / "model"))
    store = Store(tmp_path / "store")
    store.prepare()
    new = measure(checkpoint, store=store)
    path = store.folder / "records" / f"{store.key(checkpoint, None, 'cpu')}.safetensors"
    _as_measured_by_the_first_instrument(new).save(path)
    upgraded = measure(checkpoint, store=store)
    np.testing.assert_array_equal(upgraded.resid_pre, 3 * new.resid_pre)  # taken over
    assert set(upgraded.arrays) == set(new.arrays) and upgraded.groups == new.groups
    for name in sorted(set(new.arrays) - {"stream/resid_pre"}):
        np.testing.assert_array_equal(upgraded.array(name), new.array(name), err_msg=name)
    assert upgraded.metadata["absent"] == new.metadata["absent"]
    np.testing.assert_array_equal(Record.load(path).resid_pre, upgraded.resid_pre)


@pytest.mark.parametrize("group", ["weights", "padding"])
def test_weights_are_measured_again_without_a_forward_pass(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(models.save(models.gpt2(3), tmp_path / "model"))
    known = streamgauge.measure(checkpoint)
    monkeypatch.setattr(
        "streamgauge.plan.PromptRun",
        lambda *_: pytest.fail("a forward pass over the prompts"),
    )
    monkeypatch.setitem(GROUPS, group, 99)
    assert set(GROUPS) - set(current_groups(known, Wanted())) == {group}
    again = streamgauge.measure(checkpoint, known=known)
    assert again.groups[group] == 99 and current_groups(again, Wanted()) == list(GROUPS)
    assert set(again.arrays) == set(known.arrays)


def test_other_prompts_take_over_nothing(tmp_path: Path) -> None:
    folder = models.save(models.gpt2(3), tmp_path / "model")
    known = streamgauge.measure(folder)
    other = Record(
        known.arrays | {"stream/resid_pre": 3 * known.resid_pre},
        known.metadata | {"prompts_sha256": "another"},
    )
    np.testing.assert_array_equal(
        streamgauge.measure(folder, known=other).resid_pre, known.resid_pre
    )


def test_what_the_store_has_goes_by_the_name_it_is_asked_for_now(
    folder: Path, store: Store, tmp_path: Path
) -> None:
    measure(folder, groups=["stream"], store=store)
    other = shutil.copytree(folder, tmp_path / "another name")
    found = measure(other, groups=["stream"], store=store)
    assert found.metadata["model"] == "another name"
    assert len(records(store)) == 1
