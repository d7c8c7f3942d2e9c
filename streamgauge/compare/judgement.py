"""The verdict on two checkpoints in one sentence, and what leads to it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from streamgauge.compare.activations import compare_activations
from streamgauge.compare.difference import Difference, beyond
from streamgauge.compare.findings import Finding, findings, place_of
from streamgauge.compare.predictions import compare_predictions, mean_losses
from streamgauge.compare.relations import Relation
from streamgauge.compare.rounding import UNIT, weight_rounding
from streamgauge.compare.tensors import Change
from streamgauge.errors import NotApplicable, NotMeasured
from streamgauge.numerics.names import role_of
from streamgauge.record import Record

IDENTICAL, SAME_WEIGHTS, SAME_FUNCTION = "identical", "same weights", "same function"
QUANTISED, TRAINED, OTHER_MODEL = "quantised", "trained", "another model"
PARTLY_TRAINED = "partly trained"
DAMAGED, OTHER_SETTINGS, OTHER_TOKENIZER = "damaged", "other configuration", "other tokenizer"
OTHER_RESULTS = "other results"

# What passes where so much is to be the same, beside what a dtype rounds.
ACCEPTED: dict[str | None, tuple[str, ...]] = {
    None: (IDENTICAL, SAME_WEIGHTS),
    "function": (IDENTICAL, SAME_WEIGHTS, SAME_FUNCTION),
    "trained": (IDENTICAL, SAME_WEIGHTS, SAME_FUNCTION, TRAINED),
    "quantised": (IDENTICAL, SAME_WEIGHTS, SAME_FUNCTION, QUANTISED),
}
# Kinds of quantities that training and rounding to few bits move.
MOVED = ("weights", "norms", "activations", "predictions")
NAMED = 3  # findings that the first sentence names
BROAD = 0.8  # of a model's matrices are moved by training, or by rounding to few bits
ALIKE = 0.2  # cosine of weights that have something in common; that of strangers is about 0
OUTLIER = 5  # times the median of what rounding to few bits moved, and no rounding
GREW = 1.0  # times its norm is what training moves a gain at most where matrices move less
SCALED = 0.02  # training turns no matrix into so many times itself where others move less
COARSE = 0.35  # what rounding to few bits moves of a matrix at most: 2 bits move a third
# What happened to some tokens' rows of a table shows on some inputs alone, and no function is
# written otherwise by a few numbers.
PARTIAL = ("rows", "range", "cut", "shape")
SINGLE = ("numbers", "not finite")
IDLE = 0.1  # nats a token that rows more in the tables may cost
ROUNDED = ("few bits", "moved", "rounded to a dtype")  # what rounding to few bits looks like
# What training looks like; of rows, what became of them has to.
LEARNT = ("moved", "few bits", "low rank", "numbers", "padded", "rows")
# Entries that say how weights are written, and nothing of a function that was seen to agree.
LAYOUT = ("tie_word_embeddings", "vocab_size", "model_type")


# What became of tensors and of the tokenizer, by the files of two checkpoints; None of each where
# they were not compared.
Contents = tuple[Sequence[Change] | None, Sequence[str] | None]


@dataclass(frozen=True)
class Verdict:
    """What two checkpoints are to each other.

    kind: one of the words above; says: the sentence; found: what happened to tensors, by the order
    of the forward pass; agrees: whether activations and predictions do, as two ways of writing one
    function, None where that cannot be told; explained: whether rounding to the formats that the
    two say they are stored in explains all of it; beside: whether configuration or tokenizer differ
    as well; first: where the two part first.
    """

    kind: str
    says: str
    found: list[Finding] = field(default_factory=list)
    agrees: dict[str, bool | None] = field(default_factory=dict)
    explained: bool = False
    beside: bool = False
    first: str | None = None

    def passes(self, same: str | None = None) -> bool:
        """Whether the two are the same in the sense of ACCEPTED, by default but for rounding."""
        if self.beside and self.kind in (TRAINED, QUANTISED):
            return False
        return self.kind in ACCEPTED[same] or (self.kind == QUANTISED and self.explained)


def judge(
    old: Record,
    new: Record,
    compared: dict[str, list[Difference]],
    changes: Sequence[Change] | None = None,
    tokenizers: Sequence[str] | None = None,
) -> Verdict:
    """The verdict on two records.

    compared: what `differences` found; changes: of the tensors themselves where both were at hand,
    else sketches tell; tokenizers: what `compare_tokenizers` found to matter, None where tokenizers
    were not compared.
    """
    changes = _by_sketches(compared) if changes is None else list(changes)
    found, agrees = findings(changes), _agrees(old, new)
    settings = {one.name: f"{one.name} {one.says}" for one in beyond(compared.get("config", []))}
    if _is_rewritten(old, new, found, agrees):
        settings = {name: says for name, says in settings.items() if name not in LAYOUT}
    measured = beyond(compared.get("predictions", []) + compared.get("activations", []))
    tokens = list(tokenizers or [])
    if not tokens and not old.metadata.get("sampled"):  # or each wrote prompts of its own
        tokens = [one.says for one in measured if one.part == "tokenizer"]
    kind, says = _judge(old, new, changes, found, agrees, [*settings.values()], tokens)
    results = [str(one) for one in measured if one.part != "tokenizer"]
    if kind == IDENTICAL and tokenizers is None:
        says = "identical: the same weight files and configuration; tokenizers were not compared"
    failed = sorted(set(new.metadata["failed"].values()))
    if kind in (IDENTICAL, SAME_WEIGHTS) and failed:
        kind, says = OTHER_RESULTS, f"{says}, and it could not be measured: {_some(failed)}"
    elif kind in (IDENTICAL, SAME_WEIGHTS) and results:
        kind = OTHER_RESULTS
        says = f"{says}, and yet other results, whose cause is not known: {_some(results)}"
    explained = not any(beyond(own) for own in compared.values()) and not tokens
    beside = bool(settings or tokens)
    return Verdict(kind, says, found, agrees, explained, beside, _first(found, compared))


def refuse_where_free(same: str | None, kind: str) -> None:
    """Raise NotApplicable where --same lets a kind of quantity differ, and the verdict judges."""
    free = ("weights", "norms") if same == "function" else MOVED
    if same is not None and kind in free:
        raise NotApplicable(f"--same {same} lets {kind} differ; regression/verdict judges them")


def _by_sketches(compared: dict[str, list[Difference]]) -> list[Change]:
    """What sketches say of each tensor, and norms of those that moved too little for them; what
    rounding explains is no change.
    """
    norms = {one.name[1:-1]: one for one in beyond(compared.get("norms", []))}
    found = []
    for one in compared.get("weights", []):
        if one.relation is None:
            continue  # of a head
        if one.excess > 1 or (one.relation.kind == "same" and one.name not in norms):
            found.append(Change(one.name, one.relation))
        elif one.name in norms:
            norm = norms[one.name]
            told = Relation("moved", f"its norm {norm.says}", norm.size)
            found.append(Change(one.name, told))
    return found


def _agrees(old: Record, new: Record) -> dict[str, bool | None]:
    """Whether activations and losses agree as two ways of writing one function do, each rounded to
    its dtype; None where they cannot be compared.
    """
    agrees: dict[str, bool | None] = {}
    for name, compare in (
        ("activations", compare_activations),
        ("predictions", compare_predictions),
    ):
        try:
            agrees[name] = not beyond(compare(old, new, rewritten=True))
        except (NotApplicable, NotMeasured):
            agrees[name] = None
    return agrees


def _is_rewritten(
    old: Record, new: Record, found: list[Finding], agrees: dict[str, bool | None]
) -> bool:
    """Whether other weights stand for the same function: activations and losses agree, and nothing
    happened that prompts without the tokens concerned do not show.

    Rows more in the tables take their share of every prediction: a small one, or they are no idle
    rows.
    """
    partial = any(
        one.kind in SINGLE or (one.kind in PARTIAL and any(c.layer is None for c in one.changes))
        for one in found
    )
    if partial or weight_rounding(old, new) > UNIT["BF16"]:
        return False
    if found and all(one.kind == "padded" for one in found) and agrees["activations"]:
        before, after, _ = mean_losses(old, new)
        return after - before < IDLE
    return all(agrees.values())


def _judge(
    old: Record,
    new: Record,
    changes: list[Change],
    found: list[Finding],
    agrees: dict[str, bool | None],
    settings: list[str],
    tokenizers: list[str],
) -> tuple[str, str]:
    """The verdict's kind and sentence."""
    beside = settings + tokenizers
    broken = _broken(new)
    if broken:
        return DAMAGED, f"damaged: {'; '.join(broken[:NAMED])}"
    if not found:
        if settings:
            return OTHER_SETTINGS, f"the same weights, and another config.json: {_some(settings)}"
        if tokenizers:
            return OTHER_TOKENIZER, f"the same weights, and another tokenizer: {_some(tokenizers)}"
        return _same_weights(old, new)
    shapes = _shape(old), _shape(new)
    left = any(change.relation.is_same and change.is_matrix for change in changes)
    if shapes[0] != shapes[1] and left and all(o.kind in ("missing", "new") for o in found):
        says = _some([one.says for one in found])
        return DAMAGED, f"damaged: {shapes[0]} in the baseline, now {shapes[1]}: {says}"
    if shapes[0] != shapes[1]:
        return OTHER_MODEL, f"another model: {shapes[0]} in the baseline, now {shapes[1]}"
    more = f"; besides, {_some(beside)}" if beside else ""
    if tokenizers and all(one.kind == "padded" for one in found):
        says = _some([*(one.says for one in found), *tokenizers])
        return OTHER_TOKENIZER, f"the same weights, and another tokenizer: {says}"
    kind, says = _quantised(old, new, changes)
    if kind:
        return kind, says + more
    if not beside and _is_rewritten(old, new, found, agrees):
        how = _how(found)
        return SAME_FUNCTION, f"the same function in other weights{f': {how}' if how else ''}"
    kind, says = _trained(changes)
    if kind:
        return kind, says + more
    return DAMAGED, f"damaged: {_some([one.says for one in found])}{more}"


