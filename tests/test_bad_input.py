"""Every mistake gets one clear sentence, no traceback, and the documented exit code."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import streamgauge
from streamgauge.checkpoints.files import open_checkpoint
from streamgauge.errors import CheckpointError, NotMeasured, PromptError, UnknownModelError
from tests import models
from tests.conftest import Audit
from tests.records import sound_record

Auditing = Callable[..., Audit]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without tokenizer, to be copied and broken."""
    return models.save(models.gpt2(3), tmp_path_factory.mktemp("sound"))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def word_tokenizer(folder: Path, words: list[str]) -> None:
    """A tokenizer of whole words."""
    tokenizer = Tokenizer(
        tokenizer_models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0]).save_pretrained(folder)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def unsupported(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "flux_capacitor", "architectures": ["Flux"]})
    )


def not_causal(folder: Path) -> None:
    models.tf.T5Config().save_pretrained(folder)


def broken_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def lacks_a_layer(folder: Path) -> None:
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if ".h.2." not in k}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"] = np.zeros((32, 100), np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}})
    )


def shard_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}})
    )


def index_beside_weights(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    )


def index_of_another_kind(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": ["b"]}}))


def names_its_own_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"transformers_weights": "other.safetensors"})
    )


def fewer_layers_than_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 2}))


BROKEN = {
    no_config: "has no config.json",
    no_weights: "has no weights",
    truncated: "model.safetensors is truncated or corrupt",
    garbage: "model.safetensors is truncated or corrupt",
    pickled: "holds pickled weights only",
    unsupported: "is not supported",
    not_causal: "is not supported",
    broken_json: "config.json is not readable JSON",
    lacks_a_layer: "lacks 12 of the tensors",
    other_shape: "do not fit its config.json",
    index_beside_weights: "holds both model.safetensors and model.safetensors.index.json",
    index_of_another_kind: "has no weight_map",
    names_its_own_weights: "names weight files of its own",
    fewer_layers_than_weights: "holds 11 tensors of layers that its config.json does not have",
    shard_missing: "lacks model-00002-of-00002.safetensors",
    shard_outside: "not a file of that folder",
}


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda f: f.__name__)
def test_broken_checkpoints_are_named_in_one_sentence(
    break_it: Callable[[Path], None], folder: Path, audit: Auditing
) -> None:
    break_it(folder)
    found = audit("--model", folder, "-k", "additivity")
    assert found.exit == 1
    assert found.row("residual/additivity")["outcome"] == "error"
    assert BROKEN[break_it] in found.row("residual/additivity")["reason"]
    assert "Traceback" not in found.output and "site-packages" not in found.output
    with pytest.raises(CheckpointError, match=BROKEN[break_it]):
        streamgauge.measure(folder)


@pytest.mark.parametrize("name", ["gpt2-xxl", "./nowhere", "/no/such/folder", "gpt2/x/l"])
def test_unknown_model_is_a_usage_error(name: str, audit: Auditing) -> None:
    found = audit("--model", name)
    assert found.exit == 4
    assert repr(name) in found.output
    assert (
        "there is no folder" if name[0] in "./" else "nearest catalogued names are gpt2"
    ) in found.output
    assert "Traceback" not in found.output


@pytest.mark.parametrize("option", ["-k", "-m"])
def test_a_name_that_selects_nothing_is_a_usage_error(option: str, audit: Auditing) -> None:
    found = audit(option, "gtp2-xl" if option == "-k" else "model(id='gtp2-xl')")
    assert found.exit == 4
    assert "'gtp2-xl'" in found.output and "gpt2-xl" in found.output


def test_measure_knows_the_nearest_names(
    run_streamgauge: Callable[..., Any], tmp_path: Path
) -> None:
    done = run_streamgauge("measure", "gpt2-xxl", "-o", tmp_path / "x.safetensors")
    assert done.returncode == 4
    assert (
        done.stderr.startswith("streamgauge: no model is called 'gpt2-xxl'")
        and "gpt2-xl" in done.stderr
    )
    assert not list(tmp_path.iterdir())


def test_unknown_device(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="the device 'cuda' cannot be used"):
        streamgauge.measure(folder, device="cuda")


def test_nothing_a_terminal_would_act_on_is_printed() -> None:
    assert (
        str(CheckpointError("a\x1b[31mb\nstreamgauge: 11 laws hold"))
        == r"a\x1b[31mb\nstreamgauge: 11 laws hold"
    )


def test_report_that_cannot_be_written(folder: Path, tmp_path: Path, audit: Auditing) -> None:
    (tmp_path / "file").write_text("")
    found = audit("--model", folder, "--report", tmp_path / "file")
    assert found.exit == 4 and "the report" in found.output and "cannot be written" in found.output


def test_two_checkpoints_of_one_name_stay_apart(
    sound: Path, tmp_path: Path, audit: Auditing
) -> None:
    for run in ("run0", "run1"):
        shutil.copytree(sound, tmp_path / run / "ckpt")
    found = audit(
        "--model",
        tmp_path / "run0" / "ckpt",
        "--model",
        tmp_path / "run1" / "ckpt",
        "-k",
        "integrity",
    )
    assert [row["model"] for row in found.rows] == ["ckpt", "run1/ckpt"]
    assert len({row["record"] for row in found.rows}) == 2


def test_a_folders_name_lends_it_no_bands(sound: Path, tmp_path: Path, audit: Auditing) -> None:
    found = audit(
        "--model", shutil.copytree(sound, tmp_path / "gpt2"), "-k", "super_exponential or integrity"
    )
    assert found.row("residual/super_exponential")["outcome"] == "not_applicable"
    assert found.row("weights/integrity")["reproduce"].endswith(f"--model {tmp_path / 'gpt2'}")


