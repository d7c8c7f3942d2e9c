"""streamgauge: measure what flows through a transformer's residual stream, and assert what is known
to hold.
"""

from typing import Any

from streamgauge.charts import figures
from streamgauge.errors import StreamgaugeError
from streamgauge.measure import measure
from streamgauge.record import Record
from streamgauge.verdicts import verdicts

__version__ = "0.1.0"
__all__ = ["Record", "StreamgaugeError", "TrainerCallback", "figures", "measure", "verdicts"]


def __getattr__(name: str) -> Any:
    """The callback is imported when it is asked for, as it needs transformers."""
    if name == "TrainerCallback":
        from streamgauge.training import TrainerCallback

        return TrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
