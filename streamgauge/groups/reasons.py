"""Why a model has no such quantity: the sentences that more than one group gives."""

from streamgauge.engine.forward import Lacking, in_words
from streamgauge.engine.layout import Layout

POST_NORM = "blocks do more to the stream than add to it, as post-norm blocks do"
SCALED = "blocks multiply the stream, so what sublayers add does not stay in it as it was"
NO_MID = "no MLP there reads resid_pre with what mixers added, as none does in a parallel block"
NO_MLP_INPUT = "no MLP there reads resid_pre or resid_mid"
NO_LN1 = "no norm of the stream precedes the attention"
NO_MLP_NORM = "no norm precedes the MLP"
EXPERTS = (
    "no MLP there is one dense layer, an activation function and another layer, as in a mixture of "
    "experts"
)
NO_ANATOMY = "blocks do more to the stream than add to it, so their neurons were not looked for"
NO_LN_FINAL = "no norm reads the last stream before the unembedding does"
SHORT = "no prompt has two tokens, so there is nothing to predict"
NOTHING = {
    "attn": "nothing there carries information between tokens",
    "mlp": "no MLP there",
    "other": "mixers and MLPs are all that is added there",
}


def lacking(
    layout: Layout, having: "list[int] | dict[int, str]", why: str, axis: int = 0
) -> str | Lacking | None:
    """What is said where not all layers have something; None where they do."""
    missing = tuple(n for n in range(layout.n_layers) if n not in having)
    if not missing:
        return None
    if len(missing) == layout.n_layers:
        return why
    return Lacking(f"{in_words(missing)}: {why}", missing, axis)


def only_said(reasons: "dict[str, str | Lacking | None]") -> "dict[str, str | Lacking]":
    """Those that there are."""
    return {name: why for name, why in reasons.items() if why is not None}
