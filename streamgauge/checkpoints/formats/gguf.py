"""GGUF files: llama.cpp's, dequantised by the `gguf` package and named as transformers names them.

transformers' own tables say which tensor is which, and which rows of q and k llama.cpp puts in
another order. What a file says and transformers does not read is read here, or said.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from streamgauge.checkpoints.converted import Origin, Writer, convert_once
from streamgauge.checkpoints.formats.gguf_header import refuse_vast
from streamgauge.checkpoints.formats.gguf_settings import Settings, complete
from streamgauge.checkpoints.untrusted import refuse_counts, strange
from streamgauge.errors import CheckpointError, NotInstalledError, first_line
from streamgauge.numerics.grids import even_grid, without_grid
from streamgauge.progress import track

PART = re.compile(r"^(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
PROJECTOR = "mmproj"  # what the part that sees is called, which lies beside a language model
FLOATS = ("F64", "F32", "F16", "BF16")
# Of each type how fine its codes are, in bits, and how many numbers share a scale.
CODES = {
    **{"Q8_0": (8, 32), "Q8_1": (8, 32), "Q8_K": (8, 256), "Q6_K": (6, 16), "Q5_K": (5, 32)},
    **{"Q5_0": (5, 32), "Q5_1": (5, 32), "Q4_0": (4, 32), "Q4_1": (4, 32), "Q4_K": (4, 32)},
    **{"Q3_K": (3, 16), "Q2_K": (2, 16)},
    # Uneven grids: no gap is wider than those of an even one of so many bits.
    **{"IQ4_NL": (3, 32), "IQ4_XS": (3, 32), "MXFP4": (3, 32)},
}
ROPE_FACTORS = "rope_freqs.weight"
ROWS = 4096  # of a matrix that are dequantised at once


@dataclass(frozen=True)
class Gguf:
    """The parts of a GGUF model, opened. fields: what the first says of the model, by key."""

    paths: tuple[Path, ...]
    readers: list[Any]
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it."""
        return str(self.fields.get("general.architecture"))

    def tensors(self) -> Iterator[Any]:
        """Of all parts."""
        return (tensor for reader in self.readers for tensor in reader.tensors)

    def settings(self) -> Settings:
        """What it says of the function that the model computes."""
        factors = {t.name: t for t in self.tensors() if t.name.startswith("rope_")}
        return Settings(
            self.paths[0].name,
            self.architecture,
            self.fields,
            {tensor.name for tensor in self.tensors()},
            {name: _dequantised(tensor).ravel() for name, tensor in factors.items()},
            len(self.paths) > 1,
        )

    def predicts_further(self, name: str) -> bool:
        """Whether a tensor is one of the last blocks that predict further tokens."""
        further = self.fields.get(f"{self.architecture}.nextn_predict_layers", 0)
        depth = self.fields.get(f"{self.architecture}.block_count", 0)
        return bool(further) and _block(name) >= depth - further


def _block(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found.group(1)) if found else -1


def model_name(path: Path) -> str:
    """What a file's model is called: the file's name, without its number where it is a part."""
    found = PART.match(path.name)
    return found.group("name") if found else path.name.removesuffix(".gguf")


