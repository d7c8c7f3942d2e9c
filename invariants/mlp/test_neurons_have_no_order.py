"""The hidden neurons of an MLP have no order: with the rows of W_in, W_gate and their biases, and
the columns of W_out, in another one the stream is the same.

value = the largest relative change of a token's vector, over layers, tokens and drawn sequences,
divided by what rounding explains: what noise of a known size on the stream before every block does
to the same vector, for noise as large as rounding of sums of d_model terms.
Source: definition of the MLP; a sum has no order (Hecht-Nielsen 1990 on such symmetries).
Applies to: MLPs with no parameters but these; mixtures of experts have others.
"""

import pytest


@pytest.mark.theorem
def test_neurons_have_no_order(check_draws) -> None:
    check_draws("neurons", needed=True)
