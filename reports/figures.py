"""The figures of one model, from its record and the rows about it: those of the post that the laws
are from, and a few more.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .compared import compared
from .curves import (
    BLUE,
    BROWN,
    DASHED,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    Arrays,
    Figure,
    Row,
    by_layer,
    figure,
    first_tokens,
    line,
    numbers,
    over_tokens,
    quantiles,
    resid,
    spread,
    text_tokens,
)

Rows = dict[str, Row]
GROWTH = "residual/growth_rate"
HISTOGRAMS = 6  # layers whose histogram is drawn
BINS = 60
PUBLISHED = (
    "dropped.recomputed.mean.everywhere"  # the variant of the layer horizon that was published
)
FILLS = {"W_OV": "rgba(204,121,167,0.2)", "W_QK": "rgba(0,114,178,0.2)"}


def figures(rows: list[Row]) -> list[Figure]:
    """What can be drawn of a model."""
    record = next(
        (row["record"] for row in rows if row["record"] and Path(row["record"]).is_file()), None
    )
    if record is None:
        return []
    arrays, by_law = _read(Path(record)), {row["law"]: row for row in rows}
    before = next(
        (row["baseline"] for row in rows if row["baseline"] and Path(row["baseline"]).is_file()),
        None,
    )
    drawn = [draw(arrays, by_law) for draw in FIGURES]
    return (compared(arrays, _read(Path(before))) if before else []) + [
        made for made in drawn if made is not None
    ]


def _read(path: Path) -> Arrays:
    from safetensors.numpy import load_file

    arrays: Arrays = load_file(path)
    return arrays


def _claimed(rows: Rows, law: str) -> Row | None:
    """The row of a law that was asserted, whose band can be drawn."""
    row = rows.get(law)
    return row if row and row["band"] and row["layers"] else None


def _stream(arrays: Arrays, rows: Rows) -> Figure | None:
    norms = resid(arrays)
    if norms is None:
        return None
    text, first, growth = text_tokens(arrays), first_tokens(arrays), rows.get(GROWTH)
    data = over_tokens(norms[:, text], BLUE, "rgba(0,114,178,0.25)")
    if first.any():
        data.append(
            by_layer(quantiles(norms[:, first])[1], "position 0", RED, line={"dash": "dot"})
        )
    if "padding/resid" in arrays:
        data.append(
            by_layer(
                np.median(arrays["padding/resid"], axis=1), "padding", BROWN, line={"dash": "dot"}
            )
        )
    data += _wedge(quantiles(norms[:, text])[1], _claimed(rows, GROWTH))
    laws = [
        f"residual/{name}"
        for name in ("growth_rate", "exponential", "super_exponential", "every_token_grows")
    ]
    laws += [f"residual/{name}" for name in ("fast_start", "decrease", "position_0", "padding")]
    read = (
        "A straight line on this axis is exponential growth. The grey stretch is the window of "
        "the growth law; "
        "the dashed lines start at its first layer and grow at the rates its band allows."
    )
    return figure("Residual stream", data, read, laws, y="norm", row=growth, log=True)


def _wedge(median: np.ndarray, growth: Row | None) -> list[Figure]:
    if growth is None:
        return []
    first, last = growth["layers"]
    x = np.arange(first, min(last, len(median) - 1) + 1)
    bounds = [
        ("slowest the band allows", growth["band"][0]),
        ("fastest the band allows", growth["band"][1]),
    ]
    return [
        {
            "x": x.tolist(),
            "y": numbers(median[first] * rate ** (x - first)),
            "name": name,
            "mode": "lines",
            "line": DASHED,
        }
        for name, rate in bounds
        if rate is not None and np.isfinite(median[first])
    ]


def _histogram(arrays: Arrays, rows: Rows) -> Figure | None:
    norms = resid(arrays)
    if norms is None or text_tokens(arrays).sum() < BINS:
        return None
    norms = norms[:, text_tokens(arrays)]
    measured = np.flatnonzero((norms > 0).all(1) & np.isfinite(norms).all(1))
    chosen = (
        measured[np.unique(np.linspace(0, len(measured) - 1, HISTOGRAMS).astype(int))]
        if len(measured)
        else []
    )
    if not len(chosen):
        return None
    logs = np.log10(norms[chosen])
    edges = np.linspace(logs.min(), logs.max() + 1e-6, BINS + 1)
    shades = np.linspace(210, 20, len(chosen)).astype(int)
    data = [
        {
            "x": numbers(edges[:-1]),
            "y": np.histogram(row, edges)[0].tolist(),
            "name": f"layer {layer}",
            "mode": "lines",
            "line": {"shape": "hv", "color": f"rgb({shade},119,180)"},
        }
        for layer, row, shade in zip(chosen, logs, shades, strict=True)
    ]
    read = (
        "How norms are spread over prompts and positions at some layers. Equal steps to the "
        "right are exponential growth."
    )
    made = figure("Norms by layer", data, read, ["residual/spread"], y="text tokens")
    made["layout"]["xaxis"] = {"title": {"text": "log10 of the norm", "standoff": 4}}
    return made


def _factors(arrays: Arrays, rows: Rows) -> Figure | None:
    norms = resid(arrays)
    if norms is None:
        return None
    text, first, growth = text_tokens(arrays), first_tokens(arrays), _claimed(rows, GROWTH)
    layers, rates = _steps(quantiles(norms[:, text])[1])
    data = [line(layers, rates, "median token", BLUE)]
    if first.any():
        data.append(
            line(*_steps(quantiles(norms[:, first])[1]), "position 0", RED, line={"dash": "dot"})
        )
    read = "Norm after a layer over norm before it; 1 is no growth. Dashed: the band."
    made = figure(
        "Growth factor",
        data,
        read,
        [GROWTH, "residual/position_0"],
        y="growth a layer",
        row=rows.get(GROWTH),
    )
    if growth:
        start, end = growth["layers"]
        inside = rates[(layers >= start) & (layers <= end)]
        made["layout"]["yaxis"]["range"] = (
            [min(0.9, *inside) - 0.02, max(1.1, *inside) + 0.05] if len(inside) else None
        )
        across = {"type": "line", "xref": "x", "x0": start, "x1": end, "line": DASHED}
        made["layout"]["shapes"] += [
            across | {"y0": rate, "y1": rate} for rate in growth["band"] if rate is not None
        ]
    return made


def _steps(median: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middles between measured layers, and growth a layer there."""
    with np.errstate(divide="ignore"):
        logs = np.log(median)
    layers = np.flatnonzero(np.isfinite(logs))
    return (layers[1:] + layers[:-1]) / 2, np.exp(np.diff(logs[layers]) / np.diff(layers))


