"""How far two checkpoints' predictions lie apart, in the units that quantisers print: KL
divergence, perplexity, and how often the most likely token is another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from streamgauge.checkpoints.files import Checkpoint
from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.load import load_model
from streamgauge.progress import track

if TYPE_CHECKING:
    import torch

BOUNDS = ("kl", "kl99", "perplexity", "flips")  # what bounds are given to


@dataclass(frozen=True)
class Divergence:
    """Of a new checkpoint from an old one, over the tokens of some texts.

    kl: mean of KL(old ‖ new), nats; kl99: its 99th percentile; perplexity: the new one's over the
    old one's; flips: the part of tokens after which another one is the most likely; tokens: how
    many were predicted.
    """

    kl: float
    kl99: float
    perplexity: float
    flips: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"KL divergence {self.kl:.4g} nats, 99% of tokens below {self.kl99:.4g}; perplexity "
            f"×{self.perplexity:.4f}; another most likely token at {self.flips:.2%} of "
            f"{self.tokens:,}"
        )

    def beyond(self, bounds: dict[str, float]) -> list[str]:
        """What lies above a bound, in words. NaN lies above every bound."""
        return [
            f"{name} {getattr(self, name):.4g} is above {bound:g}"
            for name, bound in bounds.items()
            if not getattr(self, name) <= bound
        ]


def divergence(
    old: Checkpoint,
    new: Checkpoint,
    rows: Sequence[list[int]],
    device: str = "cpu",
    show: bool = False,
) -> Divergence | None:
    """Run both checkpoints over rows of token ids, a block at a time and then logits row by row.

    Where one has more rows in its tables the divergence is a sum over the tokens that both have, of
    what each predicts among all of its own. None where no row has two tokens. Raises
    CheckpointError.
    """
    import torch

    rows = [row for row in rows if len(row) > 1]
    if not rows:
        return None
    models = [Blockwise(load_model(checkpoint, device).mapped) for checkpoint in (old, new)]
    apart, rises, flips = [], [], []
    with torch.no_grad():
        streams = [_last_streams(model, rows, show) for model in models]
        for row, *both in track(list(zip(rows, *streams, strict=True)), "predictions", show):
            ids = torch.tensor([row], device=device)
            logits = [
                model.logits(ids[:, :-1], stream[None, :-1])[0]
                for model, stream in zip(models, both, strict=True)
            ]
            shared = min(x.shape[-1] for x in logits)
            full = [x.double().log_softmax(-1) for x in logits]
            one, other = (x[:, :shared] for x in full)
            apart.append((one.exp() * (one - other)).sum(-1).cpu().numpy())
            rises.append((one - other).gather(1, ids[0, 1:, None])[:, 0].cpu().numpy())
            flips.append((full[0].argmax(-1) != full[1].argmax(-1)).cpu().numpy())
    kl, rise, flipped = map(np.concatenate, (apart, rises, flips))
    return Divergence(
        float(kl.mean()),
        float(np.quantile(kl, 0.99)),
        float(np.exp(rise.mean())),
        float(flipped.mean()),
        len(kl),
    )


def _last_streams(model: Blockwise, rows: Sequence[list[int]], show: bool) -> "list[torch.Tensor]":
    """The stream behind the last block, (tokens, d_model), of each row."""
    by_length: dict[int, list[int]] = {}
    for n, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(n)
    batches = [model.enter([rows[n] for n in own]) for own in by_length.values()]
    for layer in track(range(model.n_layers), "blocks of both", show):
        with model.held(layer):
            for batch in batches:
                model.step(batch, layer)
    found = {
        n: stream
        for own, batch in zip(by_length.values(), batches, strict=True)
        for n, stream in zip(own, batch.stream, strict=True)
    }
    return [found[n] for n in range(len(rows))]
