"""Folders from strangers: refused in a sentence before anything in them is run, followed or given
memory.
"""

import contextlib
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import streamgauge
from streamgauge.checkpoints.files import open_checkpoint, tensor_names
from streamgauge.checkpoints.tokenizers import load_tokenizer
from streamgauge.checkpoints.untrusted import refuse_counts
from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.load import load_model
from streamgauge.engine.rows import prompts_for
from streamgauge.errors import CheckpointError, StreamgaugeError, first_line
from tests import faults, models
from tests.conftest import Audit

Auditing = Callable[..., Audit]
EXAMPLES = 150
MEMORY = 2**30  # bytes that no broken file may make us take


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    folder = models.save(models.gpt2(3), tmp_path_factory.mktemp("sound") / "model")
    words = {f"w{n}": n for n in range(models.VOCABULARY)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def _linked_out(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return change


def _config(**entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))

    return change


def _deep(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000)


def _huge(name: str, size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)  # sparse: takes no space

    return change


def _huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def _offsets_outside(folder: Path) -> None:
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def _index_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}})
    )


def _index_absolute(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "/etc/passwd"}})
    )


def _remote_code(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    _config(
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        model_type="evil",
    )(folder)


class _Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/streamgauge-was-here",)


def _pickled_bomb(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": _Bomb()}))


def _looped(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("tokenizer.json")


def _adapter_linked_out(folder: Path) -> None:
    outside = folder.parent / "outside.json"
    outside.write_text(json.dumps({"base_model_name_or_path": "secret"}))
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").symlink_to(outside)


MALICIOUS: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights linked out of the folder": (
        _linked_out("model.safetensors"),
        "is a link out of its folder",
    ),
    "configuration linked out of the folder": (
        _linked_out("config.json"),
        "is a link out of its folder",
    ),
    "tokenizer linked out of the folder": (
        _linked_out("tokenizer.json"),
        "is a link out of its folder",
    ),
    "a link to itself": (_looped, "is a link to nothing"),
    "index out of the folder": (_index_outside, "which is not a file of that folder"),
    "index to an absolute path": (_index_absolute, "which is not a file of that folder"),
    "a billion layers": (_config(n_layer=10**9), "asks for 1,000,000,000 layers"),
    "a billion heads": (_config(n_head=10**9), "n_head = 1,000,000,000"),
    "a billion labels": (_config(num_labels=10**9), "num_labels = 1,000,000,000"),
    "a vast vocabulary": (_config(vocab_size=10**10), "parameters, but the files hold"),
    "a vast width": (_config(n_inner=10**9), "parameters, but the files hold"),
    "a vast context": (_config(n_positions=10**9), "parameters, but the files hold"),
    "a configuration without end": (_deep, "nested too deep"),
    "a configuration of a gigabyte": (_huge("config.json", 2**30), "more than any configuration"),
    "a tokenizer of a gigabyte": (
        _huge("tokenizer.json", 2**30),
        "more than any configuration or tokenizer",
    ),
    "an absurd header": (_huge_header, "truncated or corrupt"),
    "offsets outside the file": (_offsets_outside, "truncated or corrupt"),
    "code of its own": (_remote_code, "not supported"),
    "an adapter's configuration linked out of the folder": (
        _adapter_linked_out,
        "is a link out of its folder",
    ),
    "a pickle that runs": (_pickled_bomb, "pickled weights only"),
}


@pytest.mark.parametrize("what", MALICIOUS)
def test_a_malicious_folder_is_refused(what: str, folder: Path, audit: Auditing) -> None:
    change, says = MALICIOUS[what]
    change(folder)
    with pytest.raises(StreamgaugeError) as refused:
        streamgauge.measure(folder)
    assert says in str(refused.value) and len(str(refused.value)) < 700
    assert not Path("/tmp/streamgauge-was-here").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_hidden_layers": 100}, None),
        ({"num_hidden_layers": 101}, "asks for 101 layers"),
        ({"parts": [{"depth": 7}, {"depth": 101}]}, "asks for 101 layers"),
        ({"text_config": {"n_layers": 101.0}}, "asks for 101 layers"),
        ({"num_local_experts": 4096}, None),
        ({"num_local_experts": 4097}, "asks for 4,097 experts"),
        ({"n_head": 10**6}, None),
        ({"n_head": 10**6 + 1}, "says n_head = 1,000,001"),
        ({"n_head": -(10**6) - 1}, "says n_head = -1,000,001"),
        ({"rope_theta": 1e9, "scale": float("inf"), "tie_word_embeddings": True}, None),
    ],
)
def test_counts_beyond_the_files_are_refused(config: dict[str, Any], says: str | None) -> None:
    if says is None:
        refuse_counts(Path("config.json"), config, 100)
    else:
        with pytest.raises(CheckpointError, match=says):
            refuse_counts(Path("config.json"), config, 100)


