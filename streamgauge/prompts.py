"""The prompt set: text, or text that the model wrote itself, as rows of token ids."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamgauge.errors import NotMeasured, PromptError
from streamgauge.mapped import Mapped

BUILT_IN = Path(__file__).with_name("prompts.txt")
SAMPLED_PROMPTS, SAMPLED_LENGTH = 64, 16
USABLE_SHARE = 0.9  # of a prompt set's characters that must survive encoding and decoding


@dataclass(frozen=True)
class Prompts:
    """Rows of token ids, how they came about, the model's BOS token where each opens with it, and whether it wrote them."""

    rows: list[list[int]]
    source: str
    bos: int | None
    sampled: bool = False

    def sha256(self) -> str:
        """Hash of the token ids."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()

    def batches(self, tokens: int) -> Iterator[list[int]]:
        """Indices of rows of equal length, at most about `tokens` tokens together, so that nothing is padded."""
        by_length: dict[int, list[int]] = {}
        for index, row in enumerate(self.rows):
            by_length.setdefault(len(row), []).append(index)
        for length, members in sorted(by_length.items()):
            size = max(1, tokens // length)
            yield from (members[i : i + size] for i in range(0, len(members), size))


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a prompt file (default: the project's own 64). Raises PromptError where there are none."""
    try:
        lines = (path or BUILT_IN).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"the prompt file {path} cannot be read as UTF-8 text ({error}).") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise PromptError(f"the prompt file {path} is empty; write one prompt a line.")
    return prompts


def tokenise(folder: Path, texts: list[str], *, context: int, vocabulary: int, shorten: bool) -> Prompts | None:
    """The prompts in the checkpoint's own tokens, BOS first where its tokenizer has one.

    None where the folder has no tokenizer that can express the texts. Prompts longer than the context are cut where
    `shorten` (the built-in set) and an error otherwise. Raises PromptError also for ids the embedding does not have.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None
    try:
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        expresses = _expresses(tokenizer, texts, encoded)
    except Exception as error:
        raise PromptError(f"the tokenizer in {folder} cannot be used ({type(error).__name__}: {error}).") from error
    if not expresses:
        return None
    bos = tokenizer.bos_token_id
    rows = [([] if bos is None else [bos]) + list(ids) for ids in encoded]
    for number, row in enumerate(rows, 1):
        if max(row) >= vocabulary:
            raise PromptError(
                f"prompt {number} holds token id {max(row)}, but the embedding has {vocabulary} rows: "
                "the tokenizer and the weights do not belong together."
            )
        if len(row) > context and not shorten:
            raise PromptError(f"prompt {number} has {len(row)} tokens, more than the model's context of {context}.")
    cut = sum(len(row) > context for row in rows)
    source = f"{len(rows)} prompts" + (f", {cut} cut to the context of {context} tokens" if cut else "")
    return Prompts([row[:context] for row in rows], source, bos)


def prompts_for(mapped: Mapped, folder: Path, texts: list[str], *, built_in: bool) -> Prompts:
    """The prompts in a loaded model's tokens, or text sampled from the model where its tokenizer cannot write ours.

    Raises PromptError where it cannot write the user's own, NotMeasured where the model gives no finite numbers.
    """
    from streamgauge.model import context_length

    model = mapped.model
    context, vocabulary = context_length(model.config), model.get_input_embeddings().num_embeddings
    prompts = tokenise(folder, texts, context=context, vocabulary=vocabulary, shorten=built_in)
    if prompts is not None:
        return prompts
    if not built_in:
        raise PromptError(
            f"{folder} has no tokenizer that can write these prompts; leave out --prompts to let the model write some."
        )
    bos = model.config.get_text_config().bos_token_id
    usable = isinstance(bos, int) and bos < vocabulary
    return sample(mapped, bos=bos if usable else None, context=context, vocabulary=vocabulary)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None: transformers invents an empty one where there is no file."""
    from transformers import AutoTokenizer

    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    ):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise PromptError(f"the tokenizer in {folder} cannot be loaded ({error}).") from error
    return tokenizer if len(tokenizer) > 1 else None


def _expresses(tokenizer: Any, texts: list[str], encoded: list[list[int]]) -> bool:
    """Whether the tokenizer can write these texts at all, rather than drop or mask what it does not know."""
    if any(not ids for ids in encoded):
        return False
    special = set(tokenizer.all_special_ids)  # unknown characters come out as one of these
    decoded = [tokenizer.decode([i for i in ids if i not in special]) for ids in encoded]
    kept = sum(min(len(a), len(b)) for a, b in zip(decoded, texts, strict=True))
    return kept >= USABLE_SHARE * sum(map(len, texts))


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
            ids = torch.cat([ids, torch.multinomial(odds, 1, generator=generator).to(ids.device)], 1)
    source = f"{SAMPLED_PROMPTS} rows of {ids.shape[1]} tokens sampled from the model: no tokenizer that can write the prompts"
    return Prompts(ids.tolist(), source, bos, sampled=True)
