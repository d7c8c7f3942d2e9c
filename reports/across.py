"""What is compared across the models of one page: whether slower growth of the stream goes with a
nearer layer horizon.
"""

from pathlib import Path

import numpy as np

from .curves import BLUE, Figure, Row, numbers

NAMED = 30  # models up to which points have their names beside them
FEWEST = 4  # models for which a rank correlation says anything
HORIZON, GROWTH = "depth/layer_horizon", "residual/growth_rate"


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

    rank = float(spearmanr(growth, horizon).statistic)
    if not np.isfinite(rank):
        return "The models do not differ, so there is no correlation."
    # Bonett and Wright 2000, for rank correlations; tanh(±inf) is ±1.
    with np.errstate(divide="ignore"):
        middle, error = np.arctanh(rank), np.sqrt((1 + rank**2 / 2) / (len(growth) - 3))
    low, high = np.tanh([middle - 1.96 * error, middle + 1.96 * error])
    return (
        f"Spearman's rank correlation over {len(growth)} models is {rank:.2f}, 95% interval "
        f"{low:.2f} to {high:.2f}."
    )