def _broken(new: Record) -> list[str]:
    problems = new.metadata.get("integrity") or {}
    return list(problems.get("not_finite", []))


def _some(lines: list[str]) -> str:
    more = f"; {len(lines) - NAMED:,} more" if len(lines) > NAMED else ""
    return "; ".join(lines[:NAMED]) + more


def _shape(record: Record) -> str:
    return f"{record.n_layers} layers of width {record.metadata['d_model']}"


def _same_weights(old: Record, new: Record) -> tuple[str, str]:
    dtypes = old.metadata["stored_dtype"], new.metadata["stored_dtype"]
    if dtypes[0] != dtypes[1]:
        return SAME_WEIGHTS, f"the same weights, stored as {dtypes[1]} where it was {dtypes[0]}"
    hashes = old.metadata.get("weights_sha256"), new.metadata.get("weights_sha256")
    if hashes[0] == hashes[1] and hashes[0] is not None:
        return IDENTICAL, "identical: the same weight files, configuration and tokenizer"
    return SAME_WEIGHTS, "the same weights, in other files"


def _how(found: list[Finding]) -> str:
    """How one function was written in other weights, where that is told."""
    if len(found) == len(found[0].changes) == 1 and found[0].kind != "padded":
        return found[0].says
    kinds = {one.kind for one in found}
    norms = [one for one in found for c in one.changes if c.part == "norm"]
    embeds = {c.relation.kind for one in found for c in one.changes if c.part == "embed"}
    said = []
    if (
        norms
        and kinds & {"constant", "offset"}
        and kinds & {"columns scaled", "rows scaled", "moved"}
    ):
        said.append("norms' gains folded into the next weights")
    if "rotated" in embeds:
        said.append("the stream rotated")
    elif "rotated" in kinds:
        said.append("queries and keys rotated together")
    if "order" in kinds:
        said.append("heads or neurons in another order")
    if "centred" in kinds:
        said.append("means taken out of what is written")
    if "padded" in kinds:
        said.append("tables with more rows")
    if not said and kinds & {"factor", "rows scaled", "columns scaled"}:
        said.append("matrices scaled against each other")
    if "fused" in kinds:
        said.append("matrices put together or taken apart")
    return ", ".join(said)


