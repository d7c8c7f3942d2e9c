"""The curves of one model, as Plotly figures in plain JSON, from its record and the rows about it."""

from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
Figure = dict[str, Any]
QUANTILES = (0.05, 0.5, 0.95)
GROWTH = "residual/growth_rate"


def figures(rows: list[Row]) -> list[Figure]:
    """What can be drawn of a model: norms of the stream, its growth factors, its sublayers, its heads."""
    record = next((row["record"] for row in rows if row["record"] and Path(row["record"]).is_file()), None)
    if record is None:
        return []
    arrays = _read(Path(record))
    growth = next((row for row in rows if row["law"] == GROWTH and row["layers"]), None)
    drawn = [_stream(arrays, growth), _factors(arrays, growth), _sublayers(arrays), _heads(arrays)]
    return [figure for figure in drawn if figure is not None]


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    arrays: dict[str, np.ndarray] = load_file(path)
    return arrays


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if not np.isfinite(v) else float(f"{v:.5g}") for v in values]


def _quantiles(norms: np.ndarray) -> np.ndarray:
    """5%, 50% and 95% over tokens, layer by layer; shape (3, layers), NaN where nothing was measured."""
    rows = [np.quantile(row[~np.isnan(row)], QUANTILES) if not np.isnan(row).all() else np.full(3, np.nan) for row in norms]
    return np.array(rows).T


