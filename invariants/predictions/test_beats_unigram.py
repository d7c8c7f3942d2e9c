"""The model predicts text better than counting tokens does.

gain = mean over predicted tokens of (loss of a unigram model - the model's loss), nats. The unigram
model counts the tokens of all other prompts, one more for each that occurs; it knows the prompt
set's vocabulary, which the model does not.
Source: a language model that reads its context must beat one that has none (Shannon 1951).
Applies to: every model whose tokenizer can write the prompts; not where it wrote them itself.
"""

import numpy as np
import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.numerics.unigram import unigram_loss
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_beats_unigram(record: Record, band: Band, check) -> None:
    prompt, token = record.array("stream/prompt"), record.array("prediction/token")
    predicted = ~record.array("prediction/is_last").astype(bool)
    if record.metadata.get("sampled"):
        raise NotApplicable(
            "the model wrote the prompts itself, for want of a tokenizer that can write ours"
        )
    if not predicted.any():
        raise NotApplicable("no prompt has two tokens, so there is nothing to predict")
    loss = record.array("prediction/loss")[predicted].astype(float)
    counted = unigram_loss([token[prompt == n] for n in np.unique(prompt)])
    of = f"{loss.mean():.3f} nats against {counted.mean():.3f}, {len(loss):,} tokens"
    check((counted - loss).mean(), within=band, what="loss below the unigram's", unit="nats", of=of)
