"""What is really in a folder, where it does not fit: the accident behind it, in one sentence.

Everything is told by names, shapes and checksums that the files' headers hold; no tensor is
unpickled.
"""

import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from math import prod
from pathlib import Path

from streamgauge.checkpoints.headers import Header, headers, read_raw
from streamgauge.checkpoints.untrusted import read_json
from streamgauge.errors import CheckpointError

Shape = tuple[int, ...]

# Words of names that a wrapper leaves: who does, and what to save instead.
WRAPPERS = {
    "_orig_mod": ("torch.compile", "save the model that was compiled, model._orig_mod"),
    "module": ("DataParallel, DDP or DeepSpeed", "save the model inside, model.module"),
    "_fsdp_wrapped_module": ("FSDP", "save a full state dict, gathered by FSDP"),
    "_checkpoint_wrapped_module": (
        "activation checkpointing",
        "save the model before it is wrapped",
    ),
    "base_model": ("PEFT", "save what merge_and_unload() returns"),
    "language_model": (
        "a model with vision or audio beside the language model",
        "save the language model itself, or give config.json of the whole",
    ),
}
PACKED = re.compile(r"\.(qweight|qzeros|g_idx|weight_packed|absmax|weight_scale_inv)$")
TABLE = re.compile(r"embed|wte|head|output", re.IGNORECASE)  # with a row for each token
LORA = re.compile(r"\.lora_[AB]\.")
FLAT = "_flat_param"
ADAPTER = "adapter_config.json"


def why_unfit(held: Mapping[str, Shape], asked: Mapping[str, Shape], quantised: bool) -> str | None:
    """What happened to a checkpoint whose tensors do not fill the model that config.json describes,
    where names and shapes tell; None where they do not.

    held, asked: shapes by name, of the files and of the model. quantised: whether config.json says
    how weights are packed.
    """
    missing = [name for name in asked if name not in held]
    packed = sorted(name for name in held if PACKED.search(name))
    if packed and not quantised:
        return (
            f"{len(packed)} tensors hold packed weights, {packed[0]} first, and config.json has no "
            "quantization_config that says how: copy config.json from where the weights are from"
        )
    lora = sorted(name for name in held if LORA.search(name))
    if lora:
        return (
            f"it holds matrices of a LoRA adapter, {lora[0]} first, beside the weights: merge them "
            "(PEFT's merge_and_unload) and save what comes out"
        )
    flat = sorted(name for name in held if name.endswith(FLAT))
    if flat:
        return (
            f"{len(flat)} tensors are parameters that FSDP flattened into one each, {flat[0]} "
            "first: save a full state dict, gathered by FSDP"
        )
    return _wrapped(held, missing) or _shapes(held, asked)


def _wrapped(held: Collection[str], missing: Collection[str]) -> str | None:
    """Names that are those of the model but for a word of a wrapper in them."""
    for word, (who, instead) in WRAPPERS.items():
        inside = re.compile(rf"(?:^|(?<=\.)){re.escape(word)}\.")
        below = [name for name in held if inside.search(name)]
        plain = {_without(name, inside) for name in below}
        if missing and below and all(name in plain for name in missing):
            return (
                f"the names of {len(below)} tensors have `{word}.` in them, {min(below)} first, as "
                f"{who} leaves them: {instead}, or take that part off the names"
            )
    return None


def _without(name: str, inside: "re.Pattern[str]") -> str:
    """A name without a wrapper's word; PEFT's is followed by one more."""
    plain = inside.sub("", name)
    return plain.removeprefix("model.") if "base_model" in inside.pattern else plain


def _shapes(held: Mapping[str, Shape], asked: Mapping[str, Shape]) -> str | None:
    """Tensors of another shape than the model has."""
    other = sorted(name for name in held if name in asked and held[name] != asked[name])
    if not other:
        return None
    empty = [name for name in other if not prod(held[name])]
    if empty:
        return (
            f"{len(empty)} tensors are empty, {empty[0]} first, as DeepSpeed's ZeRO-3 leaves them "
            "where weights were not gathered: save with stage3_gather_16bit_weights_on_model_save, "
            "or put them together with zero_to_fp32.py"
        )
    first = other[0]
    shapes = f"{list(held[first])} in the file, {list(asked[first])} in the model"
    if len({(held[name][0], asked[name][0]) for name in other}) == 1 and all(
        TABLE.search(name) and held[name][1:] == asked[name][1:] for name in other
    ):
        return (
            f"{first} has {held[first][0]:,} rows and config.json's vocab_size is "
            f"{asked[first][0]:,}: the tables were resized, or config.json belongs to another model"
        )
    if all(held[name] == asked[name][::-1] for name in other):
        return f"{len(other)} matrices are transposed, {first} first ({shapes})"
    return (
        f"{len(other)} tensors have another shape than config.json gives them, {first} first "
        f"({shapes}): config.json or the weights belong to another model"
    )


