"""Tokens and losses of prompts."""

import numpy as np

from streamgauge.compare.activations import _allowed, _rows, refuse_routers, shared_tokens
from streamgauge.compare.difference import Difference
from streamgauge.errors import NotApplicable
from streamgauge.numerics.rows import Prompts
from streamgauge.record import Record


def compare_predictions(old: Record, new: Record, *, rewritten: bool = False) -> list[Difference]:
    """Tokens of the prompts, and losses over prompts of the same tokens.

    rewritten: as of `compare_activations`. Raises NotApplicable likewise.
    """
    rows = [_rows(record) for record in (old, new)]
    texts = [record.metadata.get("texts_sha256") for record in (old, new)]
    n_old, n_shared = len(rows[0]), len(rows[0].keys() & rows[1].keys())
    if n_shared == 0 and (texts[0] != texts[1] or old.metadata.get("sampled")):
        raise NotApplicable("the two were measured on other prompts")
    says = f"{n_shared} of {n_old} prompts of the baseline have the same tokens"
    found = [
        Difference("tokens of the prompts", "tokenizer", 1 - n_shared / n_old, 0.5 / n_old, says)
    ]
    if n_shared == 0:
        return found
    refuse_routers(old, new)
    if "rounding/loss" not in old.arrays or "prediction/loss" not in new.arrays:
        raise NotApplicable(
            "a record has no losses, or the baseline does not say what rounding does to it"
        )
    before, after = _predicted(old, new)
    losses = [
        r.array("prediction/loss")[tokens].astype(float)
        for r, tokens in ((old, before), (new, after))
    ]
    agreed = float(
        (old.array("prediction/first")[before] == new.array("prediction/first")[after]).mean()
    )
    size = float(np.sqrt(((losses[1] - losses[0]) ** 2).mean()))
    says = (
        f"{losses[0].mean():.4f} nats in the baseline, now {losses[1].mean():.4f}, single "
        f"tokens differ by {size:.4f}; "
        f"{agreed:.1%} of most likely tokens agree"
    )
    return [
        Difference(
            "loss", "predictions", size, float(_allowed(old, new, "loss", rewritten)[0]), says
        ),
        *found,
    ]


def _predicted(old: Record, new: Record) -> list[np.ndarray]:
    """Indices of the tokens that both were measured on and that another one follows."""
    found = [
        tokens[~record.array("prediction/is_last")[tokens].astype(bool)]
        for record, tokens in zip((old, new), shared_tokens(old, new), strict=True)
    ]
    if not len(found[0]):
        raise NotApplicable("no prompt that both were measured on has two tokens")
    return found


def mean_losses(old: Record, new: Record) -> tuple[float, float, int]:
    """The mean losses of both, nats a token, over the tokens that both were measured on, and how
    many. Raises NotApplicable where they share none.
    """
    tokens = _predicted(old, new)
    before, after = (
        float(record.array("prediction/loss")[own].astype(float).mean())
        for record, own in zip((old, new), tokens, strict=True)
    )
    return before, after, len(tokens[0])


def rows_to_share(old: Record) -> Prompts | None:
    """The baseline's tokens where it wrote its prompts itself, so that another model is measured on
    them and not on its own.
    """
    if not old.metadata.get("sampled") or "prediction/token" not in old.arrays:
        return None
    token, prompt = old.array("prediction/token"), old.array("stream/prompt")
    rows = [token[prompt == n].tolist() for n in np.unique(prompt)]
    return Prompts(
        rows, f"the baseline's: {old.metadata['prompts']}", old.metadata["bos"], sampled=True
    )
