"""What a head writes depends on the product W_V W_O alone: with the columns of W_V and the rows of
W_O in another order within each head, the stream is the same.

value = the largest relative change of a token's vector, over layers, tokens and drawn sequences,
divided by what rounding explains: what noise of a known size on the stream before every block does
to the same vector, for noise as large as rounding of sums of d_model terms.
Source: Elhage et al. 2021, on the OV circuit.
Applies to: attention with no parameters but W_Q, W_K, W_V, W_O, their biases and norms of queries
and keys.
"""

import pytest


@pytest.mark.theorem
def test_value_basis_is_free(check_draws) -> None:
    check_draws("value_basis", needed=True)
