"""Growth of norms over layers: pure functions on arrays (layers, tokens), used by the laws and in notebooks."""

from dataclasses import dataclass

import numpy as np

from streamgauge.errors import NotApplicable

COVERAGE = 0.75  # a window may lack this much at its ends in a published record, no more


def measured_window(norms: np.ndarray, layers: tuple[int, int]) -> tuple[int, int]:
    """The window between its first and last measured layer. Raises NotApplicable where too little of it was measured."""
    first, last = layers
    measured = [n for n in range(first, min(last, len(norms) - 1) + 1) if not np.isnan(norms[n]).all()]
    if not measured or measured[-1] - measured[0] < COVERAGE * (last - first):
        raise NotApplicable(f"layers {first} to {last} are not covered by this record")
    return measured[0], measured[-1]


def _window(norms: np.ndarray, layers: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The measured layers of a window, and the log norms there; tokens without all of them are NaN."""
    first, last = layers
    index = np.arange(first, min(last, len(norms) - 1) + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return index, np.log(norms[index])


def growth_rates(norms: np.ndarray, layers: tuple[int, int]) -> np.ndarray:
    """Each token's geometric mean growth a layer over a window, ends included: exp(mean slope of the log norm).

    norms: (layers, tokens), NaN where a layer was not measured; between the first and the last measured layer of the
    window. Returns (tokens,), NaN for tokens measured at fewer than two layers of it.
    """
    index, logs = _window(norms, layers)
    rates = np.full(norms.shape[1], np.nan)
    for token in range(norms.shape[1]):
        measured = np.flatnonzero(~np.isnan(logs[:, token]))
        if len(measured) >= 2:
            first, last = measured[0], measured[-1]
            rates[token] = np.exp((logs[last, token] - logs[first, token]) / (index[last] - index[first]))
    return rates


def mean_rate(rates: np.ndarray) -> float:
    """The geometric mean over tokens, NaN left out."""
    return float(np.exp(np.nanmean(np.log(rates))))


def log_linear_r2(norms: np.ndarray, layers: tuple[int, int]) -> float:
    """R² of a straight line through the log norm against the layer, log norms averaged over tokens first."""
    index, logs = _mean_log(norms, layers)
    if np.ptp(logs) == 0:
        return 1.0
    return float(np.corrcoef(index, logs)[0, 1] ** 2)


def curvature(norms: np.ndarray, layers: tuple[int, int]) -> tuple[float, float]:
    """How fast the log growth rate rises a layer, and the standard error of that slope.

    The slope of log(norm[n+1] / norm[n]) against n, log norms averaged over tokens first.
    """
    from scipy.stats import linregress

    index, logs = _mean_log(norms, layers)
    fit = linregress(index[:-1], np.diff(logs) / np.diff(index))
    return float(fit.slope), float(fit.stderr)


def _mean_log(norms: np.ndarray, layers: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Log norms averaged over the tokens that were measured at every measured layer of the window."""
    index, logs = _window(norms, layers)
    best = (~np.isnan(logs)).sum(1).max()
    kept = (~np.isnan(logs)).sum(1) == best
    return index[kept], logs[kept][:, ~np.isnan(logs[kept]).any(0)].mean(1)


@dataclass(frozen=True)
class Interval:
    """A 95% interval."""

    low: float
    high: float


def bootstrap_rate(rates: np.ndarray, prompts: np.ndarray, resamples: int = 1000) -> Interval:
    """95% interval of mean_rate when whole prompts are resampled, tokens of one prompt being alike. Seeded."""
    logs = np.log(rates)
    measured = ~np.isnan(logs)
    names, group = np.unique(prompts[measured], return_inverse=True)
    sums, counts = np.bincount(group, logs[measured]), np.bincount(group)
    draws = np.random.default_rng(0).integers(0, len(names), (resamples, len(names)))
    low, high = np.quantile(sums[draws].sum(1) / counts[draws].sum(1), [0.025, 0.975])
    return Interval(float(np.exp(low)), float(np.exp(high)))
