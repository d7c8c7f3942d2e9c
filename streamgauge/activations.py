"""Whole activations of named hooks, for laws that need vectors rather than norms; kept in the
store, memory-mapped.
"""

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.checkpoints.files import Checkpoint
from streamgauge.checkpoints.prompts import read_prompts
from streamgauge.checkpoints.tokenizers import load_tokenizer
from streamgauge.engine.forward import BATCH_TOKENS
from streamgauge.engine.rows import prompts_for
from streamgauge.errors import NotMeasured, UnknownModelError
from streamgauge.numerics.rows import Prompts
from streamgauge.store import Store

if TYPE_CHECKING:
    from streamgauge.engine.bridge import Bridge


def stored_activations(
    store: Store,
    checkpoint: Checkpoint,
    hooks: Sequence[str],
    *,
    prompts: Path | None,
    device: str,
    limit: int,
) -> dict[str, np.ndarray]:
    """Activations (n_tokens, …) of the named hooks on the prompt set, raw, as read-only memory
    maps.

    Raises UnknownModelError for a hook that the model does not have, NotMeasured where all arrays
    together would take more than `limit` bytes; nothing is written then.
    """
    folder = store.folder / "activations" / store.key(checkpoint, prompts, device)
    paths = {
        name: folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npy" for name in hooks
    }
    missing = [name for name in hooks if not paths[name].is_file()]
    if missing:
        _compute(checkpoint, {name: paths[name] for name in missing}, prompts, device, limit)
    found = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
    _within(sum(array.nbytes for array in found.values()), limit)
    return found


def _within(size: int, limit: int) -> None:
    if size > limit:
        raise NotMeasured(
            f"these activations take {size:,} bytes, more than the limit of {limit:,}; ask for "
            "fewer or raise it"
        )


def _compute(
    checkpoint: Checkpoint, paths: dict[str, Path], prompts: Path | None, device: str, limit: int
) -> None:
    from streamgauge.engine.blockwise import Blockwise
    from streamgauge.engine.bridge import NoBridgeError, build_bridge
    from streamgauge.engine.load import load_model

    model = Blockwise(load_model(checkpoint, device).mapped)
    rows = prompts_for(
        model,
        checkpoint.folder,
        load_tokenizer(checkpoint.folder),
        read_prompts(prompts),
        built_in=prompts is None,
    )
    try:
        bridge = build_bridge(model)
    except NoBridgeError as error:
        raise NotMeasured(f"{error}, whose hooks these are") from error
    unknown = [name for name in paths if name not in bridge.hook_dict]
    if unknown:
        raise UnknownModelError(
            f"{checkpoint.name} has no hook {unknown[0]!r}; bridge.hook_dict lists those it has."
        )
    _run(bridge, rows, paths, limit)


def _run(bridge: "Bridge", rows: Prompts, paths: dict[str, Path], limit: int) -> None:
    """One forward pass over the prompts, each hook's vectors written to its file as they come."""
    import torch

    starts = np.cumsum([0, *map(len, rows.rows)])
    files: dict[str, np.memmap[Any, Any]] = {}
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        (name, lambda x, hook, name=name: seen.update({name: x.detach().cpu()})) for name in paths
    ]
    with torch.no_grad(), bridge.bridge.hooks(fwd_hooks=hooks):
        for batch in rows.batches(BATCH_TOKENS):
            ids = torch.tensor([rows.rows[i] for i in batch], device=bridge.model.device)
            bridge.bridge(ids, return_type=None, use_cache=False)
            silent = [name for name in paths if name not in seen or len(seen[name]) != len(batch)]
            if silent:
                raise NotMeasured(f"the hook {silent[0]} gave no row for each prompt")
            if not files:
                shapes = {name: (int(starts[-1]), *x.shape[2:]) for name, x in seen.items()}
                _within(4 * sum(int(np.prod(shape)) for shape in shapes.values()), limit)
                files = {name: _create(paths[name], shape) for name, shape in shapes.items()}
            for name, x in seen.items():
                for row, prompt in enumerate(batch):
                    files[name][starts[prompt] : starts[prompt + 1]] = x[row].float().numpy()
    for name, file in files.items():
        file.flush()
        Path(str(file.filename)).replace(paths[name])


def _create(path: Path, shape: tuple[int, ...]) -> "np.memmap[Any, Any]":
    path.parent.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(
        path.with_suffix(f".{uuid.uuid4().hex}.part"), mode="w+", dtype=np.float32, shape=shape
    )