def test_one_token_prompts_are_too_short_to_measure_growth(tmp_path: Path, audit: Auditing) -> None:
    folder = models.save(models.gpt2(12), tmp_path / "deep")
    word_tokenizer(folder, ["<unk>", "word"])
    (tmp_path / "short.txt").write_text("word\nword\n")
    found = audit(
        "--model", folder, "--prompts", tmp_path / "short.txt", "-k", "growth_rate or integrity"
    )
    assert found.exit == 1 and found.row("residual/growth_rate")["outcome"] == "error"
    assert "use longer prompts" in found.row("residual/growth_rate")["reason"]


def test_a_file_is_not_a_checkpoint(folder: Path) -> None:
    with pytest.raises(UnknownModelError, match="is not a folder with a checkpoint"):
        open_checkpoint(folder / "config.json")


def test_empty_prompt_file(folder: Path, audit: Auditing, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    found = audit("--model", folder, "--prompts", tmp_path / "empty.txt")
    assert found.exit == 4 and "is empty" in found.output


def test_missing_prompt_file(folder: Path, audit: Auditing, tmp_path: Path) -> None:
    found = audit("--model", folder, "--prompts", tmp_path / "none.txt")
    assert found.exit == 4 and "cannot be read" in found.output


def test_prompt_longer_than_the_context(folder: Path, tmp_path: Path) -> None:
    word_tokenizer(folder, ["<unk>", "word"])
    (tmp_path / "long.txt").write_text("word\n" + "word " * 65)
    with pytest.raises(
        PromptError, match="prompt 2 has 65 tokens, more than the model's context of 64"
    ):
        streamgauge.measure(folder, prompts=tmp_path / "long.txt")


def test_token_id_beyond_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    word_tokenizer(folder, ["<unk>"] + [f"w{n}" for n in range(200)])
    (tmp_path / "prompts.txt").write_text("w5 w6\nw150 w2\n")
    with pytest.raises(
        PromptError, match=r"prompt 2 holds token id 151, but the embedding has 97 rows"
    ):
        streamgauge.measure(folder, prompts=tmp_path / "prompts.txt")


@pytest.mark.parametrize(("words", "fault"), [(97, None), (98, 97), (150, 149)])
def test_a_tokenizer_of_more_tokens_than_rows_is_a_fault(
    words: int, fault: int | None, folder: Path
) -> None:
    word_tokenizer(folder, [f"w{n}" for n in range(words)])
    said = streamgauge.measure(folder, groups=["weights"]).metadata["integrity"]["tokenizer"]
    wanted = [f"the tokenizer has token ids up to {fault}, the embedding 97 rows"]
    assert said == (wanted if fault else [])


def test_a_file_is_no_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("model.safetensors", "./model.safetensors", "./nothing", "/nothing"):
        with pytest.raises(UnknownModelError, match=f"{name} is not a folder with a checkpoint"):
            open_checkpoint(name)


def test_without_a_tokenizer_the_model_writes_the_prompts(folder: Path) -> None:
    record = streamgauge.measure(folder)
    assert "sampled from the model" in record.metadata["prompts"]
    assert record.array("stream/is_bos").sum() == 64


def test_own_prompts_need_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("word\n")
    with pytest.raises(PromptError, match="has no tokenizer that can write these prompts"):
        streamgauge.measure(folder, prompts=tmp_path / "prompts.txt")


def test_a_tokenizer_that_cannot_write_the_prompts_is_not_used(folder: Path) -> None:
    word_tokenizer(folder, ["<unk>", "the", "a"])
    assert "sampled from the model" in streamgauge.measure(folder).metadata["prompts"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_store_without_permission(folder: Path, tmp_path: Path, audit: Auditing) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    found = audit("--model", folder, "--store", tmp_path / "locked")
    assert found.exit == 4 and "cannot be written" in found.output


def test_store_that_is_a_file(folder: Path, tmp_path: Path, audit: Auditing) -> None:
    (tmp_path / "file").write_text("")
    found = audit("--model", folder, "--store", tmp_path / "file")
    assert found.exit == 4
    assert (
        "the store" in found.output
        and "cannot be written" in found.output
        and "--store" in found.output
    )


def test_missing_record_and_damaged_record(audit: Auditing, tmp_path: Path) -> None:
    assert audit("--record", tmp_path / "none.safetensors").exit == 4
    (tmp_path / "bad.safetensors").write_bytes(b"not a record")
    found = audit("--record", tmp_path / "bad.safetensors", "-k", "additivity")
    assert found.exit == 4 and "is damaged" in found.output


def test_a_misspelt_array_is_not_merely_not_applicable() -> None:
    with pytest.raises(
        NotMeasured,
        match="no record has an array 'streams/attn_out'; the nearest names are stream/attn_out",
    ):
        sound_record().array("streams/attn_out")


def test_rows_of_another_kind(
    run_streamgauge: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    done = run_streamgauge("report", folder / "config.json", "-o", tmp_path / "page")
    assert (
        done.returncode == 1
        and "is not the rows.jsonl of an audit" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_an_audit_in_which_nothing_was_asserted_has_failed(audit: Auditing) -> None:
    found = audit("--published", "--model", "gpt2-xl", "-k", "integrity")
    assert set(found.outcomes().values()) == {"not_applicable"}
    assert found.exit == 1 and "nothing was asserted" in found.output


def test_laws_that_check_nothing_do_not_pass(audit: Auditing, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test_nothing.py").write_text(
        '"""Claim."""\n\ndef test_nothing(record):\n    pass\n'
    )
    found = audit("--model", folder, laws=str(tmp_path / "mine"))
    assert found.exit == 1
    assert found.row("mine/nothing")["outcome"] == "error"
    assert "without checking anything" in found.output
