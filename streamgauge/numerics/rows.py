"""Rows of token ids that a model is measured on."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompts:
    """Rows of token ids, how they came about, the model's BOS token where each opens with it, and
    whether it wrote them.
    """

    rows: list[list[int]]
    source: str
    bos: int | None
    sampled: bool = False

    def sha256(self) -> str:
        """Hash of the token ids."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()

    def batches(self, tokens: int) -> Iterator[list[int]]:
        """Indices of rows of equal length, at most about `tokens` tokens together, so that nothing
        is padded.
        """
        by_length: dict[int, list[int]] = {}
        for index, row in enumerate(self.rows):
            by_length.setdefault(len(row), []).append(index)
        for length, members in sorted(by_length.items()):
            size = max(1, tokens // length)
            yield from (members[i : i + size] for i in range(0, len(members), size))
