"""The changes of a checkpoint that undo what conversions do wrong, in words, and which of them are
improvements beyond chance.
"""

from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np

from streamgauge.numerics.student_t import quantile

FALSE_ALARM = 1e-3  # of a whole search: the chance that a sound checkpoint is called faulty
LOOKS = 2  # how often a candidate may be tested: after a third of the rows, and after the last
LEAST = 0.01  # nats a token by which a change must lower the loss to be looked for
NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")


@dataclass(frozen=True)
class Kind:
    """A change of a part (attn, mlp, norm, layer or model): what the model then has, and what that
    says of the file where the loss is lower so.
    """

    part: str
    having: str
    fault: str


PLACED = "something is wrong there that no repair that was tried undoes"
ORDER = "they are probably in another order in the file"
SIGN = "its sign is probably wrong in the file"
KINDS = {
    "without attn": Kind("attn", "the attention left out", ""),
    "without mlp": Kind("mlp", "the MLP left out", ""),
    "without layer": Kind("layer", "the layer left out", ""),
    "layers exchanged": Kind("layer", "this layer and the next exchanged", ORDER),
    "W_O sign": Kind("attn", "the sign of W_O (or W_V) turned", SIGN),
    "W_in sign": Kind("mlp", "the sign of W_in turned", SIGN),
    "W_out sign": Kind("mlp", "the sign of W_out turned", SIGN),
    "W_gate W_in": Kind("mlp", "gate and up exchanged", "they are probably exchanged in the file"),
    "rotary from pairs": Kind(
        "attn",
        "the rotary halves of W_Q and W_K apart",
        "their rows are probably interleaved in the file",
    ),
    "rotary to pairs": Kind(
        "attn",
        "the rotary halves of W_Q and W_K interleaved",
        "their rows were probably taken apart once too often",
    ),
    "heads from tiled": Kind(
        "attn",
        "the query heads of a group side by side",
        "grouped heads are probably tiled in the file instead of repeated",
    ),
    "heads to tiled": Kind(
        "attn",
        "the query heads tiled over the groups",
        "grouped heads are probably repeated in the file instead of tiled",
    ),
}
KINDS |= {
    f"{role} transposed": Kind(
        "mlp" if role in ("W_in", "W_out") else "attn",
        f"{role} transposed",
        "it is probably transposed in the file",
    )
    for role in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out")
}
KINDS |= {
    f"Q K V from {''.join(order)}": Kind(
        "attn", f"W_Q, W_K and W_V read as W_{', W_'.join(order)}", ORDER
    )
    for order in permutations("QKV")
    if order != tuple("QKV")
}
KINDS |= {
    f"{heads} heads {step}": Kind(
        "attn",
        f"the heads of {heads} " + ("in reverse" if step == "reversed" else f"moved {step}"),
        ORDER,
    )
    for heads in ("W_O", "W_K and W_V")
    for step in ("up", "down", "reversed")
}
KINDS |= {
    f"{one} {other}": Kind(
        "norm", f"{one} and {other} exchanged", "they are probably exchanged in the file"
    )
    for one, other in combinations(NORMS, 2)
}
KINDS |= {
    f"{one} {other} gains": Kind(
        "norm",
        f"the gains of {one} and {other} exchanged",
        "these are probably exchanged in the file",
    )
    for one, other in combinations(NORMS, 2)
}
KINDS |= {
    f"{norm} gain {step}": Kind("norm", f"the gain of {norm} {words}", fault)
    for norm in NORMS
    for step, words, fault in (
        ("+1", "larger by 1", "1 is probably subtracted from it in the file"),
        ("-1", "smaller by 1", "1 is probably added to it in the file"),
        ("as 1", "left out", "it is probably folded into the weights behind it already"),
    )
}


def paired(differences: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Mean change a token and its standard error, nats, from sums of differences by row and how
    many tokens each row has; both are infinite where a row's is, and the error where there is one
    row.
    """
    each, n = differences / tokens.mean(), len(differences)
    if not np.isfinite(each).all():
        return np.inf, np.inf
    error = float(each.std(ddof=1) / n**0.5) if n > 1 else np.inf
    return float(each.mean()), error


def upper_bounds(
    change: np.ndarray, error: np.ndarray, rows: np.ndarray, chance: np.ndarray
) -> np.ndarray:
    """What the loss changes by at most, by candidate: one-sided bounds that hold for all of them
    together but for a chance of FALSE_ALARM.

    change, error: mean over rows and its standard error, nats a token; rows: how many; chance: the
    probability of the same signed ranks where the change is symmetric around 0 (Wilcoxon 1945).
    Bounds take means over rows for normal. Where ranks, which take nothing for normal, do not rule
    out 0, a bound is 0 or above: few rows of heavy tails make no improvement. The number of
    candidates is that of all that were raced, which does not depend on the rows that they are raced
    on; one that is dropped early loses its chance to be wrong, and LOOKS shares of FALSE_ALARM pay
    for testing the others more than once.
    """
    if not len(change):
        return np.zeros(0)
    level = FALSE_ALARM / LOOKS / len(change)
    factors = {n: quantile(1 - level, n - 1) for n in map(int, np.unique(rows)) if n > 1}
    bounds = change + np.array([factors.get(int(n), np.inf) for n in rows]) * error
    certain: np.ndarray = np.where(chance < level, bounds, np.maximum(bounds, 0.0))
    return certain


def findings(
    kinds: list[str], layers: np.ndarray, change: np.ndarray, certain: np.ndarray
) -> list[int]:
    """The changes that are certain to help, those that help most first; a repair of a sublayer only
    where it does better than leaving the sublayer out.

    certain: whether each is.
    """
    order = [int(n) for n in np.argsort(change, kind="stable") if certain[n]]
    without = {
        (int(layers[n]), kinds[n].removeprefix("without ")): float(change[n])
        for n in range(len(kinds))
        if kinds[n].startswith("without ")
    }

    def beaten(n: int) -> bool:
        known = KINDS.get(kinds[n])
        rival = without.get((int(layers[n]), known.part)) if known else None
        return rival is not None and not kinds[n].startswith("without ") and rival <= change[n]

    return [n for n in order if not beaten(n)] or order


def said(kind: str, layer: int, change: float, error: float, tokens: int) -> str:
    """As `layer 12 mlp: with gate and up exchanged the loss is 0.189 nats a token lower (t -14.2,
    3,810 tokens): they are probably exchanged in the file`.

    layer: -1 for the whole model.
    """
    known = KINDS.get(kind) or Kind("model", kind, "that is probably what the weights belong to")
    where = "the whole model" if layer < 0 else f"layer {layer}"
    where += f" {known.part}" if known.part in ("attn", "mlp") else ""
    lower = (
        f"the loss is {-change:.3g} nats a token lower (t {change / error:.1f}, {tokens:,} tokens)"
    )
    return f"{where}: with {known.having} {lower}: {known.fault or PLACED}"
