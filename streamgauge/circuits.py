"""Circuits, the heads that a task was traced to, and how their weights compare with those of all other heads."""

from dataclasses import dataclass

import numpy as np

from streamgauge.errors import NotMeasured


@dataclass(frozen=True)
class Circuit:
    """A task of a model, its heads as (layer, head), and where that was found.

    ratio: the published ratio of mean ‖W_OV‖_F of these heads to that of all others, where there is one.
    """

    model: str
    task: str
    heads: tuple[tuple[int, int], ...]
    source: str
    ratio: float | None = None


def norm_ratio(norms: np.ndarray, heads: tuple[tuple[int, int], ...]) -> float:
    """Mean norm of some heads over the mean of all others; norms: (n_layers, n_heads)."""
    mask = head_mask(norms.shape, heads)
    return float(norms[mask].mean() / norms[~mask].mean())


def head_mask(shape: tuple[int, ...], heads: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Which heads are in a circuit. Raises NotMeasured for one that the model does not have."""
    beyond = [f"{layer}.{head}" for layer, head in heads if layer >= shape[0] or head >= shape[1]]
    if beyond:
        raise NotMeasured(f"the circuit names head {beyond[0]}, but the model has {shape[0]} layers of {shape[1]} heads")
    mask = np.zeros(shape, bool)
    mask[tuple(np.array(heads).T)] = True
    return mask


def chance_of_ratio(norms: np.ndarray, heads: tuple[tuple[int, int], ...], *, same_layers: bool, draws: int = 10_000) -> float:
    """How often heads drawn at random have a norm_ratio at least as large, (count + 1) / (draws + 1). Seeded.

    same_layers: as many heads from each layer as the circuit has there, since late layers have larger norms anyway.
    """
    rng, mask = np.random.default_rng(0), head_mask(norms.shape, heads)
    keys = rng.random((draws, *norms.shape))
    if same_layers:
        order = keys.argsort(-1).argsort(-1)
        drawn = order < mask.sum(1)[:, None]
    else:
        order = keys.reshape(draws, -1).argsort(-1).argsort(-1).reshape(keys.shape)
        drawn = order < mask.sum()
    inside, total, count = (norms * drawn).sum((1, 2)), norms.sum(), mask.sum()
    ratios = (inside / count) / ((total - inside) / (mask.size - count))
    # Drawing the circuit itself counts, in whatever order its norms were added.
    reached = int((ratios >= norm_ratio(norms, heads) * (1 - 1e-12)).sum())
    return (reached + 1) / (draws + 1)
