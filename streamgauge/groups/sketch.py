"""The `sketch` group: sixteen numbers a head's matrix, by which checkpoints are compared (see
`numerics.sketches`).
"""

from streamgauge.engine.forward import Group, Reading
from streamgauge.engine.heads import Heads
from streamgauge.engine.pieces import sketch


def heads_group(heads: Heads) -> Group:
    """Sketches of each head's matrices, (n_layers, n_heads, SKETCHES)."""

    def read(layer: int) -> dict[str, object]:
        matrices = heads.of(layer) or {}
        return {name: sketch(matrix).cpu().numpy() for name, matrix in matrices.items()}

    return Reading(read, heads.why)