def test_a_pickle_that_runs_is_refused_where_pickles_are_allowed(
    folder: Path, tmp_path: Path
) -> None:
    _pickled_bomb(folder)
    with pytest.raises(CheckpointError, match="holds more than plain tensors"):
        open_checkpoint(folder, allow_pickle=True, store=tmp_path / "store")
    assert not Path("/tmp/streamgauge-was-here").exists()


def test_pickled_tensors_are_audited_where_they_are_allowed(folder: Path, audit: Auditing) -> None:
    tensors = load_file(folder / "model.safetensors")
    plain = streamgauge.measure(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert (
        "pickled" in audit("--model", folder, "-k", "integrity").row("weights/integrity")["reason"]
    )
    found = audit("--model", folder, "--allow-pickle", "-k", "integrity or additivity")
    assert found.exit == 0 and found.row("residual/additivity")["outcome"] == "pass"
    record = streamgauge.record.Record.load(
        next((folder.parent / "report" / "records").glob("*.safetensors"))
    )
    assert (record.resid_pre == plain.resid_pre).all()


def _bad_pickles(folder: Path) -> dict[str, str]:
    """Pickles that are allowed and still refused, and why."""
    plain = {"a": torch.zeros(2)}
    odd = {
        "sparse": {"a": torch.eye(2).to_sparse()},
        "complex": {"a": torch.zeros(2, dtype=torch.complex128)},
        "list": [1, 2],
    }
    for name, content in odd.items():
        (folder / name).mkdir()
        torch.save(content, folder / name / "pytorch_model.bin")
    (folder / "twice").mkdir()
    for number in (1, 2):
        torch.save(plain, folder / "twice" / f"pytorch_model-{number}.bin")
    (folder / "two").mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save(plain, folder / "two" / name)
    (folder / "linked").mkdir()
    torch.save(plain, folder / "out.pt")
    (folder / "linked" / "model.pt").symlink_to(folder / "out.pt")
    refused = dict.fromkeys(odd, "holds more than plain tensors")
    return refused | {
        "twice": "which another file",
        "two": "has 2 pickled files",
        "linked": "is a link out of its folder",
    }


def test_odd_pickles_are_refused_where_pickles_are_allowed(tmp_path: Path) -> None:
    for name, says in _bad_pickles(tmp_path).items():
        (tmp_path / name / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=says):
            open_checkpoint(tmp_path / name, allow_pickle=True, store=tmp_path / "store")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("one.\ntwo", "one"),
        ("a field:\n    has no number.\nthree", "a field: has no number"),
        ("a field:", "a field:"),
        ("  \n", "ValueError"),
    ],
)
def test_what_a_library_says_is_cut_to_a_sentence(error: str, says: str) -> None:
    assert first_line(ValueError(error)) == says


def test_links_of_the_hub_cache_are_followed(sound: Path, tmp_path: Path) -> None:
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / "main",
        tmp_path / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sound.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    assert tensor_names(open_checkpoint(snapshot))


def test_names_do_not_reach_the_terminal_as_they_are(folder: Path, audit: Auditing) -> None:
    odd = folder.rename(folder.parent / "a\x1b[31m<b>\x07")
    found = audit("--model", odd, "-k", "integrity")
    assert (
        found.rows
        and "\x1b[31m<b>" not in found.output.replace("\x1b[31mF", "")
        and "\x07" not in found.output
    )


