"""The `sketch` group:

sixteen numbers a head's matrix, by which checkpoints are compared (see `numerics.sketches`).
"""

from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.forward import Absent, Group, Reading
from streamgauge.engine.pieces import sketch
from streamgauge.numerics.sketches import HEADS


def heads_group(model: Blockwise, no_heads: str | None) -> Group:
    """Sketches of each head's matrices, (n_layers, n_heads, SKETCHES)."""
    if no_heads:
        return Absent(dict.fromkeys(HEADS, no_heads))
    return Reading(
        lambda layer: {
            name: sketch(getattr(model.blocks[layer].attn, name)).cpu().numpy() for name in HEADS
        }
    )
