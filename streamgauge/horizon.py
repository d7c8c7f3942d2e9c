"""The `horizon` group: loss when each layer reads the outputs of the last k layers alone.

What layer n reads, x_n = embedding + Σ_{i<n} (attn_i + mlp_i), is replaced by the last k terms of the sum. The published
definition leaves details open, which are the fields of a Variant.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.forward import run_prompts
from streamgauge.model import Layout, device_of
from streamgauge.prompts import Prompts

if TYPE_CHECKING:
    import torch

FRACTIONS = (0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)  # of the depth
ROWS = 16  # prompts on which horizons are tried
BATCH_TOKENS = 512  # logits and a stream for every layer are held for so many tokens at once
POST_NORM = "post-norm blocks normalise the stream itself, so it is not a sum of outputs"
SHORT = "no prompt has two tokens, so there is nothing to predict"


@dataclass(frozen=True)
class Variant:
    """What the definition leaves open.

    embedding: whether layers within reach of the horizon still read the embedding (the definition drops it). streams:
    whether truncated streams are made of the clean run's outputs or of those recomputed on truncated streams, where errors
    compound. fill: what stands for the outputs left out, nothing or their mean over tokens (position 0 has its own).
    reach: whether all layers and the final output are cut, or only the final output. first: the first layer that is cut,
    which leaves layers below it untouched at every horizon.
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

    The control of `all` cuts no layer in the first five twelfths (20 of gpt2-xl's 48), so that small horizons do not differ
    from large ones in how many layers they leave untouched.
    """
    return all_variants(round(5 * n_layers / 12)) if horizons == "all" else [DEFAULT]


def all_variants(first: int) -> list[Variant]:
    """Every combination, and the control of the default one that cuts layers from `first` on alone."""
    named = [Variant(e, s, f) for e in ("dropped", "kept") for s in ("recomputed", "clean") for f in ("mean", "zero")]
    named += [Variant(e, "clean", f, "final") for e in ("dropped", "kept") for f in ("mean", "zero")]
    return [*named, Variant(first=first)]


def default_grid(n_layers: int) -> list[int]:
    """Horizons that are tried: more where the loss bends, and one beyond the depth, which leaves nothing out.

    A horizon k costs 1 - k / n_layers of a forward pass, all together about 7.5.
    """
    return sorted({round(fraction * n_layers) for fraction in FRACTIONS} | {n_layers + 1})


EPSILON = 0.1  # nats: a loss so close to the clean one counts as unchanged


def effective_horizon(k: np.ndarray, loss: np.ndarray, clean: np.ndarray, tokens: np.ndarray) -> float:
    """The smallest horizon whose loss is within EPSILON of the clean loss, interpolated between horizons that were tried.

    k: (n_k,) rising; loss: (n_k, rows); clean, tokens: (rows,). Rows count by their tokens. Unit: layers.
    """
    excess = (loss - clean) @ tokens / tokens.sum() - EPSILON
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
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def measure_horizon(
    bridge: Any, layout: Layout, prompts: Prompts, variants: list[Variant], show: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays of the group, without its prefix, and why they are absent."""
    import torch
    from tqdm import tqdm

    if not layout.pre_norm:
        return {}, {"horizon": POST_NORM}
    rows = some_prompts(prompts)
    if not rows.rows:
        return {}, {"horizon": SHORT}
    means = MeanMeter(layout)
    run_prompts(bridge, rows, [means], show=False)
    grid = default_grid(layout.n_layers)
    losses = {variant.name: np.full((len(grid), len(rows.rows)), np.nan) for variant in variants}
    clean = np.full(len(rows.rows), np.nan)
    with torch.no_grad():
        for batch in tqdm(list(rows.batches(BATCH_TOKENS)), "layer horizons", unit="batch", disable=None if show else True):
            run = CleanRun(bridge, layout, [rows.rows[i] for i in batch])
            clean[batch] = run.loss
            for variant in variants:
                for number, k in enumerate(grid):
                    losses[variant.name][number, batch] = truncated_loss(bridge, run, variant, k, means.streams())
    tokens = np.array([len(row) - 1 for row in rows.rows], np.int32)
    arrays = {"k": np.array(grid, np.int32), "clean_loss": clean, "tokens": tokens}
    return arrays | {f"loss.{name}": loss for name, loss in losses.items()}, {}


def some_prompts(prompts: Prompts) -> Prompts:
    """ROWS prompts of two tokens or more, spread over the set."""
    usable = [row for row in prompts.rows if len(row) > 1]
    chosen: np.ndarray | list[int] = (
        np.unique(np.linspace(0, len(usable) - 1, min(ROWS, len(usable))).astype(int)) if usable else []
    )
    return Prompts([usable[i] for i in chosen], prompts.source, prompts.bos)


class MeanMeter:
    """Mean of the stream at each layer, at position 0 and at all others."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.sums: dict[int, torch.Tensor] = {}
        self.counts = np.zeros(2)

    def hooks(self) -> list[tuple[str, Any]]:
        """What bridge.hooks takes."""
        last = self.layout.n_layers - 1
        hooks = [(f"blocks.{n}.hook_resid_pre", self._adder(n)) for n in range(self.layout.n_layers)]
        return [*hooks, (f"blocks.{last}.hook_resid_post", self._adder(last + 1))]

    def streams(self) -> "torch.Tensor":
        """Shape (n_layers + 1, 2, d_model): means at position 0 and elsewhere."""
        import torch

        sums = torch.stack([self.sums[n] for n in range(self.layout.n_layers + 1)])
        counts = torch.as_tensor(self.counts, device=sums.device)
        return (sums / counts[:, None].clamp_min(1)).float()

    def _adder(self, layer: int) -> Any:
        def add(x: "torch.Tensor", hook: Any) -> None:
            import torch

            parts = torch.stack([x[:, 0].double().sum(0), x[:, 1:].double().sum((0, 1))])
            self.sums[layer] = self.sums[layer] + parts if layer in self.sums else parts
            if layer == 0:
                self.counts += (x.shape[0], x.shape[0] * (x.shape[1] - 1))

        return add


class CleanRun:
    """One batch as the model runs it: the stream into each block and behind the last, and each row's loss."""

    def __init__(self, bridge: Any, layout: Layout, rows: list[list[int]]) -> None:
        import torch

        self.ids = torch.tensor(rows, device=device_of(bridge))
        self.n_layers = layout.n_layers
        kept: dict[int, torch.Tensor] = {}

        def keeper(layer: int) -> Any:
            return lambda x, hook: kept.__setitem__(layer, x.clone())

        hooks = [(f"blocks.{n}.hook_resid_pre", keeper(n)) for n in range(self.n_layers)]
        hooks.append((f"blocks.{self.n_layers - 1}.hook_resid_post", keeper(self.n_layers)))
        with bridge.hooks(fwd_hooks=hooks):
            logits = bridge(self.ids, return_type="logits")
        self.streams = [kept[n] for n in range(self.n_layers + 1)]
        self.loss = row_losses(logits, self.ids)


def row_losses(logits: "torch.Tensor", ids: "torch.Tensor") -> np.ndarray:
    """Mean cross-entropy of the next token for each row, nats."""
    import torch

    losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return np.asarray(losses.double().mean(1).cpu().numpy())


def truncated_loss(bridge: Any, run: CleanRun, variant: Variant, k: int, means: "torch.Tensor") -> np.ndarray:
    """Each row's loss at horizon k. Layers that the horizon leaves untouched are not run again."""
    depth = run.n_layers
    first = max(k, variant.first) if variant.reach == "everywhere" else depth
    if first > depth:
        return run.loss  # no layer is so deep
    start = min(first, depth - 1)
    cut = _Truncation(run, variant, k, first, means)
    hooks = [(f"blocks.{n}.hook_resid_pre", cut.entering(n)) for n in range(start, depth)]
    hooks += [(f"blocks.{n}.hook_resid_post", cut.leaving(n)) for n in range(start, depth)]
    with bridge.hooks(fwd_hooks=hooks):
        logits = bridge(run.streams[start], start_at_layer=start, return_type="logits")
    return row_losses(logits, run.ids)


class _Truncation:
    """Hooks that give blocks truncated streams, and put together what they then write.

    whole[n] is the embedding and all outputs below n, as recomputed; entered[n] is what block n was given.
    """

    def __init__(self, run: CleanRun, variant: Variant, k: int, first: int, means: "torch.Tensor") -> None:
        self.run, self.variant, self.k, self.first, self.means = run, variant, k, first, means
        self.whole = list(run.streams[: min(first, run.n_layers - 1) + 1])
        self.entered: torch.Tensor | None = None

    def entering(self, layer: int) -> Any:
        def give(x: "torch.Tensor", hook: Any) -> "torch.Tensor":
            source = self.run.streams if self.variant.streams == "clean" else self.whole
            self.entered = self._cut(source, layer) if layer >= self.first else self.run.streams[layer]
            return self.entered

        return give

    def leaving(self, layer: int) -> Any:
        def take(x: "torch.Tensor", hook: Any) -> "torch.Tensor":
            self.whole.append(x + (self.whole[layer] - self.entered))  # x itself where nothing was cut
            if layer < self.run.n_layers - 1:
                return self.whole[-1]
            # The final output reads what the blocks wrote, within the horizon.
            return self._cut(self.whole, layer + 1)

        return take

    def _cut(self, streams: "list[torch.Tensor]", layer: int) -> "torch.Tensor":
        """The stream at a layer without what lies more than k layers back."""
        bottom = max(layer - self.k, 0)
        gone, mean = streams[bottom], self.means[bottom]
        if self.variant.embedding == "kept":
            gone, mean = gone - streams[0], mean - self.means[0]
        cut = streams[layer] - gone
        if self.variant.fill == "zero":
            return cut
        cut[:, 0] += mean[0]
        cut[:, 1:] += mean[1]
        return cut
