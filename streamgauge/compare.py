"""Compare two records, quantity by quantity: what moved, where, by how much, and what rounding alone could have moved.

Differences are relative. What is allowed is derived: of weights from the rounding of the two dtypes, of activations and losses
from the `rounding` group, which measured what errors of that size do to this model. Together they raise a false alarm of one
comparison in a thousand at most.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamgauge.errors import NotApplicable
from streamgauge.mapped import LAYER
from streamgauge.model import layer_of
from streamgauge.prompts import Prompts
from streamgauge.record import Record
from streamgauge.sketch import HEADS, factor, moved, surely_moved

LISTED = 50  # differences of a kind that a page lists
FALSE_ALARMS = 1e-3  # of a whole comparison
UNIT = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8, "F8_E4M3": 2.0**-4, "F8_E5M2": 2.0**-3}
SUBNORMAL = 2.0**-25  # largest absolute error of fp16 where numbers are too small for its exponent
FP32 = UNIT["F32"]
SAME = 0.05  # two tensors are one, up to a factor, when less than this is left of their difference


@dataclass(frozen=True)
class Difference:
    """One quantity of two records. part: `attn`, `mlp`, `norm`, `embed` or another word for where it is, in which layer, head.

    size: the relative difference, by which it is judged; allowed: what rounding explains of it; says: what happened to it.
    """

    name: str
    part: str
    size: float
    allowed: float
    says: str
    layer: int | None = None
    head: int | None = None

    @property
    def excess(self) -> float:
        """Size over what is allowed; NaN, which nothing allows, counts as infinite."""
        if np.isnan(self.size):
            return float("inf")
        return self.size / self.allowed if self.allowed else float("inf") if self.size else 0.0

    @property
    def where(self) -> str:
        """Layer, sublayer, head and quantity in words."""
        layer = [] if self.layer is None else [f"layer {self.layer}"]
        head = [] if self.head is None else [f"head {self.head}"]
        return " ".join([*layer, self.part, *head, self.name])

    def __str__(self) -> str:
        return f"{self.where}: {self.says}"


def differences(old: Record, new: Record) -> dict[str, list[Difference]]:
    """Every comparison of two records, within what is allowed or not: config, weights, norms, activations, predictions.

    A kind that cannot be compared is missing. Raises NotApplicable where nothing can be.
    """
    found: dict[str, list[Difference]] = {}
    for kind, compare in KINDS.items():
        try:
            found[kind] = compare(old, new)
        except NotApplicable:
            continue
    if not found:
        raise NotApplicable("the two records have nothing in common that can be compared")
    return found


def tensor_rounding(old: Record, new: Record) -> dict[str, float]:
    """Largest relative error of each tensor's numbers that the two dtypes explain: one rounding of fp32 where they are one."""
    tables = [{row["name"]: row.get("dtype") for row in record.metadata.get("parameters", [])} for record in (old, new)]
    found: dict[str, float] = {}
    for name, dtype in tables[0].items():
        other = tables[1].get(name)
        # A tensor that the library puts together from several of the file has no dtype of its own.
        found[name] = _file_rounding(old, new) if dtype is None or other is None else _rounding({dtype}, {other})
    return found


def _file_rounding(old: Record, new: Record) -> float:
    return _rounding(*({part.strip() for part in str(r.metadata.get("stored_dtype")).split(",")} for r in (old, new)))


def _rounding(before: set[str], after: set[str]) -> float:
    return FP32 if before == after else max([UNIT.get(dtype, 0.0) for dtype in before | after] + [FP32])


def weight_rounding(old: Record, new: Record) -> float:
    """The largest of these, of a whole model; for records without tensors by all dtypes of the files."""
    return max(tensor_rounding(old, new).values(), default=_file_rounding(old, new))


def layer_rounding(old: Record, new: Record) -> np.ndarray:
    """The largest of these by layer, (n_layers,), likewise."""
    by_tensor = tensor_rounding(old, new)
    if not by_tensor:
        return np.full(old.n_layers, _file_rounding(old, new))
    found = np.full(old.n_layers, FP32)
    for name, size in by_tensor.items():
        layer = layer_of(name)
        if layer is not None:
            found[layer] = max(found[layer], size)
    return found


