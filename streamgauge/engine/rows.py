"""Rows of token ids for a loaded model:

the prompts in its own tokens, or text that it writes itself.
"""

from pathlib import Path

from streamgauge.checkpoints.files import Checkpoint
from streamgauge.checkpoints.prompts import tokenise
from streamgauge.engine.mapped import Mapped
from streamgauge.errors import NotMeasured, PromptError
from streamgauge.numerics.rows import Prompts

SAMPLED_PROMPTS, SAMPLED_LENGTH = 64, 16


def prompts_for(mapped: Mapped, folder: Path, texts: list[str], *, built_in: bool) -> Prompts:
    """The prompts in a loaded model's tokens, or text sampled from the model where its tokenizer
    cannot write ours.

    Raises PromptError where it cannot write the user's own, NotMeasured where the model gives no
    finite numbers.
    """
    from streamgauge.engine.load import context_length

    model = mapped.model
    context, vocabulary = context_length(model.config), model.get_input_embeddings().num_embeddings
    prompts = tokenise(folder, texts, context=context, vocabulary=vocabulary, shorten=built_in)
    if prompts is not None:
        return prompts
    if not built_in:
        raise PromptError(
            f"{folder} has no tokenizer that can write these prompts; leave out --prompts to "
            "let the model write some."
        )
    bos = model.config.get_text_config().bos_token_id
    usable = isinstance(bos, int) and bos < vocabulary
    return sample(mapped, bos=bos if usable else None, context=context, vocabulary=vocabulary)


def sample(mapped: Mapped, *, bos: int | None, context: int, vocabulary: int) -> Prompts:
    """Text drawn from the model itself, token by token at temperature 1, from a fixed seed."""
    import torch

    generator = torch.Generator().manual_seed(0)
    if bos is None:
        start = torch.randint(vocabulary, (SAMPLED_PROMPTS, 1), generator=generator)
    else:
        start = torch.full((SAMPLED_PROMPTS, 1), bos)
    ids, past = start.to(mapped.device), None
    with torch.no_grad():
        while ids.shape[1] < min(SAMPLED_LENGTH, context):
            output = mapped.model(ids[:, -1:], past_key_values=past, use_cache=True)
            past, odds = output.past_key_values, output.logits[:, -1].float().softmax(-1).cpu()
            if not bool(torch.isfinite(odds).all()):
                raise NotMeasured("the model gave NaN or Inf when it was to write prompts")
            ids = torch.cat(
                [ids, torch.multinomial(odds, 1, generator=generator).to(ids.device)], 1
            )
    source = (
        f"{SAMPLED_PROMPTS} rows of {ids.shape[1]} tokens sampled from the model: no "
        "tokenizer that can write the prompts"
    )
    return Prompts(ids.tolist(), source, bos, sampled=True)


def rows_for(
    mapped: Mapped, checkpoint: Checkpoint, texts: list[str] | Prompts, *, built_in: bool
) -> tuple[Prompts | None, str]:
    """Rows of token ids that this model can read, or why it cannot write any.

    Raises PromptError where given ones are beyond it.
    """
    if not isinstance(texts, Prompts):
        try:
            return prompts_for(mapped, checkpoint.folder, texts, built_in=built_in), ""
        except NotMeasured as error:
            return None, str(error)
    vocabulary, largest = (
        mapped.model.get_input_embeddings().num_embeddings,
        max(map(max, texts.rows)),
    )
    if largest >= vocabulary:
        raise PromptError(
            f"the prompts hold token id {largest}, but the embedding of {checkpoint.folder} has "
            f"{vocabulary} rows."
        )
    return texts, ""