def adapter_alone(folder: Path) -> str | None:
    """What to say of a folder that holds an adapter and no model, None for any other."""
    if not (folder / ADAPTER).is_file():
        return None
    return (
        f"{folder} holds an adapter of {_base(folder)}, not a model: merge it (PEFT's "
        "merge_and_unload) and save what comes out, or name the model that it is for."
    )


def adapter_beside(folder: Path) -> str | None:
    """What to say of an adapter that lies beside a whole model, None where there is none."""
    if not (folder / ADAPTER).is_file():
        return None
    return (
        f"{folder} holds {ADAPTER} beside a whole model: where PEFT is installed transformers "
        f"opens the adapter on top of {_base(folder)} instead; move it out of the folder if it is "
        "merged already, or merge it."
    )


def _base(folder: Path) -> str:
    said = read_json(folder / ADAPTER)
    base = said.get("base_model_name_or_path") if isinstance(said, dict) else None
    return str(base)[:100] if base else "another model"


def held_twice(files: Sequence[Path]) -> str | None:
    """What to say where two files hold different numbers under one name, None where none do."""
    places: dict[str, list[Path]] = {}
    for header in headers(files):
        places.setdefault(header.name, []).append(header.path)
    twice = {name: paths for name, paths in sorted(places.items()) if len(paths) > 1}
    for name, paths in twice.items():
        if len({zlib.crc32(read_raw(path, name)) for path in paths}) > 1:
            said = " and ".join(path.name for path in paths)
            return (
                f"{name} lies in {said} with different numbers, and readers differ in which they "
                "take; copy the checkpoint again into an empty folder."
            )
    return None


def pickles_that_differ(folder: Path, files: Sequence[Path]) -> list[str]:
    """One line for each pickled file of weights beside the safetensors that holds other numbers.

    A pickle that torch wrote is an archive with a checksum of each tensor's bytes, so nothing is
    unpickled. A file of another dtype, or of an older format, cannot be compared so and says
    nothing.
    """
    beside = sorted(
        path
        for path in folder.glob("pytorch_model*.bin")
        if path.is_file() and zipfile.is_zipfile(path)
    )
    if not beside:
        return []
    stored = Counter[tuple[int, int]]()
    for path in beside:
        try:
            with zipfile.ZipFile(path) as archive:
                stored.update(
                    (info.file_size, info.CRC)
                    for info in archive.infolist()
                    if re.search(r"/data/\d+$", info.filename)
                )
        except zipfile.BadZipFile:
            return []  # damaged: nothing can be told
    sums = {h.name: _size_and_sum(h) for h in headers(files)}
    sizes = Counter(size for size, _ in stored.elements())
    if not Counter(size for size, _ in sums.values()) <= sizes:
        return []  # other dtypes, or other tensors: nothing can be told
    other = [name for name, found in sums.items() if found not in stored]
    if not other:
        return []
    return [
        f"{beside[0].name} holds other numbers than the safetensors for {len(other)} tensors, "
        f"{min(other)} first"
    ]


def shards_that_differ(folder: Path, files: Sequence[Path]) -> list[str]:
    """One line for each safetensors file beside those of the checkpoint, as an earlier set of
    shards, that holds other numbers under names of theirs.
    """
    own = {header.name: header for header in headers(files)}
    names = {path.name for path in files}
    lines = []
    for path in sorted(folder.glob("*.safetensors")):
        if path.name in names or not path.is_file():
            continue
        try:
            others = [h for h in headers([path]) if h.name in own]
        except CheckpointError:
            continue  # damaged: nothing can be told, and nothing reads it
        other = [h.name for h in others if not _same(h, own[h.name])]
        if other:
            lines.append(
                f"{path.name}, which no index names, holds other numbers than the checkpoint for "
                f"{len(other)} tensors, {min(other)} first"
            )
    return lines


def _same(one: Header, other: Header) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return read_raw(one.path, one.name) == read_raw(other.path, other.name)


def _size_and_sum(header: Header) -> tuple[int, int]:
    raw = read_raw(header.path, header.name)
    return len(raw), zlib.crc32(raw)
