"""Quantised safetensors as Hugging Face stores them: which format, which tensors belong together,
and plain ones made of them, a matrix at a time.
"""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Collection
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from streamgauge.checkpoints.converted import Origin, Writer, convert_once, texts_beside
from streamgauge.checkpoints.formats import (
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gptq,
    mxfp4,
    torchao,
)
from streamgauge.checkpoints.formats.made import unscaled
from streamgauge.checkpoints.headers import Header, headers
from streamgauge.checkpoints.untrusted import TEXTS, strange
from streamgauge.errors import CheckpointError, NotInstalledError, first_line
from streamgauge.progress import track

if TYPE_CHECKING:
    import torch

# By the quant_method of a quantization_config. Each says what it is called (NAME), the package that
# it needs (LIBRARY), which tensor a name of the files is a part of (split), and makes the matrix of
# its parts (weight).
FORMATS: dict[str, ModuleType] = {
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "fbgemm_fp8": fp8,
    "fp8": fp8,
    "gptq": gptq,
    "mxfp4": mxfp4,
    "torchao": torchao,
}


def quantised_by(config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a config.json, of the language model's where it lies in there."""
    for place in (config, config.get("text_config") or {}):
        for name in ("quantization_config", "compression_config"):
            said = place.get(name) if isinstance(place, dict) else None
            if said is not None and not isinstance(said, dict):
                raise CheckpointError(
                    f"config.json's {name} is {str(said)[:60]!r}, where a table of settings "
                    "belongs: copy it from where the weights are from."
                )
            if said:
                return said
    return None


def convert(
    folder: Path, files: tuple[Path, ...], config: dict[str, Any], store: Path
) -> tuple[Path, Origin]:
    """A folder in the store with plain safetensors made of quantised ones.

    Raises CheckpointError for a format that cannot be opened and for files that do not hold what it
    needs, NotInstalledError where its library is missing.
    """
    said = quantised_by(config) or {}
    chosen = _format(folder, said)
    origin = Origin(chosen.NAME, files=files)
    beside = texts_beside(folder, TEXTS)

    def make(writer: Writer) -> None:
        missing = [name for name in ("torch", chosen.LIBRARY) if find_spec(name) is None]
        if missing:
            raise NotInstalledError(
                f"{folder} holds weights quantised as {chosen.NAME}, which needs the package "
                f"{chosen.PACKAGE}; install 'streamgauge[quantized]'."
            )
        writer.origin.done = f"dequantised to fp32 by {chosen.PACKAGE} {version(chosen.PACKAGE)}"
        for path in beside:
            if path.name != "config.json":
                shutil.copyfile(path, writer.folder / path.name)
        (writer.folder / "config.json").write_text(json.dumps(_plain(config)), encoding="utf-8")
        _write(chosen, said, headers(files), _conv1d(writer.folder), writer)

    return convert_once(store, folder.name, origin, make, beside), origin


def _format(folder: Path, said: dict[str, Any]) -> ModuleType:
    method = str(said.get("quant_method") or "")
    if not method and ("load_in_4bit" in said or "load_in_8bit" in said):
        method = "bitsandbytes"  # as old versions wrote it
    if not method and {"bits", "group_size"} <= set(said):
        raise CheckpointError(
            f"{folder} holds weights quantised as MLX stores them, which streamgauge cannot open; "
            "convert them with mlx_lm's --dequantize, and name what comes out."
        )
    if method not in FORMATS:
        raise CheckpointError(
            f"{folder} holds weights quantised as {method or 'no quant_method'!r}, which is not "
            f"one of {', '.join(sorted(FORMATS))}; dequantise them with the library that made "
            "them, and save what comes out."
        )
    return FORMATS[method]


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what it says of quantisation."""
    gone = ("quantization_config", "compression_config")
    return {
        name: _plain(value) if name == "text_config" and isinstance(value, dict) else value
        for name, value in config.items()
        if name not in gone
    }


def _conv1d(folder: Path) -> Collection[str]:
    """The modules of the model whose matrices face the other way than those that were quantised."""
    import torch
    import transformers
    from transformers.pytorch_utils import Conv1D

    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except strange(OSError):  # what is wrong with it is said when it is opened
        return ()
    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}


def _write(
    chosen: ModuleType,
    said: dict[str, Any],
    found: "Collection[Header] | Any",
    conv1d: Collection[str],
    writer: Writer,
) -> None:
    """All tensors: packed ones dequantised, others as they are."""
    groups: dict[str, dict[str, Header]] = defaultdict(dict)
    for header in found:
        target, part = chosen.split(header.name) or (header.name, "")
        groups[target][part] = header
    for parts in groups.values():
        for header in parts.values() if len(parts) == 1 else ():
            _refuse_unscaled(header)
    if not any(_is_packed(chosen, parts) for parts in groups.values()):
        raise CheckpointError(
            f"{writer.origin.files[0].parent} has a quantization_config that says {chosen.NAME}, "
            "and no tensor is stored so: take it out of config.json where the weights were "
            "dequantised, or copy config.json from where they are from."
        )
    for target, parts in track(list(groups.items()), "dequantising", show=True):
        if not _is_packed(chosen, parts):
            for header in parts.values():
                _copy(header, writer)
            continue
        tensors = {part: _read(header) for part, header in parts.items()}
        try:
            made = chosen.weight(target.removesuffix(".weight"), tensors, said, parts)
        except strange(re.error) as error:
            raise CheckpointError(
                f"the parts of {target} do not make a matrix as {chosen.NAME} stores it "
                f"({first_line(error)}): the files are damaged, or config.json says something else "
                "than they hold."
            ) from error
        values = made.values.float()
        if _faces_away(target, conv1d):
            values = values.T
        writer.add(target, values, made.dtype, made.rounding)


def _is_packed(chosen: ModuleType, parts: dict[str, Header]) -> bool:
    return bool(chosen.BASES & set(parts)) and len(parts) > 1


def _refuse_unscaled(header: Header) -> None:
    if header.dtype.startswith("F8"):
        raise unscaled(header.name, header.dtype)


def _copy(header: Header, writer: Writer) -> None:
    values = _read(header)
    writer.add(header.name, values.float() if values.is_floating_point() else values, header.dtype)


def _faces_away(target: str, conv1d: Collection[str]) -> bool:
    name = target.removesuffix(".weight")
    return any(path == name or path.endswith(f".{name}") for path in conv1d)


def _read(header: Header) -> "torch.Tensor":
    from safetensors import safe_open

    with safe_open(str(header.path), framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(header.name)
        return tensor
