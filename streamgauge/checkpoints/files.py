"""Find a checkpoint, check that its files are whole, and read tensors from it with numpy."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamgauge.checkpoints.contents import adapter_alone, adapter_beside, held_twice
from streamgauge.checkpoints.headers import headers, read_tensor
from streamgauge.checkpoints.untrusted import (
    PICKLED,
    TEXTS,
    read_json,
    refuse_counts,
    refuse_large_texts,
    refuse_links,
)
from streamgauge.errors import CheckpointError, HubError, UnknownModelError
from streamgauge.record import write_whole

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NAMED = "pytorch_model.bin"
OF_TRAINING = ("optimizer", "scheduler", "scaler", "rng_state", "training_args", "trainer_state")
WANTED_FROM_HUB = ["*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine: its folder's or repository's name, its folder, its weight
    files, its revision.
    """

    name: str
    folder: Path
    files: tuple[Path, ...]
    revision: str | None = None

    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        config: dict[str, Any] = read_json(self.folder / "config.json")
        return config


def open_checkpoint(
    name: str | Path,
    revision: str | None = None,
    *,
    fetch: bool = True,
    converted: Path | None = None,
) -> Checkpoint:
    """The checkpoint in a folder, in the hub cache, or (fetch) on the Hugging Face hub.

    A folder on this machine goes before a hub repository of the same name. converted: where to keep
    safetensors made of pickled weights, which are refused without it; nothing but tensors is
    unpickled.
    Raises UnknownModelError, HubError, or CheckpointError where its files are missing, pickled or
    damaged.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _inspect(folder.resolve().name, _unpickled(folder.resolve(), converted), revision)
    if folder.is_file() or str(name).startswith((".", "/", "~")):
        raise UnknownModelError(
            f"{name} is not a folder with a checkpoint; name a folder or a hub repository."
        )
    snapshot = _cached_snapshot(str(name), revision)
    if snapshot is None:
        if not fetch:
            raise UnknownModelError(
                f"{name} is not in the hub cache of this machine; name it with --model to fetch it."
            )
        snapshot = _download(
            str(name), revision, WANTED_FROM_HUB + (["*.bin"] if converted else [])
        )
    return _inspect(str(name), _unpickled(snapshot, converted), revision or snapshot.name)


def is_cached(repository: str) -> bool:
    """Whether the hub cache of this machine holds weights of the repository; asks no network,
    imports nothing heavy.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    return any(_is_whole(folder) for folder in snapshots.glob("*"))


def _cached_snapshot(repository: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=WANTED_FROM_HUB, local_files_only=True
            )
        )
    except HFValidationError:
        raise UnknownModelError(
            f"{repository!r} is neither a folder nor a hub repository's name."
        ) from None
    except LocalEntryNotFoundError:
        return None
    return folder if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    """Whether all weights are there: an interrupted download leaves an index without some of its
    shards.
    """
    if (folder / INDEX).is_file():
        return all((folder / shard).is_file() for shard in _shards(folder))
    return (folder / SINGLE).is_file()