def _resid(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    pre, post = arrays.get("stream/resid_pre"), arrays.get("stream/resid_post")
    if pre is None:
        return None
    return pre if post is None else np.vstack([pre, post[-1:]])


def _text_tokens(arrays: dict[str, np.ndarray]) -> np.ndarray:
    text: np.ndarray = (arrays["stream/position"] > 0) & ~arrays["stream/is_padding"]
    return text


def _line(x: np.ndarray, y: np.ndarray, name: str, colour: str, **more: Any) -> dict[str, Any]:
    kept = np.isfinite(y)
    line = {"color": colour} | more.pop("line", {})
    return {"x": x[kept].tolist(), "y": _numbers(y[kept]), "name": name, "mode": "lines+markers", "line": line} | more


def _spread(x: np.ndarray, quantiles: np.ndarray, colour: str) -> list[dict[str, Any]]:
    """5% to 95% of tokens as a shaded region."""
    kept = np.isfinite(quantiles[1])
    edge = {"x": x[kept].tolist(), "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    low = edge | {"y": _numbers(quantiles[0][kept]), "showlegend": False}
    high = edge | {"y": _numbers(quantiles[2][kept]), "name": "5% to 95% of tokens", "fill": "tonexty", "fillcolor": colour}
    return [low, high]


def _window(growth: Row | None) -> list[dict[str, Any]]:
    """The window that the growth law speaks of, as a shaded stretch of layers."""
    if growth is None:
        return []
    first, last = growth["layers"]
    return [{
        "type": "rect", "xref": "x", "yref": "paper", "x0": first, "x1": last, "y0": 0, "y1": 1,
        "fillcolor": "rgba(128,128,128,0.12)", "line": {"width": 0}, "layer": "below",
    }]  # fmt: skip


def _layout(title: str, y_title: str, growth: Row | None, *, log: bool) -> dict[str, Any]:
    y_axis = {"title": {"text": y_title}} | ({"type": "log", "dtick": 1, "minor": {"ticks": "inside"}} if log else {})
    return {
        "title": {"text": title},
        "xaxis": {"title": {"text": "layer", "standoff": 4}, "tickformat": "d"},
        "yaxis": y_axis,
        "shapes": _window(growth),
    }


def _stream(arrays: dict[str, np.ndarray], growth: Row | None) -> Figure | None:
    resid = _resid(arrays)
    if resid is None:
        return None
    layers, text = np.arange(len(resid)), _text_tokens(arrays)
    quantiles = _quantiles(resid[:, text])
    data = [*_spread(layers, quantiles, "rgba(31,119,180,0.25)"), _line(layers, quantiles[1], "median token", "#1f77b4")]
    first = resid[:, ~text]
    if first.size:
        data.append(_line(layers, _quantiles(first)[1], "position 0", "#d62728", line={"dash": "dot"}))
    if growth:
        data += _wedge(quantiles[1], growth)
    return {
        "data": data,
        "layout": _layout("Residual stream", "norm", growth, log=True),
        "read": "A straight line on this axis is exponential growth. The grey stretch is the window of the growth law; "
        "the dashed lines start at its first layer and grow at the rates its band allows.",
    }


def _wedge(median: np.ndarray, growth: Row) -> list[dict[str, Any]]:
    first, last = growth["layers"]
    x = np.arange(first, min(last, len(median) - 1) + 1)
    start = median[first]
    bounds = [("slowest the band allows", growth["band"][0]), ("fastest the band allows", growth["band"][1])]
    return [
        {"x": x.tolist(), "y": _numbers(start * rate ** (x - first)), "name": name, "mode": "lines",
         "line": {"color": "#7f7f7f", "dash": "dash", "width": 1}}
        for name, rate in bounds if rate is not None and np.isfinite(start)
    ]  # fmt: skip


def _factors(arrays: dict[str, np.ndarray], growth: Row | None) -> Figure | None:
    resid = _resid(arrays)
    if resid is None:
        return None
    text = _text_tokens(arrays)
    logs = np.log(_quantiles(resid[:, text])[1])
    layers = np.flatnonzero(np.isfinite(logs))
    rates = np.exp(np.diff(logs[layers]) / np.diff(layers))
    data = [_line((layers[1:] + layers[:-1]) / 2, rates, "median token", "#1f77b4")]
    layout = _layout("Growth factor", "growth a layer", growth, log=False)
    if growth:
        first, last = growth["layers"]
        inside = rates[(layers[:-1] >= first) & (layers[1:] <= last)]
        layout["yaxis"]["range"] = [min(0.9, *inside) - 0.02, max(1.1, *inside) + 0.05] if len(inside) else None
        dashed = {"color": "#7f7f7f", "dash": "dash", "width": 1}
        bounds = [rate for rate in growth["band"] if rate is not None]
        span = {"type": "line", "xref": "x", "x0": first, "x1": last, "line": dashed}
        layout["shapes"] += [span | {"y0": rate, "y1": rate} for rate in bounds]
    return {"data": data, "layout": layout, "read": "Norm after a layer over norm before it; 1 is no growth. Dashed: the band."}


def _sublayers(arrays: dict[str, np.ndarray]) -> Figure | None:
    names = {"attn_out": "#ff7f0e", "mlp_out": "#2ca02c", "resid_pre": "#1f77b4"}
    found = {name: arrays[f"stream/{name}"] for name in names if f"stream/{name}" in arrays}
    if "attn_out" not in found:
        return None
    text = _text_tokens(arrays)
    data = [_line(np.arange(len(norms)), _quantiles(norms[:, text])[1], name, names[name]) for name, norms in found.items()]
    return {
        "data": data,
        "layout": _layout("What the sublayers add", "norm of the median token", None, log=True),
        "read": "Attention and MLP outputs must together be at least as large as the growth they cause.",
    }


def _heads(arrays: dict[str, np.ndarray]) -> Figure | None:
    norms = arrays.get("weights/W_OV_frobenius")
    if norms is None:
        return None
    n_layers, n_heads = norms.shape
    labels = [f"layer {n}, head {h}" for n in range(n_layers) for h in range(n_heads)]
    heads = {
        "x": np.repeat(np.arange(n_layers), n_heads).tolist(), "y": _numbers(norms.ravel()), "text": labels, "name": "heads",
        "mode": "markers", "marker": {"color": "#999999", "size": 5}, "hovertemplate": "%{text}: %{y}<extra></extra>",
    }  # fmt: skip
    return {
        "data": [heads, _line(np.arange(n_layers), norms.mean(1), "mean over heads", "#9467bd")],
        "layout": _layout("‖W_OV‖ by head", "Frobenius norm", None, log=True),
        "read": "What a head can write at most, as a root mean square over random input.",
    }
