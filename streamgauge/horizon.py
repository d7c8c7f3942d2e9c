"""The `horizon` group: loss when each layer reads the outputs of the last k layers alone.

What layer n reads, x_n = embedding + Σ_{i<n} (attn_i + mlp_i), is replaced by the last k terms of the sum. The published
definition leaves details open, which are the fields of a Variant.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from streamgauge.blockwise import Batch, Blockwise, Hooks
from streamgauge.forward import Found, walk
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

    A horizon k > 0 costs 1 - k / n_layers of a forward pass, all together about 6.5; each an unembedding besides.
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


def some_prompts(prompts: Prompts) -> Prompts:
    """ROWS prompts of two tokens or more, spread over the set."""
    usable = [row for row in prompts.rows if len(row) > 1]
    chosen: np.ndarray | list[int] = (
        np.unique(np.linspace(0, len(usable) - 1, min(ROWS, len(usable))).astype(int)) if usable else []
    )
    return Prompts([usable[i] for i in chosen], prompts.source, prompts.bos)


def token_losses(model: Blockwise, ids: "torch.Tensor", stream: "torch.Tensor") -> np.ndarray:
    """Cross-entropy of each next token, nats, (rows, positions - 1), where a stream ends."""
    import torch

    losses = []
    for part in model.in_parts(ids):
        logits = model.logits(ids[part], stream[part])
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[part][:, 1:], reduction="none"))
    return np.asarray(torch.cat(losses).double().cpu().numpy())


class CleanRuns:
    """Some prompts as the model runs them: the stream into each block and behind the last, by batch, and its mean.

    readers: give hooks for a layer and a batch's number, with which others read along.
    """

    def __init__(self, model: Blockwise, prompts: Prompts) -> None:
        self.model, self.prompts = model, some_prompts(prompts)
        self.members = list(self.prompts.batches(BATCH_TOKENS))
        self.batches = [model.enter([self.prompts.rows[i] for i in members]) for members in self.members]
        self.streams = [[batch.stream] for batch in self.batches]
        self.means = [self._mean(0)] if self.batches else []
        self.readers: list[Callable[[int, int], Hooks]] = []

    def visit(self, layer: int) -> None:
        """Take all batches through a block."""
        for number, (batch, streams) in enumerate(zip(self.batches, self.streams, strict=True)):
            hooks = [hook for reader in self.readers for hook in reader(layer, number)]
            streams.append(self.model.step(batch, layer, hooks).clone())
        self.means.append(self._mean(layer + 1))

    def found(self) -> Found:
        """Nothing by itself."""
        return {}, {}

    def _mean(self, layer: int) -> "torch.Tensor":
        """Mean of the stream at position 0 and at all others, (2, d_model)."""
        import torch

        streams = [streams[layer].double() for streams in self.streams]
        sums = [sum(x[:, 0].sum(0) for x in streams), sum(x[:, 1:].sum((0, 1)) for x in streams)]
        counts = [sum(x.shape[0] for x in streams), sum(x.shape[0] * (x.shape[1] - 1) for x in streams)]
        return torch.stack([total / max(count, 1) for total, count in zip(sums, counts, strict=True)]).float()


class Horizons:
    """All horizons of a variant on their way through the model, together, from the first layer that they cut.

    clean: runs of some prompts as they are, which must be visited before. Variants but the first have walks of their own
    afterwards, so that their streams are not in memory together.
    """

    def __init__(self, clean: CleanRuns, variants: list[Variant]) -> None:
        self.clean, self.model, self.variants = clean, clean.model, variants
        self.grid = default_grid(self.model.n_layers)
        self.calls: dict[tuple[int, int], Batch] = {}
        self.lanes = self._lanes(variants[0])

    def visit(self, layer: int) -> None:
        """Take all that are cut here or below through a block, in one call a batch."""
        import torch

        for number, (batch, lanes) in enumerate(zip(self.clean.batches, self.lanes, strict=True)):
            cut = [lane for lane in lanes if lane.runs and lane.first <= layer]
            if not cut:
                continue
            together = self._batch(number, batch.ids, len(cut))
            together.stream = torch.cat([lane.enter(layer) for lane in cut])
            for lane, x in zip(cut, self.model.step(together, layer).chunk(len(cut)), strict=True):
                lane.leave(layer, x)

    def found(self) -> Found:
        """Each row's loss by variant, (n_k, rows), and without any cut."""
        clean = np.full(len(self.clean.prompts.rows), np.nan)
        for members, batch, streams in zip(self.clean.members, self.clean.batches, self.clean.streams, strict=True):
            clean[members] = self._loss(batch, streams[-1])
        tokens = np.array([len(row) - 1 for row in self.clean.prompts.rows], np.int32)
        arrays = {"k": np.array(self.grid, np.int32), "clean_loss": clean, "tokens": tokens}
        for variant in self.variants:
            if variant != self.variants[0]:
                self.lanes = self._lanes(variant)
                walk(self.model, {variant.name: self})
            arrays[f"loss.{variant.name}"] = self._losses(clean)
        return arrays, {}

    def _lanes(self, variant: Variant) -> "list[list[_Lane]]":
        """By batch, all horizons of a variant."""
        depth, means = self.model.n_layers, self.clean.means
        return [[_Lane(variant, k, depth, streams, means) for k in self.grid] for streams in self.clean.streams]

    def _losses(self, clean: np.ndarray) -> np.ndarray:
        """Each row's loss at each horizon, (n_k, rows); clean: without any cut."""
        losses = np.tile(clean, (len(self.grid), 1))
        for members, batch, lanes in zip(self.clean.members, self.clean.batches, self.lanes, strict=True):
            for number, lane in enumerate(lanes):
                if lane.first <= self.model.n_layers:
                    losses[number, members] = self._loss(batch, lane.final())
        return losses

    def _batch(self, number: int, ids: "torch.Tensor", copies: int) -> Batch:
        """So many copies of a batch, entered once."""
        if (number, copies) not in self.calls:
            self.calls = {key: batch for key, batch in self.calls.items() if key[0] != number}
            self.calls[number, copies] = self.model.enter(ids.repeat(copies, 1))
        return self.calls[number, copies]

    def _loss(self, batch: Batch, stream: "torch.Tensor") -> np.ndarray:
        import torch

        with torch.no_grad():
            return np.asarray(token_losses(self.model, batch.ids, stream).mean(1))


