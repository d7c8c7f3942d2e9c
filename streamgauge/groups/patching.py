"""The `patching` group: how much of a task each head carries, by TransformerLens's activation
patching.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.checkpoints.tokenizers import load_tokenizer
from streamgauge.engine.bridge import Bridge
from streamgauge.engine.forward import Found, Lacking
from streamgauge.numerics.circuits import Pair, Task
from streamgauge.progress import track

if TYPE_CHECKING:
    import torch

NO_TASK = "no circuit with prompt pairs is known of this model"
NO_TOKENIZER = "the checkpoint has no tokenizer, so prompt pairs cannot be written"
NO_PAIR = (
    "this tokenizer writes none of the pairs with prompts of equal length and answers of one token"
)
NO_EFFECT = (
    "the model does not do the task: corrupted prompts move its answer no way at all, "
    "or the wrong one"
)
NO_HEADS = "TransformerLens shows no output by head for this architecture"


def tasks_sha256(tasks: Sequence[Task]) -> str:
    """A hash of names and prompt pairs."""
    return hashlib.sha256(json.dumps([asdict(task) for task in tasks]).encode()).hexdigest()


def measure_patching(
    bridge: Bridge | None, folder: Path, tasks: Sequence[Task], show: bool = False
) -> Found:
    """Each task's scores, (n_layers, n_heads), and why they are absent.

    bridge: TransformerLens's, which patches. A head's score is the part of the clean prompts'
    advantage over the corrupted ones (log odds of answer against wrong, summed over pairs) that its
    output on the clean prompt, put into the corrupted run at all positions, brings back.
    """
    if not tasks:
        return {}, {"patching": NO_TASK}
    if bridge is None or any(
        f"blocks.{n}.attn.hook_z" not in bridge.hook_dict for n in bridge.layers
    ):
        return {}, {"patching": NO_HEADS}
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return {}, {"patching": NO_TOKENIZER}
    arrays: dict[str, np.ndarray] = {}
    absent: dict[str, str | Lacking] = {}
    for task in track(tasks, "patching heads", show):
        pairs = [ids for pair in task.pairs if (ids := _token_ids(tokenizer, pair)) is not None]
        scores = _scores(bridge, pairs) if pairs else NO_PAIR
        if isinstance(scores, str):
            absent[task.name] = scores
        else:
            arrays |= {task.name: scores, f"{task.name}.n_pairs": np.array([len(pairs)], np.int32)}
    return arrays, absent


PairIds = tuple[list[int], list[int], int, int]


def _token_ids(tokenizer: Any, pair: Pair) -> PairIds | None:
    """Clean and corrupted prompt, answer and wrong answer; None where they do not match in
    length.
    """
    clean, corrupted, answer, wrong = (
        list(ids)
        for ids in tokenizer(
            [pair.clean, pair.corrupted, pair.answer, pair.wrong], add_special_tokens=False
        )["input_ids"]
    )
    unknown = tokenizer.unk_token_id
    if (
        len(clean) != len(corrupted)
        or len(answer) != 1
        or len(wrong) != 1
        or answer == wrong
        or answer[0] == unknown
    ):
        return None
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + clean, bos + corrupted, answer[0], wrong[0]


def _scores(bridge: Bridge, pairs: list[PairIds]) -> np.ndarray | str:
    import torch

    by_length: dict[int, list[PairIds]] = {}
    for pair in pairs:
        by_length.setdefault(len(pair[0]), []).append(pair)
    with torch.no_grad():
        sums = [_advantages(bridge, batch) for batch in by_length.values()]
    patched, clean, corrupted = (sum(values) for values in zip(*sums, strict=True))
    if not float(clean - corrupted) > 0:
        return NO_EFFECT
    return np.asarray((patched - corrupted) / (clean - corrupted))


def _advantages(bridged: Bridge, pairs: list[PairIds]) -> tuple[np.ndarray, float, float]:
    """Log odds of answer against wrong, summed over pairs of one length: with each head patched,
    (n_layers, n_heads), clean, and corrupted.
    """
    import torch
    from transformer_lens.patching import get_act_patch_attn_head_out_all_pos

    bridge, device = bridged.bridge, bridged.model.device
    clean, corrupted, answer, wrong = (
        torch.tensor(column, device=device) for column in zip(*pairs, strict=True)
    )
    rows = torch.arange(len(pairs), device=device)

    def advantage(logits: "torch.Tensor") -> "torch.Tensor":
        return logits[rows, -1, answer].float() - logits[rows, -1, wrong].float()

    logits, cache = bridge.run_with_cache(
        clean, names_filter=lambda name: name.endswith("attn.hook_z")
    )
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off
        found = get_act_patch_attn_head_out_all_pos(
            bridge, corrupted, cache, advantage, reduce="none", baseline=True
        )
    patched = found.values.double().sum(-1).cpu().numpy()
    return patched, float(advantage(logits).double().sum()), float(found.baseline.double().sum())
