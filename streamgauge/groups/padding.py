"""The `padding` group: the stream at padding positions behind a text, which models are never
trained on.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.forward import Absent, Found, Group
from streamgauge.engine.layout import Layout
from streamgauge.engine.load import context_length
from streamgauge.numerics.rows import Prompts

if TYPE_CHECKING:
    import torch

TEXTS, PADDING = 8, 8
NO_TOKEN = "the configuration names no padding, end-of-text or beginning-of-text token"
NO_ROOM = "the context has no room for padding behind a text"


def padding_group(model: Blockwise, layout: Layout, prompts: Prompts) -> Group:
    """Norms at PADDING padding tokens behind each of TEXTS prompts, cut to one length: (n_layers
    + 1, tokens), no mask.
    """
    config = model.mapped.model.config
    token = padding_token(config, model.vocabulary)
    length = min([*map(len, prompts.rows), context_length(config) - PADDING])
    if token is None or length < 1:
        return Absent({"padding": NO_TOKEN if token is None else NO_ROOM})
    return _Padding(
        model, layout, [row[:length] + [token] * PADDING for row in prompts.rows[:TEXTS]]
    )


class _Padding:
    def __init__(self, model: Blockwise, layout: Layout, rows: list[list[int]]) -> None:
        self.model, self.layout, self.batch = model, layout, model.enter(rows)
        self.norms = [self._norms(self.batch.stream)]

    def visit(self, layer: int) -> None:
        self.norms.append(self._norms(self.model.step(self.batch, layer)))

    def found(self) -> Found:
        return {"resid": np.array(self.norms, np.float32)}, {}

    def _norms(self, x: "torch.Tensor") -> np.ndarray:
        import torch

        behind = self.layout.centre(x[:, -PADDING:])
        return np.asarray(torch.linalg.vector_norm(behind, dim=-1).reshape(-1).cpu().numpy())


def padding_token(config: Any, vocabulary: int) -> int | None:
    """The token that texts are padded with: the configured one, end of text, or beginning."""
    text = config.get_text_config()
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        token = getattr(text, name, None)
        # Some models end texts in several ways.
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int) and 0 <= token < vocabulary:
            return token
    return None
