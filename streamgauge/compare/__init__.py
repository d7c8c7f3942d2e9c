"""Compare two records, quantity by quantity: what moved, where, by how much, and what rounding
alone could have moved.

Differences are relative. What is allowed is derived: of weights from the rounding of the two
dtypes, of activations and losses from the `rounding` group, which measured what errors of that size
do to this model. Together they raise a false alarm of one comparison in a thousand at most.
"""

from streamgauge.compare.activations import (
    compare_activations,
    refuse_routers,
    shared_rows,
    shared_tokens,
)
from streamgauge.compare.all_kinds import differences, table
from streamgauge.compare.config import compare_config
from streamgauge.compare.difference import Difference, beyond, verdict
from streamgauge.compare.judgement import ACCEPTED, Contents, judge, refuse_where_free
from streamgauge.compare.movement import movement
from streamgauge.compare.norms import compare_norms
from streamgauge.compare.predictions import compare_predictions, mean_losses, rows_to_share
from streamgauge.compare.weights import compare_weights

__all__ = [
    "ACCEPTED",
    "Contents",
    "Difference",
    "beyond",
    "compare_activations",
    "compare_config",
    "compare_norms",
    "compare_predictions",
    "compare_weights",
    "differences",
    "judge",
    "mean_losses",
    "movement",
    "refuse_routers",
    "refuse_where_free",
    "rows_to_share",
    "shared_rows",
    "shared_tokens",
    "table",
    "verdict",
]
