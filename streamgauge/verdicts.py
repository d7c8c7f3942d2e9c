"""What the laws say of a record, outside of an audit: in a notebook, or while a model trains."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamgauge.errors import StreamgaugeError
from streamgauge.laws import invariants_folder

if TYPE_CHECKING:
    from streamgauge.record import Record


def verdicts(
    record: "Record", baseline: "Record | None" = None, same: str | None = None
) -> list[dict[str, Any]]:
    """The rows of an audit of a record, one a law, as rows.jsonl holds them
    (reports/row.schema.json), beside a baseline if one is given, which the record is held to as
    --same says: `function`, `trained` or `quantised`.

    Takes a second: pytest runs in a process of its own, which imports no torch. Raises
    StreamgaugeError where it does not run.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        name = Path(str(record.metadata["model"])).name
        record.save(folder / f"{name}.safetensors")
        command = [sys.executable, "-m", "pytest", str(invariants_folder()), "--quiet"]
        command += ["--override-ini=addopts=", "-p", "no:cacheprovider", f"--rootdir={folder}"]
        command += [f"--record={folder / name}.safetensors", f"--report={folder / 'report'}"]
        if baseline is not None:
            baseline.save(folder / "baseline" / "baseline.safetensors")
            command.append(f"--baseline={folder / 'baseline' / 'baseline.safetensors'}")
        command += [f"--same={same}"] if same else []
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        rows = folder / "report" / "rows.jsonl"
        if not rows.is_file():
            said = (done.stderr or done.stdout).strip()
            raise StreamgaugeError(f"pytest did not run: {said.splitlines()[-1] if said else '?'}")
        # Of paths what is behind this folder, which will be gone.
        text = rows.read_text(encoding="utf-8").replace(f" --rootdir {folder}", "")
        text = text.replace(f"{folder}{os.sep}", "")
        return [json.loads(line) for line in text.splitlines()]


def scalars(rows: list[dict[str, Any]], prefix: str = "streamgauge") -> dict[str, float]:
    """Numbers of rows for whatever draws curves, by `prefix/law`: each law's value, and
    `prefix/margin/law` where it was asserted (above 0: within its band).
    """
    found = {f"{prefix}/{row['law']}": row["value"] for row in rows if row["value"] is not None}
    margins = {f"{prefix}/margin/{r['law']}": r["margin"] for r in rows if r["margin"] is not None}
    return found | margins
