"""Two models in one figure: the curves of the one under audit and of its baseline, of all that
moved and nothing else.
"""

import itertools

import numpy as np

from .curves import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    Arrays,
    Figure,
    by_layer,
    figure,
    quantiles,
    resid,
    text_tokens,
)

SEEN = 1e-3  # a curve that differs by less than this everywhere looks the same
LAWS = [
    "regression/config",
    "regression/weights",
    "regression/norms",
    "regression/activations",
    "regression/predictions",
]
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, GREY)


def compared(arrays: Arrays, baseline: Arrays) -> list[Figure]:
    """Curves of both where they differ, and their ratios."""
    both = [
        (name, now, before)
        for name, now, before in _pairs(_curves(arrays), _curves(baseline))
        if _moved(now, before)
    ]
    if not both:
        return []
    over, ratios = [], []
    for (name, now, before), colour in zip(both, itertools.cycle(COLOURS), strict=False):
        over += [
            by_layer(now, name, colour),
            by_layer(before, f"{name}, baseline", colour, line={"dash": "dot"}),
        ]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(by_layer(now / before, name, colour))
    read = (
        "Only what differs by more than a thousandth somewhere; dotted: the baseline. "
        "Norms, the median token's or by layer."
    )
    times = "The same curves, divided by the baseline's. Where one leaves 1 first is where to look."
    return [
        figure("Compared with the baseline", over, read, LAWS, y="norm", log=True),
        figure("Ratio to the baseline", ratios, times, LAWS, y="this / baseline"),
    ]


def _curves(arrays: Arrays) -> dict[str, np.ndarray]:
    """One number a layer of whatever a record holds."""
    found: dict[str, np.ndarray] = {}
    norms = resid(arrays)
    if norms is not None:
        text = text_tokens(arrays)
        found["the stream"] = quantiles(norms[:, text])[1]
        for name in ("attn_out", "mlp_out"):
            if f"stream/{name}" in arrays:
                found[name] = quantiles(arrays[f"stream/{name}"][:, text])[1]
    for name in (
        "W_Q_raw",
        "W_K_raw",
        "W_V_raw",
        "W_O_raw",
        "W_in_raw",
        "W_gate_raw",
        "W_out_raw",
        "W_OV_frobenius",
    ):
        if f"weights/{name}" in arrays:
            values = arrays[f"weights/{name}"]
            found[f"‖{name.removesuffix('_raw').removesuffix('_frobenius')}‖"] = np.linalg.norm(
                values.reshape(len(values), -1), axis=1
            )
    return found


def _pairs(
    now: dict[str, np.ndarray], before: dict[str, np.ndarray]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    return [
        (name, now[name], before[name])
        for name in now
        if name in before and now[name].shape == before[name].shape
    ]


def _moved(now: np.ndarray, before: np.ndarray) -> bool:
    return bool((np.abs(now - before) > SEEN * np.abs(before)).any())
