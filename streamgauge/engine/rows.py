"""Rows of token ids for a loaded model: the prompts in its own tokens, or text that it writes
itself.
"""

from pathlib import Path
from typing import Any

from streamgauge.checkpoints.files import Checkpoint
from streamgauge.checkpoints.prompts import tokenise
from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.load import context_length
from streamgauge.engine.probe import quiet
from streamgauge.errors import NotMeasured, PromptError
from streamgauge.numerics.rows import Prompts

SAMPLED_PROMPTS, SAMPLED_LENGTH = 64, 16


def prompts_for(
    model: Blockwise, folder: Path, tokenizer: Any, texts: list[str], *, built_in: bool
) -> Prompts:
    """The prompts in a model's tokens, or text sampled from the model where its tokenizer, if the
    folder has one, cannot write ours.

    Raises PromptError where it cannot write the user's own, NotMeasured where the model gives no
    finite numbers.
    """
    config, vocabulary = model.mapped.model.config, model.vocabulary
    context = context_length(config)
    prompts = tokenise(tokenizer, texts, context=context, vocabulary=vocabulary, shorten=built_in)
    if prompts is not None:
        return prompts
    if not built_in:
        raise PromptError(
            f"{folder} has no tokenizer that can write these prompts; leave out --prompts to let "
            "the model write some."
        )
    bos = getattr(config.get_text_config(), "bos_token_id", None)
    usable = isinstance(bos, int) and 0 <= bos < vocabulary
    return sample(model, bos=bos if usable else None, length=min(SAMPLED_LENGTH, context))


def sample(model: Blockwise, *, bos: int | None, length: int) -> Prompts:
    """Text drawn from the model itself, token by token at temperature 1, from a fixed seed."""
    import torch

    generator = torch.Generator().manual_seed(0)
    if bos is None:
        start = torch.randint(model.vocabulary, (SAMPLED_PROMPTS, 1), generator=generator)
    else:
        start = torch.full((SAMPLED_PROMPTS, 1), bos)
    ids, past = start.to(model.device), None
    # Caches of other mixers than attention differ from one architecture to the next.
    cached = all(path is not None for path in model.seen.attention)
    with torch.no_grad():
        while ids.shape[1] < length:
            if cached:
                output = model.mapped.model(ids[:, -1:], past_key_values=past, use_cache=True)
                past = output.past_key_values
            else:
                output = model.mapped.model(input_ids=ids, **quiet(model.mapped.model))
            odds = output.logits[:, -1].float().softmax(-1).cpu()
            if not bool(torch.isfinite(odds).all()):
                raise NotMeasured("the model gave NaN or Inf when it was to write prompts")
            drawn = torch.multinomial(odds, 1, generator=generator)
            ids = torch.cat([ids, drawn.to(ids.device)], 1)
    source = (
        f"{SAMPLED_PROMPTS} rows of {ids.shape[1]} tokens sampled from the model: no tokenizer "
        f"that "
        "can write the prompts"
    )
    return Prompts(ids.tolist(), source, bos, sampled=True)


def rows_for(
    model: Blockwise,
    checkpoint: Checkpoint,
    tokenizer: Any,
    texts: list[str] | Prompts,
    *,
    built_in: bool,
) -> tuple[Prompts | None, str]:
    """Rows of token ids that this model can read, or why it cannot write any.

    Raises PromptError where given ones are beyond it.
    """
    if not isinstance(texts, Prompts):
        try:
            folder = checkpoint.folder
            return prompts_for(model, folder, tokenizer, texts, built_in=built_in), ""
        except NotMeasured as error:
            return None, str(error)
    largest = max(map(max, texts.rows))
    if largest >= model.vocabulary:
        raise PromptError(
            f"the prompts hold token id {largest}, but the embedding of {checkpoint.folder} has "
            f"{model.vocabulary} rows."
        )
    return texts, ""
