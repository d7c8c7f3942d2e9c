"""Why a model has no such quantity: the sentences that more than one group gives."""

POST_NORM = "post-norm blocks normalise the stream itself, so sublayers do not simply add to it"
NO_MID = "attention and MLP of a parallel block both read resid_pre, so there is no resid_mid"
NO_LN1 = "no norm precedes the attention"
EXPERTS = "the MLP is not one dense layer into another (a mixture of experts)"
SHORT = "no prompt has two tokens, so there is nothing to predict"
