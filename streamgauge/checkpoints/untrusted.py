"""Checkpoints come from strangers: what is refused before any of it is opened, and before memory is
taken for it.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from streamgauge.errors import CheckpointError

TEXTS = (".json", ".model", ".txt", ".tiktoken")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
READ = (*TEXTS, ".safetensors", ".gguf", *PICKLED)  # files of a folder that something may open
JSON_LIMIT = 2**26  # bytes of a configuration or an index
TOKENIZER_LIMIT = 2**29  # bytes of any other file but weights
POINTER, POINTER_LIMIT = b"version https://git-lfs", 1024
LARGEST = 10**6  # of a number in a configuration that counts parts
COUNTS_NO_PARTS = re.compile(
    r"theta|window|position|length|token|vocab|_id|scal|factor|size|seed|context|base|inner|dim|ctx|embd|value"
)
LAYERS = re.compile(r"layers?$|depth$")
EXPERTS = re.compile(r"experts?$")
MOST_EXPERTS = 4096
SPARE_PARAMETERS, SPARE_BYTES = 10**6, 2**31


def strange(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What transformers' and TransformerLens's code raise on a stranger's configuration: nearly
    anything, but for what memory and files have to say.
    """
    from huggingface_hub.errors import StrictDataclassError

    own = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError)
    return (*own, RuntimeError, TypeError, ValueError, StrictDataclassError, *more)


def refuse_links(folder: Path) -> None:
    """Raise CheckpointError for a link that leads out of the folder, but for those of the hub cache
    to its own blobs.
    """
    snapshot = next((p for p in (folder, *folder.parents) if p.parent.name == "snapshots"), None)
    blobs = folder if snapshot is None else snapshot.parent.parent / "blobs"
    for path in sorted(folder.iterdir()):
        if path.suffix in READ and path.is_symlink():
            try:
                target = path.resolve(strict=True)
            except (OSError, RuntimeError):
                raise CheckpointError(
                    f"{path} is a link to nothing; copy the checkpoint again."
                ) from None
            if not (
                target.is_relative_to(folder.resolve()) or target.is_relative_to(blobs.resolve())
            ):
                raise CheckpointError(
                    f"{path} is a link out of its folder; refused. Copy the file itself there."
                )


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Raise CheckpointError for a file of Git LFS that stands for the one that is meant."""
    for path in paths:
        if path.suffix in READ and path.is_file() and path.stat().st_size < POINTER_LIMIT:
            with path.open("rb") as file:
                pointer = file.read(len(POINTER)) == POINTER
            if pointer:
                raise CheckpointError(
                    f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` in "
                    "its folder, or download the file."
                )


def refuse_large_texts(folder: Path) -> None:
    """Raise CheckpointError for a tokenizer file that is larger than any."""
    for path in sorted(folder.iterdir()):
        if path.suffix in TEXTS and path.stat().st_size > TOKENIZER_LIMIT:
            raise CheckpointError(
                f"{path} is {path.stat().st_size:,} bytes, more than any configuration or "
                "tokenizer; refused."
            )


def read_json(path: Path) -> Any:
    """A configuration or an index.

    Raises CheckpointError where it is unreadable, nested too deep, or absurdly large.
    """
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(
                f"{path} is {path.stat().st_size:,} bytes, more than any configuration or "
                "index; refused."
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else error
        raise CheckpointError(
            f"{path} is not readable JSON ({why}); copy the checkpoint again."
        ) from error


def refuse_counts(path: Path, config: dict[str, Any], n_tensors: int) -> None:
    """Raise CheckpointError for a configuration of more layers than the files have tensors, or of a
    million of anything.
    """
    for name, value in _integers(config):
        if LAYERS.search(name) and value > n_tensors:
            raise CheckpointError(
                f"{path} asks for {value:,} layers ({name}), but the files hold {n_tensors:,} "
                "tensors; refused."
            )
        if EXPERTS.search(name) and value > MOST_EXPERTS:
            raise CheckpointError(f"{path} asks for {value:,} experts ({name}); refused.")
        if abs(value) > LARGEST and not COUNTS_NO_PARTS.search(name):
            raise CheckpointError(
                f"{path} says {name} = {value:,}, more than any model has; refused."
            )


def _integers(config: Any, name: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _integers(value, str(key))
    elif isinstance(config, list):
        for value in config:
            yield from _integers(value, name)
    elif (
        isinstance(config, (int, float))
        and not isinstance(config, bool)
        and abs(config) < float("inf")
    ):
        yield name, int(config)


def refuse_sizes(path: Path, make: Any, n_elements: int) -> None:
    """Raise CheckpointError for a configuration of twice as many parameters as the files hold, or
    of vast buffers.

    make: builds the model; it is called where tensors have shapes and no memory.
    """
    import torch

    try:
        with torch.device("meta"):
            model = make()
    except strange():  # what is wrong with it is said by the loading that follows
        return
    wanted = sum(p.numel() for p in model.parameters())
    if wanted > 2 * n_elements + SPARE_PARAMETERS:
        raise CheckpointError(
            f"{path} asks for {wanted:,} parameters, but the files hold {n_elements:,} numbers; "
            "refused."
        )
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    if buffers > 4 * n_elements + SPARE_BYTES:
        raise CheckpointError(f"{path} asks for {buffers:,} bytes beside its parameters; refused.")
