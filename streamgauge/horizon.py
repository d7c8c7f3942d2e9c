"""The `horizon` group: loss when each layer reads the outputs of the last k layers alone.

What layer n reads, x_n = embedding + Σ_{i<n} (attn_i + mlp_i), is replaced by the last k terms of the sum. The published
definition leaves details open, which are the fields of a Variant.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from streamgauge.blockwise import Batch, Blockwise, grouped
from streamgauge.forward import Found, PromptRun, walk
from streamgauge.prompts import Prompts

if TYPE_CHECKING:
    import torch

FRACTIONS = (0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)  # of the depth
ROWS = 16  # prompts on which horizons are tried
TOKENS = 4096  # of them at most: their streams at every layer are kept
WINDOWS = 2**28  # bytes of streams that horizons keep at once
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


def some_rows(prompts: Prompts) -> list[int]:
    """Indices of ROWS prompts of two tokens or more, spread over the set; fewer where they have more than TOKENS together."""
    usable = [index for index, row in enumerate(prompts.rows) if len(row) > 1]
    for count in range(min(ROWS, len(usable)), 0, -1):
        chosen = [usable[place] for place in np.linspace(0, len(usable) - 1, count).astype(int)]
        if count == 1 or sum(len(prompts.rows[index]) for index in chosen) <= TOKENS:
            return chosen
    return []


def token_losses(model: Blockwise, ids: "torch.Tensor", stream: "torch.Tensor") -> np.ndarray:
    """Cross-entropy of each next token, nats, (rows, positions - 1), where a stream ends."""
    import torch

    losses = []
    for part in model.in_parts(ids):
        logits, right = model.logits(ids[part], stream[part])[:, :-1], ids[part][:, 1:]
        found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), right.flatten(), reduction="none")
        losses.append(found.view(right.shape))
    return np.asarray(torch.cat(losses).double().cpu().numpy())


class CleanRuns:
    """Some of the prompts as the model runs them: the stream into each block and behind the last, by batch, and its mean.

    run: takes the prompts through the model, and must be visited before. members: by batch, which of `rows` it has; ids: their
    token ids; streams: by batch and layer.
    """

    def __init__(self, run: PromptRun) -> None:
        self.model, self.run = run.model, run
        self.rows = some_rows(run.prompts)
        self.places = [[n for n, row in enumerate(batch) if row in self.rows] for batch in run.members]
        self.members = [[self.rows.index(batch[n]) for n in kept] for batch, kept in zip(run.members, self.places, strict=True)]
        self.ids = [batch.ids[kept] for batch, kept in zip(run.batches, self.places, strict=True)]
        self.streams: list[list[torch.Tensor]] = [[] for _ in run.batches]
        self.means: list[torch.Tensor] = []
        self._keep()

    def visit(self, layer: int) -> None:
        """Keep what the block made of the stream."""
        self._keep()

    def found(self) -> Found:
        """Nothing by itself."""
        return {}, {}

    def _keep(self) -> None:
        """Keep the stream as it is now, and its mean at position 0 and at all others, (2, d_model)."""
        import torch

        now = [batch.stream[kept].clone() for batch, kept in zip(self.run.batches, self.places, strict=True)]
        for streams, stream in zip(self.streams, now, strict=True):
            streams.append(stream)
        sums = [sum(x[:, 0].double().sum(0) for x in now), sum(x[:, 1:].double().sum((0, 1)) for x in now)]
        counts = [sum(len(x) for x in now), sum(len(x) * (x.shape[1] - 1) for x in now)]
        self.means.append(torch.stack([total / max(n, 1) for total, n in zip(sums, counts, strict=True)]).float())


class Horizons:
    """All horizons of a variant on their way through the model, together, from the first layer that they cut.

    clean: runs of some prompts as they are, which must be visited before. Each lane keeps the streams of the layers that it
    still looks back at; as many batches go together as keep WINDOWS bytes. The others, and variants but the first, have walks
    of their own afterwards.
    """

    def __init__(self, clean: CleanRuns, variants: list[Variant]) -> None:
        self.clean, self.model, self.variants = clean, clean.model, variants
        self.grid = default_grid(self.model.n_layers)
        self.calls: dict[tuple[int, int], Batch] = {}
        self.parts = [(variant, numbers) for variant in variants for numbers in self._shares()]
        self.lanes = self._lanes(*self.parts[0])

    def visit(self, layer: int) -> None:
        """Take all that are cut here or below through a block, a batch's in one call."""
        import torch

        cut = {number: [lane for lane in lanes if lane.runs and lane.first <= layer] for number, lanes in self.lanes.items()}
        entered = [(self._batch(number, self.clean.ids[number], len(lanes)), lanes) for number, lanes in cut.items() if lanes]
        for members in grouped([batch.ids.numel() for batch, _ in entered]):
            group = entered[members.start : members.stop]
            for batch, lanes in group:
                batch.stream = torch.cat([lane.enter(layer) for lane in lanes])
            streams = self.model.step_together([batch for batch, _ in group], layer)
            for (_, lanes), stream in zip(group, streams, strict=True):
                for lane, x in zip(lanes, stream.chunk(len(lanes)), strict=True):
                    lane.leave(layer, x)

    def found(self) -> Found:
        """Each row's loss by variant, (n_k, rows), and without any cut."""
        prompts = [self.clean.run.prompts.rows[row] for row in self.clean.rows]
        clean = np.full(len(prompts), np.nan)
        for members, ids, streams in zip(self.clean.members, self.clean.ids, self.clean.streams, strict=True):
            clean[members] = self._loss(ids, streams[-1])
        tokens = np.array([len(row) - 1 for row in prompts], np.int32)
        arrays = {"k": np.array(self.grid, np.int32), "clean_loss": clean, "tokens": tokens}
        losses = {variant: np.tile(clean, (len(self.grid), 1)) for variant in self.variants}
        for part in self.parts:
            if part != self.parts[0]:
                self.lanes = self._lanes(*part)
                walk(self.model, {"horizon": self})
            self._read(losses[part[0]])
            self.lanes.clear()
        for streams in self.clean.streams:
            del streams[:-1]  # many, and of no more use
        return arrays | {f"loss.{variant.name}": found for variant, found in losses.items()}, {}

    def _shares(self) -> list[list[int]]:
        """Numbers of batches that are taken through the model together."""
        depth = self.model.n_layers
        windows = sum(min(k, depth - k) + 1 for k in self.grid if 0 < k < depth)
        shares: list[list[int]] = [[]]
        room = WINDOWS
        for number, streams in enumerate(self.clean.streams):
            needed = windows * streams[0].nbytes
            if needed > room and shares[-1]:
                shares.append([])
                room = WINDOWS
            room -= needed
            shares[-1] += [number] if len(streams[0]) else []
        return shares

    def _lanes(self, variant: Variant, numbers: list[int]) -> "dict[int, list[_Lane]]":
        """All horizons of a variant, by batch."""
        depth, clean = self.model.n_layers, self.clean
        return {n: [_Lane(variant, k, depth, clean.streams[n], clean.means) for k in self.grid] for n in numbers}

    def _read(self, losses: np.ndarray) -> None:
        """Fill in each row's loss at each horizon, (n_k, rows), where something was cut."""
        import torch

        for batch, lanes in self.lanes.items():
            cut = [number for number, lane in enumerate(lanes) if lane.first <= self.model.n_layers]
            found = self._loss(self.clean.ids[batch].repeat(len(cut), 1), torch.cat([lanes[number].final() for number in cut]))
            losses[np.ix_(cut, self.clean.members[batch])] = found.reshape(len(cut), -1)

    def _batch(self, number: int, ids: "torch.Tensor", copies: int) -> Batch:
        """So many copies of a batch, entered once."""
        if (number, copies) not in self.calls:
            self.calls = {key: batch for key, batch in self.calls.items() if key[0] != number}
            self.calls[number, copies] = self.model.enter(ids.repeat(copies, 1))
        return self.calls[number, copies]

    def _loss(self, ids: "torch.Tensor", stream: "torch.Tensor") -> np.ndarray:
        import torch

        with torch.no_grad():
            return np.asarray(token_losses(self.model, ids, stream).mean(1)) if len(ids) else np.zeros(0)


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
