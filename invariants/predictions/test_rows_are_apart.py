"""Rows of a batch know nothing of each other: with other rows beside it, of any length and in any
order, a text has the stream that it has alone.

value = the largest relative change of a token's vector behind the last block, over drawn sequences,
when transformers runs them in one batch, divided by what rounding explains: what noise of a known
size before every block does to the same vector.
Source: definition of a batch; where it breaks, a loss depends on what else was in it.
Applies to: every causal language model.
"""

import pytest


@pytest.mark.theorem
def test_rows_are_apart(check_draws) -> None:
    check_draws("batch", needed=True)