def _download(repository: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = repository if revision is None else f"{repository} at revision {revision}"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except GatedRepoError:
        raise HubError(
            f"the hub keeps {where} behind a licence; accept it there and log in with `hf auth "
            "login`."
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise UnknownModelError(
            f"the hub has no {where}; check the name, or name a folder."
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise HubError(
            f"the hub could not be reached for {where} ({type(error).__name__}); "
            "try again with a network, or name a folder on this machine."
        ) from error


def _inspect(name: str, folder: Path, revision: str | None) -> Checkpoint:
    refuse_links(folder)  # before any file of it is read
    refuse_large_texts(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            adapter_alone(folder)
            or f"{folder} has no config.json; name the folder that save_pretrained wrote."
        )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "transformers_weights" in config:
        raise CheckpointError(
            f"{folder / 'config.json'} is no configuration, or names weight files of its own; "
            "refused."
        )
    files = tuple(_weight_files(folder))
    wrong = adapter_beside(folder) or held_twice(files)
    if wrong:
        raise CheckpointError(wrong)
    checkpoint = Checkpoint(name, folder, files, revision)
    refuse_counts(folder / "config.json", config, len(tensor_names(checkpoint)))
    return checkpoint


def _unpickled(folder: Path, converted: Path | None) -> Path:
    """The folder, or one with safetensors made of its pickled weights where it has nothing else and
    that is allowed.
    """
    if converted is None or (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return folder
    refuse_links(folder)
    pickles = _pickles(folder)
    if not pickles:
        return folder
    digest = hashlib.sha256("".join(_sha256(path) for path in pickles).encode()).hexdigest()
    target = converted / digest[:32] / folder.name
    if not (target / INDEX).is_file():
        target.mkdir(parents=True, exist_ok=True)
        _convert(pickles, target)
    for path in folder.iterdir():
        if path.suffix in TEXTS and not path.name.endswith(".index.json"):
            shutil.copy(path, target)
    return target


def _pickles(folder: Path) -> list[Path]:
    """The weights that transformers would open: pytorch_model and its parts, or else the only
    pickle there is.
    """
    named = sorted(path for path in folder.glob("pytorch_model*.bin") if path.is_file())
    others = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in PICKLED and path.is_file() and not _of_training(path)
    )
    if not named and len(others) > 1:
        raise CheckpointError(
            f"{folder} has {len(others)} pickled files, {others[0].name} first; call the one "
            f"with weights {NAMED}."
        )
    return named or others


def _of_training(path: Path) -> bool:
    """Whether a pickle is what a trainer keeps beside the weights: no weights in it."""
    return path.name.startswith(OF_TRAINING)


def _convert(pickles: list[Path], target: Path) -> None:
    """Write each file's tensors as safetensors, and an index last.

    Raises CheckpointError for files of anything else.
    """
    import torch
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    for number, path in enumerate(pickles, 1):
        name = f"model-{number:05d}-of-{len(pickles):05d}.safetensors"
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(tensors, dict) or not all(
                isinstance(t, torch.Tensor) for t in tensors.values()
            ):
                raise TypeError("not a table of tensors")
            save_file(
                {str(key): t.detach().clone().contiguous() for key, t in tensors.items()},
                target / name,
                {"format": "pt"},
            )
        except Exception as error:  # whatever a stranger's pickle makes of it
            raise CheckpointError(
                f"{path} holds more than plain tensors, or is damaged ({type(error).__name__}); "
                "refused."
            ) from None
        twice = sorted(weight_map.keys() & set(map(str, tensors)))
        if twice:
            raise CheckpointError(
                f"{path} holds {twice[0]}, which another file of {path.parent} holds too; refused."
            )
        weight_map |= dict.fromkeys(map(str, tensors), name)
    write_whole(target / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}).encode())


def _weight_files(folder: Path) -> list[Path]:
    # Some tools write an index beside a single file too, of that file alone.
    if (folder / INDEX).is_file() and (folder / SINGLE).is_file() and _shards(folder) != {SINGLE}:
        raise CheckpointError(
            f"{folder} holds both {SINGLE} and {INDEX}; remove the one that is not meant."
        )
    if (folder / INDEX).is_file():
        shards = _shards(folder)
        strays = [s for s in shards if Path(s).name != s]
        if strays:
            raise CheckpointError(
                f"{folder / INDEX} names {strays[0]!r}, which is not a file of that folder; "
                "refused."
            )
        missing = sorted(s for s in shards if not (folder / s).is_file())
        if missing:
            raise CheckpointError(
                f"{folder} lacks {missing[0]}, which its index names; copy the checkpoint again."
            )
        if shards:
            return [folder / s for s in sorted(shards)]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    alone = adapter_alone(folder)
    if alone:
        raise CheckpointError(alone)
    if any(path.suffix in PICKLED and not _of_training(path) for path in folder.iterdir()):
        raise CheckpointError(
            f"{folder} holds pickled weights only, which can run code when they are opened; "
            "give --allow-pickle where you trust them, or convert them with save_pretrained."
        )
    raise CheckpointError(f"{folder} has no weights: neither {SINGLE} nor {INDEX} is there.")


def _shards(folder: Path) -> set[str]:
    """The files that an index names."""
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CheckpointError(
            f"{folder / INDEX} has no weight_map from tensors to files; copy the checkpoint again."
        )
    return set(weight_map.values())


def weights_sha256(checkpoint: Checkpoint) -> str:
    """The sha256 of the weight file, or of the lines `sha256 name` of the shards."""
    digests = [(_sha256(path), path.name) for path in checkpoint.files]
    if len(digests) == 1:
        return digests[0][0]
    return hashlib.sha256(
        "".join(f"{digest} {name}\n" for digest, name in digests).encode()
    ).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_names(checkpoint: Checkpoint) -> dict[str, Path]:
    """Every tensor's name, and the file it lies in."""
    return {header.name: header.path for header in headers(checkpoint.files)}


def count_elements(checkpoint: Checkpoint) -> int:
    """How many numbers the files hold, by their headers: of packed ones eight to an int32 and four
    to a byte.
    """
    packed = {"I32": 8, "U8": 4, "I8": 4}
    return sum(
        math.prod(header.shape) * packed.get(header.dtype, 1)
        for header in headers(checkpoint.files)
    )


def stored_dtypes(checkpoint: Checkpoint) -> dict[str, str]:
    """The dtype of each tensor in the files' headers, as safetensors spells it: `F16`, `BF16`."""
    return {header.name: header.dtype for header in headers(checkpoint.files)}


def stored_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in the files' headers."""
    return {header.name: header.shape for header in headers(checkpoint.files)}


def tensor_reader(checkpoint: Checkpoint) -> Callable[[str], np.ndarray]:
    """From a tensor's name to what the files hold under it, as `read_tensor` gives it."""
    files = tensor_names(checkpoint)
    return lambda name: read_tensor(files[name], name)
