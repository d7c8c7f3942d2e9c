"""What the search for repairs finds: every fault of the catalogue in an early, a middle and the
last layer, what it costs, and whether it is found and named without a baseline.

`python -m tests.benchmarks.repair_table FOLDER [PROMPTS]` prints the table of one model.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from streamgauge.checkpoints.files import open_checkpoint
from streamgauge.checkpoints.prompts import read_prompts
from streamgauge.checkpoints.tokenizers import load_tokenizer
from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.load import load_model
from streamgauge.engine.rows import rows_for
from streamgauge.errors import StreamgaugeError
from streamgauge.groups.neighbours import padded, text_for
from tests import faults
from tests.benchmarks.fault_table import audited, failing

ROWS = 48  # on which costs are measured
COSTLY = 0.05  # nats a token that a fault costs which is to be found
# Laws whose reason names the tensor or the entry; a model that cannot be run is refused by
# instrument laws with such a reason.
NAMING = {"weights/integrity", "weights/gains_vary"}
# The words by which a fault is named; faults that are not here have no repair.
NAMES = {
    "layers in the wrong order": "this layer and the next exchanged",
    "a layer twice": "the layer left out",
    "heads in another order": "the heads of W_O moved down",
    "a square matrix transposed": "W_O transposed",
    "W_out with its sign turned": "the sign of W_out turned",
    "a norm's gain folded twice": "the gain of ln2",
    "norms of attention and MLP swapped": "ln1 and ln2 exchanged",
    "rows of the embedding permuted": "the token table moved by -1 row",
    "a head of its own that is ignored": "the head tied to the embedding",
    "wrong ε": "_eps",
    "wrong rope base": "rope_theta",
    "wrong activation": "act",
    "scores not scaled": "scale_attn_weights True",
    "wrong head count": "head",
    "positions off by 2": "the position table moved by -2 rows",
    "grouped heads in the wrong order": "the heads of W_K and W_V moved down",
    "rotary halves interleaved": "the rotary halves of W_Q and W_K apart",
    "queries for keys": "W_Q, W_K and W_V read as W_K, W_Q, W_V",
    "gate for up": "gate and up exchanged",
}


def losses(folder: Path, prompts: Path | None) -> tuple[np.ndarray, float]:
    """Losses summed by row of the first rows that candidates are raced on, and how many tokens."""
    checkpoint = open_checkpoint(folder)
    model = Blockwise(load_model(checkpoint, "cpu").mapped)
    rows, _ = rows_for(
        model,
        checkpoint,
        load_tokenizer(folder),
        read_prompts(prompts),
        built_in=prompts is None,
    )
    assert rows is not None
    text = text_for(model, checkpoint, rows, built_in=prompts is None)
    assert not isinstance(text, str), text
    ids, counted = padded(text.race[:ROWS], "cpu")
    with torch.no_grad():
        logits = model.mapped.model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return (each.view(counted.shape) * counted).sum(1).double().numpy(), float(counted.sum())


def searched(folder: Path, scratch: Path, *options: str) -> tuple[str, bool]:
    """What the law of the search says, and whether it fails."""
    asked = ("-k", "best_of_its_neighbours", *options)
    row = next(iter(audited(folder, scratch, *asked)), {"outcome": "error", "reason": "refused"})
    if row["outcome"] == "fail":
        return row["of"], True
    return row["outcome"].replace("pass", "nothing") + f" {row['reason'] or ''}"[:160], False


def placed(fault: faults.Fault, layer: int, words: str) -> bool:
    """Whether a finding names the right layer, or the whole model."""
    if not fault.layers:
        return words.startswith("the whole model")
    numbers = {layer, layer + 1} if fault.name == "a layer twice" else {layer}
    return any(words.startswith((f"layer {n}:", f"layer {n} ")) for n in numbers)


def rows_of(folder: Path, prompts: Path | None, scratch: Path) -> Iterator[str]:
    """One line of the table a fault and layer, and the counts at the end."""
    sound, tokens = losses(folder, prompts)
    n_layers = faults.Files(folder).n_layers
    options = ["--prompts", str(prompts)] if prompts else []
    costly = found = named = 0
    for fault in faults.FAULTS:
        last = n_layers - (2 if "layer" in fault.name and fault.layers else 1)
        for layer in sorted({n_layers // 10, n_layers // 2, last}) if fault.layers else (0,):
            files = faults.Files(folder, layer)
            if fault.change(files) is False:
                continue
            target = files.write(scratch / f"{fault.name} {layer}")
            try:
                cost = float((losses(target, prompts)[0] - sound).sum() / tokens)
            except (StreamgaugeError, IndexError):
                cost = float("inf")  # it does not run
            words, fails = searched(target, scratch, *options)
            laws: set[str] = set()
            if not fails or "is not known" in words or "another fault" in words:
                laws = failing(target, scratch, "--neighbours", "none", *options)
            right = fails and placed(fault, layer, words) and NAMES.get(fault.name, "…") in words
            right = (right and "is not known" not in words) or bool(laws & NAMING)
            if cost >= COSTLY:
                costly, found, named = costly + 1, found + (fails or bool(laws)), named + right
            where, short = layer if fault.layers else "all", ", ".join(sorted(laws)[:4])
            yield f"| {fault.name} | {where} | {cost:+.3f} | {words} | {short} | {'✓' * right} |"
            shutil.rmtree(target)
    yield f"\n{costly} cost {COSTLY} or more, or stop the model: {found} found, {named} named"


def main() -> None:
    """Print the table of one model."""
    prompts = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    print("| fault | layer | cost | the search says | else found by | named |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for line in rows_of(Path(sys.argv[1]), prompts, Path(scratch)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
