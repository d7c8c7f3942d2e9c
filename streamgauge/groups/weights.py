"""The `weights` group: norms of every matrix and bias; and where W_V and W_O lie in the files."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.checkpoints.files import Checkpoint, tensor_names
from streamgauge.checkpoints.headers import read_tensor
from streamgauge.engine.anatomy import is_norm
from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.forward import Found, stacked
from streamgauge.engine.heads import Heads
from streamgauge.engine.layout import Layout
from streamgauge.engine.pieces import pieces
from streamgauge.groups.reasons import EXPERTS
from streamgauge.numerics.convention import expand_heads, product_frobenius, product_spectral
from streamgauge.numerics.matrices import strided
from streamgauge.numerics.names import LAYER

if TYPE_CHECKING:
    import torch

GAIN_ROUNDING = 2.0**-20  # gains are read off a norm's output in fp32
MLP_WEIGHTS = ("W_in", "W_in_raw", "W_out", "W_out_raw", "b_in", "b_in_raw", "b_out", "b_out_raw")
HEADS_WEIGHTS = (
    *("W_Q", "W_K", "W_V", "W_O", "W_Q_raw", "W_K_raw", "W_V_raw", "W_O_raw", "b_Q", "b_K", "b_O"),
    *("b_Q_raw", "b_K_raw", "b_V_raw", "b_O_raw", "W_OV_raw_frobenius"),
    *("W_OV_frobenius", "W_OV_spectral", "W_QK_frobenius", "W_QK_spectral"),
)
GATED = ("W_gate", "W_gate_raw", "b_gate", "b_gate_raw")
UNGATED = ("W_in_W_out", "b_in_W_out")
GATED_MLP = "the MLP is gated, so nothing flows through W_in W_out alone"
QK_NORM = (
    "queries and keys are normalised before they meet, so W_Q W_K^T is not what scores are made by"
)
UNGATED_MLP = "the MLP has no gate"


def reset_gains(model: Blockwise) -> list[str] | None:
    """Norms whose gain is one constant although the same norm's of other layers are not: a line
    each.

    Every norm in a block counts, wherever it stands, and the one behind the last. None where no
    gain varies, as before training and in norms without parameters.
    """
    gains: dict[str, dict[int, np.ndarray]] = {}
    for layer, block in enumerate(model.blocks):
        for path, module in block.named_modules():
            gain = module._parameters.get("weight")
            if is_norm(module) and gain is not None and gain.numel() > 1:
                gains.setdefault(path, {})[layer] = gain.detach().float().cpu().numpy()
    resets: list[str] | None = None
    for path, by_layer in gains.items():
        constant = [n for n, gain in by_layer.items() if _is_constant(gain)]
        if len(constant) < len(by_layer):
            lines = [f"layer {layer}: the gain of {path} is constant" for layer in constant]
            resets = (resets or []) + lines
    behind: Any = None if model.ln_final is None else model.ln_final._parameters.get("weight")
    last = np.zeros(1) if behind is None else behind.detach().float().cpu().numpy()
    if resets is not None and last.size > 1 and _is_constant(last):
        resets.append(f"behind the last layer: the gain of {model.seen.ln_final} is constant")
    return resets


def _is_constant(gain: np.ndarray) -> bool:
    return bool(np.ptp(gain) <= GAIN_ROUNDING * np.abs(gain).max())


class WeightsGroup:
    """Norms of a block's matrices and biases, in fp64, from Gram matrices and sums over rows."""

    def __init__(self, layout: Layout, heads: Heads) -> None:
        self.layout, self.heads = layout, heads
        self.layers: list[dict[str, np.ndarray]] = []

    def visit(self, layer: int) -> None:
        """Read a block."""
        self.layers.append(self._norms(layer))

    def found(self) -> Found:
        """Arrays of the group, and the reasons for those that this architecture does not have."""
        arrays, absent = stacked(self.layers, "no such matrix, or heads of another size, there")
        arrays |= {"ln1_gain": self.layout.gains, "ln2_gain": self.layout.mlp_gains}
        return arrays, absent | {n: why for n, why in self._absent(arrays) if n not in arrays}

    def _absent(self, arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, str]]:
        has_heads, has_mlp = "W_OV_frobenius" in arrays, "W_in" in arrays
        for name in HEADS_WEIGHTS:
            yield name, QK_NORM if has_heads and name.startswith("W_QK") else self.heads.why
        if self.layout.with_neurons and not has_mlp:
            why = self.heads.why.replace("W_V and W_O by head", "W_in and W_out")
        else:
            why = EXPERTS
        for name in MLP_WEIGHTS:
            yield name, why
        for name in GATED:
            yield name, UNGATED_MLP if has_mlp else why
        for name in UNGATED:
            yield name, GATED_MLP if has_mlp else why

    def _norms(self, layer: int) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        if matrices := self.heads.of(layer):
            found = _attention_norms(matrices, self.heads.attention(layer), self.layout, layer)
        bridge = self.heads.bridge
        mlp = bridge.part(layer, "mlp") if bridge else None
        if mlp is not None and _is_dense(mlp):
            found |= _mlp_norms(mlp, self.layout, layer)
        return found


