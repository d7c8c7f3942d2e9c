"""The `weights` group: norms of every matrix and bias, the state of every tensor, and where W_V and W_O lie in the files."""

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.checkpoint import Checkpoint, read_tensor, tensor_names
from streamgauge.convention import centre, expand_heads, fold_reading, fold_writing, ov_norms
from streamgauge.model import LAYER, Layout

if TYPE_CHECKING:
    import torch

GAIN_ROUNDING = 2.0**-20  # gains are read off a norm's output in fp32
MLP_WEIGHTS = ("W_in", "W_in_raw", "W_out", "W_out_raw", "b_in", "b_in_raw", "b_out", "b_out_raw")
GATED = ("W_gate", "W_gate_raw", "b_gate", "b_gate_raw")
UNGATED = ("W_in_W_out", "b_in_W_out")
EXPERTS = "the MLP is not one dense layer into another (a mixture of experts)"
GATED_MLP = "the MLP is gated, so nothing flows through W_in W_out alone"
QK_NORM = "queries and keys are normalised before they meet, so W_Q W_K^T is not what scores are made by"
UNGATED_MLP = "the MLP has no gate"


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


def reset_gains(layout: Layout) -> list[str] | None:
    """Norms whose gain is one constant although other layers' gains are not: one line each.

    None where no gain varies, as before training and in norms without parameters.
    """
    resets: list[str] | None = None
    for name, gains in (("norm before the attention", layout.gains), ("norm before the MLP", layout.mlp_gains)):
        constant = np.ptp(gains, axis=1) <= GAIN_ROUNDING * np.abs(gains).max(axis=1)
        if not constant.all():
            resets = (resets or []) + [
                f"layer {layer}: the gain of the {name} is constant" for layer in np.flatnonzero(constant)
            ]
    return resets


def reason_without_heads(bridge: Any, layout: Layout) -> str | None:
    """Why an architecture's attention cannot be read by head, None where it can."""
    try:
        _attention_norms(bridge.blocks[0].attn, layout, 0)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        architecture = type(bridge.original_model).__name__
        return f"TransformerLens shows no W_V and W_O by head for {architecture} ({type(error).__name__})"
    return None


def measure_weights(bridge: Any, layout: Layout) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays of the group, without its prefix, and the reasons for those that this architecture does not have."""
    layers: list[dict[str, np.ndarray]] = []
    absent: dict[str, str] = {}
    for layer, block in enumerate(bridge.blocks):
        readings = _attention_norms(block.attn, layout, layer)
        if layout.has_neurons:
            readings |= _mlp_norms(block.mlp, layout, layer)
        layers.append(readings)
    arrays = {name: np.array([readings[name] for readings in layers]) for name in layers[0]}
    arrays |= {"ln1_gain": layout.gains, "ln2_gain": layout.mlp_gains}
    if not layout.has_neurons:
        absent = dict.fromkeys([*MLP_WEIGHTS, *GATED, *UNGATED], EXPERTS)
    else:
        missing, reason = (UNGATED, GATED_MLP) if "W_gate" in arrays else (GATED, UNGATED_MLP)
        absent = dict.fromkeys(missing, reason)
    if "W_QK_frobenius" not in arrays:
        absent |= dict.fromkeys(["W_QK_frobenius", "W_QK_spectral"], QK_NORM)
    return arrays, absent


def _attention_norms(attn: Any, layout: Layout, layer: int) -> dict[str, np.ndarray]:
    """Norms of one layer's attention: by head, and of its output bias."""
    gain, bias = layout.gains[layer], layout.biases[layer]
    raw = {name: _numpy(getattr(attn, name)) for name in ("W_Q", "W_K", "W_V", "W_O")}
    folded = {name: fold_reading(raw[name], gain, layout.centres) for name in ("W_Q", "W_K", "W_V")}
    folded["W_O"] = layout.multiplier * fold_writing(raw["W_O"], layout.centres)
    readings = {name: _frobenius(weight) for name, weight in folded.items()}
    readings |= {f"{name}_raw": _frobenius(weight) for name, weight in raw.items()}
    for name in ("Q", "K"):
        own = _bias(attn, f"b_{name}", raw[f"W_{name}"].shape[::2])
        readings |= {f"b_{name}": norm(own + bias @ raw[f"W_{name}"]), f"b_{name}_raw": norm(own)}
    n_heads, b_V = len(raw["W_O"]), _bias(attn, "b_V", raw["W_V"].shape[::2])
    b_O = _bias(attn, "b_O", (raw["W_O"].shape[2],))
    carried = expand_heads(b_V + bias @ raw["W_V"], n_heads)
    b_O_folded = layout.multiplier * (b_O + np.einsum("he,hed->d", carried, raw["W_O"]))
    readings |= {"b_V_raw": norm(b_V), "b_O_raw": norm(b_O), "b_O": norm(centre(b_O_folded) if layout.centres else b_O_folded)}
    frobenius, spectral = ov_norms(expand_heads(folded["W_V"], n_heads), folded["W_O"])
    raw_frobenius, _ = ov_norms(expand_heads(raw["W_V"], n_heads), raw["W_O"])
    readings |= {"W_OV_frobenius": frobenius, "W_OV_spectral": spectral, "W_OV_raw_frobenius": raw_frobenius}
    if not has_qk_norm(attn):
        keys = expand_heads(folded["W_K"], n_heads).swapaxes(-1, -2)
        readings["W_QK_frobenius"], readings["W_QK_spectral"] = ov_norms(folded["W_Q"], keys)
    return readings