def compare_config(old: Record, new: Record) -> list[Difference]:
    """Entries of the two configurations, one level deep. Raises NotApplicable where a record holds none."""
    before, after = (record.metadata.get("config") for record in (old, new))
    if before is None or after is None:
        raise NotApplicable("a record holds no configuration")
    found = []
    for name in sorted(set(before) | set(after)):
        one, other = before.get(name), after.get(name)
        says = f"{_short(one)} in the baseline, now {_short(other)}"
        found.append(Difference(name, "config", 0.0 if one == other else 1.0, 0.5, says))
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def compare_weights(old: Record, new: Record) -> list[Difference]:
    """Every tensor by its sketch, and heads by theirs. Raises NotApplicable where a record has no sketches."""
    tables = [_tensors(record) for record in (old, new)]
    rounding = tensor_rounding(old, new)
    found = list(_unmatched(*tables))
    shared = [name for name in tables[0] if name in tables[1] and tables[0][name].shape == tables[1][name].shape]
    for name in shared:
        before, after = tables[0][name], tables[1][name]
        others = {n: t.sketch for n, t in tables[0].items() if n != name and t.shape == before.shape}
        size, says = _judge(before.sketch, after.sketch, before.norm, others)
        allowed = rounding[name] + _subnormal(rounding[name], float(np.sqrt(np.prod(before.shape))), before.norm)
        found.append(Difference(name, _part(name), size, allowed if before.norm else 0.5, says, layer_of(name)))
    return found + list(_heads(old, new))


def _subnormal(rounding: float, root_of_size: float, norm: float) -> float:
    """What numbers too small for fp16's exponent add to a tensor's relative error, where another dtype was made of it."""
    return 0.0 if rounding == FP32 else SUBNORMAL * root_of_size / max(norm, 1e-30)


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    norm: float
    sketch: np.ndarray


def _tensors(record: Record) -> dict[str, _Tensor]:
    sketches, norms = record.array("sketch/parameters"), record.array("sketch/norms")
    rows = zip(record.metadata["parameters"], norms, sketches, strict=True)
    return {row["name"]: _Tensor(tuple(row["shape"]), float(norm), values) for row, norm, values in rows}


def _unmatched(before: dict[str, _Tensor], after: dict[str, _Tensor]) -> Iterator[Difference]:
    """Tensors that only one of the two has, or that have another shape now."""
    for name in sorted(set(before) | set(after)):
        if name not in after:
            yield Difference(name, _part(name), 1.0, 0.5, "missing, the baseline has it", layer_of(name))
        elif name not in before:
            yield Difference(name, _part(name), 1.0, 0.5, "new, the baseline has none", layer_of(name))
        elif before[name].shape != after[name].shape:
            says = f"shape {before[name].shape} in the baseline, now {after[name].shape}"
            yield Difference(name, _part(name), 1.0, 0.5, says, layer_of(name))


def _judge(before: np.ndarray, after: np.ndarray, norm: float, others: dict[str, np.ndarray]) -> tuple[float, str]:
    """Relative difference of two sketches, as it is judged, and what it looks like."""
    size = float(surely_moved(before, after)) / norm if norm else float(np.abs(after).max() > 0)
    return size, _looks_like(before, after, norm, others) if size != 0 else "unchanged"


def _looks_like(before: np.ndarray, after: np.ndarray, norm: float, others: dict[str, np.ndarray]) -> str:
    if not np.isfinite(after).all():
        return "not finite"
    if not after.any():
        return "all zero"
    times, rest = factor(before, after)
    if rest < min(SAME, abs(times - 1) / 3):
        return f"×{times:.4g}" if times > 0 else f"sign turned, ×{times:.4g}"
    twin = next((name for name, values in others.items() if _is_same(values, after)), None)
    if twin and rest >= SAME:
        return f"holds what {twin} held"
    return f"moved by {float(moved(before, after)) / norm:.3%} of its norm" if norm else "was all zero"


def _is_same(before: np.ndarray, after: np.ndarray) -> bool:
    size = float(np.linalg.norm(before))
    return size > 0 and float(np.linalg.norm(after - before)) < SAME * size


