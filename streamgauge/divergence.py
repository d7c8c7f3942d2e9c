"""How far two checkpoints' predictions lie apart, in the units that quantisers print: KL
divergence, perplexity, and how often the most likely token is another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streamgauge.checkpoints.files import Checkpoint
from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.load import load_model
from streamgauge.progress import track

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
    old: Checkpoint, new: Checkpoint, rows: Sequence[list[int]], show: bool = False
) -> Divergence:
    """Run both checkpoints over rows of token ids, one row at a time.

    Over the tokens that both have, where one has more rows in its tables. Raises CheckpointError.
    """
    import torch

    models = [Blockwise(load_model(checkpoint, "cpu").mapped) for checkpoint in (old, new)]
    apart, losses, flips = [], [], []
    rows = [row for row in rows if len(row) > 1]
    with torch.no_grad():
        for row in track(rows, "predictions of both", show):
            ids = torch.tensor([row])
            logits = [m.mapped.model(input_ids=ids, use_cache=False).logits[0, :-1] for m in models]
            shared = min(x.shape[-1] for x in logits)
            one, other = (x[:, :shared].double().log_softmax(-1) for x in logits)
            apart.append((one.exp() * (one - other)).sum(-1).numpy())
            targets = ids[0, 1:, None]
            losses.append((one - other).gather(1, targets)[:, 0].numpy())
            flips.append((one.argmax(-1) != other.argmax(-1)).numpy())
    kl, rise, flipped = map(np.concatenate, (apart, losses, flips))
    return Divergence(
        float(kl.mean()),
        float(np.quantile(kl, 0.99)),
        float(np.exp(rise.mean())),
        float(flipped.mean()),
        len(kl),
    )