def parts_of(path: Path) -> tuple[Path, ...]:
    """A file, or all parts of the model that it is one of, whether they are there or not."""
    found = PART.match(path.name)
    if not found:
        return (path,)
    name, count = found.group("name"), int(found.group("count"))
    return tuple(path.parent / f"{name}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1))


def models_in(folder: Path) -> list[Path]:
    """The GGUF models of a folder, the first file of each that is there."""
    files = sorted(
        p for p in folder.glob("*.gguf") if p.is_file() and not p.name.startswith(PROJECTOR)
    )
    return list({model_name(path): path for path in reversed(files)}.values())[::-1]


def convert(path: Path, store: Path) -> tuple[Path, Origin]:
    """A folder in the store with safetensors, configuration and tokenizer made of a file or, where
    it is one part of several, of all.

    Raises CheckpointError for files that are damaged, or of an architecture that transformers
    cannot read from GGUF, and NotInstalledError.
    """
    origin = Origin("GGUF", files=parts_of(path))
    missing = [part.name for part in origin.files if not part.is_file()]
    if path not in origin.files:
        raise CheckpointError(f"{path.name} is no part of a model by its name; rename the file.")
    if missing:
        raise CheckpointError(
            f"{path.parent} lacks {missing[0]}, which belongs to {path.name}; copy it there."
        )

    def make(writer: Writer) -> None:
        if find_spec("gguf") is None or find_spec("torch") is None:
            raise NotInstalledError(
                "reading GGUF needs the package gguf, which this installation lacks; install "
                "'streamgauge[measure]'."
            )
        writer.origin.done = (
            f"dequantised to fp32 by gguf {version('gguf')}, names and the order of rows by "
            f"transformers {version('transformers')}"
        )
        _convert(_opened(origin.files), writer)

    return convert_once(store, model_name(path), origin, make), origin


def _opened(paths: Sequence[Path]) -> Gguf:
    from gguf import GGUFReader

    readers = []
    for path in paths:
        refuse_vast(path)
        try:
            readers.append(GGUFReader(path))
            fields = {
                name: one.contents()
                for name, one in readers[0].fields.items()
                if not name.startswith("tokenizer.")
            }
        except Exception as error:  # whatever a damaged file makes of it
            raise CheckpointError(
                f"{path} cannot be read as GGUF, or is truncated ({first_line(error)}); copy it "
                "again, or convert the model anew."
            ) from error
        for tensor in readers[-1].tensors:
            first, size = int(tensor.data_offset), path.stat().st_size
            if not readers[-1].data_offset <= first <= size - int(tensor.n_bytes):
                raise CheckpointError(
                    f"{path} says that {tensor.name[:100]} lies outside of its data; refused."
                )
    for name in [name for name in readers[0].fields if name.startswith("tokenizer.")]:
        del readers[0].fields[name]  # an object for each token
    said = fields.get("split.tensors.count")
    found = sum(len(reader.tensors) for reader in readers)
    if said is not None and int(said) != found:
        raise CheckpointError(
            f"{paths[0]} says that its parts hold {said} tensors, but they hold {found}: parts of "
            "different models lie together; copy them again."
        )
    return Gguf(tuple(paths), readers, fields)


def _convert(file: Gguf, writer: Writer) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    where = {"gguf_file": file.paths[0].name, "local_files_only": True, "trust_remote_code": False}
    folder = file.paths[0].parent
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **where)
        complete(config, file.settings(), writer.origin)
        refuse_counts(file.paths[0], config.to_dict(), sum(1 for _ in file.tensors()))
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        _write_tensors(file, model, writer)
    except strange(OSError, NotImplementedError) as error:
        raise CheckpointError(
            f"transformers cannot read {file.paths[0].name} ({file.architecture}): "
            f"{first_line(error)}."
        ) from error
    _refuse_unfilled(model, file, writer.origin)
    config.architectures = [type(model).__name__]
    config.save_pretrained(writer.folder)
    try:
        transformers.AutoTokenizer.from_pretrained(folder, **where).save_pretrained(writer.folder)
    except Exception as error:  # another library's parser of a stranger's file
        writer.origin.done += f"; its tokenizer cannot be read ({first_line(error)})"


def _write_tensors(file: Gguf, model: Any, writer: Writer) -> None:
    conversion = _by_converters if file.architecture in _converted_archs() else _by_processor
    convert_block = conversion(file, model, writer.origin)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = sorted(file.tensors(), key=lambda t: _block(t.name))
    for _, block in itertools.groupby(
        track(tensors, "dequantising", show=True), key=lambda t: _block(t.name)
    ):
        for one in convert_block([t for t in block if t.name != ROPE_FACTORS]):
            found = list(one.values.shape)
            if found != shapes.get(one.name, found):
                raise CheckpointError(
                    f"{file.paths[0].name} holds {one.name} as {found}, where what it says of the "
                    f"model makes {shapes[one.name]}: it is damaged, or a variant that "
                    "transformers cannot read."
                )
            writer.add(one.name, one.values, one.dtype, one.rounding)


def _refuse_unfilled(model: Any, file: Gguf, origin: Origin) -> None:
    """Raise CheckpointError where the file does not fill the model that it describes."""
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    wanted = {name for name, _ in model.named_parameters()} - tied
    missing = sorted(wanted - set(origin.dtypes))
    if missing:
        further = f"; nothing reads {origin.unread[0]}" if origin.unread else ""
        raise CheckpointError(
            f"{file.paths[0].name} has nothing for {len(missing)} tensors of the "
            f"{type(model).__name__} that transformers takes it for, {missing[0]} first{further}: "
            "it is damaged, or a variant that transformers cannot read."
        )


@dataclass
class _Tensor:
    """A tensor as transformers names it, fp32, what the file has it in, and how far rounding to
    that can have moved it.
    """

    name: str
    values: Any
    dtype: str
    rounding: float | None


