"""Norms of the stream and of what is added to it, over the tokens of prompts that both were
measured on.
"""

import numpy as np

from streamgauge.compare.difference import FALSE_ALARMS, Difference
from streamgauge.compare.rounding import FP32, coarsest, weight_rounding
from streamgauge.errors import NotApplicable
from streamgauge.record import Record

ACTIVATIONS = {"resid": "stream", "attn_out": "attn", "mlp_out": "mlp"}


def compare_activations(old: Record, new: Record, *, rewritten: bool = False) -> list[Difference]:
    """Log norms of the stream and of what is added to it, by layer, over the tokens of prompts that
    both were measured on.

    rewritten: whether other weights may stand for the same function, each rounded by itself to the
    dtype that it is stored in.
    Raises NotApplicable where they share no prompts, or the baseline does not say what rounding
    does to it.
    """
    refuse_routers(old, new)
    before, after = shared_tokens(old, new)
    found: list[Difference] = []
    for name, part in ACTIVATIONS.items():
        if f"rounding/{name}" not in old.arrays or (
            name != "resid" and f"stream/{name}" not in new.arrays
        ):
            continue
        norms = [
            record.resid[:, tokens]
            if name == "resid"
            else record.partial(f"stream/{name}")[:, tokens]
            for record, tokens in ((old, before), (new, after))
        ]
        if norms[0].shape != norms[1].shape:
            raise NotApplicable("the models have different depths")
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.abs(np.log(norms[1].astype(float)) - np.log(norms[0].astype(float)))
        change[norms[0] == norms[1]] = 0
        size = np.sqrt((change**2).mean(1))
        for layer, (difference, allowed) in enumerate(
            zip(size, _allowed(old, new, name, rewritten), strict=True)
        ):
            if np.isnan(norms[0][layer]).all() and np.isnan(norms[1][layer]).all():
                continue  # neither has such a sublayer there
            says = _from_to(norms[0][layer].astype(float), norms[1][layer].astype(float))
            found.append(
                Difference(f"‖{name}‖", part, float(difference), float(allowed), says, layer)
            )
    if not found:
        raise NotApplicable("the baseline does not say what rounding does to it; measure it again")
    return found


def _from_to(before: np.ndarray, after: np.ndarray) -> str:
    """Mean norms over tokens, their ratio, and how far single tokens go."""
    one, other = float(before.mean()), float(after.mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        single = np.where(before == after, 0, after / before - 1)
    spread = float(np.sqrt((single**2).mean()))
    return (
        f"mean norm {one:.4g} in the baseline, now {other:.4g} (×{other / max(one, 1e-30):.4g}); "
        f"single tokens change by {spread:.2%}, root mean square over {len(before)}"
    )


def refuse_routers(old: Record, new: Record) -> None:
    """Raise NotApplicable for a mixture of experts in another dtype: a router may choose others for
    a rounding error.
    """
    config = old.metadata.get("config") or {}
    experts = [
        value
        for name, value in config.items()
        if name.endswith("experts") and isinstance(value, int)
    ]
    if max(experts, default=0) > 1 and weight_rounding(old, new) > FP32:
        raise NotApplicable(
            "rounding makes routers choose other experts, so what it does to this model has no "
            "bound"
        )


def _allowed(old: Record, new: Record, name: str, rewritten: bool = False) -> np.ndarray:
    """The root mean square that rounding explains, by layer.

    Mean squares of the `rounding` draws, each a weighted sum of squares of normal variables, are
    taken for chi-squared with the degrees of freedom that their scatter shows in the layer where it
    is largest, at least one (Satterthwaite 1946): a few tokens whose outputs nearly cancel may make
    most of a layer's change. A new one exceeds F times their mean once in as many comparisons as
    FALSE_ALARMS says.
    """
    from scipy.special import fdtri

    squares = old.partial(f"rounding/{name}").astype(float) ** 2
    draws = len(squares)
    scatter = squares.var(0, ddof=1) / np.maximum(squares.mean(0), 1e-300) ** 2
    freedom = max(1.0, 2 / max(float(np.nanmax(scatter)), 1e-3))
    comparisons = 3 * (old.n_layers + 1) + 1
    quantile = float(fdtri(freedom, draws * freedom, 1 - FALSE_ALARMS / comparisons))
    weights = weight_rounding(old, new)
    if rewritten:
        weights = max(weights, coarsest(old, new))
    # Arithmetic is fp32: sums of d_model terms in another order are off by the root of their number
    # (Higham 2002, §4.2).
    arithmetic = np.sqrt(old.metadata["d_model"]) * FP32
    size = np.hypot(weights if weights > FP32 else 0.0, arithmetic)
    return np.asarray(np.sqrt(quantile * squares.mean(0)) * size + 4 * FP32)


def shared_tokens(old: Record, new: Record) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the tokens of prompts that are the same in both, in the baseline's order.

    Raises NotApplicable for none.
    """
    rows = [_rows(record) for record in (old, new)]
    pairs = [(index, rows[1][key]) for key, index in rows[0].items() if key in rows[1]]
    if not pairs:
        raise NotApplicable("the two were not measured on a single prompt of the same tokens")
    before, after = zip(*pairs, strict=True)
    return np.concatenate(before), np.concatenate(after)


def shared_rows(old: Record, new: Record) -> list[list[int]]:
    """The prompts' token ids that both were measured on; none where they share none."""
    try:
        theirs = _rows(new)
        return [list(row) for row in _rows(old) if row in theirs]
    except NotApplicable:
        return []


def _rows(record: Record) -> dict[tuple[int, ...], np.ndarray]:
    """Where each prompt's tokens are, by its ids."""
    if "prediction/token" not in record.arrays:
        raise NotApplicable("a record does not hold the tokens that it was measured on")
    prompt, token = record.array("stream/prompt"), record.array("prediction/token")
    return {
        tuple(token[prompt == n].tolist()): np.flatnonzero(prompt == n) for n in np.unique(prompt)
    }