def has_qk_norm(attn: Any) -> bool:
    """Whether queries and keys are normalised before they meet, so that scores are not bilinear in the stream."""
    return bool({"q_norm", "k_norm"} & set(attn.submodules))


def _mlp_norms(mlp: Any, layout: Layout, layer: int) -> dict[str, np.ndarray]:
    """Norms of one layer's MLP: its matrices and biases, and without a gate those of their products."""
    gain, bias = layout.mlp_gains[layer], layout.mlp_biases[layer]
    W_in, W_out = _numpy(mlp.W_in), _numpy(mlp.W_out)
    b_in, b_out = _bias(mlp, "b_in", W_in.shape[1:]), _bias(mlp, "b_out", W_out.shape[1:])
    folded = fold_reading(W_in, gain, layout.centres)
    writing, b_out_folded = (layout.multiplier * fold_writing(x, layout.centres) for x in (W_out, b_out))
    b_in_folded = b_in + bias @ W_in
    readings = {
        "W_in": norm(folded.ravel()), "W_in_raw": norm(W_in.ravel()), "W_out": norm(writing.ravel()),
        "W_out_raw": norm(W_out.ravel()), "b_in": norm(b_in_folded), "b_in_raw": norm(b_in),
        "b_out": norm(b_out_folded), "b_out_raw": norm(b_out),
    }  # fmt: skip
    if mlp.W_gate is None:
        # The product is taken in fp32: its norm is exact to about 1e-7, and fp64 would take twice as long.
        product = folded.astype(np.float32) @ writing.astype(np.float32)
        return readings | {"W_in_W_out": norm(product.astype(np.float64).ravel()), "b_in_W_out": norm(b_in_folded @ writing)}
    W_gate = _numpy(mlp.W_gate)
    b_gate = _bias(mlp, "b_gate", W_gate.shape[1:])
    return readings | {
        "W_gate": norm(fold_reading(W_gate, gain, layout.centres).ravel()), "W_gate_raw": norm(W_gate.ravel()),
        "b_gate": norm(b_gate + bias @ W_gate), "b_gate_raw": norm(b_gate),
    }  # fmt: skip


def _frobenius(heads: np.ndarray) -> np.ndarray:
    return norm(heads.reshape(len(heads), -1))


def norm(vectors: np.ndarray) -> np.ndarray:
    """L2 norm over the last axis."""
    return np.asarray(np.linalg.norm(vectors, axis=-1))


def _bias(module: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A bias, or zeros where the architecture has none; by head where it is kept in one row."""
    found = getattr(module, name, None)
    return np.zeros(shape) if found is None else _numpy(found).reshape(shape)


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
