"""torchao: tensors of its own classes, taken apart into plain ones that the file's metadata tells
how to put together.
"""

import json
import re
from typing import TYPE_CHECKING, Any

from streamgauge.checkpoints.formats.made import Made
from streamgauge.numerics.grids import even_grid

if TYPE_CHECKING:
    import torch

    from streamgauge.checkpoints.headers import Header

NAME = "torchao"
LIBRARY = PACKAGE = "torchao"
BASES = {"qdata"}
# Of each class the bits of an even grid that is no finer; of others 2.
COARSE = {"Float8Tensor": 4, "Int8Tensor": 8}
COARSE |= dict.fromkeys(["Int4Tensor", "Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor"], 4)


def split(name: str) -> tuple[str, str] | None:
    """The matrix that a tensor is a part of, and which part."""
    found = re.fullmatch(r"(.+)\._weight_(\w+)", name)
    return (f"{found.group(1)}.weight", found.group(2)) if found else None


def weight(
    module: str, parts: "dict[str, torch.Tensor]", said: Any, files: "dict[str, Header]"
) -> Made:
    """The matrix."""
    from safetensors import safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    with safe_open(str(files["qdata"].path), framework="pt") as file:
        metadata = file.metadata()
    flat = {f"{module}._weight_{part}": tensor for part, tensor in parts.items()}
    own = {k: v for k, v in metadata.items() if k == f"{module}.weight"}
    names = json.dumps([f"{module}.weight"])
    made, _ = unflatten_tensor_state_dict(flat, own | {"tensor_names": names})
    tensor = made[f"{module}.weight"]
    values = tensor.dequantize().float()
    kind = type(tensor).__name__
    block = getattr(tensor, "block_size", None) or (1, values.shape[-1])
    said_bits = re.search(r"int(\d)$", str(getattr(tensor, "target_dtype", "")))
    bits = int(said_bits.group(1)) if said_bits else COARSE.get(kind, 2)
    return Made(values, f"{NAME} {kind}", even_grid(values.numpy(), bits, int(block[-1])))
