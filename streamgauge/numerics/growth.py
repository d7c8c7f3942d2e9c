"""Growth of norms over layers: pure functions on arrays (layers, tokens), used by the laws and in
notebooks.
"""

from dataclasses import dataclass

import numpy as np

from streamgauge.errors import NotApplicable, NotMeasured
from streamgauge.numerics.student_t import quantile

QUANTILES = (0.025, 0.975)
COVERAGE = 0.75  # a window may lack this much at its ends in a published record, no more


def measured_window(norms: np.ndarray, layers: tuple[int, int]) -> tuple[int, int]:
    """The window between its first and last measured layer.

    Raises NotApplicable where too little of it was measured.
    """
    if norms.shape[1] == 0:
        raise NotMeasured("no token but those at position 0 was measured; use longer prompts")
    first, last = layers
    if last <= first:
        raise NotApplicable(f"the window from layer {first} to {last} leaves no room for growth")
    measured = [
        n for n in range(first, min(last, len(norms) - 1) + 1) if not np.isnan(norms[n]).all()
    ]
    if not measured or measured[-1] - measured[0] < COVERAGE * (last - first):
        raise NotApplicable(f"layers {first} to {last} are not covered by this record")
    return measured[0], measured[-1]


def growth_rates(norms: np.ndarray, layers: tuple[int, int]) -> np.ndarray:
    """Each token's geometric mean growth a layer over a window, ends included: exp(mean slope of
    the log norm).

    norms: (layers, tokens). Returns (tokens,), NaN where either end was not measured.
    """
    first, last = layers
    with np.errstate(divide="ignore", invalid="ignore"):
        rates: np.ndarray = np.exp((np.log(norms[last]) - np.log(norms[first])) / (last - first))
    return rates


def mean_rate(rates: np.ndarray) -> float:
    """The geometric mean over tokens of rates, (tokens,), as `growth_rates` gives them; NaN where
    one of them is. Raises ValueError for anything of another shape, such as norms.
    """
    if np.ndim(rates) != 1:
        raise ValueError(
            f"mean_rate takes one rate a token, as growth_rates(norms, layers) gives them, and no "
            f"array of shape {np.shape(rates)}"
        )
    return float(np.exp(np.log(rates).mean()))


def log_linear_r2(norms: np.ndarray, layers: tuple[int, int]) -> float:
    """R² of a straight line through the log norm against the layer, log norms averaged over tokens
    first.

    Negative where the line falls, 0 where the norm stays as it is: neither is growth.
    """
    index, logs = _mean_log(norms, layers)
    if np.ptp(logs) == 0:
        return 0.0
    correlation = float(np.corrcoef(index, logs)[0, 1])
    return correlation * abs(correlation)


def curvature(norms: np.ndarray, layers: tuple[int, int], level: float) -> tuple[float, float]:
    """How fast the log growth rate rises a layer, and what its scatter explains at a one-sided
    level (t test).

    The slope of log(norm[n+1] / norm[n]) against n + 1/2, log norms averaged over tokens first.
    """
    index, logs = _mean_log(norms, layers)
    if len(index) < 4:
        raise NotApplicable(
            f"layers {layers[0]} to {layers[1]} are too few to tell curvature from scatter"
        )
    x, rates = (index[:-1] + index[1:]) / 2, np.diff(logs) / np.diff(index)
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * rates).sum() / spread
    freedom = len(x) - 2
    scatter = ((rates - rates.mean() - slope * (x - x.mean())) ** 2).sum() / freedom
    return float(slope), float(-quantile(level, freedom) * np.sqrt(scatter / spread))


def _mean_log(norms: np.ndarray, layers: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The measured layers of a window and their mean log norms: NaN where a token is missing from a
    measured layer.
    """
    first, last = layers
    index = np.arange(first, last + 1)
    index = index[~np.isnan(norms[index]).all(1)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return index, np.log(norms[index]).mean(1)


@dataclass(frozen=True)
class Interval:
    """A 95% interval."""

    low: float
    high: float


def bootstrap_rate(rates: np.ndarray, prompts: np.ndarray, resamples: int = 1000) -> Interval:
    """95% interval of mean_rate when whole prompts are resampled, tokens of one prompt being alike.

    Seeded.
    """
    low, high = np.quantile(resampled_means(np.log(rates), prompts, resamples), QUANTILES)
    return Interval(float(np.exp(low)), float(np.exp(high)))


def resampled_means(values: np.ndarray, prompts: np.ndarray, resamples: int = 1000) -> np.ndarray:
    """Means over tokens, (resamples,), when whole prompts are drawn with replacement. Seeded."""
    names, group = np.unique(prompts, return_inverse=True)
    sums, counts = np.bincount(group, values), np.bincount(group)
    draws = np.random.default_rng(0).integers(0, len(names), (resamples, len(names)))
    means: np.ndarray = sums[draws].sum(1) / counts[draws].sum(1)
    return means


def log_slopes(norms: np.ndarray, layers: tuple[int, int]) -> np.ndarray:
    """Least-squares slope of the log norm against the layer, for each column of (layers, tokens)
    over a window: (tokens,).

    Layers that were not measured at all are left out.
    """
    first, last = layers
    index = np.arange(first, last + 1)
    index = index[~np.isnan(norms[index]).all(1)]
    weights = (index - index.mean()) / ((index - index.mean()) ** 2).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes: np.ndarray = weights @ np.log(norms[index])
    return slopes


def layer_slope(values: np.ndarray, layers: tuple[int, int]) -> float:
    """Least-squares slope of the log of one number a layer, (layers,), over a window."""
    return float(log_slopes(values[:, None], layers)[0])


def mean_ratio(above: np.ndarray, below: np.ndarray, layers: tuple[int, int]) -> float:
    """Geometric mean over a window, ends included, of the ratio of two numbers a layer, each
    (layers,).
    """
    first, last = layers
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.exp(np.log(above / below)[first : last + 1].mean()))


@dataclass(frozen=True)
class Share:
    """A share and its 95% interval."""

    value: float
    interval: Interval


def reproduced_share(
    random: np.ndarray,
    error: np.ndarray,
    outputs: np.ndarray,
    prompts: np.ndarray,
    layers: tuple[int, int],
) -> Share:
    """How much of the log growth of a sublayer's output its answers to layer-independent random
    inputs reproduce.

    random, error: (layers,) mean norm of these answers and its standard error; outputs: (layers,
    tokens) norms in the model's own run; prompts: (tokens,). slope(log random) / slope(log
    outputs), with an interval that resamples prompts and draws the random norms anew within their
    errors. Raises NotApplicable where the output's own slope cannot be told from 0.
    """
    slopes = log_slopes(outputs, layers)
    own = resampled_means(slopes, prompts)
    if not np.quantile(own, QUANTILES[0]) > 0:
        raise NotApplicable(
            f"growth of the output over layers {layers[0]} to {layers[1]} cannot be told from none"
        )
    noise = np.random.default_rng(1).standard_normal((len(random), len(own)))
    drawn = log_slopes(random[:, None] + error[:, None] * noise, layers) / own
    low, high = np.quantile(drawn, QUANTILES)
    return Share(
        layer_slope(random, layers) / float(slopes.mean()), Interval(float(low), float(high))
    )
