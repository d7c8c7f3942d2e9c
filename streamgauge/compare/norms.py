"""Norms of weights, by layer and head."""

import numpy as np

from streamgauge.compare.difference import Difference
from streamgauge.compare.matching import with_names_of
from streamgauge.compare.rounding import FP32, layer_rounding, subnormal, tensor_rounding
from streamgauge.compare.weights import tensors_of
from streamgauge.errors import NotApplicable
from streamgauge.numerics.names import layer_of, part_of
from streamgauge.numerics.sketches import HEADS
from streamgauge.record import Record

# Norms of weights, which part they are of, and what they are products of: an error of each factor
# adds to that of the product.
NORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{f"{name}{raw}": ("attn", ()) for name in HEADS for raw in ("", "_raw")},
    **{f"{name}{raw}": ("mlp", ()) for name in ("W_in", "W_gate", "W_out") for raw in ("", "_raw")},
    **{f"b_{name}_raw": ("attn", ()) for name in ("Q", "K", "V", "O")},
    **{f"b_{name}_raw": ("mlp", ()) for name in ("in", "gate", "out")},
    "W_OV_frobenius": ("attn", ("W_V", "W_O")),
    "W_OV_spectral": ("attn", ("W_V", "W_O")),
    "W_QK_frobenius": ("attn", ("W_Q", "W_K")),
    "W_QK_spectral": ("attn", ("W_Q", "W_K")),
    "W_in_W_out": ("mlp", ("W_in", "W_out")),
}


def compare_norms(old: Record, new: Record) -> list[Difference]:
    """Norms of weights by layer and head, and of every tensor.

    Raises NotApplicable where the records share none.
    """
    new = with_names_of(old, new)
    found = _tensor_norms(old, new)
    layers = layer_rounding(old, new)
    d_model = old.metadata["d_model"]
    for name, (part, factors) in NORMS.items():
        before, after = (record.arrays.get(f"weights/{name}") for record in (old, new))
        needed = {f"weights/{factor}" for factor in factors}
        if (
            before is None
            or after is None
            or before.shape != after.shape
            or not needed <= set(old.arrays)
        ):
            continue
        rounding = np.broadcast_to(
            layers[: len(before)].reshape(-1, *[1] * (before.ndim - 1)), before.shape
        )
        # Relative to the norm: a folded matrix carries the error of a gain too. Norms of products
        # are taken in fp32 at worst.
        allowed = 2 * rounding + np.sqrt(d_model) * FP32
        if factors:
            sizes = [_of_heads(old.arrays[f"weights/{factor}"], before.shape) for factor in factors]
            allowed = 2 * allowed * sizes[0] * sizes[1] / np.maximum(before, 1e-30)
        size = np.abs(after - before) / np.maximum(before, 1e-30)
        for index in np.ndindex(*before.shape):
            if np.isnan(before[index]) and np.isnan(after[index]):
                continue  # a layer without such a matrix
            head = index[1] if len(index) > 1 else None
            # No matrix of a layer has more than (4 d_model)² numbers.
            small = subnormal(float(rounding[index]), 4 * d_model, float(before[index]))
            says = _from_to(float(before[index]), float(after[index]))
            found.append(
                Difference(
                    f"‖{name}‖",
                    part,
                    float(size[index]),
                    float(allowed[index]) + small,
                    says,
                    index[0],
                    head,
                )
            )
    if not found:
        raise NotApplicable("the records share no norms of weights")
    return found


def _tensor_norms(old: Record, new: Record) -> list[Difference]:
    """Norms of all tensors of the same shape: a bound that sketches, which see a fraction of a
    small move, do not replace.
    """
    if "sketch/norms" not in old.arrays or "sketch/norms" not in new.arrays:
        return []
    before, after, rounding = tensors_of(old), tensors_of(new), tensor_rounding(old, new)
    found = []
    for name in before:
        if name in after and after[name].shape == before[name].shape and before[name].norm:
            one, other = before[name].norm, after[name].norm
            allowed = rounding[name] + subnormal(
                rounding[name], float(np.sqrt(np.prod(before[name].shape))), one
            )
            says = _from_to(one, other)
            found.append(
                Difference(
                    f"‖{name}‖",
                    part_of(name),
                    abs(other - one) / one,
                    allowed,
                    says,
                    layer_of(name),
                )
            )
    return found


def _from_to(before: float, after: float) -> str:
    return f"{before:.4g} in the baseline, now {after:.4g} ({after / max(before, 1e-30) - 1:+.2%})"


def _of_heads(norms: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Norms by head, those of grouped heads repeated."""
    return norms if norms.ndim == 1 else norms.repeat(shape[1] // norms.shape[1], axis=1)
