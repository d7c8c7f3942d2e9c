"""Any implementation of attention computes the same: torch's fused one gives the stream that the
plain one does.

value = the largest relative change of a token's vector behind the last block, over drawn sequences,
between transformers' `eager` and `sdpa` attention, divided by what rounding explains: what noise of
a known size before every block does to the same vector.
Source: definition of attention (Vaswani et al. 2017); Dao et al. 2022 reorder its sums alone.
Applies to: models of which transformers has both and whose scores are not capped, which `sdpa`
leaves out.
"""

import pytest


@pytest.mark.theorem
def test_any_attention_kernel(check_draws) -> None:
    check_draws("attention_implementation", needed=True)
