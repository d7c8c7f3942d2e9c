"""The attention's matrices by head, where TransformerLens names them."""

from typing import TYPE_CHECKING, Any

from streamgauge.engine.bridge import Bridge

if TYPE_CHECKING:
    import torch

MATRICES = ("W_Q", "W_K", "W_V", "W_O")


class Heads:
    """W_Q, W_K, W_V and W_O of each layer that has them.

    bridge: whose names they are, None where there is none. why: what is said of layers without.
    """

    def __init__(self, bridge: Bridge | None, why: str | None) -> None:
        self.bridge = bridge
        self.why = why or "TransformerLens shows no W_V and W_O by head there"

    def of(self, layer: int) -> "dict[str, torch.Tensor] | None":
        """A held block's matrices: W_Q, W_K, W_V (heads, d_model, d_head) and W_O (heads, d_head,
        d_model); W_K and W_V may have fewer, grouped heads. None where they cannot be had.
        """
        attn = self.attention(layer)
        if attn is None:
            return None
        try:
            found = {name: getattr(attn, name).detach() for name in MATRICES}
        # What TransformerLens raises for attention that it does not take apart.
        except (AttributeError, NotImplementedError, RuntimeError, ValueError):
            return None
        return found if _fit(found) else None

    def attention(self, layer: int) -> Any:
        """A block's attention by TransformerLens's name, None where it has none."""
        return None if self.bridge is None else self.bridge.part(layer, "attn")


def _fit(matrices: "dict[str, torch.Tensor]") -> bool:
    """Whether shapes are those of heads that share their sizes."""
    if any(matrix.dim() != 3 for matrix in matrices.values()):
        return False
    (n_q, width, d_q), (n_k, _, d_k), (n_v, _, d_v), (n_o, d_o, out) = (
        tuple(matrices[name].shape) for name in MATRICES
    )
    same = n_q == n_o and n_k == n_v and d_q == d_k and d_v == d_o and width == out
    return bool(same and n_o % n_v == 0)
