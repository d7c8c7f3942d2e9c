"""Two checkpoints, or two records, side by side: the verdict, what leads to it, and every
difference.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from streamgauge.apart import Pair, Parting, parting, search
from streamgauge.catalogued import location
from streamgauge.checkpoints.files import (
    Checkpoint,
    open_checkpoint,
    stored_shapes,
    tensor_reader,
)
from streamgauge.checkpoints.prompts import read_prompts
from streamgauge.checkpoints.tokenizers import describe_tokenizer, has_tokenizer, load_tokenizer
from streamgauge.compare import differences, refuse_routers, rows_to_share, shared_rows
from streamgauge.compare.difference import Difference, beyond
from streamgauge.compare.judgement import (
    DAMAGED,
    OTHER_RESULTS,
    OTHER_SETTINGS,
    QUANTISED,
    SAME_FUNCTION,
    Verdict,
    judge,
)
from streamgauge.compare.rounding import coarsest, weight_rounding
from streamgauge.compare.tensors import Change, Tensors, compare_tensors
from streamgauge.compare.tokenizers import (
    TokenizerDifference,
    beyond_the_table,
    compare_tokenizers,
)
from streamgauge.divergence import Divergence, divergence
from streamgauge.errors import NotApplicable, SettingsError
from streamgauge.measure import measure
from streamgauge.numerics.names import BESIDE
from streamgauge.progress import track
from streamgauge.record import Record, write_whole
from streamgauge.store import Store
from streamgauge.strategies import smallest

DRAWS, KEPT = 20, 20  # sequences that are drawn, and that are kept of earlier comparisons
# Verdicts after which it is worth while to look for the simplest tokens on which the two part.
SEARCHED = (SAME_FUNCTION, DAMAGED, OTHER_SETTINGS, OTHER_RESULTS)
SCHEMA = 1  # of what as_json gives
TEXTS = 200  # are drawn for two tokenizers that differ
COMPARED = ("stream", "weights", "sketch", "prediction", "rounding")  # groups that are looked at


@dataclass(frozen=True)
class Side:
    """One of the two: its record, and its files where it is a checkpoint."""

    record: Record
    checkpoint: Checkpoint | None


@dataclass(frozen=True)
class Comparison:
    """What was found: the verdict, all differences by kind, and, where both checkpoints were at
    hand, what became of each tensor and how the tokenizers differ.
    """

    verdict: Verdict
    differences: dict[str, list[Difference]]
    changes: list[Change] | None
    tokenizers: list[TokenizerDifference] | None
    divergence: Divergence | None = None
    parting: Parting | None = None
    drawn: int = 0  # sequences on which the two were seen side by side

    def as_json(self) -> dict[str, Any]:
        """What `diff --json` prints; docs/diff.schema.json describes it."""
        verdict = self.verdict
        return {
            "schema": SCHEMA,
            "verdict": verdict.kind,
            "says": verdict.says,
            "first": verdict.first,
            "agrees": verdict.agrees,
            "findings": [
                {
                    "kind": one.kind,
                    "says": one.says,
                    "layers": one.layers,
                    "tensors": [
                        {
                            "name": change.name,
                            "says": change.relation.says,
                            "size": _number(change.relation.size),
                            "cosine": _number(change.relation.cosine),
                        }
                        for change in one.changes
                    ],
                }
                for one in verdict.found
            ],
            "differences": {
                kind: [
                    {
                        "where": one.where,
                        "says": one.says,
                        "layer": one.layer,
                        "head": one.head,
                        "excess": _number(one.excess),
                    }
                    for one in beyond(found)
                ]
                for kind, found in self.differences.items()
            },
            "tokenizers": [asdict(one) for one in self.tokenizers or []],
            "every_number": self.changes is not None,
            "divergence": None if self.divergence is None else asdict(self.divergence),
            "drawn": self.drawn,
            "parting": None
            if self.parting is None
            else {
                "tokens": list(self.parting.tokens),
                "layer": self.parting.layer,
                "ratio": _number(self.parting.ratio),
                "says": str(self.parting),
            },
        }


def _number(value: float) -> float | None:
    """JSON has no NaN and no Inf."""
    return value if np.isfinite(value) else None


def diff(
    old: str,
    new: str,
    store: Store,
    *,
    prompts: Path | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
    verify: bool = False,
    logits: bool = False,
    draws: int | None = None,
    tokens: Sequence[int] | None = None,
    show: bool = False,
) -> Comparison:
    """Compare two checkpoints or records, each a folder, a name or FILE.safetensors of `measure`.

    Checkpoints are measured where the store has no record of them, the new one on the old one's
    prompts, and their tensors are read one after the other. verify: whether weight files are held
    to the hashes published for them first. logits: whether both are run side by side for their KL
    divergence, as they are where the new one is a quantisation. draws: how many sequences of tokens
    hypothesis draws to find where the two part, by default DRAWS where that is not plain from the
    verdict; tokens: the one sequence to look at instead. Raises StreamgaugeError.
    """

    def side(name: str, rows: Any = None) -> Side:
        if Path(name).is_file() and not name.endswith(".gguf"):
            return Side(Record.load(name), None)
        checkpoint = open_checkpoint(
            location(name), allow_pickle=allow_pickle, verify=verify, store=store.folder
        )
        record = measure(
            checkpoint,
            store=store,
            prompts=prompts,
            device=device,
            groups=COMPARED,
            rows=rows,
            show=show,
        )
        return Side(record, checkpoint)

    before = side(old)
    after = side(new, rows_to_share(before.record))
    found, changes, tokenizers = differences(before.record, after.record), None, None
    if before.checkpoint and after.checkpoint:
        changes = read_both(before.checkpoint, after.checkpoint, before.record, show)
        tokenizers = compare_both(before.checkpoint, after.checkpoint)
    other = None if tokenizers is None else matters(tokenizers)
    verdict = judge(before.record, after.record, found, changes, other)
    apart = None
    if before.checkpoint and after.checkpoint and (logits or verdict.kind == QUANTISED):
        rows = shared_rows(before.record, after.record)
        apart = divergence(before.checkpoint, after.checkpoint, rows, device, show)
    drawn = draws if draws is not None else DRAWS * (verdict.kind in SEARCHED)
    parted = None
    if drawn or tokens:
        why = _not_searched(before, after)
        if why and (tokens or draws):
            raise SettingsError(f"no tokens can be put to both: {why}.")
        if why:
            drawn = 0
        else:
            parted = _search(before, after, store, drawn, tokens, device)
    if parted and verdict.kind == SAME_FUNCTION:
        says = f"damaged: {parted}, though the prompts do not show it; {verdict.says}"
        verdict = replace(verdict, kind=DAMAGED, says=says)
    return Comparison(verdict, found, changes, tokenizers, apart, parted, drawn)


def _not_searched(old: Side, new: Side) -> str | None:
    """Why the two cannot be put to the same tokens, None where they can."""
    if old.checkpoint is None or new.checkpoint is None:
        return "one of the two is a record, which does not run"
    if old.record.n_layers != new.record.n_layers:
        return "they have different depths"
    if old.record.metadata["d_model"] != new.record.metadata["d_model"]:
        return "they have different widths"
    if {"stream", "prediction"} & set(new.record.metadata["failed"]):
        return "the new one cannot be run"
    try:
        refuse_routers(old.record, new.record)
    except NotApplicable as error:
        return str(error)
    return None


def _search(
    old: Side, new: Side, store: Store, draws: int, tokens: Sequence[int] | None, device: str
) -> Parting | None:
    """Where two checkpoints part. What was found is kept beside the records, for the comparisons
    with the same baseline that follow.
    """
    assert old.checkpoint and new.checkpoint
    unit = max(weight_rounding(old.record, new.record), coarsest(old.record, new.record))
    pair = Pair(old.checkpoint, new.checkpoint, unit, device)
    if tokens:
        return parting(pair, tokens)
    file = store.folder / "partings" / f"{old.record.metadata['weights_sha256']}.json"
    try:
        known = [[int(n) for n in ids] for ids in json.loads(file.read_text())][:KEPT]
    except (OSError, ValueError, TypeError):
        known = []
    found = search(pair, shared_rows(old.record, new.record), draws, known)
    if found is not None:
        file.parent.mkdir(exist_ok=True)
        kept = [list(found.tokens), *(ids for ids in known if ids != list(found.tokens))]
        write_whole(file, json.dumps(kept[:KEPT]).encode())
    return found


def read_both(old: Checkpoint, new: Checkpoint, record: Record, show: bool = False) -> list[Change]:
    """What became of each tensor, by the files of both checkpoints.

    What lies beside a language model is left out where one of the two has none of it.
    """
    config = record.metadata.get("config") or {}
    heads = config.get("num_attention_heads") or config.get("n_head")
    d_head = config.get("head_dim") or (heads and record.metadata["d_model"] // heads)
    shapes = [stored_shapes(checkpoint) for checkpoint in (old, new)]
    if not all(any(map(BESIDE.search, own)) for own in shapes):
        shapes = [{n: s for n, s in own.items() if not BESIDE.search(n)} for own in shapes]
    before, after = (
        Tensors(own, tensor_reader(checkpoint), d_head)
        for own, checkpoint in zip(shapes, (old, new), strict=True)
    )
    names = track(list(before.shapes), "tensors of both", show)
    return list(compare_tensors(before, after, names))


def compare_both(old: Checkpoint, new: Checkpoint) -> list[TokenizerDifference]:
    """How the tokenizers differ, by the files of both checkpoints, and the shortest text that they
    encode otherwise where hypothesis finds one.

    A part that is another and changes no text that was drawn counts as changing none. Of a
    checkpoint that was made of another format its tokens count and no more: such files say less.
    """
    described = [describe_tokenizer(checkpoint.folder) for checkpoint in (old, new)]
    is_made = bool(old.origin or new.origin)
    if is_made and None in described:
        return []
    if None in described and all(has_tokenizer(checkpoint.folder) for checkpoint in (old, new)):
        # Files of another kind, which texts alone can hold against each other.
        apart = text_apart(old.folder, new.folder)
        says = f"the text {apart!r} has other tokens"
        return [] if apart is None else [TokenizerDifference(says, encodes=True)]
    found = compare_tokenizers(*described)
    out = _rows(new) and beyond_the_table(described[1], _rows(new))
    if out and not beyond_the_table(described[0], _rows(old) or _rows(new)):
        found.insert(0, TokenizerDifference(out, encodes=True))
    if is_made:
        return [one for one in found if one.encodes and not one.is_role and not one.is_part]
    if None not in described and any(one.encodes for one in found):
        apart = text_apart(old.folder, new.folder)
        if apart is None:
            found = [
                replace(one, encodes=one.encodes and (one.is_certain or not one.is_part))
                for one in found
            ]
        else:
            found.append(TokenizerDifference(f"the text {apart!r} has other tokens", encodes=True))
    return found


def matters(tokenizers: Sequence[TokenizerDifference]) -> list[str]:
    """The differences that a verdict goes by: what changes how texts are encoded, or the tokens
    that have a role.
    """
    return [one.says for one in tokenizers if one.encodes or one.is_role]


def text_apart(old: Path, new: Path) -> str | None:
    """The simplest text that two folders' tokenizers encode otherwise, None where none was drawn:
    the built-in prompts, special tokens, and any characters.
    """
    tokenizers = load_tokenizer(old), load_tokenizer(new)
    if None in tokenizers:
        return None

    def differs(text: str) -> bool:
        one, other = (tokenizer(text)["input_ids"] for tokenizer in tokenizers)
        return bool(one != other)

    prompts = read_prompts(None)
    words = {word for text in prompts for word in text.split(" ")}
    special = {token for tokenizer in tokenizers for token in tokenizer.all_special_tokens}
    pieces = st.one_of(st.sampled_from(sorted(words | special)), st.text(max_size=4))
    drawn = smallest(st.lists(pieces, max_size=8).map(" ".join), differs, TEXTS)
    if drawn is not None:
        return drawn
    return next((text for text in sorted([*words, *prompts], key=len) if differs(text)), None)


def _rows(checkpoint: Checkpoint) -> int:
    """How many tokens the embedding has rows for, by config.json."""
    config = checkpoint.config()
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0)