def _quantised(old: Record, new: Record, changes: list[Change]) -> tuple[str, str]:
    """Rounding to few bits: matrices are a little off, none by far more than the others.

    Where one of the two says that it is of such a format, or most matrices look it; what is not so
    is damaged beyond it.
    """
    matrices = [c for c in changes if c.is_matrix]
    moved = [c for c in matrices if not c.relation.is_same]
    said = [(r.metadata.get("converted_from") or {}).get("format") for r in (old, new)]
    formats = " and ".join(dict.fromkeys(name for name in said if name))
    rounded = sum(c.relation.kind == "few bits" for c in moved)
    if not moved or (not formats and rounded < BROAD * len(moved)):
        return "", ""
    limit = min(COARSE, OUTLIER * float(np.median([c.relation.size for c in moved])))

    def odd(change: Change) -> bool:
        """Whether a matrix moved as no rounding moves it, where no format says that it may."""
        told = change.relation
        return not formats and told.kind == "moved" and told.size > 0.3 * limit

    more = [
        c
        for c in changes
        if not c.relation.is_same
        and (c.relation.kind not in ROUNDED or not c.relation.size <= limit or odd(c))
    ]
    of = f" ({formats})" if formats else ""
    if more:
        if len(more) > len(moved) // 2:
            return "", ""
        return DAMAGED, f"damaged, beyond a quantisation{of}: " + _some(
            [one.says for one in findings(more)]
        )
    most = max(moved, key=lambda c: c.relation.size)
    least = min(c.relation.size for c in moved)
    return QUANTISED, (
        f"a quantisation of it{of}: {len(moved)} of {len(matrices)} matrices are off by "
        f"{least:.2g} to {most.relation.size:.2g} times their norms, the most {most.where}"
    )