def _sublayers(arrays: Arrays, rows: Rows) -> Figure | None:
    names = {"attn_out": ORANGE, "mlp_out": GREEN, "resid_pre": BLUE}
    found = {name: arrays[f"stream/{name}"] for name in names if f"stream/{name}" in arrays}
    if "attn_out" not in found:
        return None
    text = text_tokens(arrays)
    data = [
        by_layer(quantiles(norms[:, text])[1], name, names[name]) for name, norms in found.items()
    ]
    laws = [
        "sublayers/both_grow",
        "attention/fall_off",
        "sublayers/contribution_bound",
        "sublayers/addition_law",
    ]
    read = "Attention and MLP outputs must together be at least as large as the growth they cause."
    row = rows.get("sublayers/both_grow")
    return figure(
        "What the sublayers add", data, read, laws, y="norm of the median token", row=row, log=True
    )


def _correlation(arrays: Arrays, rows: Rows) -> Figure | None:
    names = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    if not all(f"stream/{name}" in arrays for name in names):
        return None
    text = text_tokens(arrays)
    pre, attn, mlp, post = (arrays[f"stream/{name}"][:, text].astype(float) for name in names)
    uncorrelated, aligned = np.sqrt(pre**2 + attn**2 + mlp**2), pre + attn + mlp
    median = np.median(pre, axis=1)
    growth = rows.get(GROWTH)
    first, last = growth["layers"] if growth and growth["layers"] else (0, len(pre) - 1)
    rate = (median[min(last, len(pre) - 1)] / median[first]) ** (
        1 / max(1, min(last, len(pre) - 1) - first)
    )
    # A record without the gains does not tell d_model, and norms are drawn as they are.
    gain = arrays.get("weights/ln1_gain")
    what, width = ("norm", 1) if gain is None else ("standard deviation", gain.shape[1])
    scale = np.sqrt(width) * rate ** np.arange(1, len(pre) + 1)
    low, high, measured = (np.median(x, axis=1) / scale for x in (uncorrelated, aligned, post))
    data = spread(
        low, high, "from uncorrelated to fully correlated", "rgba(204,121,167,0.25)", start=1
    )
    data.append(line(np.arange(1, len(pre) + 1), measured, "measured", BLUE))
    read = (
        f"{what.capitalize()} of the stream behind each block, divided by {rate:.4f} to the "
        "layer. The region runs from where "
        "the block's outputs would bring it uncorrelated with the stream to where they would if "
        "they lay along it."
    )
    return figure(
        "Correlated or not",
        data,
        read,
        ["sublayers/alignment"],
        y=f"{what} / rate^layer",
        row=growth,
        log=True,
    )


