"""The charts of an audit's page, for a notebook or a paper."""

import tempfile
from pathlib import Path
from typing import Any

from streamgauge.catalogued import part
from streamgauge.record import Record


def figures(record: Record, rows: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """What the page draws of a model, as plotly figures by their titles.

    rows: `record.verdicts()`, whose bands are drawn too where they are given.
    """
    from plotly.graph_objects import Figure

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.safetensors"
        record.save(path)
        found = rows or [{"law": ""}]
        drawn = part("reports.figures").figures(
            [row | {"record": str(path), "baseline": None} for row in found]
        )
    made = {}
    for one in drawn:
        layout = one["layout"] | {"template": "simple_white"}
        made[one["layout"]["title"]["text"]] = Figure(one["data"], layout)
    return made
