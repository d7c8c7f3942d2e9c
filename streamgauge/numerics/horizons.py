"""Layer horizons: which variants and horizons are tried, and what the losses at them say."""

from dataclasses import dataclass

import numpy as np

FRACTIONS = tuple(n / 16 for n in (0, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16))  # of the depth


@dataclass(frozen=True)
class Variant:
    """What the definition leaves open.

    embedding: whether layers within reach of the horizon still read the embedding (the definition
    drops it). streams: whether truncated streams are made of the clean run's outputs or of those
    recomputed on truncated streams, where errors compound. fill: what stands for the outputs left
    out, nothing or their mean over tokens (position 0 has its own). reach: whether all layers and
    the final output are cut, or only the final output. first: the first layer that is cut, which
    leaves layers below it untouched at every horizon.
    """

    embedding: str = "dropped"
    streams: str = "recomputed"
    fill: str = "mean"
    reach: str = "everywhere"
    first: int = 0

    @property
    def name(self) -> str:
        """Its part of an array's name, as in `horizon/loss.dropped.recomputed.mean.everywhere`."""
        reach = self.reach if not self.first else f"from-{self.first}"
        return f"{self.embedding}.{self.streams}.{self.fill}.{reach}"


DEFAULT = Variant()


def variants_of(horizons: str, n_layers: int) -> list[Variant]:
    """What `default` and `all` stand for.

    The control of `all` cuts no layer in the first five twelfths (20 of gpt2-xl's 48), so that
    small horizons do not differ from large ones in how many layers they leave untouched.
    """
    return all_variants(round(5 * n_layers / 12)) if horizons == "all" else [DEFAULT]


def all_variants(first: int) -> list[Variant]:
    """Every combination, and the control of the default one that cuts layers from `first` on
    alone.
    """
    named = [
        Variant(e, s, f)
        for e in ("dropped", "kept")
        for s in ("recomputed", "clean")
        for f in ("mean", "zero")
    ]
    named += [
        Variant(e, "clean", f, "final") for e in ("dropped", "kept") for f in ("mean", "zero")
    ]
    return [*named, Variant(first=first)]


def default_grid(n_layers: int) -> list[int]:
    """Horizons that are tried: more where the loss bends, and one beyond the depth, which leaves
    nothing out.

    A horizon k > 0 costs 1 - k / n_layers of a forward pass, all together about 4.7; each an
    unembedding besides. The shortest ones cost most and would say least: gpt2-xl's loss, as
    published, falls most between a fifth and half of its depth.
    """
    return sorted({round(fraction * n_layers) for fraction in FRACTIONS} | {n_layers + 1})


EPSILON = 0.1  # nats: a loss so close to the clean one counts as unchanged


def effective_horizon(
    k: np.ndarray, loss: np.ndarray, clean: np.ndarray, tokens: np.ndarray
) -> float:
    """The smallest horizon whose loss is within EPSILON of the clean loss, interpolated between
    horizons that were tried.

    k: (n_k,) rising; loss: (n_k, rows); clean, tokens: (rows,). Rows count by their tokens. Unit:
    layers. NaN where none of them is.
    """
    excess = (loss - clean) @ tokens / tokens.sum() - EPSILON
    if not (excess <= 0).any():
        return float("nan")
    within = int(np.argmax(excess <= 0))
    if within == 0:
        return float(k[0])
    above, below = excess[within - 1], excess[within]
    return float(k[within - 1] + (k[within] - k[within - 1]) * above / (above - below))


def horizon_interval(
    k: np.ndarray, loss: np.ndarray, clean: np.ndarray, tokens: np.ndarray, resamples: int = 1000
) -> tuple[float, float]:
    """95% interval of effective_horizon when prompts are resampled. Seeded."""
    draws = np.random.default_rng(0).integers(0, len(clean), (resamples, len(clean)))
    found = [effective_horizon(k, loss[:, rows], clean[rows], tokens[rows]) for rows in draws]
    # Prompts that no horizon tried is near enough for have theirs beyond all of them.
    beyond = np.where(np.isnan(found), np.inf, found)
    low, high = np.quantile(beyond, [0.025, 0.975], method="nearest")
    return float(low), float(high)