def _by_processor(file: Gguf, model: Any, origin: Origin) -> Callable[..., list[_Tensor]]:
    """What makes a block's tensors, by transformers' tables of names and of what llama.cpp does to
    single tensors.
    """
    from transformers import modeling_gguf_pytorch_utils as tables

    kind = tables.TENSOR_PROCESSORS.get(file.architecture, tables.TensorProcessor)
    processor = kind(config=model.config.to_dict())
    names = tables.get_gguf_hf_weights_map(model, processor)
    sources = Counter(names.values())  # how many of the file's tensors make one of the model's

    def convert(tensors: list[Any]) -> list[_Tensor]:
        import torch

        found, merged, seen = [], [], Counter[str]()
        # Where several become one, the processor puts them here.
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for tensor in tensors:
            target = names.get(tensor.name, names.get(tensor.name.removesuffix(".weight")))
            if target is None:
                if not file.predicts_further(tensor.name):
                    origin.unread.append(tensor.name)
                continue
            seen[target] += 1
            values = _dequantised(tensor)
            rounding = _rounding(values, tensor.tensor_type.name)
            out = processor.process(
                values, tensor.name, tensor_key_mapping=names, parsed_parameters=parsed
            )
            if out.name is None:
                merged.append((tensor.tensor_type.name, rounding))
            else:
                values = torch.from_numpy(np.ascontiguousarray(out.weights, np.float32))
                found.append(_Tensor(names[out.name], values, tensor.tensor_type.name, rounding))
        for target, number in seen.items():
            if number < sources[target]:
                raise ValueError(f"{target} is made of {sources[target]} tensors, {number} there")
        dtype = ", ".join(sorted({dtype for dtype, _ in merged}))
        most = max((rounding for _, rounding in merged if rounding), default=None)
        return found + [_Tensor(n, t.float(), dtype, most) for n, t in parsed["tensors"].items()]

    return convert


def _converted_archs() -> Collection[str]:
    from transformers.integrations.gguf import GGUF_ARCHS

    archs: Collection[str] = GGUF_ARCHS
    return archs


def _by_converters(file: Gguf, model: Any, origin: Origin) -> Callable[..., list[_Tensor]]:
    """The same by transformers' newer tables, where an architecture has them: names, and chains of
    operations.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.integrations.gguf import get_gguf_conversion_mapping

    mapping = get_gguf_conversion_mapping(file.architecture, model.config)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    known = set(model.state_dict())

    def convert(tensors: list[Any]) -> list[_Tensor]:
        import torch

        sources: dict[str, list[tuple[str | None, Any]]] = defaultdict(list)
        for tensor in tensors:
            name, pattern = rename_source_key(tensor.name, renamings, converters)
            sources[name].append((pattern, tensor))
        found = []
        for name, parts in sources.items():
            if name not in known:
                origin.unread += [t.name for _, t in parts if not file.predicts_further(t.name)]
                continue
            arrays = [(pattern, t.tensor_type.name, _dequantised(t)) for pattern, t in parts]
            roundings = [_rounding(array, kind) for _, kind, array in arrays]
            values = {pattern: torch.from_numpy(array) for pattern, _, array in arrays}
            converter: Any = by_pattern.get(parts[0][0])
            for operation in converter.operations if converter else ():
                values = operation.convert(
                    values,
                    source_patterns=converter.source_patterns,
                    target_patterns=converter.target_patterns,
                )
            (value,) = values.values()
            dtype = ", ".join(sorted({tensor.tensor_type.name for _, tensor in parts}))
            most = max((r for r in roundings if r), default=None)
            found.append(_Tensor(name, value, dtype, most))
        return found

    return convert


def _dequantised(tensor: Any) -> np.ndarray:
    """A tensor in fp32, made of some of its rows after the other: the library takes several times
    what comes out.
    """
    from gguf import dequantize

    shape = [int(size) for size in reversed(tensor.shape)]
    values = np.empty((int(np.prod(shape[:-1])), shape[-1]), np.float32)
    data = tensor.data.reshape(len(values), -1)
    for first in range(0, len(values), ROWS):
        here = slice(first, first + ROWS)
        values[here] = dequantize(data[here], tensor.tensor_type)
    return values.reshape(shape)


def _rounding(values: np.ndarray, kind: str) -> float | None:
    """How far rounding to a type's grid can have moved a tensor, relative to its norm."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind in FLOATS:
        return None
    if kind not in CODES:
        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        return without_grid(8 * size / numbers)
    bits, block = CODES[kind]
    return even_grid(values, bits, block)