def _heads(arrays: Arrays, rows: Rows) -> Figure | None:
    norms = arrays.get("weights/W_OV_frobenius")
    if norms is None:
        return None
    n_layers, n_heads = norms.shape
    labels = [f"layer {n}, head {h}" for n in range(n_layers) for h in range(n_heads)]
    heads = {
        "x": np.repeat(np.arange(n_layers), n_heads).tolist(),
        "y": numbers(norms.ravel()),
        "text": labels,
        "name": "heads",
        "mode": "markers",
        "marker": {"color": GREY, "size": 5},
        "hovertemplate": "%{text}: %{y}<extra></extra>",
    }
    data = [heads, by_layer(norms.mean(1), "‖W_OV‖, mean over heads", PURPLE)]
    if arrays.get("weights/b_O", np.zeros(1)).any():
        data.append(by_layer(arrays["weights/b_O"], "‖b_O‖", RED))
    if "stream/attn_out" in arrays:
        data.append(
            by_layer(
                quantiles(arrays["stream/attn_out"][:, text_tokens(arrays)])[1],
                "attn_out, median token",
                ORANGE,
            )
        )
    if "random_input/attn_norm" in arrays:
        data.append(
            by_layer(arrays["random_input/attn_norm"], "sum of heads on random input", BROWN)
        )
    laws = [
        f"attention/{name}"
        for name in (
            "ov_growth",
            "frobenius_is_random_response",
            "amplification_bound",
            "output_bias",
        )
    ]
    laws += [
        f"attention/{name}"
        for name in ("last_output_bias", "random_sum", "hard_coded_growth", "gain_share")
    ]
    read = (
        "Where these rise side by side attention writes more because its weights are larger, "
        "whatever it reads."
    )
    return figure(
        "Attention's weights and output",
        data,
        read,
        laws,
        y="norm",
        row=rows.get("attention/ov_growth"),
        log=True,
    )


def _random_mlp(arrays: Arrays, rows: Rows) -> Figure | None:
    if "random_input/mlp_norm" not in arrays:
        return None
    data = [by_layer(arrays["random_input/mlp_norm"], "random input", BROWN)]
    if "random_input/resampled_norm" in arrays:
        data.append(by_layer(arrays["random_input/resampled_norm"], "resampled resid_mid", PURPLE))
    if "stream/mlp_out" in arrays:
        data.append(
            by_layer(
                quantiles(arrays["stream/mlp_out"][:, text_tokens(arrays)])[1],
                "mlp_out, median token",
                GREEN,
            )
        )
    laws = ["mlp/random_input_growth", "mlp/hard_coded_growth"]
    read = (
        "The same random vectors go into every layer, so what grows on the upper curves is "
        "in the weights alone."
    )
    return figure(
        "MLP on random input",
        data,
        read,
        laws,
        y="norm",
        row=rows.get("mlp/random_input_growth"),
        log=True,
    )


def _components(arrays: Arrays, rows: Rows) -> Figure | None:
    colours = {
        "W_in": BLUE,
        "W_gate": RED,
        "W_out": ORANGE,
        "W_in_W_out": GREEN,
        "b_in_W_out": PURPLE,
        "b_out": BROWN,
    }
    found = {
        name: arrays[f"weights/{name}"]
        for name in colours
        if arrays.get(f"weights/{name}", np.zeros(1)).any()
    }
    if not found:
        return None
    data = [
        by_layer(norms, f"‖{name.replace('_W_', ' W_')}‖", colours[name])
        for name, norms in found.items()
    ]
    norms = resid(arrays)
    if norms is not None:
        data.append(
            by_layer(
                quantiles(norms[:, text_tokens(arrays)])[1],
                "the stream, for its slope",
                GREY,
                line={"dash": "dot"},
            )
        )
    laws = ["mlp/component_norms", "mlp/gain_share"]
    read = (
        "Norms of the MLP's parts. Where all run flatter than the stream, none of them "
        "alone makes mlp_out grow."
    )
    return figure(
        "MLP components", data, read, laws, y="norm", row=rows.get("mlp/component_norms"), log=True
    )


