"""The loss of counting tokens: what a model that knows no context would reach."""

import numpy as np


def unigram_loss(rows: list[np.ndarray]) -> np.ndarray:
    """Loss of each predicted token, nats, under how often the tokens of all other prompts occur,
    one more for each token seen.

    rows: token ids by prompt. Returns the losses of all tokens but each prompt's first, in order. A
    prompt's own tokens do not count, so that a token that only this text has is as unexpected as it
    would be in another; unseen tokens share the weight of one.
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