def _trained(changes: list[Change]) -> tuple[str, str]:
    """Another state of training: most matrices moved, or some by matrices of low rank, none in a
    way that has a name, and they still have something in common.
    """
    matrices = [c for c in changes if c.is_matrix]
    moved = [c for c in matrices if not c.relation.is_same]
    plain = [c for c in moved if _is_learnt(c)]
    # Training may be of some kinds of matrices alone, as adapters' mostly is, but of these in the
    # whole depth.
    roles = {role_of(c.name) for c in moved}
    trained = [c for c in matrices if role_of(c.name) in roles]
    if not moved:
        return _partly_trained(changes)
    if len(plain) < BROAD * len(moved):
        return "", ""
    usual = float(np.median([c.relation.size for c in plain]))
    odd = [c for c in changes if _is_odd(c, usual)]
    is_adapted = not odd and all(
        c.relation.kind == "low rank" and c.relation.size < COARSE for c in moved
    )
    if len(moved) < BROAD * len(trained) and not is_adapted:
        return _partly_trained(changes)
    if not is_adapted and not any(c.layer is not None for c in plain):
        return "", ""
    cosine = float(np.mean([c.relation.cosine for c in plain]))
    if cosine < ALIKE:
        if len(moved) < BROAD * len(matrices):
            return "", ""
        return OTHER_MODEL, (
            f"another model of the same shape: its weights have nothing in common with the "
            f"baseline's (mean cosine {cosine:.2f})"
        )
    if odd:
        says = _some([one.says for one in findings(odd)])
        return DAMAGED, f"damaged, beyond further training: {says}"
    by = ", by matrices of low rank, as adapters are merged" if is_adapted else ""
    return TRAINED, (
        f"the same model trained further, or fine-tuned: {_amounts(moved, len(matrices))}{by}"
    )


