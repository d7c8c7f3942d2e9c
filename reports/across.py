"""What is compared across the models of one page: whether slower growth of the stream goes with a
nearer layer horizon, and what growth, its hard-coded share and the horizon go with.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .curves import BLUE, Figure, Row, numbers

NAMED = 30  # models up to which points have their names beside them
FEWEST = 4  # models for which a rank correlation says anything
HORIZON, GROWTH = "depth/layer_horizon", "residual/growth_rate"
QUANTITIES = {  # laws whose values are compared, and what these are
    GROWTH: "growth of the stream a layer",
    "mlp/hard_coded_growth": "hard-coded share of the growth of mlp_out",
    "attention/hard_coded_growth": "hard-coded share of the growth of attn_out",
    HORIZON: "effective layer horizon / layers",
}
PROPERTIES: dict[str, Callable[[dict[str, Any]], float | None]] = {  # by a record's metadata
    "layers": lambda said: said.get("n_layers"),
    "width": lambda said: said.get("d_model"),
    "d_head": lambda said: _d_head(said),
    "parameters": lambda said: said.get("n_parameters"),
}


def horizon_and_growth(rows: list[Row]) -> Figure | None:
    """Effective layer horizon, part of the depth, against growth a layer; one point a model, from
    two models on.
    """
    points = {model: point for model, point in _points(rows).items() if point is not None}
    if len(points) < 2:
        return None
    growth, horizon = np.array(list(points.values())).T
    data = {
        "x": numbers(growth),
        "y": numbers(horizon),
        "text": list(points),
        "name": "models",
        "mode": "markers+text" if len(points) <= NAMED else "markers",
        "textposition": "top center",
        "marker": {"color": BLUE, "size": 9},
        "hovertemplate": "%{text}: growth %{x}, horizon %{y} of the depth<extra></extra>",
    }
    layout = {
        "title": {"text": "Layer horizon and growth"},
        "xaxis": {"title": {"text": "growth of the stream a layer", "standoff": 4}},
        "yaxis": {"title": {"text": "effective layer horizon / layers"}},
    }
    read = (
        "Does a stream that grows more slowly have a nearer horizon? Nobody has shown it. "
        f"{_correlation(growth, horizon)}"
    )
    return {"data": [data], "layout": layout, "read": read, "laws": []}


def against_properties(rows: list[Row]) -> list[Figure]:
    """Each quantity against each property of the models, one point a model, where FEWEST of them
    have both and they differ.
    """
    values: dict[str, dict[str, float]] = {}
    records: dict[str, str] = {}
    for row in rows:
        if row["law"] in QUANTITIES and row["value"] is not None and row["record"]:
            values.setdefault(row["law"], {})[row["model"]] = row["value"]
            records[row["model"]] = row["record"]
    if len(records) < FEWEST:
        return []
    known = {model: _properties(Path(path)) for model, path in records.items()}
    found = []
    for law, name in QUANTITIES.items():
        for what in PROPERTIES:
            points = {
                model: (known[model][what], _scaled(law, value, known[model]))
                for model, value in values.get(law, {}).items()
                if what in known[model]
            }
            if len(points) >= FEWEST and len({x for x, _ in points.values()}) > 1:
                found.append((law, what, name, points))
    chance = (
        f"One of {len(found)} such comparisons; by chance one in twenty has an interval off 0, and "
        "more where models of one family count as several."
    )
    return [_against(*one, chance) for one in found]


def _against(
    law: str, what: str, name: str, points: dict[str, tuple[float, float]], chance: str
) -> Figure:
    x, y = np.array(list(points.values())).T
    data = {
        "x": numbers(x), "y": numbers(y), "text": list(points), "name": "models", "mode": "markers",
        "marker": {"color": BLUE, "size": 8},
        "hovertemplate": f"%{{text}}: {what} %{{x}}, %{{y}}<extra></extra>",
    }  # fmt: skip
    layout = {
        "title": {"text": f"{name[0].upper()}{name[1:]}, by {what}"},
        "xaxis": {"title": {"text": what, "standoff": 4}}
        | ({"type": "log"} if what == "parameters" else {}),
        "yaxis": {"title": {"text": name}},
    }
    return {"data": [data], "layout": layout, "read": f"{_correlation(x, y)} {chance}", "laws": []}


def _scaled(law: str, value: float, properties: dict[str, float]) -> float:
    return value / properties["layers"] if law == HORIZON else value


def _properties(path: Path) -> dict[str, float]:
    """What a record says of its model; nothing of what it does not know."""
    from safetensors import safe_open

    if not path.is_file():
        return {}
    with safe_open(str(path), framework="numpy") as record:
        said = json.loads(record.metadata()["record"])
    found = {name: read(said) for name, read in PROPERTIES.items()}
    return {name: float(value) for name, value in found.items() if value}


def _d_head(said: dict[str, Any]) -> float | None:
    config = said.get("config") or {}
    heads = config.get("num_attention_heads") or config.get("n_head")
    width = said.get("d_model")
    own = config.get("head_dim")
    return own or (width / heads if width and heads else None)


def _points(rows: list[Row]) -> dict[str, tuple[float, float] | None]:
    by_model: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["law"] in (HORIZON, GROWTH) and row["value"] is not None:
            by_model.setdefault(row["model"], {})[row["law"]] = row
    return {model: _point(found) for model, found in by_model.items()}


def _point(found: dict[str, Row]) -> tuple[float, float] | None:
    if (
        set(found) != {HORIZON, GROWTH}
        or not found[HORIZON]["record"]
        or not Path(found[HORIZON]["record"]).is_file()
    ):
        return None
    from safetensors import safe_open

    with safe_open(found[HORIZON]["record"], framework="numpy") as record:
        # The last horizon lies one beyond the depth.
        n_layers = int(record.get_tensor("horizon/k")[-1]) - 1
    return found[GROWTH]["value"], found[HORIZON]["value"] / n_layers


def _correlation(growth: np.ndarray, horizon: np.ndarray) -> str:
    if len(growth) < FEWEST:
        return f"{len(growth)} models are too few for a correlation."
    from scipy.stats import spearmanr

    if np.ptp(growth) == 0 or np.ptp(horizon) == 0:
        return "The models do not differ, so there is no correlation."
    rank = float(spearmanr(growth, horizon).statistic)
    # Bonett and Wright 2000, for rank correlations; tanh(±inf) is ±1.
    with np.errstate(divide="ignore"):
        middle, error = np.arctanh(rank), np.sqrt((1 + rank**2 / 2) / (len(growth) - 3))
    low, high = np.tanh([middle - 1.96 * error, middle + 1.96 * error])
    return (
        f"Spearman's rank correlation over {len(growth)} models is {rank:.2f}, 95% interval "
        f"{low:.2f} to {high:.2f}."
    )