class _Lane:
    """One horizon of one variant on one batch.

    own[n] is the embedding and all outputs below n, as recomputed; below the first cut they are the clean ones. entered is
    what the block at work was given.
    """

    def __init__(self, variant: Variant, k: int, depth: int, clean: "list[torch.Tensor]", means: "list[torch.Tensor]") -> None:
        self.variant, self.k, self.depth, self.clean, self.means = variant, k, depth, clean, means
        self.first = max(k, variant.first) if variant.reach == "everywhere" else depth
        # At horizon 0 all outputs are cut from the final output, so that what the blocks would write need not be known.
        self.runs = self.first < depth and k > 0
        self.own: dict[int, torch.Tensor] = {}
        self.entered: torch.Tensor | None = None

    def enter(self, layer: int) -> "torch.Tensor":
        """What a block reads."""
        self.entered = self._cut(self.clean.__getitem__ if self.variant.streams == "clean" else self._whole, layer)
        return self.entered

    def leave(self, layer: int, x: "torch.Tensor") -> None:
        """Put together what was there and what the block wrote."""
        self.own[layer + 1] = x + (self._whole(layer) - self.entered)
        self.own.pop(layer + 1 - self.k - 1, None)  # further back than anything will look

    def final(self) -> "torch.Tensor":
        """What the unembedding reads: what the blocks wrote, within the horizon."""
        return self._cut(self._whole, self.depth)

    def _whole(self, layer: int) -> "torch.Tensor":
        return self.own[layer] if layer in self.own else self.clean[layer]

    def _cut(self, stream: "Callable[[int], torch.Tensor]", layer: int) -> "torch.Tensor":
        """The stream at a layer without what lies more than k layers back."""
        bottom = max(layer - self.k, 0)
        gone, mean = stream(bottom), self.means[bottom]
        if self.variant.embedding == "kept":
            gone, mean = gone - stream(0), mean - self.means[0]
        cut = stream(layer) - gone
        if self.variant.fill == "zero":
            return cut
        cut[:, 0] += mean[0]
        cut[:, 1:] += mean[1]
        return cut
