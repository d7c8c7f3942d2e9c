"""compressed-tensors, as llm-compressor writes it: integers packed or not, FP8, FP4, a scheme for
each group of modules.
"""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.checkpoints.formats.made import Made, plain
from streamgauge.errors import CheckpointError
from streamgauge.numerics.grids import even_grid, float_grid

if TYPE_CHECKING:
    import torch

NAME = "compressed-tensors"
LIBRARY, PACKAGE = "compressed_tensors", "compressed-tensors"
BASES = {"weight", "weight_packed"}
PARTS = (
    r"weight|weight_packed|weight_scale|weight_zero_point|weight_shape|weight_g_idx"
    r"|weight_global_scale|(?:input|output)_(?:scale|zero_point|global_scale)"
)


def split(name: str) -> tuple[str, str] | None:
    """The matrix that a tensor is a part of, and which part."""
    found = re.fullmatch(rf"(.+)\.({PARTS})", name)
    return (f"{found.group(1)}.weight", found.group(2)) if found else None


def weight(module: str, parts: "dict[str, torch.Tensor]", said: dict[str, Any], _: Any) -> Made:
    """The matrix. Raises CheckpointError for what changes more than single matrices."""
    from compressed_tensors.compressors import BaseCompressor

    if "weight_scale" not in parts:
        return plain(parts["weight"])
    for further in ("sparsity_config", "transform_config"):
        entry = said.get(further)
        if entry and not (isinstance(entry, dict) and entry.get("format") == "dense"):
            raise CheckpointError(
                f"config.json has a {further} of compressed-tensors, which streamgauge cannot "
                "undo; decompress the checkpoint with that library, and save what comes out."
            )
    scheme, layout = _scheme(module, said)
    own = {name: part for name, part in parts.items() if name.startswith("weight")}
    own |= {name: own[name].float() for name in own if name.endswith("scale")}  # fp32 comes out
    values = (
        BaseCompressor.get_value_from_registry(layout).decompress(own, scheme)["weight"].float()
    )
    kind = str(getattr(scheme.weights.type, "value", scheme.weights.type))
    label = f"{NAME} {kind}{scheme.weights.num_bits}"
    return Made(values, label, _rounding(values.numpy(), kind, scheme.weights))


def _rounding(values: np.ndarray, kind: str, weights: Any) -> float:
    if kind == "float" and weights.num_bits == 8:  # E4M3: its smallest step is 2⁻⁹ of 448
        return float_grid(values, 3, float(np.abs(values).max()) * 2.0**-19)
    size = weights.group_size or 0
    # The widest gap of FP4, from 4 to 6, is one of an even grid of 3 bits.
    bits = 3 if kind == "float" else weights.num_bits
    return even_grid(values, bits, size if size > 0 else values.shape[-1])


def _scheme(module: str, said: dict[str, Any]) -> tuple[Any, str]:
    """The scheme of a module, by its name and as a Linear, and how it is laid out."""
    import torch
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import is_match

    known = {name: said[name] for name in QuantizationConfig.model_fields if name in said}
    config, linear = QuantizationConfig.model_validate(known), torch.nn.Linear(1, 1)
    for scheme in config.config_groups.values():
        if is_match(module, linear, scheme.targets, config.ignore or []):
            layout = scheme.format or config.format
            return scheme, str(getattr(layout, "value", layout))
    raise CheckpointError(
        f"{module} holds compressed weights, and no group of config.json's quantization_config is "
        "for it."
    )
