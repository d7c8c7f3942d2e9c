"""The table of architectures in docs/architectures.md: which are measured, and how right.

`python -m tests.benchmarks.architectures FOLDER [SCRIPT]` audits every checkpoint below FOLDER, one
folder for each model type of transformers. SCRIPT builds them first, as `python SCRIPT FOLDER`; the
developers' machines have one that makes tiny random models of every type that transformers maps to
causal language models.
"""

import json
import math
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from streamgauge.numerics.names import block_of
from tests.conftest import ROOT

TABLE = ROOT / "docs" / "architectures.md"
HEAD = """# Which architectures are measured

Tiny random models (four layers, random gains and biases) of the types that transformers maps to
causal language models, as it builds them, and of configurations that change what a model computes
(`tests/variants.py`), each audited whole. **Sublayers**: what blocks add to the
stream, found by trying (`streamgauge/engine/anatomy.py`), with the factor where there is one;
layers that are alike stand once. **Heads**: whether TransformerLens names the attention's matrices
and its block computes what transformers' does. **Differs**: largest relative difference of the
stream norms, or difference of its losses in nats, from those of plain forward hooks on a model that
transformers opened by itself. **Laws**: hold / fail / not applicable / could not be measured;
theorems that do not hold are named. Phenomena may fail on random weights.

Made by `python -m tests.benchmarks.architectures`, with transformers {transformers} and
TransformerLens {transformer_lens}.

"""
COLUMNS = "| type | measured | sublayers | heads | differs | laws |\n|---|---|---|---|---|---|\n"


def measure(folder: Path, store: Path) -> dict[str, Any]:
    """One architecture's record, in the store, and how it compares with plain hooks; or why not."""
    import logging
    import warnings

    import torch

    import streamgauge
    from streamgauge.checkpoints.files import open_checkpoint
    from streamgauge.errors import StreamgaugeError

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        record = streamgauge.measure(open_checkpoint(folder), store=store)
        differs = difference(folder, record)
    except StreamgaugeError as error:
        return {"refused": str(error).replace(str(folder), folder.name)}
    except Exception as error:
        return {"traceback": f"{type(error).__name__}: {error}"}
    said = record.metadata
    heads = said["failed"].get("weights") or said["absent"].get("weights/W_OV_frobenius")
    if "weights/W_OV_frobenius" in record.arrays:
        lacks = record.lacking.get("weights/W_OV_frobenius", {"layers": []})["layers"]
        heads = (
            "yes" if not lacks else f"in {record.n_layers - len(lacks)} of {record.n_layers} layers"
        )
    return {
        "sublayers": said["sublayers"],
        "pre_norm": said["pre_norm"],
        "heads": heads,
        "failed": said["failed"],
        "differs": differs,
    }


def difference(folder: Path, record: Any) -> float:
    """From plain hooks: of norms before blocks, and of losses."""
    import torch

    from tests import variants

    prompt = record.array("stream/prompt")
    token = record.array("prediction/token")
    rows = [token[prompt == n].tolist() for n in np.unique(prompt)]
    model = variants.plain(folder)
    blocks = _blocks(folder, model)
    seen: dict[int, Any] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            seen[layer] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    for layer, path in enumerate(blocks):
        block = model.get_submodule(path)
        block.register_forward_pre_hook(keep(layer), with_kwargs=True)
    lengths = {len(row) for row in rows}
    norms = np.full((len(blocks), len(token)), np.nan)
    losses = np.zeros(len(token))
    with torch.no_grad():
        for length in lengths:
            places = [
                np.flatnonzero(prompt == n) for n, row in enumerate(rows) if len(row) == length
            ]
            ids = torch.tensor([row for row in rows if len(row) == length])
            output = model(input_ids=ids)
            logits = output.logits.float()
            found = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            losses[np.array(places)[:, :-1]] = found.view(len(ids), -1).numpy()
            for layer, x in seen.items():
                x = x - x.mean(-1, keepdim=True) if record.metadata["centres"] else x
                norms[layer, np.array(places)] = x.norm(dim=-1).numpy()
    stream = np.abs(record.array("stream/resid_pre") - norms) / norms
    loss = np.abs(record.array("prediction/loss") - losses)
    return float(max(np.nanmax(stream), loss.max()))


