"""As many prompts as it takes until the growth rate is known well enough."""

from typing import Any

import numpy as np

from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.forward import PromptRun, walk
from streamgauge.engine.layout import Layout
from streamgauge.groups.stream import StreamMeter
from streamgauge.numerics.bands import default_window
from streamgauge.numerics.growth import bootstrap_rate, growth_rates
from streamgauge.numerics.rows import Prompts

FEWEST = 8  # prompts; below that an interval over prompts says little


def enough_prompts(
    model: Blockwise, layout: Layout, prompts: Prompts, precision: float, show: bool
) -> tuple[Prompts, dict[str, Any]]:
    """Prompts drawn without replacement, FEWEST and then twice as many each time, until the 95%
    interval of the growth rate over the default window is narrower than `precision` or all were
    drawn; and what was reached. All of them where there is no growth to measure.

    The interval resamples prompts (`growth.bootstrap_rate`). Looking several times makes it stop a
    little early: of what it then says, somewhat fewer than 95% hold.
    """
    order = np.random.default_rng(0).permutation(len(prompts.rows))
    order = order[
        np.argsort([len(prompts.rows[i]) < 2 for i in order], kind="stable")
    ]  # single tokens say nothing: last
    window = default_window(layout.n_layers)
    if not layout.pre_norm or window[1] <= window[0] or max(map(len, prompts.rows)) < 2:
        return prompts, {
            "asked": precision,
            "reached": None,
            "prompts": len(order),
            "tokens": sum(map(len, prompts.rows)),
        }
    rates: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    drawn = 0
    while True:
        new = order[drawn : max(FEWEST, 2 * drawn)]
        found, prompt = _growth(
            model,
            layout,
            Prompts([prompts.rows[i] for i in new], prompts.source, prompts.bos),
            window,
            show,
        )
        rates.append(found)
        numbers.append(prompt + drawn)
        drawn += len(new)
        width = _width(np.concatenate(rates), np.concatenate(numbers))
        if width <= precision or drawn == len(order):
            break
    rows = [prompts.rows[i] for i in sorted(order[:drawn])]
    source = prompts.source if drawn == len(order) else f"{drawn} of {prompts.source}"
    reached = {
        "asked": precision,
        "reached": float(width) if np.isfinite(width) else None,
        "prompts": drawn,
        "tokens": sum(map(len, rows)),
    }
    return Prompts(rows, source, prompts.bos, prompts.sampled), reached


def _width(rates: np.ndarray, numbers: np.ndarray) -> float:
    """Width of the interval, infinite where it rests on a single prompt: its resamples are all the
    same.
    """
    if len(np.unique(numbers)) < 2:
        return float("inf")
    interval = bootstrap_rate(rates, numbers)
    return interval.high - interval.low


def _growth(
    model: Blockwise, layout: Layout, prompts: Prompts, window: tuple[int, int], show: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Growth rates of text tokens, and the prompt that each is of."""
    meter = StreamMeter(layout, prompts)
    walk(model, {"prompts": PromptRun(model, prompts, [meter])}, show=show)
    found, _ = meter.found()
    text = found["position"] > 0
    return growth_rates(found["resid_pre"][:, text], window), found["prompt"][text]