def test_a_report_does_not_replace_what_is_not_ours(
    tmp_path: Path, run_pytest: Any, run_streamgauge: Any
) -> None:
    (tmp_path / "report.html").write_text("somebody's")
    done = run_pytest("invariants", "--published", "-k", "gpt2-xl", "--report", tmp_path)
    assert done.returncode == 4 and "was not written by streamgauge" in done.stdout + done.stderr
    assert (tmp_path / "report.html").read_text() == "somebody's"
    (tmp_path / "thesis.safetensors").write_text("somebody's")
    done = run_streamgauge("measure", "pystdlib-3m", "-o", tmp_path / "thesis.safetensors")
    assert done.returncode == 1 and (tmp_path / "thesis.safetensors").read_text() == "somebody's"


def _opened(folder: Path) -> None:
    """What comes before a forward pass; whatever else than our own errors it raises is a crash."""
    with contextlib.suppress(StreamgaugeError):
        checkpoint = open_checkpoint(folder)
        model = Blockwise(load_model(checkpoint, "cpu").mapped)
        tokenizer = load_tokenizer(checkpoint.folder)
        prompts_for(model, checkpoint.folder, tokenizer, ["w1 w2", "w3"], built_in=True)


def _fuzzed(
    change: Callable[[Path, Any], None], values: st.SearchStrategy[Any], sound: Path, tmp_path: Path
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    number = iter(range(10**6))

    @settings(
        max_examples=EXAMPLES,
        deadline=20_000,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    @given(values)
    def run(value: Any) -> None:
        folder = Path(shutil.copytree(sound, tmp_path / str(next(number))))
        try:
            change(folder, value)
            _opened(folder)
        finally:
            shutil.rmtree(folder)

    run()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 10**6, 10**9, 10**18])
    | st.floats()
    | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=8,
)
OF_GPT2 = json.loads(models.tf.GPT2Config(**models.GPT2).to_json_string(use_diff=False))
KEYS = [*sorted(OF_GPT2), "auto_map", "quantization_config"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", 1),
        ("architectures", {"": None}),
        ("architectures", []),
        ("architectures", "GPT2"),
        ("return_dict", None),
    ],
)
def test_entries_that_are_not_of_the_model(
    key: str, value: Any, sound: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "odd"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    (folder / "tokenizer.json").unlink(
        missing_ok=True
    )  # so that the model is run, to write prompts
    _opened(folder)


def test_fuzz_configurations(sound: Path, tmp_path: Path) -> None:
    def change(folder: Path, entries: dict[str, Any]) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))

    _fuzzed(
        change,
        st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3),
        sound,
        tmp_path,
    )


def test_fuzz_headers(sound: Path, tmp_path: Path) -> None:
    def change(folder: Path, edit: tuple[int, bytes]) -> None:
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[edit[0] : edit[0] + len(edit[1])] = edit[1]
        (folder / "model.safetensors").write_bytes(content)

    _fuzzed(
        change, st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=12)), sound, tmp_path
    )


def test_fuzz_indices(sound: Path, tmp_path: Path) -> None:
    names = sorted(load_file(sound / "model.safetensors"))
    shards = (
        st.sampled_from(["model-1.safetensors", "../x", "", ".", "config.json", "a\x00b"]) | JSON
    )
    tables = st.dictionaries(st.sampled_from(names), shards, max_size=4)
    files = faults.Files(sound)

    def change(folder: Path, index: Any) -> None:
        files.write(folder / "part")
        (folder / "part" / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    whole = dict.fromkeys(names, "model-1.safetensors")
    indices = (
        tables.map(lambda table: {"metadata": {}, "weight_map": whole | table})
        | JSON
        | JSON.map(lambda x: {"weight_map": x})
    )
    _fuzzed(change, indices, sound, tmp_path)


def test_fuzz_tokenizers(sound: Path, tmp_path: Path) -> None:
    def change(folder: Path, edits: tuple[str, dict[str, Any]]) -> None:
        path = folder / edits[0]
        path.write_text(json.dumps(json.loads(path.read_text()) | edits[1]))

    keys = st.sampled_from(
        [
            "model",
            "added_tokens",
            "pre_tokenizer",
            "post_processor",
            "decoder",
            "tokenizer_class",
            "unk_token",
        ]
    )
    files = st.sampled_from(["tokenizer.json", "tokenizer_config.json"])
    _fuzzed(
        change,
        st.tuples(files, st.dictionaries(keys, JSON, min_size=1, max_size=2)),
        sound,
        tmp_path,
    )
