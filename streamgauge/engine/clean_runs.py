"""Some of the prompts as the model runs them, with the stream at every layer kept."""

import math
from typing import TYPE_CHECKING

import numpy as np

from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.forward import Found, PromptRun
from streamgauge.numerics.rows import Prompts

if TYPE_CHECKING:
    import torch


ROWS = 8  # prompts on which horizons are tried


TOKENS = 4096  # of them at most: their streams at every layer are kept


def some_rows(prompts: Prompts) -> list[int]:
    """Indices of ROWS prompts of two tokens or more, spread over the set; fewer where they have
    more than TOKENS together.
    """
    usable = [index for index, row in enumerate(prompts.rows) if len(row) > 1]
    for count in range(min(ROWS, len(usable)), 0, -1):
        chosen = [usable[place] for place in np.linspace(0, len(usable) - 1, count).astype(int)]
        if count == 1 or sum(len(prompts.rows[index]) for index in chosen) <= TOKENS:
            return chosen
    return []


def token_losses(
    model: Blockwise, ids: "torch.Tensor", stream: "torch.Tensor", every: int = 1
) -> np.ndarray:
    """Cross-entropy of each next token, or of every so-manyth, where a stream ends: nats, (rows,
    (positions - 1) // every).
    """
    import torch

    losses, at = [], slice(every - 1, -1, every)
    if ids.shape[1] <= every:
        return np.zeros((len(ids), 0))
    for part in model.in_parts(ids[:, at]):
        right = ids[part][:, 1:][:, every - 1 :: every]
        logits = model.logits(ids[part][:, at], stream[part][:, at])
        found = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), right.flatten(), reduction="none"
        )
        losses.append(found.view(right.shape))
    return np.asarray(torch.cat(losses).double().cpu().numpy())


class CleanRuns:
    """Some of the prompts as the model runs them: the stream into each block and behind the last,
    by batch, and its mean.

    run: takes the prompts through the model, and must be visited before. members: by batch, which
    of `rows` it has; ids: their token ids; streams: by batch and layer.
    """

    def __init__(self, run: PromptRun) -> None:
        self.model, self.run = run.model, run
        self.rows = some_rows(run.prompts)
        self.places = [
            [n for n, row in enumerate(batch) if row in self.rows] for batch in run.members
        ]
        self.members = [
            [self.rows.index(batch[n]) for n in kept]
            for batch, kept in zip(run.members, self.places, strict=True)
        ]
        self.ids = [batch.ids[kept] for batch, kept in zip(run.batches, self.places, strict=True)]
        self.streams: list[list[torch.Tensor]] = [[] for _ in run.batches]
        self.means: list[torch.Tensor] = []
        self._keep()

    def sparsity(self, unembedded: int, share: float) -> int:
        """Of how many positions one is to be looked at, where each is unembedded so often, if that
        is to cost no more than a share of a forward pass over all prompts.
        """
        head, tokens = self.model.head, sum(map(len, self.run.prompts.rows))
        own = sum(len(self.run.prompts.rows[row]) - 1 for row in self.rows)
        budget = share * tokens * (self.model.n_layers + head)
        return max(1, math.ceil(unembedded * own * head / budget))

    def visit(self, layer: int) -> None:
        """Keep what the block made of the stream."""
        self._keep()

    def found(self) -> Found:
        """Nothing by itself."""
        return {}, {}

    def _keep(self) -> None:
        """Keep the stream as it is now, and its mean at position 0 and at all others, (2,
        d_model).
        """
        import torch

        now = [
            batch.stream[kept].clone()
            for batch, kept in zip(self.run.batches, self.places, strict=True)
        ]
        for streams, stream in zip(self.streams, now, strict=True):
            streams.append(stream)
        sums = [
            sum(x[:, 0].double().sum(0) for x in now),
            sum(x[:, 1:].double().sum((0, 1)) for x in now),
        ]
        counts = [sum(len(x) for x in now), sum(len(x) * (x.shape[1] - 1) for x in now)]
        self.means.append(
            torch.stack([total / max(n, 1) for total, n in zip(sums, counts, strict=True)]).float()
        )
