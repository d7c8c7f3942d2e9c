"""Find a checkpoint, check that its files are whole, and read tensors from it with numpy."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamgauge.checkpoints import published_hashes
from streamgauge.checkpoints.contents import adapter_alone, adapter_beside, held_twice
from streamgauge.checkpoints.converted import INDEX, Origin, origin_of
from streamgauge.checkpoints.formats import gguf, pickled, quantized
from streamgauge.checkpoints.hashes import sha256_of
from streamgauge.checkpoints.headers import headers, read_tensor
from streamgauge.checkpoints.untrusted import (
    read_json,
    refuse_counts,
    refuse_large_texts,
    refuse_links,
    refuse_pointers,
)
from streamgauge.errors import CheckpointError, HubError, UnknownModelError

SINGLE = "model.safetensors"
NUMBERED = re.compile(r"(.*?)(\d+)")  # a revision and the number at its end
WANTED_FROM_HUB = ["*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine: its folder's or repository's name, its folder, its weight
    files, its revision.

    origin: what they were made of, where they are a conversion that lies in the store.
    """

    name: str
    folder: Path
    files: tuple[Path, ...]
    revision: str | None = None
    origin: Origin | None = None

    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        config: dict[str, Any] = read_json(self.folder / "config.json")
        return config

    @property
    def own_files(self) -> tuple[Path, ...]:
        """The weight files that were given, whatever their format."""
        return self.origin.files if self.origin else self.files


def default_store() -> Path:
    """The platform's cache folder for streamgauge."""
    from platformdirs import user_cache_path

    return user_cache_path("streamgauge")


def open_checkpoint(
    name: str | Path,
    revision: str | None = None,
    *,
    fetch: bool = True,
    allow_pickle: bool = False,
    verify: bool = False,
    store: Path | None = None,
) -> Checkpoint:
    """The checkpoint in a folder, in a GGUF file, in the hub cache, or (fetch) on the Hugging Face
    hub, where OWNER/NAME/FILE.gguf is a file of a repository.

    What is on this machine goes before a hub repository of the same name. allow_pickle: whether
    pickled weights are opened, tensors only. verify: whether weight files are held to the sha256
    that is published for them before any is read. store: where safetensors made of GGUF, of
    quantised and of pickled weights are kept, by default the platform's cache folder.
    Raises UnknownModelError, HubError, NotInstalledError, StoreError, or CheckpointError where its
    files are missing, pickled or damaged.
    """
    path, store = Path(name).expanduser(), store or default_store()
    if path.is_dir():
        if verify:
            published_hashes.verify(path)
        return _inspect(path.resolve().name, path.resolve(), revision, allow_pickle, store)
    if path.is_file() and path.suffix.lower() == ".gguf":
        if verify:
            published_hashes.verify(path.parent, gguf.parts_of(path))
        return _of_gguf(gguf.model_name(path), path.absolute(), revision, store)
    if path.is_file() or str(name).startswith((".", "/", "~")):
        raise UnknownModelError(
            f"{name} is not a folder with a checkpoint, nor a .gguf file; name one, or a hub "
            "repository."
        )
    repository, file = _file_of_hub(str(name))
    wanted = WANTED_FROM_HUB + (["*.bin"] if allow_pickle else [])
    if file:
        wanted = [gguf.PART.sub(r"\g<name>-*-of-\g<count>.gguf", file)]
    snapshot = _cached_snapshot(repository, revision, file)
    if snapshot is None:
        if not fetch:
            raise UnknownModelError(
                f"{name} is not in the hub cache of this machine; name it with --model to fetch it."
            )
        snapshot = _download(repository, revision, wanted)
    revision = revision or snapshot.name
    if verify:
        published_hashes.verify(snapshot, gguf.parts_of(snapshot / file) if file else None)
    if not file:
        return _inspect(repository, snapshot, revision, allow_pickle, store)
    if not (snapshot / file).is_file():
        raise UnknownModelError(f"the hub's {repository} has no file {file}; check its name.")
    return _of_gguf(str(name).removesuffix(".gguf"), snapshot / file, revision, store)


def _file_of_hub(name: str) -> tuple[str, str | None]:
    """The repository and the file of OWNER/NAME/FILE.gguf; other names are repositories."""
    parts = name.split("/")
    if name.endswith(".gguf") and len(parts) > 2:
        if ".." in parts or set(name) & set("*?[]"):
            raise UnknownModelError(f"{name} is no file of a hub repository; name OWNER/NAME/FILE.")
        return "/".join(parts[:2]), "/".join(parts[2:])
    return name, None


def _of_gguf(name: str, path: Path, revision: str | None, store: Path) -> Checkpoint:
    """A GGUF file, or all parts of it, by way of safetensors made of it."""
    parts = gguf.parts_of(path)
    if len(parts) > 1:  # a file that the user named may lie anywhere, its parts beside it
        refuse_links(path.parent)
    refuse_pointers(parts)
    folder, origin = gguf.convert(path, store)
    return _converted(name, folder, origin, revision)


def _converted(name: str, folder: Path, origin: Origin, revision: str | None) -> Checkpoint:
    files = tuple(_weight_files(folder))
    return Checkpoint(name, folder, files, revision, origin_of(folder, origin.files))


