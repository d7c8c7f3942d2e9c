"""What training does to a law's value: one line a model, over the steps of its checkpoints that are
on the page.
"""

import re
from collections import defaultdict
from typing import Any

from .curves import COLOURS, Figure, Row

# A step in a revision, or in a name: step1000, step-400, iter_0001000, checkpoint-500.
STEP = re.compile(r"(?<![a-z])(?:global_step|step|iter|checkpoint|ckpt)[-_ ]?(\d+)", re.IGNORECASE)
RUN = re.compile(r" \(run \d+\)$")  # of a model that is on the page twice
FEWEST = 3  # checkpoints of which a line is drawn
LINES = 8  # models that are drawn, those of the most checkpoints first
LAWS = {
    "residual/growth_rate": "Growth over training",
    "depth/layer_horizon": "Layer horizon over training",
    "mlp/activation_rate": "Activation rate over training",
    "attention/hard_coded_growth": "Attention's hard-coded growth over training",
    "mlp/random_input_growth": "MLP's hard-coded growth over training",
    "predictions/beats_unigram": "Predictions over training",
}


def trajectories(rows: list[Row]) -> list[Figure]:
    """A chart for each law that was measured at several steps of one model."""
    by_law: dict[str, list[tuple[str, int, Row]]] = defaultdict(list)
    for row in rows:
        if row["law"] in LAWS and row["value"] is not None and (step := step_of(row)) is not None:
            by_law[row["law"]].append((*step, row))
    return [made for law in LAWS if (made := _figure(law, by_law[law])) is not None]


def step_of(row: Row) -> tuple[str, int] | None:
    """The model that a checkpoint is of, and its step, None where neither revision nor name says
    one.
    """
    run = RUN.search(row["model"])
    own = RUN.sub("", row["model"])
    for text in (row["revision"], own):
        found = STEP.search(text or "")
        if found:
            name = STEP.sub("", own).strip(":-_/ @") or "one model"
            return f"{name}{run[0] if run else ''}", int(found.group(1))
    return None


def _figure(law: str, points: list[tuple[str, int, Row]]) -> Figure | None:
    by_model: dict[str, list[tuple[int, Row]]] = defaultdict(list)
    for model, step, row in points:
        by_model[model].append((step, row))
    long = {name: own for name, own in by_model.items() if len({s for s, _ in own}) >= FEWEST}
    if not long:
        return None
    kept = sorted(long, key=lambda name: -len(long[name]))[:LINES]
    data = [_line(name, long[name], COLOURS[n % len(COLOURS)]) for n, name in enumerate(kept)]
    row = points[0][2]
    layout = {
        "title": {"text": LAWS[law]},
        "xaxis": {"title": {"text": "training step", "standoff": 4}, "type": "log"},
        "yaxis": {"title": {"text": f"{row['what']} {row['unit'] or ''}".strip()}},
    }
    read = f"{row['claim']} Step 0 has no place on this axis, and is in the numbers (CSV)."
    if len(long) > len(kept):
        read += f" {len(kept)} of {len(long)} models are drawn, those of the most checkpoints."
    return {"data": data, "layout": layout, "read": read, "laws": []}


def _line(name: str, own: list[tuple[int, Row]], colour: str) -> dict[str, Any]:
    own = sorted(own, key=lambda one: one[0])
    return {
        "x": [step for step, _ in own],
        "y": [row["value"] for _, row in own],
        "name": name,
        "mode": "lines+markers",
        "line": {"color": colour},
        "hovertemplate": "step %{x}: %{y}<extra>%{fullData.name}</extra>",
    }