def _attention_norms(
    matrices: "dict[str, torch.Tensor]", attn: Any, layout: Layout, layer: int
) -> dict[str, np.ndarray]:
    """Norms of one layer's attention: by head, (heads,), and of its output bias, ()."""
    multiplier = layout.factor(layer, "attn")
    device = matrices["W_Q"].device
    gain, bias = (_fp64(x, device) for x in (layout.gains[layer], layout.biases[layer]))
    # All four as rows that face the stream, (heads, d_head, d_model), which most files have next to
    # each other.
    raw = {name: matrix.mT if name != "W_O" else matrix for name, matrix in matrices.items()}
    raw = {name: rows.contiguous().double() for name, rows in raw.items()}
    n_heads = len(raw["W_O"])
    own = {
        name: _bias(attn, f"b_{name[-1]}", raw[name].shape[:2]) for name in ("W_Q", "W_K", "W_V")
    }
    carried = {name: raw[name] @ bias for name in own}  # what the norm's bias adds, (heads, d_head)
    readings = {f"{name}_raw": _frobenius(weight) for name, weight in raw.items()}
    readings |= {f"b_{name}_raw": _norm(own[f"W_{name}"]) for name in "QKV"}
    readings |= {f"b_{name}": _norm(own[f"W_{name}"] + carried[f"W_{name}"]) for name in "QK"}
    b_O = _bias(attn, "b_O", (raw["W_O"].shape[2],))
    values = (own["W_V"] + carried["W_V"]).repeat_interleave(n_heads // len(raw["W_V"]), dim=0)
    b_O_folded = multiplier * (b_O + (values.flatten() @ raw["W_O"].flatten(0, 1)))
    readings |= {"b_O_raw": _norm(b_O), "b_O": _norm(layout.centre(b_O_folded))}
    raw_V, raw_O = gram(raw["W_V"]), gram(raw["W_O"])
    readings["W_OV_raw_frobenius"] = product_frobenius(expand_heads(raw_V, n_heads), raw_O)
    folded = {name: raw[name].mul_(gain) for name in own}
    grams = {name: gram(rows) - _means(rows, layout.centres) for name, rows in folded.items()}
    grams["W_O"] = multiplier**2 * (raw_O - _means(raw["W_O"], layout.centres))
    readings |= {
        name: np.sqrt(np.maximum(np.trace(found, axis1=-2, axis2=-1), 0))
        for name, found in grams.items()
    }
    products = {"W_OV": (expand_heads(grams["W_V"], n_heads), grams["W_O"])}
    if not has_qk_norm(attn):
        products["W_QK"] = (grams["W_Q"], expand_heads(grams["W_K"], n_heads))
    readings |= {f"{name}_frobenius": product_frobenius(*pair) for name, pair in products.items()}
    return readings | {
        f"{name}_spectral": product_spectral(*pair) for name, pair in products.items()
    }


def _is_dense(mlp: Any) -> bool:
    """Whether TransformerLens shows one matrix into the neurons, and one out of them."""
    if not {"in", "out"} <= set(mlp.submodules):
        return False
    W_in, W_out = mlp.W_in, mlp.W_out
    return bool(W_in.dim() == W_out.dim() == 2 and W_in.shape == W_out.shape[::-1])


def gram(rows: "torch.Tensor") -> np.ndarray:
    """Inner products (…, n, n) of rows (…, n, d_model)."""
    return np.asarray((rows @ rows.mT).cpu().numpy())


def _means(rows: "torch.Tensor", centres: bool) -> "np.ndarray | float":
    """What those products lose when each row loses its mean, as it does where the convention
    centres.
    """
    return rows.shape[-1] * gram(rows.mean(-1, keepdim=True)) if centres else 0.0


def has_qk_norm(attn: Any) -> bool:
    """Whether queries and keys are normalised before they meet, so that scores are not bilinear in
    the stream.
    """
    return bool({"q_norm", "k_norm"} & set(attn.submodules))


def _mlp_norms(mlp: Any, layout: Layout, layer: int) -> dict[str, np.ndarray]:
    """Norms of one layer's MLP: its matrices and biases, and without a gate those of their
    products.
    """
    multiplier = layout.factor(layer, "mlp")
    gain, bias = (
        _fp64(x, mlp.W_in.device) for x in (layout.mlp_gains[layer], layout.mlp_biases[layer])
    )
    W_in, W_out = mlp.W_in.detach(), mlp.W_out.detach()
    b_in, b_out = _bias(mlp, "b_in", W_in.shape[1:]), _bias(mlp, "b_out", W_out.shape[1:])
    raw_in, folded_in, carried_in = _reading_norms(W_in, gain, bias, layout.centres)
    b_in_folded = b_in + carried_in
    raw_out, folded_out, carried_out = _writing_norms(W_out, b_in_folded, layout, multiplier)
    readings = {
        "W_in": folded_in,
        "W_in_raw": raw_in,
        "W_out": folded_out,
        "W_out_raw": raw_out,
        "b_in": _norm(b_in_folded),
        "b_in_raw": _norm(b_in),
        "b_out": _norm(multiplier * layout.centre(b_out)),
        "b_out_raw": _norm(b_out),
    }
    if mlp.W_gate is None:
        return readings | {
            "W_in_W_out": _through(W_in, W_out, gain, layout, multiplier),
            "b_in_W_out": carried_out,
        }
    b_gate = _bias(mlp, "b_gate", mlp.W_gate.shape[1:])
    raw_gate, folded_gate, carried_gate = _reading_norms(
        mlp.W_gate.detach(), gain, bias, layout.centres
    )
    return readings | {
        "W_gate": folded_gate,
        "W_gate_raw": raw_gate,
        "b_gate": _norm(b_gate + carried_gate),
        "b_gate_raw": _norm(b_gate),
    }


def _reading_norms(
    weight: "torch.Tensor", gain: "torch.Tensor", bias: "torch.Tensor", centres: bool
) -> tuple[np.ndarray, np.ndarray, "torch.Tensor"]:
    """Frobenius norms of a reading weight (d_model, d_mlp), raw and folded, and what the norm's
    bias carries through it.
    """
    import torch

    raw = folded = total = carried = gain.new_zeros(())
    for own, rows in pieces(weight):
        squares = torch.linalg.vector_norm(rows, dim=1).square()
        raw, folded = raw + squares.sum(), folded + gain[own].square() @ squares
        total, carried = total + gain[own] @ rows, carried + bias[own] @ rows
    mean = _square(total) / len(weight) if centres else 0
    return _root(raw), _root(folded - mean), carried


def _writing_norms(
    weight: "torch.Tensor", bias: "torch.Tensor", layout: Layout, multiplier: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frobenius norms of a writing weight (d_mlp, d_model), raw and in the convention, and the norm
    of bias @ weight there.
    """
    raw = means = carried = bias.new_zeros(())
    for own, rows in pieces(weight):
        raw, means = raw + _square(rows), means + _square(rows.sum(1))
        carried = carried + bias[own] @ rows
    folded = _root(raw - means / weight.shape[1] if layout.centres else raw)
    return _root(raw), multiplier * folded, multiplier * _norm(layout.centre(carried))


def _through(
    W_in: "torch.Tensor",
    W_out: "torch.Tensor",
    gain: "torch.Tensor",
    layout: Layout,
    multiplier: float,
) -> np.ndarray:
    """Frobenius norm of W_in W_out.

    The product is taken in fp32, which leaves its norm exact to about 1e-7.
    """
    product = gain[:, None] * (W_in @ W_out).double()
    if layout.centres:  # on both sides
        product -= product.mean(0)
        product -= product.mean(1, keepdim=True)
    return np.asarray(multiplier * _root(_square(product)))


def _frobenius(heads: "torch.Tensor") -> np.ndarray:
    return _norm(heads.flatten(1))


def _norm(vectors: "torch.Tensor") -> np.ndarray:
    """L2 norm over the last axis."""
    import torch

    return np.asarray(torch.linalg.vector_norm(vectors, dim=-1).cpu().numpy())


def _square(x: "torch.Tensor") -> "torch.Tensor":
    flat = x.reshape(-1)
    return flat @ flat


def _root(squares: "torch.Tensor") -> np.ndarray:
    """Roots of sums of squares, which rounding may leave below zero."""
    return np.asarray(squares.clamp_min(0).sqrt().cpu().numpy())


def _bias(module: Any, name: str, shape: Any) -> "torch.Tensor":
    """A bias, or zeros where the architecture has none; by head where it is kept in one row."""
    import torch

    found = getattr(module, name, None)
    if found is None:
        return torch.zeros(
            tuple(shape), dtype=torch.float64, device=next(module.parameters()).device
        )
    return torch.as_tensor(found.detach().double().reshape(tuple(shape)))


def _fp64(values: np.ndarray, device: Any) -> "torch.Tensor":
    import torch

    return torch.as_tensor(values, dtype=torch.float64, device=device)


class Locator:
    """Finds where each layer's W_V and W_O lie: a file's tensor, and shape, strides and offset of
    the view, in elements.

    With the places `streamgauge.numerics.matrices` reads them with numpy alone. places: by matrix,
    then by layer, None for a layer without; empty where some matrix is not a view of one tensor.
    """

    def __init__(self, model: Blockwise, heads: Heads, checkpoint: Checkpoint) -> None:
        self.model, self.heads, self.files = model, heads, tensor_names(checkpoint)
        self.places: dict[str, list[dict[str, Any] | None]] = {"W_V": [], "W_O": []}

    def visit(self, layer: int) -> None:
        """Find a layer's."""
        matrices = self.heads.of(layer) if self.places else None
        names = self.model.mapped.names_by_address(self.model.paths[layer])
        for name, places in self.places.items():
            place = None
            if matrices:
                place = self._find(matrices[name], layer, names)
                if place is None:
                    self.places = {}
                    return
            places.append(place)

    def found(self) -> Found:
        """Nothing that an array holds."""
        return {}, {}

    def _find(self, weight: Any, layer: int, names: dict[int, str]) -> dict[str, Any] | None:
        fused = _fused_parameters(self.model.blocks[layer], names)
        place = _as_view(weight, names) or _as_rows(weight, fused)
        return place if place is not None and _in_files(place, weight, self.files) else None


def _fused_parameters(block: Any, names: dict[int, str]) -> dict[str, "torch.Tensor"]:
    """A block's own matrices, for bridges that split a fused query-key-value tensor into copies."""
    tensors = block.named_parameters()
    return {
        names[p.untyped_storage().data_ptr()]: p
        for _, p in tensors
        if p.dim() == 2 and p.untyped_storage().data_ptr() in names
    }


def _as_view(weight: "torch.Tensor", names: dict[int, str]) -> dict[str, Any] | None:
    name = names.get(weight.untyped_storage().data_ptr())
    if name is None:
        return None
    return {
        "tensor": name,
        "shape": list(weight.shape),
        "strides": list(weight.stride()),
        "offset": weight.storage_offset(),
    }


def _as_rows(weight: "torch.Tensor", fused: dict[str, "torch.Tensor"]) -> dict[str, Any] | None:
    """W_V (heads, d_model, d_head) as rows of a fused (out, d_model) tensor, found by their
    values.
    """
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
            return {
                "tensor": name,
                "shape": list(weight.shape),
                "strides": strides,
                "offset": origin * d_model,
            }
    return None


def _in_files(place: dict[str, Any], weight: "torch.Tensor", files: dict[str, Any]) -> bool:
    """Put the file's own name for the tensor into the place, and see that it leads to these very
    values.
    """
    wanted = place["tensor"]
    # The file may call it otherwise: with another prefix, or none. Its layer and what follows stay.
    layer = LAYER.search(f".{wanted}")
    tail = f".{wanted}"[layer.start() :] if layer else wanted
    candidates = [wanted] * (wanted in files) + [n for n in files if f".{n}".endswith(tail)]
    for name in candidates:
        view = strided(read_tensor(files[name], name), place)
        if view is not None and np.array_equal(
            view.astype(np.float32), weight.detach().cpu().numpy()
        ):
            place["tensor"] = name
            return True
    return False
