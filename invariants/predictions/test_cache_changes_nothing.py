"""A cache changes nothing: a text that is read in two parts, keys and values of the first kept, has
the stream of one that is read at once.

value = the largest relative change of a token's vector behind the last block, over drawn sequences,
when transformers reads them in two parts, divided by what rounding explains: what noise of a known
size before every block does to the same vector.
Source: definition of causal attention; generation rests on it.
Applies to: models all of whose mixers are attention.
"""

import pytest


@pytest.mark.theorem
def test_cache_changes_nothing(check_draws) -> None:
    check_draws("cache", needed=True)
