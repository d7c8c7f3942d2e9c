"""The `prediction` group: what the model says of each next token, and whether later tokens reach
back.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.forward import Found, PromptRun, stacked
from streamgauge.groups.reasons import SHORT

if TYPE_CHECKING:
    import torch

KEPT = 8  # tokens at the beginning of a prompt that are kept when the rest is exchanged
NO_PATTERN = "no module there shows attention weights"


class PredictionGroup:
    """What the model says of each next token where a run over the prompts ends; and a run of its
    own for causality.

    later_changes: (n_layers + 1,) largest relative change of the stream at the first tokens of one
    prompt when those behind them are exchanged. row_sum_error, future_weight: (n_layers,) largest
    |Σ - 1| over rows of attention patterns, and largest weight on a later position. Where attention
    has a sink, which takes a share of each row and is not shown, rows sum to at most 1, and the
    error is what they exceed it by.
    """

    def __init__(self, model: Blockwise, run: PromptRun) -> None:
        self.model, self.run = model, run
        self.changes: list[float] = []
        self.patterns: list[dict[str, float]] = []
        row = max(run.prompts.rows, key=len)
        self.kept = min(KEPT, len(row) - 1)
        self.batch = None
        if self.kept:
            other = [(token + 1) % model.vocabulary for token in row[self.kept :]]
            self.batch = model.enter([row, row[: self.kept] + other])
            self._compare(self.batch.stream)

    def visit(self, layer: int) -> None:
        """Take the two prompts that differ behind their first tokens through a block."""
        if self.batch is None:
            return
        seen: dict[str, float] = {}
        sink = any("sink" in name for name in self.model.names_in(layer))

        def read(pattern: "torch.Tensor", hook: Any) -> None:
            excess = pattern.double().sum(-1) - 1
            seen["row_sum_error"] = float((excess if sink else excess.abs()).max())
            seen["future_weight"] = float(pattern.triu(1).abs().max())

        shown = self.model.seen.attention[layer] is not None
        hooks = [(f"blocks.{layer}.attn.hook_pattern", read)] if shown else []
        self._compare(self.model.step(self.batch, layer, hooks))
        self.patterns.append(seen)

    def found(self) -> Found:
        """Arrays by token in the order of the prompts, and those of causality."""
        arrays = self._predictions()
        names = ("row_sum_error", "future_weight")
        if self.batch is None:
            return arrays, dict.fromkeys(["later_changes", *names], SHORT)
        arrays["later_changes"] = np.array(self.changes)
        patterns, absent = stacked(self.patterns, NO_PATTERN)
        return arrays | patterns, absent or dict.fromkeys(set(names) - set(patterns), NO_PATTERN)

    def _compare(self, x: "torch.Tensor") -> None:
        one, other = x[:, : self.kept].double()
        self.changes.append(
            float(((other - one).norm(dim=-1) / one.norm(dim=-1).clamp_min(1e-30)).max())
        )

    def _predictions(self) -> dict[str, np.ndarray]:
        import torch

        rows = self.run.prompts.rows
        starts = np.cumsum([0, *map(len, rows)])
        is_last = np.zeros(starts[-1], bool)
        is_last[starts[1:] - 1] = True
        token = np.concatenate(rows).astype(np.int32)
        loss, entropy = (np.zeros(starts[-1], np.float32) for _ in range(2))
        first = np.zeros(starts[-1], np.int32)
        batches = zip(self.run.members, self.run.batches, strict=True)
        for members, batch in batches:
            for part in self.model.in_parts(batch.ids):
                ids = batch.ids[part]
                with torch.no_grad():
                    log_odds = self.model.logits(ids, batch.stream[part]).log_softmax(-1)
                columns = np.array([np.arange(starts[i], starts[i + 1]) for i in members[part]])
                first[columns] = log_odds.argmax(-1).cpu().numpy()
                entropy[columns] = -(log_odds.exp() * log_odds).sum(-1).cpu().numpy()
                # The last token of a prompt predicts nothing that is known.
                loss[columns[:, :-1]] = (
                    -log_odds[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].cpu().numpy()
                )
        return {
            "token": token,
            "loss": loss,
            "is_last": is_last,
            "entropy": entropy,
            "first": first,
        }
