"""Two tokenizers: what differs, and whether it changes how text is encoded."""

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any

LISTED = 3  # tokens that are named
# What a tokenizer is described by (see `checkpoints.tokenizers`), and what each is called. Of the
# first texts are encoded; the others come to bear behind it or beside it.
ENCODING = {
    "model": "kind of tokenizer",
    "merges": "merges",
    "scores": "scores of tokens",
    "added": "way to match added tokens",
    "normalizer": "normaliser",
    "pre_tokenizer": "pre-tokeniser",
    "post_processor": "post-processor",
}
BESIDE = {"decoder": "decoder", "chat_template": "chat template"}

Described = Mapping[str, Any]


@dataclass(frozen=True)
class TokenizerDifference:
    """One thing that differs: what, in words; whether texts may be encoded otherwise for it.

    is_part: of a step of encoding, which texts may never take; is_role: of a special token's, or
    what stands beside encoding; is_certain: encodes some text otherwise, whether it was tried or
    not.
    """

    says: str
    encodes: bool
    is_part: bool = False
    is_role: bool = False
    is_certain: bool = False


def compare_tokenizers(old: Described | None, new: Described | None) -> list[TokenizerDifference]:
    """What differs between two tokenizers, as `describe_tokenizer` describes them.

    Where either has none there is nothing to compare, and one that is gone is a difference.
    """
    if old is None and new is None:
        return []
    if old is None or new is None:
        gone = "the tokenizer is new" if old is None else "the tokenizer is gone"
        return [TokenizerDifference(gone, encodes=True)]
    found = _tokens(old["vocabulary"], new["vocabulary"])
    found += _special(old, new)
    for names, encodes in ((ENCODING, True), (BESIDE, False)):
        for name, word in names.items():
            if old[name] != new[name]:
                says = f"another {word}{_where(old, new, name)}"
                found.append(
                    TokenizerDifference(
                        says,
                        encodes,
                        is_part=encodes,
                        is_role=not encodes,
                        is_certain=name in ("merges", "scores"),
                    )
                )
    return found


def beyond_the_table(described: Described | None, rows: int) -> str | None:
    """Tokens whose ids no row of the embedding has, in words; None where there are none."""
    if described is None:
        return None
    beyond = {token: n for token, n in described["vocabulary"].items() if n >= rows}
    if not beyond:
        return None
    first = min(beyond, key=beyond.__getitem__)
    return (
        f"{_count(beyond, 'token has an id', 'tokens have ids')} beyond the embedding's {rows:,} "
        f"rows, {first!r} ({beyond[first]:,}) first"
    )


def _count(some: Sized, one: str, many: str) -> str:
    return f"{len(some):,} {one if len(some) == 1 else many}"


def _tokens(old: Mapping[str, int], new: Mapping[str, int]) -> list[TokenizerDifference]:
    lost = sorted((token for token in old if token not in new), key=old.__getitem__)
    added = sorted((token for token in new if token not in old), key=new.__getitem__)
    turned = sorted((t for t in old if t in new and old[t] != new[t]), key=old.__getitem__)
    found = []
    for tokens, what in ((lost, "gone"), (added, "new")):
        if tokens:
            named = ", ".join(repr(token) for token in tokens[:LISTED])
            count = _count(tokens, f"token is {what}", f"tokens are {what}")
            found.append(f"{count}: {named}{_more(tokens)}")
    if turned:
        named = ", ".join(f"{t!r} {old[t]:,} → {new[t]:,}" for t in turned[:LISTED])
        count = _count(turned, "token has another id", "tokens have other ids")
        found.append(f"{count}: {named}{_more(turned)}")
    return [TokenizerDifference(says, encodes=True) for says in found]


def _more(tokens: list[str]) -> str:
    return " …" if len(tokens) > LISTED else ""


def _special(old: Described, new: Described) -> list[TokenizerDifference]:
    """The special tokens by their roles, and ids that configurations give them."""
    found = []
    for name in old["special"]:
        one, other = old["special"][name], new["special"][name]
        if one != other:
            found.append(f"{name} {one!r} in the baseline, now {other!r}")
    for name in sorted(set(old["ids"]) & set(new["ids"])):
        one, other = old["ids"].get(name), new["ids"].get(name)
        if one != other:
            found.append(f"{name} {one} in the baseline, now {other}")
    for one, other, single, many in (
        (old, new, "special token is none any more", "special tokens are none any more"),
        (new, old, "token is special now", "tokens are special now"),
    ):
        lost = sorted(
            token
            for token in set(one["marked"]) - set(other["marked"])
            if token in other["vocabulary"]
        )
        if lost:
            named = ", ".join(map(repr, lost[:LISTED]))
            found.append(f"{_count(lost, single, many)}: {named}{_more(lost)}")
    return [TokenizerDifference(says, encodes=True, is_role=True) for says in found]


def _where(old: Described, new: Described, name: str) -> str:
    """Of merges, which rank is the first that differs; of others nothing."""
    if name != "merges":
        return ""
    one, other = old["merges"], new["merges"]
    if len(one) != len(other):
        return f": {len(one):,} in the baseline, now {len(other):,}"
    rank = next(n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return f", from rank {rank:,} on ({one[rank]!r} in the baseline, now {other[rank]!r})"
