"""Write docs/faults.md: every fault of the catalogue on every model, found without a baseline, with
one, and located.

Run by hand, an hour or so: `python -m tests.benchmarks.fault_table`.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import streamgauge
from tests import faults, models
from tests.conftest import ROOT, SHARED

MOST = 10  # laws that a cell lists
TABLE = ROOT / "docs" / "faults.md"
HEAD = """# What an audit finds

Faults that conversions, quantisations and copies really make (`tests/faults.py`), put into layer 2
of each model. The four signs stand for: found by an audit of the folder alone, found by a
comparison with the sound checkpoint (`--baseline`), located rightly by it (the layer and the part,
or the entry of the configuration), and named in the first line of `diff`. A dot: it cannot be made
in this model.
Made by `python -m tests.benchmarks.fault_table`.

"""


TESTED = """

Prompts in another order, other batches and another number of threads, which add up in another order
as another machine would, are compared in `tests/test_regression.py`: quiet.
"""


def subjects(folder: Path) -> dict[str, Path]:
    """The bundled model, the shared checkpoints where they are, and two random models."""
    found = {"pystdlib-3m": ROOT / "fixtures" / "bundled" / "pystdlib-3m"}
    found |= {
        name: SHARED / "checkpoints" / name
        for name in ("stories260K", "makemore_lmj9")
        if (SHARED / "checkpoints").is_dir()
    }
    configs = {
        "random GPT-2": tf.GPT2Config(**models.GPT2 | {"n_layer": 5}),
        "random Llama": tf.LlamaConfig(
            **models.LLAMA | {"num_hidden_layers": 5, "num_key_value_heads": 2, "head_dim": 8}
        ),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        found[name] = models.save(model, folder / name)
    return found


def audited(folder: Path, scratch: Path, *more: str) -> list[dict[str, Any]]:
    """The rows of an audit of a folder by itself."""
    report = scratch / "report"
    options = ["--model", str(folder), "--report", str(report), "--store", str(scratch / "store")]
    options += more
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main(
            [
                str(ROOT / "invariants"),
                "-q",
                "-p",
                "no:cacheprovider",
                "-c",
                str(ROOT / "pyproject.toml"),
                *options,
            ]
        )
    lines = (report / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def failing(folder: Path, scratch: Path, *more: str) -> set[str]:
    """The laws that fail, or cannot be measured, in such an audit."""
    rows = audited(folder, scratch, *more)
    return {row["law"] for row in rows if row["outcome"] in ("fail", "error")}


def main() -> None:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        found = subjects(scratch)
        table: dict[str, dict[str, str]] = {fault.name: {} for fault in faults.FAULTS}
        quiet: dict[str, dict[str, str]] = {}
        laws: dict[str, set[str]] = {}
        for model, folder in found.items():
            record, sound = streamgauge.measure(folder), failing(folder, scratch)
            for number, fault in enumerate(faults.FAULTS):
                files = faults.Files(folder)
                if fault.change(files) is False:
                    table[fault.name][model] = "·"
                    continue
                target = files.write(scratch / f"{model} {number}")
                alone, verdict = (
                    failing(target, scratch) - sound,
                    faults.compare_with(record, target, folder),
                )
                laws.setdefault(fault.name, set()).update(alone)
                table[fault.name][model] = " ".join(
                    "✓" if yes else "✗"
                    for yes in (
                        bool(alone),
                        verdict.found,
                        verdict.locates(fault),
                        fault.named() in verdict.sentence,
                    )
                )
                print(model, fault.name, table[fault.name][model], file=sys.stderr)
            for what, change in faults.HARMLESS.items():
                files = faults.Files(folder)
                if change(files) is False:
                    quiet.setdefault(what, {})[model] = "·"
                    continue
                target = files.write(scratch / f"{model} {what}")
                alarmed = (
                    bool(failing(target, scratch) - sound),
                    faults.compare_with(record, target, folder).found,
                )
                quiet.setdefault(what, {})[model] = " ".join(
                    "alarm" if yes else "quiet" for yes in alarmed
                )
            target = faults.reshard(folder, scratch / f"{model} shards")
            alarmed = (
                bool(failing(target, scratch) - sound),
                faults.compare_with(record, target, folder).found,
            )
            quiet.setdefault("in three files", {})[model] = " ".join(
                "alarm" if yes else "quiet" for yes in alarmed
            )
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(
            HEAD + _faults(table, laws, list(found)) + _harmless(quiet, list(found)),
            encoding="utf-8",
        )


def _faults(table: dict[str, dict[str, str]], laws: dict[str, set[str]], names: list[str]) -> str:
    lines = [
        f"| fault | {' | '.join(names)} | laws that find it without a baseline |",
        f"|---|{'---|' * len(names)}---|",
    ]
    for fault, by_model in table.items():
        finding = laws.get(fault, set())
        alone = ", ".join(sorted(finding)) or "none"
        if len(finding) > MOST:
            alone = (
                "all: the checkpoint cannot be measured, and the reason names the tensor "
                "or the entry"
            )
        lines.append(
            f"| {fault} | {' | '.join(by_model.get(name, '·') for name in names)} | {alone} |"
        )
    lines.append("")
    for name in names:
        cells = [row[name].split() for row in table.values() if row.get(name, "·") != "·"]
        shares = [sum(cell[n] == "✓" for cell in cells) / len(cells) for n in range(4)]
        alone, found, located, named = (f"{share:.0%}" for share in shares)
        lines.append(
            f"- {name}, {len(cells)} faults: {alone} found without a baseline, {found} with "
            f"one, {located} located, {named} named."
        )
    return "\n".join(lines) + "\n"


def _harmless(quiet: dict[str, dict[str, str]], names: list[str]) -> str:
    lines = [
        "\n# What raises no alarm\n",
        "By itself, and compared with the checkpoint it was made from.\n",
    ]
    lines += [f"| change | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [
        f"| {what} | {' | '.join(by_model.get(name, '·') for name in names)} |"
        for what, by_model in quiet.items()
    ]
    return "\n".join(lines) + TESTED


if __name__ == "__main__":
    main()
