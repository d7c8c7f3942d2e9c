"""The `prediction` group: what the model says of each next token, and whether later tokens reach back."""

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.forward import BATCH_TOKENS
from streamgauge.horizon import SHORT
from streamgauge.model import Layout, device_of
from streamgauge.prompts import Prompts

if TYPE_CHECKING:
    import torch

KEPT = 8  # tokens at the beginning of a prompt that are kept when the rest is exchanged
NO_PATTERN = "TransformerLens shows no attention pattern for this architecture"


def measure_prediction(
    bridge: Any, layout: Layout, prompts: Prompts, show: bool
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays of the group, without its prefix, and why others are absent. All by token, in the order of the prompts."""
    import torch
    from tqdm import tqdm

    total = sum(map(len, prompts.rows))
    starts = np.cumsum([0, *map(len, prompts.rows)])
    loss, entropy, first = np.full(total, np.nan, np.float32), np.zeros(total, np.float32), np.zeros(total, np.int32)
    is_last = np.zeros(total, bool)
    is_last[starts[1:] - 1] = True
    with torch.no_grad():
        for batch in tqdm(list(prompts.batches(BATCH_TOKENS)), "predictions", unit="batch", disable=None if show else True):
            ids = torch.tensor([prompts.rows[i] for i in batch], device=device_of(bridge))
            log_odds = bridge(ids, return_type="logits").float().log_softmax(-1)
            columns = np.array([np.arange(starts[i], starts[i + 1]) for i in batch])
            first[columns] = log_odds.argmax(-1).cpu().numpy()
            entropy[columns] = -(log_odds.exp() * log_odds).sum(-1).cpu().numpy()
            loss[columns[:, :-1]] = -log_odds[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].cpu().numpy()
    # The last token of a prompt predicts nothing that is known.
    token = np.concatenate(prompts.rows).astype(np.int32)
    arrays = {"token": token, "loss": np.where(is_last, 0, loss), "is_last": is_last, "entropy": entropy, "first": first}
    causal, absent = measure_causality(bridge, layout, prompts)
    return arrays | causal, absent


def measure_causality(bridge: Any, layout: Layout, prompts: Prompts) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """How far later tokens change the stream before them, and how far attention rows are from summing to one.

    later_changes: (n_layers + 1,) largest relative change of the stream at the first tokens of one prompt when those behind
    them are exchanged. row_sum_error, future_weight: (n_layers,) largest |Σ - 1| over rows of attention patterns, and largest
    weight on a later position.
    """
    import torch

    row = max(prompts.rows, key=len)
    if len(row) < 2:
        return {}, dict.fromkeys(["later_changes", "row_sum_error", "future_weight"], SHORT)
    kept, vocabulary = min(KEPT, len(row) - 1), bridge.original_model.get_input_embeddings().num_embeddings
    others = [(token + 1) % vocabulary for token in row[kept:]]
    last = layout.n_layers - 1
    streams: dict[int, torch.Tensor] = {}
    rows: dict[int, torch.Tensor] = {}
    future: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda x, hook: streams.__setitem__(layer, x.double())

    def read(layer: int) -> Any:
        def note(pattern: "torch.Tensor", hook: Any) -> None:
            rows[layer] = (pattern.double().sum(-1) - 1).abs().max()
            future[layer] = pattern.triu(1).abs().max()

        return note

    has_pattern = "blocks.0.attn.hook_pattern" in bridge.hook_dict
    hooks = [(f"blocks.{n}.hook_resid_pre", keep(n)) for n in range(layout.n_layers)]
    hooks.append((f"blocks.{last}.hook_resid_post", keep(layout.n_layers)))
    hooks += [(f"blocks.{n}.attn.hook_pattern", read(n)) for n in range(layout.n_layers)] if has_pattern else []
    ids = torch.tensor([row, row[:kept] + others], device=device_of(bridge))
    with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
        bridge(ids, return_type=None)
    changes = [
        float(((x[1] - x[0]).norm(dim=-1) / x[0].norm(dim=-1).clamp_min(1e-30))[:kept].max())
        for x in (streams[n] for n in range(layout.n_layers + 1))
    ]
    arrays = {"later_changes": np.array(changes)}
    if len(rows) < layout.n_layers:
        return arrays, dict.fromkeys(["row_sum_error", "future_weight"], NO_PATTERN)
    patterns = {"row_sum_error": rows, "future_weight": future}
    return arrays | {name: np.array([float(found[n]) for n in range(layout.n_layers)]) for name, found in patterns.items()}, {}


def unigram_loss(rows: list[np.ndarray]) -> np.ndarray:
    """Loss of each predicted token, nats, under how often the tokens of all other prompts occur, one more for each token seen.

    rows: token ids by prompt. Returns the losses of all tokens but each prompt's first, in order. A prompt's own tokens do not
    count, so that a token that only this text has is as unexpected as it would be in another; unseen tokens share the weight
    of one.
    """
    ids = np.concatenate([row[1:] for row in rows])
    names, index = np.unique(ids, return_inverse=True)
    counts = np.bincount(index)
    losses, start = [], 0
    for row in rows:
        own = index[start : start + len(row) - 1]
        start += len(own)
        others = counts - np.bincount(own, minlength=len(names)) + 1
        losses.append(-np.log(others[own] / others.sum()))
    return np.concatenate(losses)
