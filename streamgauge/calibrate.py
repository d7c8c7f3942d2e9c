"""An adopter's own bands, from records of checkpoints that are known to be sound."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamgauge.errors import RecordError, SettingsError
from streamgauge.laws import invariants_folder, laws
from streamgauge.numerics.calibration import LEAST, calibrated
from streamgauge.record import Record

HEAD = "# Bands that `python -m streamgauge calibrate` made; run it again rather than edit them.\n"
Rows = dict[str, dict[str, Any]]  # of one record, by law
Values = dict[str, dict[str, list[float]]]  # by law and quantity, one a record


def calibrate(records: Sequence[Path], output: Path, rate: float) -> list[str]:
    """Write bands within which another checkpoint of the kind of these lies in all laws, but for a
    chance of `rate`. Returns what there is to say of it, line by line.

    Raises SettingsError for too few records, a rate that is none, or a file that is somebody's own;
    RecordError for what is no record.
    """
    if not 0 < rate < 1:
        raise SettingsError(f"--rate {rate} is no chance between 0 and 1; 0.05 is usual.")
    if len(records) < LEAST:
        raise SettingsError(
            f"{len(records)} records are too few to say where another checkpoint lies; give "
            f"{LEAST} or more, of other releases, seeds or late steps of training."
        )
    if output.exists() and not output.read_text(encoding="utf-8").startswith(HEAD):
        raise SettingsError(f"{output} was written by somebody else; name another file with -o.")
    loaded = [Record.load(path) for path in records]
    if len({record.n_layers for record in loaded}) > 1:
        raise RecordError("the records are of models of different depth; calibrate each by itself.")
    by_record = [_audited(path) for path in records]
    values = _values(by_record)
    source = (
        f"calibrated on {len(records)} checkpoints ({', '.join(p.stem for p in records)}): where "
        f"another one lies in all of these laws, but for a chance of {rate:g} (Student's t)"
    )
    level = rate / max(1, sum(map(len, values.values())))
    entries, said = {}, []
    for law, by_what in values.items():
        found = {w: calibrated(np.array(v), level) for w, v in by_what.items()}
        missed = sorted({records[n].stem for one in found.values() for n in one.outside})
        if missed:
            said.append(f"{law}: no band, as {', '.join(missed)} lies outside that of the others")
            continue
        low, high = min(f.low for f in found.values()), max(f.high for f in found.values())
        layers = by_record[0][law]["layers"]
        entries[law] = (
            f"[[band]]\nlaw = {json.dumps(law)}\nlow = {low!r}\nhigh = {high!r}\n"
            + (f"layers = {layers}\n" if layers else "")
            + f"source = {json.dumps(source, ensure_ascii=False)}\n"
        )
        said.append(f"{law}: {low:.4g} to {high:.4g}")
    # Laws that state a bound of their own beside the band may refuse what the band allows.
    again = [_audited(path, "\n".join(entries.values())) for path in records]
    for law in sorted({law for rows in again for law in entries if rows[law]["outcome"] == "fail"}):
        del entries[law]
        said = [line for line in said if not line.startswith(f"{law}:")]
        said.append(f"{law}: no band, as the law has a bound of its own that these break")
    if not entries:
        raise SettingsError("no law has values in all of these records that differ at all.")
    output.write_text(HEAD + "\n" + "\n".join(entries.values()), encoding="utf-8")
    ending = f"{len(entries)} bands; by chance {rate:.0%} of sound checkpoints fail"
    return [*said, f"{output}: {ending}"]


def _values(by_record: Sequence[Rows]) -> Values:
    """What each law about training measures, where all records have it and do not all agree."""
    about_training = {law.id for law in laws() if law.kind == "phenomenon"}
    found: Values = {}
    for law in sorted(about_training.intersection(*by_record)):
        given = [{v["what"]: v["value"] for v in rows[law]["values"]} for rows in by_record]
        for what in given[0]:
            values = [one[what] for one in given if one.get(what) is not None]
            if len(values) == len(by_record) and len(set(values)) > 1:
                found.setdefault(law, {})[what] = values
    return found


def _audited(record: Path, settings: str = "") -> Rows:
    """The rows, by law, of an audit in a folder where these settings lie alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "streamgauge.toml").write_text(settings, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", str(invariants_folder())]
        command += ["--record", str(record.absolute()), "--report", folder, "-q"]
        command += ["-p", "no:cacheprovider", "-p", "streamgauge.plugin", "--rootdir", folder]
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        rows = Path(folder) / "rows.jsonl"
        if not rows.is_file():
            raise RecordError(f"{record} could not be audited: {done.stdout[-200:].strip()}")
        lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    return {row["law"]: row for row in lines}