def is_cached(repository: str) -> bool:
    """Whether the hub cache of this machine holds weights of the repository; asks no network,
    imports nothing heavy.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots"
    return any(_is_whole(folder) for folder in snapshots.glob("*"))


def _cached_snapshot(repository: str, revision: str | None, file: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    wanted = [file] if file else WANTED_FROM_HUB
    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=wanted, local_files_only=True
            )
        )
    except HFValidationError:
        raise UnknownModelError(
            f"{repository!r} is neither a folder nor a hub repository's name."
        ) from None
    except LocalEntryNotFoundError:
        return None
    if file:
        return folder if all(p.is_file() for p in gguf.parts_of(folder / file)) else None
    return folder if _is_whole(folder) else None


def snapshots() -> set[Path]:
    """The folders of the hub cache of this machine that hold one revision of a model each."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return set(Path(HF_HUB_CACHE).glob("models--*/snapshots/*"))


def evict(snapshot: Path) -> None:
    """Take a revision, and the files that no other one shares, out of the hub cache."""
    from huggingface_hub import scan_cache_dir

    scan_cache_dir().delete_revisions(snapshot.name).execute()


def _is_whole(folder: Path) -> bool:
    """Whether all weights are there: an interrupted download leaves an index without some of its
    shards.
    """
    if (folder / INDEX).is_file():
        return all((folder / shard).is_file() for shard in _shards(folder))
    return (folder / SINGLE).is_file()


def revisions_between(repository: str, first: str, last: str) -> list[str]:
    """Branches and tags of a hub repository that are named alike but for a number, from one to
    another, in the order of their numbers: step1000, step2000 …

    Asks the hub. Raises UnknownModelError where there are none, HubError where it is out of reach.
    """
    from huggingface_hub import HfApi

    ends = [NUMBERED.fullmatch(end) for end in (first, last)]
    if None in ends or ends[0][1] != ends[1][1]:  # type: ignore[index]
        raise UnknownModelError(
            f"{first}..{last} is no range of revisions; name two that differ in a number at their "
            "end, as step1000..step143000."
        )
    with _asking(repository):
        refs = HfApi().list_repo_refs(repository)
    found = {
        int(match[2]): ref.name
        for ref in [*refs.branches, *refs.tags]
        if (match := NUMBERED.fullmatch(ref.name)) and match[1] == ends[0][1]  # type: ignore[index]
    }
    low, high = (int(end[2]) for end in ends)  # type: ignore[index]
    chosen = [found[number] for number in sorted(found) if low <= number <= high]
    if not chosen:
        known = ", ".join(found[n] for n in sorted(found)[:3]) or "none that is named so"
        raise UnknownModelError(
            f"the hub has no revision {first}..{last} of {repository}; it has {known}."
        )
    return chosen


def _download(repository: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    where = repository if revision is None else f"{repository} at revision {revision}"
    with _asking(where):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))


@contextlib.contextmanager
def _asking(where: str) -> Iterator[None]:
    """What the hub, or the lack of it, answers, in our words."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise HubError(
            f"the hub keeps {where} behind a licence; accept it there and log in with `hf auth "
            "login`."
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise UnknownModelError(
            f"the hub has no {where}; check the name, or name a folder."
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise HubError(
            f"the hub could not be reached for {where} ({type(error).__name__}); "
            "try again with a network, or name a folder on this machine."
        ) from error


def _inspect(
    name: str, folder: Path, revision: str | None, allow_pickle: bool, store: Path
) -> Checkpoint:
    refuse_links(folder)  # before any file of it is read
    refuse_pointers(sorted(folder.iterdir()))
    refuse_large_texts(folder)
    models = gguf.models_in(folder)
    if models and not _has_safetensors(folder):
        if len(models) > 1:
            named = ", ".join(path.name for path in models[:8])
            raise CheckpointError(
                f"{folder} holds {len(models)} GGUF models; name one of its files: {named}."
            )
        if allow_pickle and pickled.pickled_weights(folder):
            raise CheckpointError(
                f"{folder} holds {models[0].name} and pickled weights; name the file, or move it."
            )
        return _of_gguf(name, models[0], revision, store)
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
    if allow_pickle and not _has_safetensors(folder):
        pickles = pickled.pickled_weights(folder)
        if pickles:
            made, origin = pickled.convert(folder, pickles, store)
            return _converted(name, made, origin, revision)
    files = tuple(_weight_files(folder))
    wrong = adapter_beside(folder) or held_twice(files)
    if wrong:
        raise CheckpointError(wrong)
    checkpoint = Checkpoint(name, folder, files, revision)
    refuse_counts(folder / "config.json", config, len(tensor_names(checkpoint)))
    if quantized.quantised_by(config):
        made, origin = quantized.convert(folder, files, config, store)
        return _converted(name, made, origin, revision)
    without = [h for h in headers(files) if h.dtype.startswith("F8")]
    if without:
        raise CheckpointError(
            f"{folder} holds {len(without)} tensors of FP8 numbers ({without[0].dtype}), "
            f"{without[0].name} first, and its config.json has no quantization_config that says "
            "where their scales are: copy config.json from where the weights are from."
        )
    return checkpoint


def _has_safetensors(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


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
    if any(pickled.is_pickled(path) for path in folder.iterdir()):
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


def named_in_vain(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """The tensors that the index names and no file holds, and the file that it names for each."""
    if not (checkpoint.folder / INDEX).is_file():
        return []
    weight_map = read_json(checkpoint.folder / INDEX)["weight_map"]
    held = tensor_names(checkpoint)
    return sorted((name, file) for name, file in weight_map.items() if name not in held)


def weights_sha256(checkpoint: Checkpoint) -> str:
    """The sha256 of the weight file as it was given, or of the lines `sha256 name` of several."""
    return sha256_of(checkpoint.own_files)


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
