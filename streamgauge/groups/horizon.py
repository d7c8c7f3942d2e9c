"""The `horizon` group: loss when each layer reads the outputs of the last k layers alone.

What layer n reads, x_n = embedding + Σ_{i<n} (attn_i + mlp_i), is replaced by the last k terms of
the sum. The published definition leaves details open, which are the fields of a Variant.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from streamgauge.engine.blockwise import Batch, grouped
from streamgauge.engine.clean_runs import CleanRuns, token_losses
from streamgauge.engine.forward import Found, walk
from streamgauge.numerics.horizons import Variant, default_grid

if TYPE_CHECKING:
    import torch

WINDOWS = 2**28  # bytes of streams that horizons keep at once
UNEMBEDDED = 0.2  # of a pass over all prompts that unembedding for losses may cost


class Horizons:
    """All horizons of a variant on their way through the model, together, from the first layer that
    they cut.

    clean: runs of some prompts as they are, which must be visited before. Each lane keeps the
    streams of the layers that it still looks back at; as many batches go together as keep WINDOWS
    bytes. The others, and variants but the first, have walks of their own afterwards.
    """

    def __init__(self, clean: CleanRuns, variants: list[Variant]) -> None:
        self.clean, self.model, self.variants = clean, clean.model, variants
        self.grid = default_grid(self.model.n_layers)
        # Losses at every so-manyth position, the same at all horizons, whose differences count.
        shortest = min((len(clean.run.prompts.rows[row]) for row in clean.rows), default=2)
        sparse = clean.sparsity(len(self.grid), UNEMBEDDED)
        self.every = max(1, min(sparse, shortest - 1))
        self.calls: dict[tuple[int, int], Batch] = {}
        self.parts = [(variant, numbers) for variant in variants for numbers in self._shares()]
        self.lanes = self._lanes(*self.parts[0])

    def visit(self, layer: int) -> None:
        """Take all that are cut here or below through a block, a batch's in one call."""
        import torch

        cut = {
            number: [lane for lane in lanes if lane.runs and lane.first <= layer]
            for number, lanes in self.lanes.items()
        }
        entered = [
            (self._batch(number, self.clean.ids[number], len(lanes)), lanes)
            for number, lanes in cut.items()
            if lanes
        ]
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
        for members, ids, streams in zip(
            self.clean.members, self.clean.ids, self.clean.streams, strict=True
        ):
            clean[members] = self._loss(ids, streams[-1])
        tokens = np.array([(len(row) - 1) // self.every for row in prompts], np.int32)
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
        return {
            n: [_Lane(variant, k, depth, clean.streams[n], clean.means) for k in self.grid]
            for n in numbers
        }

    def _read(self, losses: np.ndarray) -> None:
        """Fill in each row's loss at each horizon, (n_k, rows), where something was cut."""
        import torch

        for batch, lanes in self.lanes.items():
            cut = [number for number, lane in enumerate(lanes) if lane.first <= self.model.n_layers]
            found = self._loss(
                self.clean.ids[batch].repeat(len(cut), 1),
                torch.cat([lanes[number].final() for number in cut]),
            )
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
            return (
                np.asarray(token_losses(self.model, ids, stream, self.every).mean(1))
                if len(ids)
                else np.zeros(0)
            )


class _Lane:
    """One horizon of one variant on one batch.

    own[n] is the embedding and all outputs below n, as recomputed; below the first cut they are the
    clean ones. entered is what the block at work was given.
    """

    def __init__(
        self,
        variant: Variant,
        k: int,
        depth: int,
        clean: "list[torch.Tensor]",
        means: "list[torch.Tensor]",
    ) -> None:
        self.variant, self.k, self.depth, self.clean, self.means = variant, k, depth, clean, means
        self.first = max(k, variant.first) if variant.reach == "everywhere" else depth
        # At horizon 0 all outputs are cut from the final output, so that what the blocks would
        # write need not be known.
        self.runs = self.first < depth and k > 0
        self.own: dict[int, torch.Tensor] = {}
        self.entered: torch.Tensor | None = None

    def enter(self, layer: int) -> "torch.Tensor":
        """What a block reads."""
        self.entered = self._cut(
            self.clean.__getitem__ if self.variant.streams == "clean" else self._whole, layer
        )
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
