"""The changes of a checkpoint that undo what conversions do wrong, in words, and which of them are
improvements beyond chance.
"""

from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np

from streamgauge.numerics.student_t import quantile

FALSE_ALARM = 1e-3  # of a whole search: the chance that a sound checkpoint is called faulty
LOOKS = 2  # how often a candidate may be tested: after a third of the rows, and after the last
# A parabola whose slope at its end is half its fall has its lowest point half as far again.
UNDOES = 0.5
FOREIGN = 1.0  # nats a token
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


UNKNOWN = "what is wrong is not known, as no change that was tried undoes it"
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


KINDS |= {
    f"{role} over ln2": Kind(
        "mlp",
        f"the gain of ln2 taken out of {role}",
        "it is probably folded into that matrix already",
    )
    for role in ("W_in", "W_gate")
}


def paired(differences: np.ndarray, tokens: np.ndarray) -> tuple[float, float, float]:
    """Mean change a token and its standard error, nats, and the skewness of rows, from sums of
    differences by row and how many tokens each row has.

    Mean and error are infinite where a row's is, and the error where there is one row.
    """
    each, n = differences / tokens.mean(), len(differences)
    if not np.isfinite(each).all():
        return np.inf, np.inf, 0.0
    spread = float(each.std())
    skew = float(((each - each.mean()) ** 3).mean()) / spread**3 if spread else 0.0
    error = float(each.std(ddof=1) / n**0.5) if n > 1 else np.inf
    return float(each.mean()), error, skew


def upper_bounds(
    change: np.ndarray, error: np.ndarray, rows: np.ndarray, skew: np.ndarray
) -> np.ndarray:
    """What the loss changes by at most, by candidate: one-sided bounds that hold for all of them
    together but for a chance of FALSE_ALARM.

    change, error, skew: mean over rows and its standard error, nats a token, and the rows'
    skewness; rows: how many. Student's t, with Hall's cubic correction (1992) where a few rows
    change much more for the worse than the others, which would pass for an improvement. Simulated
    on 64 rows: the chance is as stated for normal changes, less for heavy tails, and 2.5 times as
    much for changes as skewed as an exponential distribution (21 times without the correction).
    The number of candidates is that of all that were raced, which does not depend on the rows that
    they are raced on; one that is dropped early loses its chance to be wrong, and LOOKS shares of
    FALSE_ALARM pay for testing the others more than once.
    """
    if not len(change):
        return np.zeros(0)
    level = FALSE_ALARM / LOOKS / len(change)
    factors = {n: quantile(1 - level, n - 1) for n in map(int, np.unique(rows)) if n > 1}
    t = np.array([factors.get(int(n), np.inf) for n in rows])
    bent = np.maximum(skew, 1e-9) / (3 * rows**0.5)
    bounds: np.ndarray = change + error * (1 - np.cbrt(1 - 3 * bent * (t + bent / 2))) / bent
    return bounds


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
    3,810 tokens)`; layer: -1 for the whole model.
    """
    known = KINDS.get(kind) or Kind("model", kind, "")
    where = "the whole model" if layer < 0 else f"layer {layer}"
    where += f" {known.part}" if known.part in ("attn", "mlp") else ""
    lower = f"{-change:.3g} nats a token lower (t {change / error:.1f}, {tokens:,} tokens)"
    return f"{where}: with {known.having} the loss is {lower}"


def cause(kind: str, change: float, slope: float) -> str:
    """As `they are probably exchanged in the file`.

    slope: how the loss goes on beyond a repair. It is flat at the lowest point; where it is steeper
    than UNDOES of the whole change, that lies elsewhere, and the repair is not what the file needs.
    """
    fault = KINDS[kind].fault if kind in KINDS else "the weights probably belong to that"
    return UNKNOWN if abs(slope) > UNDOES * -change or not fault else fault


def is_foreign(change: float, excess: float) -> bool:
    """Whether text is of another kind than the model was trained on, so that a change which lowers
    the loss says nothing of the file.

    excess: of the loss, with the change, over what the model itself expects (the entropy of its
    predictions), nats a token. On text of its kind a model expects about the loss that it has: 0.06
    to 0.89 in nine pairs of a sound model and a text, 1.32 to 4.1 in three pairs that do not fit. A
    fault that was lifted in part may leave more, but then the change itself is large.
    """
    return excess > FOREIGN and -change < excess
