"""Two checkpoints, or two records, side by side: the verdict, what leads to it, and every
difference.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamgauge.catalogued import location
from streamgauge.checkpoints.files import (
    Checkpoint,
    open_checkpoint,
    stored_shapes,
    tensor_reader,
)
from streamgauge.compare import differences, rows_to_share
from streamgauge.compare.difference import Difference
from streamgauge.compare.tensors import Change, Tensors, compare_tensors
from streamgauge.compare.verdict import Verdict, judge
from streamgauge.measure import measure
from streamgauge.progress import track
from streamgauge.record import Record
from streamgauge.store import Store


COMPARED = ("stream", "weights", "sketch", "prediction", "rounding")  # groups that are looked at


@dataclass(frozen=True)
class Side:
    """One of the two: its record, and its files where it is a checkpoint."""

    record: Record
    checkpoint: Checkpoint | None


@dataclass(frozen=True)
class Comparison:
    """What was found: the verdict, all differences by kind, and what became of each tensor where
    both checkpoints were at hand.
    """

    verdict: Verdict
    differences: dict[str, list[Difference]]
    changes: list[Change] | None


def diff(
    old: str,
    new: str,
    store: Store,
    *,
    prompts: Path | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
    show: bool = False,
) -> Comparison:
    """Compare two checkpoints or records, each a folder, a name or FILE.safetensors of `measure`.

    Checkpoints are measured where the store has no record of them, the new one on the old one's
    prompts, and their tensors are read one after the other. Raises StreamgaugeError.
    """

    def side(name: str, rows: Any = None) -> Side:
        if Path(name).is_file() and not name.endswith(".gguf"):
            return Side(Record.load(name), None)
        checkpoint = open_checkpoint(location(name), allow_pickle=allow_pickle, store=store.folder)
        record = measure(
            checkpoint,
            store=store,
            prompts=prompts,
            device=device,
            groups=COMPARED,
            rows=rows,
            show=show,
        )
        return Side(record, checkpoint)

    before = side(old)
    after = side(new, rows_to_share(before.record))
    found, changes = differences(before.record, after.record), None
    if before.checkpoint and after.checkpoint:
        changes = read_both(before.checkpoint, after.checkpoint, before.record, show)
    return Comparison(judge(before.record, after.record, found, changes), found, changes)


def read_both(old: Checkpoint, new: Checkpoint, record: Record, show: bool = False) -> list[Change]:
    """What became of each tensor, by the files of both checkpoints."""
    config = record.metadata.get("config") or {}
    heads = config.get("num_attention_heads") or config.get("n_head")
    d_head = config.get("head_dim") or (heads and record.metadata["d_model"] // heads)
    before = Tensors(stored_shapes(old), tensor_reader(old), d_head)
    after = Tensors(stored_shapes(new), tensor_reader(new), d_head)
    names = track(list(before.shapes), "tensors of both", show)
    return list(compare_tensors(before, after, names))