def _is_learnt(change: Change) -> bool:
    """Whether what happened to a tensor has no name but training's."""
    return change.relation.kind in LEARNT and change.relation.inner in ("", *LEARNT)


def _is_odd(change: Change, usual: float) -> bool:
    """Whether training does this to no tensor, where matrices moved by so much."""
    told = change.relation
    if told.is_same:
        return False
    # Biases grow out of nothing, and in one direction; gains do not.
    is_gain = change.part == "norm" and not change.name.endswith("bias")
    is_bias = not change.is_matrix and not is_gain
    if told.kind == "factor" and told.factor is not None:
        return not is_bias and abs(told.factor - 1) > max(SCALED, OUTLIER * usual)
    if not _is_learnt(change):
        return True
    limit = max(COARSE if change.is_matrix else GREW, OUTLIER * usual)
    return not is_bias and not told.size <= limit


def _partly_trained(changes: list[Change]) -> tuple[str, str]:
    """Matrices of some layers, or biases alone, that moved as training moves them."""
    moved = [c for c in changes if not c.relation.is_same]
    usual = float(np.median([c.relation.size for c in moved]))
    if len({c.layer for c in moved} - {None}) < 2 or any(_is_odd(c, usual) for c in moved):
        return "", ""
    # Of a table a few rows are another matter, and so are a few numbers of a matrix.
    plain = [c for c in moved if c.relation.kind in ("moved", "few bits", "low rank")]
    rest = [c for c in moved if c not in plain]
    if any(c.is_matrix or c.relation.kind != "numbers" for c in rest):
        return "", ""
    if not plain:
        return "", ""
    return PARTLY_TRAINED, (
        f"moved in part: {_some([one.says for one in findings(plain)])}; the others are unchanged, "
        "as where they were frozen, or where files of two states of training were put together: "
        "which of the two is not known"
    )


def _amounts(moved: list[Change], count: int) -> str:
    sizes = [c.relation.size for c in moved]
    most = max(moved, key=lambda c: c.relation.size)
    return (
        f"{len(moved)} of {count} matrices moved by {min(sizes):.2g} to {max(sizes):.2g} times "
        f"their norms, the most {most.where}"
    )


def _first(found: list[Finding], compared: dict[str, list[Difference]]) -> str | None:
    """What differs first in the order of the forward pass, of weights, else of activations."""
    if found:
        return str(found[0].changes[0])
    moved = [one for one in compared.get("activations", []) if one.excess > 1]
    if not moved:
        return None
    return str(min(moved, key=lambda one: place_of(one.layer, one.part, one.name)))


def lines_of(verdict: Verdict, compared: int | None, listed: int | None) -> list[str]:
    """The verdict for a terminal: the sentence, where the two part first, and what happened to
    tensors. compared: how many of them were read; listed: how many findings, all where None.
    """
    lines = [verdict.says]
    if verdict.first and verdict.first not in verdict.says:
        lines.append(f"first, in the order of the forward pass: {verdict.first}")
    if compared is not None:
        count = sum(len(one.changes) for one in verdict.found)
        lines.append(f"tensors: {count:,} of {compared:,} differ, every number compared")
    if len(verdict.found) > 1:
        shown = verdict.found if listed is None else verdict.found[:listed]
        lines += [f"  {one.says}" for one in shown]
        if len(shown) < len(verdict.found):
            lines.append(f"  {len(verdict.found) - len(shown):,} more; --all prints them")
    return lines
