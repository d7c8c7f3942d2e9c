"""How far training moved the weights from one state to the next."""

from collections.abc import Sequence

import numpy as np

from streamgauge.compare.tensors import Change
from streamgauge.compare.weights import compare_weights
from streamgauge.errors import NotApplicable
from streamgauge.record import Record

APART = ("missing", "new", "shape", "not finite")  # relations whose size is no distance


def movement(old: Record, new: Record, changes: Sequence[Change] | None) -> tuple[float, str]:
    """Median over matrices of ‖new - old‖_F / ‖old‖_F, and in words the one that moved most.

    changes: of the tensors themselves, None where only sketches tell. Raises NotApplicable where no
    matrix can be compared.
    """
    if changes is None:
        compared = compare_weights(old, new)
        changes = [Change(one.name, one.relation) for one in compared if one.relation]
    matrices = [c for c in changes if c.is_matrix and c.relation.kind not in APART]
    if not matrices:
        raise NotApplicable("the two have no matrices in common")
    sizes = np.array([c.relation.size for c in matrices])
    most = matrices[int(sizes.argmax())]
    return float(np.median(sizes)), (
        f"{len(matrices)} matrices, the most {most.where} by {most.relation.size:.3g}"
    )
