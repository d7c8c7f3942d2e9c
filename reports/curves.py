"""Pieces that figures are made of: quantiles over tokens, lines, spreads and axes, as Plotly's
plain JSON.
"""

from typing import Any

import numpy as np

Row = dict[str, Any]
Figure = dict[str, Any]
Arrays = dict[str, np.ndarray]
QUANTILES = (0.05, 0.5, 0.95)
# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, GREY = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#7f5217",
    "#999999",
)
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, BROWN)
DASHED = {"color": "#7f7f7f", "dash": "dash", "width": 1}


def numbers(values: np.ndarray) -> list[float | None]:
    """Five significant digits; nothing where there is no finite number."""
    return [None if not np.isfinite(v) else float(f"{v:.5g}") for v in values]


def quantiles(norms: np.ndarray) -> np.ndarray:
    """5%, 50% and 95% over tokens, layer by layer; shape (3, layers), NaN where nothing was
    measured.
    """
    rows = [
        np.quantile(row[~np.isnan(row)], QUANTILES)
        if not np.isnan(row).all()
        else np.full(3, np.nan)
        for row in norms
    ]
    return np.array(rows).T


def text_tokens(arrays: Arrays) -> np.ndarray:
    """Which tokens are text: neither at position 0 nor padding."""
    text: np.ndarray = (arrays["stream/position"] > 0) & ~arrays["stream/is_padding"]
    return text


def first_tokens(arrays: Arrays) -> np.ndarray:
    """Which tokens are at position 0."""
    first: np.ndarray = arrays["stream/position"] == 0
    return first


def resid(arrays: Arrays) -> np.ndarray | None:
    """The stream at each block's input and after the last, (n_layers + 1, tokens), where it was
    measured.
    """
    pre, post = arrays.get("stream/resid_pre"), arrays.get("stream/resid_post")
    if pre is None:
        return None
    return pre if post is None else np.vstack([pre, post[-1:]])


def by_layer(values: np.ndarray, name: str, colour: str, **more: Any) -> dict[str, Any]:
    """A line through one number a layer, from layer 0 on."""
    return line(np.arange(len(values)), values, name, colour, **more)


def line(x: np.ndarray, y: np.ndarray, name: str, colour: str, **more: Any) -> dict[str, Any]:
    """A line with markers through what is finite of y."""
    kept = np.isfinite(y)
    style = {"color": colour} | more.pop("line", {})
    return {
        "x": x[kept].tolist(),
        "y": numbers(y[kept]),
        "name": name,
        "mode": "lines+markers",
        "line": style,
    } | more


def spread(
    low: np.ndarray, high: np.ndarray, name: str, colour: str, start: int = 0
) -> list[dict[str, Any]]:
    """The region between two curves, shaded."""
    kept = np.isfinite(low) & np.isfinite(high)
    edge = {
        "x": (start + np.flatnonzero(kept)).tolist(),
        "mode": "lines",
        "line": {"width": 0},
        "hoverinfo": "skip",
    }
    lower = edge | {"y": numbers(low[kept]), "showlegend": False}
    return [
        lower,
        edge | {"y": numbers(high[kept]), "name": name, "fill": "tonexty", "fillcolor": colour},
    ]


def over_tokens(norms: np.ndarray, colour: str, fill: str) -> list[dict[str, Any]]:
    """The median token with the spread over tokens around it; one line where a record holds one
    number a layer.
    """
    low, median, high = quantiles(norms)
    if norms.shape[1] == 1:
        return [by_layer(median, "over all tokens", colour)]
    return [
        *spread(low, high, "5% to 95% of tokens", fill),
        by_layer(median, "median token", colour),
    ]


def window(row: Row | None) -> list[dict[str, Any]]:
    """The stretch of layers that a law speaks of, shaded."""
    if row is None or not row["layers"]:
        return []
    first, last = row["layers"]
    return [{
        "type": "rect", "xref": "x", "yref": "paper", "x0": first, "x1": last, "y0": 0, "y1": 1,
        "fillcolor": "rgba(128,128,128,0.12)", "line": {"width": 0}, "layer": "below",
    }]  # fmt: skip


def figure(
    title: str,
    data: list[dict[str, Any]],
    read: str,
    laws: list[str],
    *,
    y: str,
    row: Row | None = None,
    log: bool = False,
) -> Figure:
    """A figure over layers.

    read: how to read it; laws: those whose verdict belongs beside it; row: the law to shade for.
    """
    y_axis = {"title": {"text": y}} | ({"type": "log"} if log else {})
    layout = {
        "title": {"text": title},
        "xaxis": {"title": {"text": "layer", "standoff": 4}, "tickformat": "d"},
        "yaxis": y_axis,
        "shapes": window(row),
    }
    return {"data": data, "layout": layout, "read": read, "laws": laws}