def _heads(old: Record, new: Record) -> Iterator[Difference]:
    by_layer = layer_rounding(old, new)
    for name in HEADS:
        before, after = (record.arrays.get(f"sketch/{name}") for record in (old, new))
        norms = old.arrays.get(f"weights/{name}_raw")
        if before is None or after is None or norms is None or before.shape != after.shape:
            continue
        for layer, head in np.ndindex(*norms.shape):
            others = {f"head {h}": before[layer, h] for h in range(norms.shape[1]) if h != head}
            norm, rounding = float(norms[layer, head]), float(by_layer[layer])
            size, says = _judge(before[layer, head], after[layer, head], norm, others)
            # No head has more than d_model² numbers.
            allowed = 2 * rounding + _subnormal(rounding, old.metadata["d_model"], norm)
            yield Difference(name, "attn", size, allowed if norm else 0.5, says, layer, head)


def _part(name: str) -> str:
    """The part of the model that a tensor belongs to, by its name."""
    inside = LAYER.sub(".", f".{name}").lower()
    if any(word in inside for word in ("norm", "ln_", "ln1", "ln2")):
        return "norm"
    if layer_of(name) is None:
        return "head" if "head" in inside or "embed_out" in inside else "embed"
    return "attn" if "att" in inside else "mlp"


# Norms of weights, which part they are of, and what they are products of: an error of each factor adds to that of the product.
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
    """Norms of weights by layer and head, and of every tensor. Raises NotApplicable where the records share none."""
    found = _tensor_norms(old, new)
    layers = layer_rounding(old, new)
    d_model = old.metadata["d_model"]
    for name, (part, factors) in NORMS.items():
        before, after = (record.arrays.get(f"weights/{name}") for record in (old, new))
        needed = {f"weights/{factor}" for factor in factors}
        if before is None or after is None or before.shape != after.shape or not needed <= set(old.arrays):
            continue
        rounding = np.broadcast_to(layers[: len(before)].reshape(-1, *[1] * (before.ndim - 1)), before.shape)
        # Relative to the norm: a folded matrix carries the error of a gain too. Norms of products are taken in fp32 at worst.
        allowed = 2 * rounding + np.sqrt(d_model) * FP32
        if factors:
            sizes = [_of_heads(old.arrays[f"weights/{factor}"], before.shape) for factor in factors]
            allowed = 2 * allowed * sizes[0] * sizes[1] / np.maximum(before, 1e-30)
        size = np.abs(after - before) / np.maximum(before, 1e-30)
        for index in np.ndindex(*before.shape):
            head = index[1] if len(index) > 1 else None
            # No matrix of a layer has more than (4 d_model)² numbers.
            small = _subnormal(float(rounding[index]), 4 * d_model, float(before[index]))
            says = _from_to(float(before[index]), float(after[index]))
            found.append(Difference(f"‖{name}‖", part, float(size[index]), float(allowed[index]) + small, says, index[0], head))
    if not found:
        raise NotApplicable("the records share no norms of weights")
    return found


def _tensor_norms(old: Record, new: Record) -> list[Difference]:
    """Norms of all tensors of the same shape: a bound that sketches, which see a fraction of a small move, do not replace."""
    if "sketch/norms" not in old.arrays or "sketch/norms" not in new.arrays:
        return []
    before, after, rounding = _tensors(old), _tensors(new), tensor_rounding(old, new)
    found = []
    for name in before:
        if name in after and after[name].shape == before[name].shape and before[name].norm:
            one, other = before[name].norm, after[name].norm
            allowed = rounding[name] + _subnormal(rounding[name], float(np.sqrt(np.prod(before[name].shape))), one)
            says = _from_to(one, other)
            found.append(Difference(f"‖{name}‖", _part(name), abs(other - one) / one, allowed, says, layer_of(name)))
    return found


def _from_to(before: float, after: float) -> str:
    return f"{before:.4g} in the baseline, now {after:.4g} ({after / max(before, 1e-30) - 1:+.2%})"


