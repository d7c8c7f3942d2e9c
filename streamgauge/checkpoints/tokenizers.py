"""A checkpoint's own tokenizer."""

from pathlib import Path
from typing import Any

from streamgauge.errors import PromptError


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None: transformers invents an empty one where there is no file."""
    from transformers import AutoTokenizer

    if not any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    ):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise PromptError(f"the tokenizer in {folder} cannot be loaded ({error}).") from error
    return tokenizer if len(tokenizer) > 1 else None
