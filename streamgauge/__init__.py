"""streamgauge: measure what flows through a transformer's residual stream, and assert what is known
to hold.
"""

from streamgauge.errors import StreamgaugeError
from streamgauge.measure import measure
from streamgauge.record import Record

__version__ = "0.1.0"
__all__ = ["Record", "StreamgaugeError", "measure"]
