"""The prompt set: text, or text that the model wrote itself, as rows of token ids."""

from pathlib import Path
from typing import Any

from streamgauge.errors import PromptError
from streamgauge.numerics.rows import Prompts

BUILT_IN = Path(__file__).with_name("prompts.txt")
USABLE_SHARE = 0.9  # of a prompt set's characters that must survive encoding and decoding


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a prompt file (default: the project's own 64). Raises PromptError where there
    are none.
    """
    try:
        lines = (path or BUILT_IN).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"the prompt file {path} cannot be read as UTF-8 text ({error})."
        ) from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise PromptError(f"the prompt file {path} is empty; write one prompt a line.")
    return prompts


def tokenise(
    tokenizer: Any, texts: list[str], *, context: int, vocabulary: int, shorten: bool
) -> Prompts | None:
    """The prompts in the tokens of a checkpoint's own tokenizer (`load_tokenizer`), BOS first where
    it has one.

    None where there is none, or it cannot express the texts. Prompts longer than the
    context are cut where `shorten` (the built-in set) and an error otherwise. Raises PromptError
    also for ids the embedding does not have.
    """
    if tokenizer is None:
        return None
    try:
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        expresses = _expresses(tokenizer, texts, encoded)
    except Exception as error:
        raise PromptError(
            f"the tokenizer in {tokenizer.name_or_path} cannot be used ({type(error).__name__}: "
            f"{error})."
        ) from error
    if not expresses:
        return None
    bos = tokenizer.bos_token_id
    rows = [([] if bos is None else [bos]) + list(ids) for ids in encoded]
    for number, row in enumerate(rows, 1):
        if max(row) >= vocabulary:
            raise PromptError(
                f"prompt {number} holds token id {max(row)}, but the embedding has {vocabulary} "
                f"rows: "
                "the tokenizer and the weights do not belong together."
            )
        if len(row) > context and not shorten:
            raise PromptError(
                f"prompt {number} has {len(row)} tokens, more than the model's context of "
                f"{context}."
            )
    cut = sum(len(row) > context for row in rows)
    source = f"{len(rows)} prompts" + (
        f", {cut} cut to the context of {context} tokens" if cut else ""
    )
    return Prompts([row[:context] for row in rows], source, bos)


def _expresses(tokenizer: Any, texts: list[str], encoded: list[list[int]]) -> bool:
    """Whether the tokenizer can write these texts at all, rather than drop or mask what it does not
    know.
    """
    if any(not ids for ids in encoded):
        return False
    special = set(tokenizer.all_special_ids)  # unknown characters come out as one of these
    decoded = [tokenizer.decode([i for i in ids if i not in special]) for ids in encoded]
    kept = sum(min(len(a), len(b)) for a, b in zip(decoded, texts, strict=True))
    return kept >= USABLE_SHARE * sum(map(len, texts))