def _activation(arrays: Arrays, rows: Rows) -> Figure | None:
    rates = arrays.get("neurons/activation_rate")
    if rates is None or "stream/position" not in arrays:
        return None
    data = over_tokens(rates[:, text_tokens(arrays)], GREEN, "rgba(0,158,115,0.25)")
    for name, label, colour in (
        ("mlp", "random input", BROWN),
        ("resampled", "resampled resid_mid", PURPLE),
    ):
        if f"random_input/{name}_activation_rate" in arrays:
            data.append(by_layer(arrays[f"random_input/{name}_activation_rate"], label, colour))
    laws = ["mlp/activation_rate", "mlp/random_activation_rate", "mlp/resampled_activation_rate"]
    read = "The fraction of neurons whose pre-activation (the gate's, in a gated MLP) is above 0."
    return figure(
        "Activation rate",
        data,
        read,
        laws,
        y="fraction of neurons",
        row=rows.get("mlp/activation_rate"),
        log=True,
    )


def _hidden(arrays: Arrays, rows: Rows) -> Figure | None:
    values = arrays.get("neurons/singular_values")
    if values is None or not values.any(1).all():
        return None
    p, q = values**2 / (values**2).sum(1, keepdims=True), values / values.sum(1, keepdims=True)
    entropy = -np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0).sum(1)
    data = [
        by_layer(np.exp(entropy), "effective rank", BLUE),
        by_layer(1 / (p**2).sum(1), "participation ratio", ORANGE),
    ]
    read = (
        f"How many directions the hidden activations of {values.shape[1]} sequences use at "
        "one position."
    )
    return figure(
        "Hidden structure", data, read, ["mlp/hidden_structure"], y="directions", log=True
    )


def _weights(arrays: Arrays, rows: Rows) -> Figure | None:
    colours = {
        "W_Q": BLUE,
        "W_K": PURPLE,
        "W_V": GREEN,
        "W_in": GREY,
        "W_gate": BROWN,
        "W_O": ORANGE,
        "W_out": RED,
    }
    found = {
        name: arrays[f"weights/{name}_raw"] for name in colours if f"weights/{name}_raw" in arrays
    }
    if not found:
        return None
    whole = {
        name: np.linalg.norm(norms.reshape(len(norms), -1), axis=1) for name, norms in found.items()
    }
    data = [by_layer(norms, f"‖{name}‖", colours[name]) for name, norms in whole.items()]
    laws = [
        "weights/writing_grows",
        "weights/reading_stays",
        "weights/embedding_norm",
        "weights/integrity",
    ]
    read = (
        "Frobenius norms as the file has them. W_O and W_out, orange and red, write to the stream; "
        "the others read from it."
    )
    return figure("Reading and writing matrices", data, read, laws, y="norm", log=True)


def _horizon(arrays: Arrays, rows: Rows) -> Figure | None:
    if "horizon/k" not in arrays:
        return None
    tokens = arrays["horizon/tokens"]
    mean = {
        name.removeprefix("horizon/loss."): values @ tokens / tokens.sum()
        for name, values in arrays.items()
        if name.startswith("horizon/loss.")
    }
    k = arrays["horizon/k"]
    data = [
        line(k, loss, name, BLUE, visible=True)
        if name == PUBLISHED
        else line(k, loss, name, colour, visible="legendonly")
        for (name, loss), colour in zip(
            mean.items(), itertools.cycle((ORANGE, GREEN, RED, PURPLE, BROWN, GREY)), strict=False
        )
    ]
    clean = float(arrays["horizon/clean_loss"] @ tokens / tokens.sum())
    read = "Loss when layers read the last k layers' outputs alone. Dotted: the model as it is."
    if len(mean) > 1:
        read += (
            " Names of variants say whether the embedding is kept, whether errors compound, what "
            "fills in for what is left out, and where; click one to see it."
        )
    made = figure(
        "Layer horizon",
        data,
        read,
        ["depth/layer_horizon", "depth/loss_falls_with_horizon"],
        y="loss, nats a token",
    )
    made["layout"]["xaxis"]["title"]["text"] = "layers back that can be read"
    dotted = {"color": "#7f7f7f", "dash": "dot", "width": 1}
    made["layout"]["shapes"] = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": clean,
            "y1": clean,
            "line": dotted,
        }
    ]
    return made


