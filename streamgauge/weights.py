"""The `weights` group: norms of W_OV by head, the state of every tensor, and where W_V and W_O lie in the files."""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.checkpoint import Checkpoint, read_tensor, tensor_names
from streamgauge.convention import expand_heads, fold_reading, fold_writing, ov_norms
from streamgauge.model import LAYER, Layout

if TYPE_CHECKING:
    import torch


def measure_integrity(model: Any) -> dict[str, list[str]]:
    """What is wrong with a model's tensors, one line each: not finite, all zero, or the same in two layers.

    Of tensors that belong to a block only matrices are held to be alive and distinct: biases and gains may rightly be
    zero, and are all alike before training.
    """
    import torch

    problems: dict[str, list[str]] = {"not_finite": [], "dead": [], "alike": []}
    seen: dict[tuple[str, str], str] = {}
    for name, tensor in model.named_parameters():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            problems["not_finite"].append(f"{name}: {bad} of {tensor.numel()} values are NaN or Inf")
        layer = LAYER.search(f".{name}")
        if layer is None or tensor.dim() < 2:
            continue
        if not torch.any(tensor):
            problems["dead"].append(f"{name} is all zero")
            continue
        digest = hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        kind = LAYER.sub(".N.", f".{name}", count=1)
        twin = seen.setdefault((kind, digest), name)
        if twin != name:
            problems["alike"].append(f"{name} equals {twin}")
    return problems


def measure_weights(bridge: Any, layout: Layout) -> dict[str, np.ndarray]:
    """Norms of W_OV, (n_layers, n_heads), and the gains that were folded in, (n_layers, d_model)."""
    norms = [ov_norms(W_V, W_O) for W_V, W_O in _folded(bridge, layout)]
    return {
        "W_OV_frobenius": np.array([frobenius for frobenius, _ in norms]),
        "W_OV_spectral": np.array([spectral for _, spectral in norms]),
        "ln1_gain": layout.gains,
    }


def _folded(bridge: Any, layout: Layout) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each layer's W_V (n_heads, d_model, d_head) and W_O (n_heads, d_head, d_model), in fp64 and in the convention."""
    for layer, block in enumerate(bridge.blocks):
        W_V, W_O = (_numpy(getattr(block.attn, name)) for name in ("W_V", "W_O"))
        W_V = fold_reading(W_V, layout.gains[layer], layout.centres)
        yield expand_heads(W_V, len(W_O)), fold_writing(W_O, layout.centres)


def _numpy(tensor: "torch.Tensor") -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().double().numpy()
    return array


def parameter_names(model: Any) -> dict[int, str]:
    """The name of each parameter by its storage, taken before a bridge renames the modules."""
    return {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}


def locate_matrices(bridge: Any, names: dict[int, str], checkpoint: Checkpoint) -> dict[str, list[dict[str, Any]]]:
    """Where each layer's W_V and W_O lie: a file's tensor, and shape, strides and offset of the view, in elements.

    names: what parameter_names gave before the bridge was built. With the places `streamgauge.matrices` reads them with
    numpy alone. Empty where some matrix is not a view of one tensor.
    """
    files = tensor_names(checkpoint)
    found: dict[str, list[dict[str, Any]]] = {"W_V": [], "W_O": []}
    for block in bridge.blocks:
        fused = _fused_parameters(block, names)
        for name, places in found.items():
            weight = getattr(block.attn, name)
            place = _as_view(weight, names) or _as_rows(weight, fused)
            if place is None or not _in_files(place, weight, files):
                return {}
            places.append(place)
    return found


def _fused_parameters(block: Any, names: dict[int, str]) -> dict[str, "torch.Tensor"]:
    """The attention's own matrices, for bridges that split a fused query-key-value tensor into copies."""
    tensors = block.attn.original_component.named_parameters()
    return {
        names[p.untyped_storage().data_ptr()]: p for _, p in tensors if p.dim() == 2 and p.untyped_storage().data_ptr() in names
    }


def _as_view(weight: "torch.Tensor", names: dict[int, str]) -> dict[str, Any] | None:
    name = names.get(weight.untyped_storage().data_ptr())
    if name is None:
        return None
    return {"tensor": name, "shape": list(weight.shape), "strides": list(weight.stride()), "offset": weight.storage_offset()}


def _as_rows(weight: "torch.Tensor", fused: dict[str, "torch.Tensor"]) -> dict[str, Any] | None:
    """W_V (heads, d_model, d_head) as rows of a fused (out, d_model) tensor, found by their values."""
    heads, d_model, d_head = weight.shape

    def row_of(tensor: "torch.Tensor", head: int, column: int) -> int:
        hits = (tensor == weight[head, :, column]).all(-1).nonzero().flatten().tolist()
        return int(hits[0]) if hits else -1

    for name, tensor in fused.items():
        if tensor.shape[-1] != d_model:
            continue
        origin, next_column = row_of(tensor, 0, 0), row_of(tensor, 0, min(1, d_head - 1))
        next_head = row_of(tensor, min(1, heads - 1), 0)
        if min(origin, next_column, next_head) >= 0:
            strides = [(next_head - origin) * d_model, 1, (next_column - origin) * d_model]
            return {"tensor": name, "shape": list(weight.shape), "strides": strides, "offset": origin * d_model}
    return None


def _in_files(place: dict[str, Any], weight: "torch.Tensor", files: dict[str, Any]) -> bool:
    """Put the file's own name for the tensor into the place, and see that it leads to these very values."""
    wanted = place["tensor"]
    candidates = [n for n in files if n == wanted or wanted.endswith(f".{n}") or n.endswith(f".{wanted}")]
    for name in candidates:
        view = strided(read_tensor(files[name], name), place)
        if view is not None and np.array_equal(view.astype(np.float32), weight.detach().cpu().numpy(), equal_nan=True):
            place["tensor"] = name
            return True
    return False


def strided(array: np.ndarray, place: dict[str, Any]) -> np.ndarray | None:
    """The view that a place describes, or None where it would reach outside the array."""
    flat = np.ascontiguousarray(array).reshape(-1)
    last = place["offset"] + sum((n - 1) * s for n, s in zip(place["shape"], place["strides"], strict=True))
    if min(place["strides"]) < 0 or place["offset"] < 0 or last >= flat.size:
        return None
    strides = [s * flat.itemsize for s in place["strides"]]
    return np.lib.stride_tricks.as_strided(flat[place["offset"] :], place["shape"], strides, writeable=False)
