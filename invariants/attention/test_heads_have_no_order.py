"""The heads of an attention have no order: exchanged with their queries, keys and values, within
their groups and groups as a whole, they leave the stream as it was.

value = the largest relative change of a token's vector, over layers, tokens and drawn sequences,
divided by what rounding explains: what noise of a known size on the stream before every block does
to the same vector, for noise as large as rounding of sums of d_model terms.
Source: heads are added up (Elhage et al. 2021), and a sum has no order.
Applies to: attention with no parameters but W_Q, W_K, W_V, W_O, their biases and norms that heads
share, and no positions that heads read each in their own way (ALiBi).
"""

import pytest


@pytest.mark.theorem
def test_heads_have_no_order(check_draws) -> None:
    check_draws("heads", needed=True)