def _effects(arrays: Arrays, rows: Rows) -> Figure | None:
    if "sublayer_effect/attn_kl" not in arrays:
        return None
    names = (("attn", ORANGE), ("mlp", GREEN))
    data = [
        by_layer(arrays[f"sublayer_effect/{kind}_kl"].mean(1), f"without {kind}_out", colour)
        for kind, colour in names
    ]
    data += [
        by_layer(
            arrays[f"sublayer_effect/{kind}_frozen_kl"].mean(1),
            f"{kind}_out, scale kept",
            colour,
            line={"dash": "dot"},
        )
        for kind, colour in names
    ]
    laws = ["depth/effect_bound", "depth/update_norms_rise"]
    read = (
        "How far predictions move, KL(full ‖ without), when one sublayer's output is taken out of "
        "the final residual; dotted "
        "with the last norm dividing by what it divides the full residual by."
    )
    return figure("What each sublayer is worth", data, read, laws, y="nats a token", log=True)


def _blocks(arrays: Arrays, rows: Rows) -> Figure | None:
    data = []
    if "stream/block_influence" in arrays:
        influence = arrays["stream/block_influence"][:, text_tokens(arrays)]
        data += over_tokens(influence, BLUE, "rgba(0,114,178,0.25)")
    if "block_skip/loss" in arrays:
        rises = arrays["block_skip/loss"].mean(1)
        data.append(by_layer(rises, "rise of the loss without the block", RED))
    if not data:
        return None
    laws = ["depth/block_influence", "depth/block_skip"]
    read = (
        "Block influence, 1 - cosine of what a block reads and what it leaves; the rise of the "
        "loss, where it was published, when that block alone is left out."
    )
    y = "1 - cosine, or nats a token"
    return figure("What each block changes", data, read, laws, y=y, log=True)


def _spectral(arrays: Arrays, rows: Rows) -> Figure | None:
    names = {"W_OV": PURPLE, "W_QK": BLUE}
    found = {
        name: arrays[f"weights/{name}_spectral"]
        for name in names
        if f"weights/{name}_spectral" in arrays
    }
    if not found:
        return None
    data = []
    for name, norms in found.items():
        data += [
            *spread(norms.min(1), norms.max(1), f"σ₁({name}), all heads", FILLS[name]),
            by_layer(norms.mean(1), f"σ₁({name}), mean over heads", names[name]),
        ]
        rank = (arrays[f"weights/{name}_frobenius"] / np.maximum(norms, np.finfo(float).tiny)) ** 2
        data.append(
            by_layer(rank.mean(1), f"stable rank of {name}", names[name], line={"dash": "dot"})
        )
    read = (
        "Largest singular value of each head, and the stable rank, squared Frobenius over squared "
        "spectral norm. Where "
        "positions are rotary, W_QK is the part of the scores without them."
    )
    laws = [
        f"attention/{name}" for name in ("circuit_norms", "circuit_spectral", "spectral_trajectory")
    ]
    return figure("Spectral norms of heads", data, read, laws, y="norm, or rank", log=True)


def _patching(arrays: Arrays, rows: Rows) -> Figure | None:
    tasks = [
        name for name, values in arrays.items() if name.startswith("patching/") and values.ndim == 2
    ]
    norms = arrays.get("weights/W_OV_spectral")
    if not tasks or norms is None:
        return None
    labels = [f"layer {n}, head {h}" for n, h in np.ndindex(*norms.shape)]
    data = [
        {
            "x": numbers(norms.ravel()),
            "y": numbers(arrays[task].ravel()),
            "text": labels,
            "name": task.split("/")[1],
            "mode": "markers",
            "marker": {"color": colour, "size": 6},
            "hovertemplate": "%{text}: %{y}<extra></extra>",
        }
        for task, colour in zip(tasks, itertools.cycle((BLUE, ORANGE, GREEN, RED)), strict=False)
    ]
    read = (
        "Each head once: how much of a task it brings back when its output on the clean prompt is "
        "put into the corrupted run, "
        "against its σ₁(W_OV). Heads in the upper right are large and matter to the task."
    )
    made = figure(
        "Patching scores of heads",
        data,
        read,
        ["attention/circuit_patching"],
        y="part of the task brought back",
    )
    made["layout"]["xaxis"] = {"title": {"text": "σ₁(W_OV)", "standoff": 4}}
    return made


FIGURES: tuple[Callable[[Arrays, Rows], Figure | None], ...] = (
    _stream,
    _histogram,
    _factors,
    _sublayers,
    _correlation,
    _heads,
    _random_mlp,
    _components,
    _activation,
    _hidden,
    _weights,
    _horizon,
    _effects,
    _blocks,
    _spectral,
    _patching,
)