def _blocks(folder: Path, model: Any) -> list[str]:
    """Where a model's blocks are, by names alone."""
    import transformers

    depth = transformers.AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers
    paths = dict.fromkeys(p for name, _ in model.named_parameters() if (p := block_of(name)))
    lists = Counter(path.rpartition(".")[0] for path in paths)
    beside = ("vision", "visual", "encoder.")
    decoder = [name for name in lists if not any(word in name for word in beside)]
    where = next((name for name in decoder if lists[name] == depth), next(iter(lists)))
    return [path for path in paths if path.rpartition(".")[0] == where]


def _one(arguments: tuple[Path, Path]) -> tuple[str, dict[str, Any]]:
    folder, store = arguments
    return folder.name, measure(folder, store)


def audit(folders: list[Path], store: Path, report: Path) -> list[dict[str, Any]]:
    """The rows of one audit of all that have a record."""
    models = [f"--model={folder}" for folder in folders]
    own = ["--store", str(store), "--report", str(report), "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "invariants", *models, *own, "--tb=no"]
    subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, check=False)
    return [json.loads(line) for line in (report / "rows.jsonl").read_text().splitlines()]


def table(found: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """All architectures, and how many of each kind."""
    lines = [
        _line(name, one, [r for r in rows if r["model"] == name]) for name, one in found.items()
    ]
    measured = [one for one in found.values() if "sublayers" in one]
    whole = [one for one in measured if one["pre_norm"]]
    wrong = [name for name, one in found.items() if "traceback" in one]
    theorems = {r["model"] for r in rows if r["kind"] == "theorem" and r["outcome"] == "fail"}
    largest = max((one["differs"] for one in measured), default=math.nan)
    said = (
        f"{len(found)} types and variants: {len(measured)} with a record, {len(whole)} of them "
        "with every sublayer, "
        f"{sum('refused' in one for one in found.values())} refused in one sentence, {len(wrong)} "
        f"that end in a traceback. A theorem fails for {len(theorems)}"
        f"{': ' + ', '.join(sorted(theorems)) if theorems else ''}. Largest difference from plain "
        f"hooks: {largest:.1e}.\n\n"
    )
    return said + COLUMNS + "".join(lines)


def _line(name: str, one: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    if "sublayers" not in one:
        why = one.get("refused") or f"TRACEBACK {one['traceback']}"
        return f"| {name} | {_cell(why)} | | | | |\n"
    counts = Counter(row["outcome"] for row in rows)
    laws = " / ".join(str(counts[o]) for o in ("pass", "fail", "not_applicable", "error"))
    broken = [
        r["law"] for r in rows if r["kind"] == "theorem" and r["outcome"] in ("fail", "error")
    ]
    laws += f"; {', '.join(broken)}" if broken else ""
    kinds = list(dict.fromkeys(", ".join(layer) for layer in one["sublayers"]))
    sublayers = "; ".join(kinds) if one["pre_norm"] else "the stream alone: blocks do more than add"
    return (
        f"| {name} | yes | {_cell(sublayers)} | {_cell(one['heads'])} | {one['differs']:.1e} | "
        f"{laws} |\n"
    )


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def main(folder: Path, script: Path | None) -> None:
    """Build, measure, audit, and write the table."""
    import importlib.metadata

    from tests import variants

    if script is not None:
        subprocess.run([sys.executable, str(script), str(folder)], check=False)
    for name in variants.CONFIGS:  # one entry of a configuration each
        variants.build(name, folder / name)
    store = folder.parent / f"{folder.name}-store"
    folders = sorted(path for path in folder.iterdir() if (path / "config.json").is_file())
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=40) as pool:
        found = dict(pool.imap(_one, [(path, store) for path in folders]))
    measured = [path for path in folders if "sublayers" in found[path.name]]
    rows = audit(measured, store, folder.parent / f"{folder.name}-report")
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(found, indent=1))
    versions = {n: importlib.metadata.version(n) for n in ("transformers", "transformer_lens")}
    TABLE.write_text(HEAD.format(**versions) + table(found, rows), encoding="utf-8")
    print(TABLE.read_text().split("| type")[0].rpartition("\n\n")[0].rpartition("\n\n")[2])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