def _of_heads(norms: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Norms by head, those of grouped heads repeated."""
    return norms if norms.ndim == 1 else norms.repeat(shape[1] // norms.shape[1], axis=1)


ACTIVATIONS = {"resid": "stream", "attn_out": "attn", "mlp_out": "mlp"}


def compare_activations(old: Record, new: Record) -> list[Difference]:
    """Log norms of the stream and of what is added to it, by layer, over the tokens of prompts that both were measured on.

    Raises NotApplicable where they share no prompts, or the baseline does not say what rounding does to it.
    """
    _refuse_routers(old, new)
    before, after = shared_tokens(old, new)
    found: list[Difference] = []
    for name, part in ACTIVATIONS.items():
        if f"rounding/{name}" not in old.arrays or (name != "resid" and f"stream/{name}" not in new.arrays):
            continue
        norms = [
            record.resid[:, tokens] if name == "resid" else record.array(f"stream/{name}")[:, tokens]
            for record, tokens in ((old, before), (new, after))
        ]
        if norms[0].shape != norms[1].shape:
            raise NotApplicable("the models have different depths")
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.abs(np.log(norms[1].astype(float)) - np.log(norms[0].astype(float)))
        change[norms[0] == norms[1]] = 0
        size = np.sqrt((change**2).mean(1))
        for layer, (difference, allowed) in enumerate(zip(size, _allowed(old, new, name), strict=True)):
            says = f"norms differ by {difference:.3%}, root mean square over {len(before)} tokens"
            found.append(Difference(f"‖{name}‖", part, float(difference), float(allowed), says, layer))
    if not found:
        raise NotApplicable("the baseline does not say what rounding does to it; measure it again")
    return found


def compare_predictions(old: Record, new: Record) -> list[Difference]:
    """Tokens of the prompts, and losses over prompts of the same tokens. Raises NotApplicable likewise."""
    rows = [_rows(record) for record in (old, new)]
    texts = [record.metadata.get("texts_sha256") for record in (old, new)]
    n_old, n_shared = len(rows[0]), len(rows[0].keys() & rows[1].keys())
    if n_shared == 0 and (texts[0] != texts[1] or old.metadata.get("sampled")):
        raise NotApplicable("the two were measured on other prompts")
    says = f"{n_shared} of {n_old} prompts of the baseline have the same tokens"
    found = [Difference("tokens of the prompts", "tokenizer", 1 - n_shared / n_old, 0.5 / n_old, says)]
    if n_shared == 0:
        return found
    _refuse_routers(old, new)
    if "rounding/loss" not in old.arrays or "prediction/loss" not in new.arrays:
        raise NotApplicable("a record has no losses, or the baseline does not say what rounding does to it")
    before, after = shared_tokens(old, new)
    losses = [r.array("prediction/loss")[tokens].astype(float) for r, tokens in ((old, before), (new, after))]
    agreed = float((old.array("prediction/first")[before] == new.array("prediction/first")[after]).mean())
    size = float(np.sqrt(((losses[1] - losses[0]) ** 2).mean()))
    says = (
        f"{losses[0].mean():.4f} nats in the baseline, now {losses[1].mean():.4f}, single tokens differ by {size:.4f}; "
        f"{agreed:.1%} of most likely tokens agree"
    )
    return [Difference("loss", "predictions", size, float(_allowed(old, new, "loss")[0]), says), *found]


def _refuse_routers(old: Record, new: Record) -> None:
    """Raise NotApplicable for a mixture of experts in another dtype: a router may choose others for a rounding error."""
    config = old.metadata.get("config") or {}
    experts = [value for name, value in config.items() if name.endswith("experts") and isinstance(value, int)]
    if max(experts, default=0) > 1 and weight_rounding(old, new) > FP32:
        raise NotApplicable("rounding makes routers choose other experts, so what it does to this model has no bound")


def _allowed(old: Record, new: Record, name: str) -> np.ndarray:
    """The root mean square that rounding explains, by layer.

    Mean squares of the `rounding` draws, each a weighted sum of squares of normal variables, are taken for chi-squared with
    the degrees of freedom that their scatter shows in the layer where it is largest, at least one (Satterthwaite 1946): a few
    tokens whose outputs nearly cancel may make most of a layer's change. A new one exceeds F times their mean once in as many
    comparisons as FALSE_ALARMS says.
    """
    from scipy.special import fdtri

    squares = old.array(f"rounding/{name}").astype(float) ** 2
    draws = len(squares)
    scatter = squares.var(0, ddof=1) / np.maximum(squares.mean(0), 1e-300) ** 2
    freedom = max(1.0, 2 / max(float(scatter.max()), 1e-3))
    comparisons = 3 * (old.n_layers + 1) + 1
    quantile = float(fdtri(freedom, draws * freedom, 1 - FALSE_ALARMS / comparisons))
    weights = weight_rounding(old, new)
    # Arithmetic is fp32: sums of d_model terms in another order are off by the root of their number (Higham 2002, §4.2).
    arithmetic = np.sqrt(old.metadata["d_model"]) * FP32
    size = np.hypot(weights if weights > FP32 else 0.0, arithmetic)
    return np.asarray(np.sqrt(quantile * squares.mean(0)) * size + 4 * FP32)


def rows_to_share(old: Record) -> Prompts | None:
    """The baseline's tokens where it wrote its prompts itself, so that another model is measured on them and not on its own."""
    if not old.metadata.get("sampled") or "prediction/token" not in old.arrays:
        return None
    token, prompt = old.array("prediction/token"), old.array("stream/prompt")
    rows = [token[prompt == n].tolist() for n in np.unique(prompt)]
    return Prompts(rows, f"the baseline's: {old.metadata['prompts']}", old.metadata["bos"], sampled=True)


def shared_tokens(old: Record, new: Record) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the tokens of prompts that are the same in both, in the baseline's order. Raises NotApplicable for none."""
    rows = [_rows(record) for record in (old, new)]
    pairs = [(index, rows[1][key]) for key, index in rows[0].items() if key in rows[1]]
    if not pairs:
        raise NotApplicable("the two were not measured on a single prompt of the same tokens")
    before, after = zip(*pairs, strict=True)
    return np.concatenate(before), np.concatenate(after)


def _rows(record: Record) -> dict[tuple[int, ...], np.ndarray]:
    """Where each prompt's tokens are, by its ids."""
    if "prediction/token" not in record.arrays:
        raise NotApplicable("a record does not hold the tokens that it was measured on")
    prompt, token = record.array("stream/prompt"), record.array("prediction/token")
    return {tuple(token[prompt == n].tolist()): np.flatnonzero(prompt == n) for n in np.unique(prompt)}


KINDS: dict[str, Callable[[Record, Record], list[Difference]]] = {
    "config": compare_config,
    "weights": compare_weights,
    "norms": compare_norms,
    "activations": compare_activations,
    "predictions": compare_predictions,
}


def beyond(found: list[Difference]) -> list[Difference]:
    """The differences that exceed what is allowed, largest first."""
    return sorted((one for one in found if one.excess > 1), key=lambda one: (-min(one.excess, 1e300), one.where))


def summary(found: list[Difference], listed: int = 3) -> str:
    """What differs, largest first, and how much was compared."""
    differing = beyond(found)
    if not differing:
        return f"{len(found):,} compared"
    where = "" if nearest_layers(differing) == "no layer" else f", {nearest_layers(differing)}"
    more = f"; {len(differing) - listed:,} more" if len(differing) > listed else ""
    return f"{len(differing):,} of {len(found):,} differ{where}: {'; '.join(map(str, differing[:listed]))}{more}"


def verdict(found: list[Difference]) -> dict[str, Any]:
    """What a law says of a kind: the arguments of `check`, but for the band. value: the largest excess."""
    details = list(map(str, beyond(found)[:LISTED]))
    value = max(one.excess for one in found)
    return {"value": value, "what": "largest difference over what is allowed", "of": summary(found), "details": details}


def table(found: dict[str, list[Difference]], listed: int | None) -> tuple[list[str], bool]:
    """All comparisons as lines for a terminal, the largest of each kind first, and whether anything differs."""
    lines: list[str] = []
    for kind, compared in found.items():
        differing = beyond(compared)
        where = f", {nearest_layers(differing)}" if differing and nearest_layers(differing) != "no layer" else ""
        lines.append(f"{kind}: {len(differing):,} of {len(compared):,} differ{where}")
        shown = differing if listed is None else differing[:listed]
        width = max((len(one.where) for one in shown), default=0)
        lines += [f"  {one.where:<{width}}  {one.says}  ({one.excess:,.1f}× what is allowed)" for one in shown]
        if len(shown) < len(differing):
            lines.append(f"  {len(differing) - len(shown):,} more; --all prints them")
    missing = [kind for kind in KINDS if kind not in found]
    if missing:
        lines.append(f"not compared, for want of data in one of the two: {', '.join(missing)}")
    return lines, any(beyond(compared) for compared in found.values())


def nearest_layers(found: list[Difference]) -> str:
    """The layers of some differences, in words: `layer 3`, `layers 3 to 7`, or `no layer`."""
    layers = sorted({one.layer for one in found if one.layer is not None})
    if not layers:
        return "no layer"
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
