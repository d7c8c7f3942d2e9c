"""The `padding` group: the stream at padding positions behind a text, which models are never trained on."""

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.model import Layout, context_length, device_of
from streamgauge.prompts import Prompts

if TYPE_CHECKING:
    import torch

TEXTS, PADDING = 8, 8
NO_TOKEN = "the configuration names no padding, end-of-text or beginning-of-text token"
NO_ROOM = "the context has no room for padding behind a text"


def measure_padding(bridge: Any, layout: Layout, prompts: Prompts) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Norms at PADDING padding tokens behind each of TEXTS prompts, cut to one length: (n_layers + 1, tokens), no mask."""
    import torch

    config = bridge.original_model.config
    token = padding_token(config, bridge.original_model.get_input_embeddings().num_embeddings)
    length = min([*map(len, prompts.rows), context_length(config) - PADDING])
    if token is None or length < 1:
        return {}, {"padding": NO_TOKEN if token is None else NO_ROOM}
    rows = [row[:length] + [token] * PADDING for row in prompts.rows[:TEXTS]]
    norms: dict[int, np.ndarray] = {}
    hooks = [(f"blocks.{n}.hook_resid_pre", _norms_behind(length, layout, norms, n)) for n in range(layout.n_layers)]
    last = layout.n_layers - 1
    hooks.append((f"blocks.{last}.hook_resid_post", _norms_behind(length, layout, norms, last + 1)))
    with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
        bridge(torch.tensor(rows, device=device_of(bridge)), return_type=None)
    return {"resid": np.array([norms[n] for n in range(layout.n_layers + 1)], np.float32)}, {}


def padding_token(config: Any, vocabulary: int) -> int | None:
    """The token that texts are padded with: the configured one, else end of text, else beginning."""
    text = config.get_text_config()
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        token = getattr(text, name, None)
        token = token[0] if isinstance(token, list) and token else token  # some models end texts in several ways
        if isinstance(token, int) and 0 <= token < vocabulary:
            return token
    return None


def _norms_behind(length: int, layout: Layout, norms: dict[int, np.ndarray], layer: int) -> Any:
    def read(x: "torch.Tensor", hook: Any) -> None:
        import torch

        norms[layer] = torch.linalg.vector_norm(layout.centre(x[:, length:]), dim=-1).reshape(-1).cpu().numpy()

    return read
