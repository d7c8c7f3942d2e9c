"""Which tensor of one checkpoint is which of another: by name, or by name without a wrapper's
prefix.
"""

from collections import Counter
from collections.abc import Iterable

from streamgauge.numerics.names import layer_of
from streamgauge.record import Record


def matched_names(old: Iterable[str], new: Iterable[str]) -> dict[str, str]:
    """From names of the old checkpoint to those of the new.

    Names that both have are theirs. Of the others, prefixes are exchanged, `model.language_model.`
    for `model.`, by the pair of prefixes that fits most names first.
    """
    left, right = set(old), set(new)
    found = {name: name for name in left & right}
    left, right = left - set(found), right - set(found)
    for before, after in _prefixes(left, right):
        for name in sorted(name for name in left if name.startswith(before)):
            other = after + name[len(before) :]
            # A prefix may end in a layer's number, and layers do not change places by their names.
            if other in right and layer_of(name) == layer_of(other):
                found[name] = other
                left.discard(name)
                right.discard(other)
    return found


def _prefixes(left: Iterable[str], right: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of prefixes that names of both sides differ by, the most frequent first."""
    ends: dict[str, list[str]] = {}
    for name in right:
        for start in _starts(name):
            ends.setdefault(name[start:], []).append(name[:start])
    pairs: Counter[tuple[str, str]] = Counter()
    for name in left:
        # The longest end that another name has too tells what stands before it.
        start = next((start for start in _starts(name) if name[start:] in ends), len(name))
        if name.count(".", start):
            pairs.update((name[:start], prefix) for prefix in ends[name[start:]])
    return sorted(pairs, key=lambda pair: (-pairs[pair], pair))


def _starts(name: str) -> list[int]:
    """Where the parts of a dotted name begin."""
    return [0, *(n + 1 for n, letter in enumerate(name) if letter == ".")]


def with_names_of(old: Record, new: Record) -> Record:
    """The new record with its tensors called as the old one calls them."""
    rows = {row["name"]: row for row in new.metadata.get("parameters", [])}
    pairs = matched_names([row["name"] for row in old.metadata.get("parameters", [])], rows)
    names = {theirs: ours for ours, theirs in pairs.items()}
    renamed = [row | {"name": names.get(name, name)} for name, row in rows.items()]
    return Record(new.arrays, new.metadata | {"parameters": renamed})
