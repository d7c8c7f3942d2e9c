"""A checkpoint's own tokenizer."""

from pathlib import Path
from typing import Any

from streamgauge.checkpoints.untrusted import read_json
from streamgauge.errors import CheckpointError, PromptError

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")  # tokens by their roles
PLACED = ("id", "content", "special")  # of an added token, which are compared by themselves
PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")  # of tokenizer.json


FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether one of the files is there that a tokenizer is made of."""
    return any((folder / name).is_file() for name in FILES)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None: transformers invents an empty one where there is no file."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise PromptError(f"the tokenizer in {folder} cannot be loaded ({error}).") from error
    return tokenizer if len(tokenizer) > 1 else None


def describe_tokenizer(folder: Path) -> dict[str, Any] | None:
    """What the folder's files say of its tokenizer, None where there is no tokenizer.json:
    vocabulary (ids by token, added ones too), marked (special tokens), special (tokens by role),
    ids (of roles, as config.json and generation_config.json have them), added (how added tokens are
    matched), scores (of a Unigram model), merges, chat_template, and
    the model, normalizer, pre_tokenizer, post_processor and decoder as JSON.

    Nothing of it is run. Raises CheckpointError for a file that is no JSON.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    said = read_json(file)
    if not isinstance(said, dict) or not isinstance(said.get("model"), dict):
        raise CheckpointError(f"{file} describes no tokenizer; copy it again.")
    model = said["model"]
    added = [entry for entry in said.get("added_tokens") or [] if isinstance(entry, dict)]
    settings = _read(folder, "tokenizer_config.json") | _read(folder, "special_tokens_map.json")
    return {
        "vocabulary": _vocabulary(model.get("vocab"))
        | {str(entry.get("content")): int(entry.get("id", -1)) for entry in added},
        "marked": [str(entry.get("content")) for entry in added if entry.get("special")],
        "special": {name: _content(settings.get(name)) for name in SPECIAL},
        "added": {
            str(entry.get("content")): {k: v for k, v in entry.items() if k not in PLACED}
            for entry in added
        },
        "ids": {
            f"{file}: {name}_token_id": value
            for file in ("config.json", "generation_config.json")
            for entries in [_read(folder, file)]
            for name in ("bos", "eos", "pad")
            for value in [_of_text(entries, f"{name}_token_id")]
            if entries
        },
        "merges": [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []],
        "model": {k: v for k, v in model.items() if k not in ("vocab", "merges")},
        "scores": model.get("vocab") if isinstance(model.get("vocab"), list) else None,
        "chat_template": _chat_template(folder, settings),
        **{name: said.get(name) for name in PIPELINE},
    }


def _vocabulary(said: Any) -> dict[str, int]:
    """Ids by token; Unigram models have a list of tokens with their scores."""
    if isinstance(said, dict):
        return {str(token): int(number) for token, number in said.items()}
    return {str(entry[0]): number for number, entry in enumerate(said or [])}


def _read(folder: Path, name: str) -> dict[str, Any]:
    said = read_json(folder / name) if (folder / name).is_file() else {}
    return said if isinstance(said, dict) else {}


def _of_text(entries: dict[str, Any], name: str) -> Any:
    """An entry of a configuration, or of its language model's."""
    text = entries.get("text_config")
    return entries.get(name, text.get(name) if isinstance(text, dict) else None)


def _content(token: Any) -> str | None:
    """A token's text, which some files have with how it is matched."""
    found = token.get("content") if isinstance(token, dict) else token
    return None if found is None else str(found)


def _chat_template(folder: Path, settings: dict[str, Any]) -> Any:
    file = folder / "chat_template.jinja"
    if not file.is_file():
        return settings.get("chat_template")
    return file.read_text("utf-8", errors="replace")
