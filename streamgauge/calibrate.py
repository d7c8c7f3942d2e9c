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

from streamgauge.compare import movement
from streamgauge.errors import NotApplicable, NotMeasured, RecordError, SettingsError
from streamgauge.laws import invariants_folder, laws
from streamgauge.numerics.calibration import LEAST, calibrated
from streamgauge.record import Record

HEAD = "# Bands that `python -m streamgauge calibrate` made; run it again rather than edit them.\n"
# Laws whose values may be negative by what they are: slopes, shares, and R² of a line that falls.
SIGNED = (
    "attention/spectral_trajectory",
    "attention/gain_share",
    "attention/hard_coded_growth",
    "mlp/gain_share",
    "mlp/hard_coded_growth",
    "mlp/resampled_activation_rate",
    "predictions/beats_unigram",
    "predictions/best_of_its_neighbours",
    "regression/loss",
    "residual/exponential",
    "residual/spread",
    "residual/super_exponential",
    "weights/gains_vary",
    "weights/repeated_blocks",
)
# Of what is better the less it is, only too much fails.
ABOVE = ("regression/loss", "regression/movement")
OF_DTYPE = ("residual/fits_dtype",)  # what a copy in another dtype has another value of
SMALLEST, LARGEST = 1e-6, 0.5  # chances that a sound checkpoint fails
Rows = dict[str, dict[str, Any]]  # of one record, by law
Values = dict[str, dict[str, list[float]]]  # by law and quantity, one a record


def calibrate(
    records: Sequence[Path], output: Path, rate: float, *, successive: bool = False
) -> list[str]:
    """Write bands within which another checkpoint of the kind of these lies in all laws, but for a
    chance of `rate`. Returns what there is to say of it, line by line.

    successive: whether each record is of a further trained state of the one before it, so that how
    the next one may differ from the last is calibrated too.

    Raises SettingsError for too few records, or one that is there twice, a rate that is none, or an
    output that cannot be written or is somebody's own; RecordError for what is no record.
    """
    _refuse(records, output, rate, LEAST + successive)
    if successive:
        _refuse_disorder(records)
    before: list[Path | None] = [None] * len(records)
    if successive:
        before[1:] = records[:-1]
    by_record = [_audited(path, old) for path, old in zip(records, before, strict=True)]
    for path, rows in zip(records, by_record, strict=True):
        if failing := [row for row in rows.values() if row["outcome"] == "fail"]:
            raise SettingsError(
                f"{path} is not sound: {failing[0]['law']} fails; calibrate on checkpoints that "
                f"are. {failing[0]['reason']}"
            )
    values = _values(by_record)
    level = rate / max(1, sum(map(len, values.values())))
    bands, said = {}, []
    for law, by_what in values.items():
        band = _band(law, by_what, level, [path.stem for path in records])
        if isinstance(band, str):
            said.append(f"{law}: no band, as {band}")
        else:
            bands[law] = band
    windows = {law: by_record[-1][law]["layers"] for law in bands}
    source = (
        f"calibrated on {len(records)} checkpoints ({', '.join(p.stem for p in records)}): where "
        f"another one lies in all of these laws, but for a chance of {rate:g} (Student's t)"
    )
    # Laws that state a bound of their own beside the band may refuse what the band allows.
    for path, old in zip(records, before, strict=True):
        rows = _audited(path, old, _toml(bands, windows, source))
        for law in [law for law in bands if law in rows and rows[law]["outcome"] == "fail"]:
            del bands[law]
            said.append(
                f"{law}: no band, as the law has a bound of its own that {path.stem} breaks"
            )
    if not bands:
        raise SettingsError("no law has values in all of these records that could make a band.")
    try:
        output.write_text(HEAD + "\n" + _toml(bands, windows, source), encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{output} cannot be written ({error.strerror}).") from error
    said += [
        f"{law}: {f'at most {high:.4g}' if law in ABOVE else f'{low:.4g} to {high:.4g}'}"
        for law, (low, high) in bands.items()
    ]
    return [*said, f"{output}: {len(bands)} bands; by chance {rate:.0%} of sound checkpoints fail"]


def _refuse(records: Sequence[Path], output: Path, rate: float, least: int) -> None:
    if not SMALLEST <= rate <= LARGEST:
        raise SettingsError(
            f"--rate {rate} is not between {SMALLEST} and {LARGEST}; 0.05 is usual."
        )
    if len(records) < least:
        raise SettingsError(
            f"{len(records)} records are too few to say where another checkpoint lies; give "
            f"{least} or more, of other releases, seeds or late steps of training."
        )
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise SettingsError(f"{output} is no file that can be written; name one with -o.")
    if output.exists() and not output.read_bytes().startswith(HEAD.encode()):
        raise SettingsError(f"{output} was written by somebody else; name another file with -o.")
    loaded = [Record.load(path) for path in records]
    for path, record in zip(records, loaded, strict=True):
        if record.n_layers != loaded[0].n_layers:
            raise RecordError(
                f"{path} has {record.n_layers} layers, {records[0]} {loaded[0].n_layers}; "
                "calibrate models of one depth together."
            )
        if record.metadata.get("prompts_sha256") != loaded[0].metadata.get("prompts_sha256"):
            raise RecordError(
                f"{path} and {records[0]} have other prompts; measure all on the same."
            )
    seen: dict[str, Path] = {}
    for path, record in zip(records, loaded, strict=True):
        twice = seen.setdefault(str(record.metadata.get("weights_sha256") or path.absolute()), path)
        if twice is not path:
            raise SettingsError(f"{twice} and {path} are of the same weights; give each once.")


def _refuse_disorder(records: Sequence[Path]) -> None:
    """Raise SettingsError where a state is nearer to a later one than to the next: training goes
    on from where it was.
    """
    loaded = [Record.load(path) for path in records]
    for n, record in enumerate(loaded[:-2]):
        try:
            moved = [movement(record, later, None)[0] for later in loaded[n + 1 :]]
        except (NotApplicable, NotMeasured):  # records without sketches, as old ones are
            return
        nearest = int(np.argmin(moved))
        if nearest:
            raise SettingsError(
                f"{records[n]} is nearer to {records[n + 1 + nearest]} than to {records[n + 1]}; "
                "with --successive give records in the order of training."
            )


def _band(
    law: str, by_what: dict[str, list[float]], level: float, names: Sequence[str]
) -> tuple[float, float] | str:
    """The interval of all quantities of a law, or why there is none."""
    found = [
        calibrated(np.array(v), level, ratios=law not in SIGNED and min(v) > 0, above=law in ABOVE)
        for v in by_what.values()
    ]
    own = names[-len(next(iter(by_what.values()))) :]  # the first is the successor of none
    missed = sorted({own[n] for one in found for n in one.outside})
    if missed:
        return f"{', '.join(missed)} lies outside that of the others"
    if max(one.low for one in found) > min(one.high for one in found):
        return "its quantities lie apart, and a law has one band"
    return min(one.low for one in found), max(one.high for one in found)


def _toml(
    bands: dict[str, tuple[float, float]], windows: dict[str, list[int] | None], source: str
) -> str:
    return "\n".join(
        f"[[band]]\nlaw = {json.dumps(law)}\n"
        + (f"low = {low!r}\n" if law not in ABOVE else "")
        + f"high = {high!r}\n"
        + (f"layers = {windows[law]}\n" if windows[law] else "")
        + f"source = {json.dumps(source, ensure_ascii=False)}\n"
        for law, (low, high) in bands.items()
    )


def _values(by_record: Sequence[Rows]) -> Values:
    """What each law about training measures, where all records have it and do not all agree; what
    tells a record from the one before it, where all but the first have it.
    """
    about_training = {law.id for law in laws() if law.kind == "phenomenon"}.difference(OF_DTYPE)
    found: Values = {}
    for law in sorted(about_training.union(ABOVE).intersection(*by_record[1:])):
        records = [rows for rows in by_record if law in rows]
        given = [{v["what"]: v["value"] for v in rows[law]["values"]} for rows in records]
        for what in given[0]:
            values = [one[what] for one in given if one.get(what) is not None]
            if len(values) == len(records) and len(set(values)) > 1:
                found.setdefault(law, {})[what] = values
    return found


def _audited(record: Path, before: Path | None = None, settings: str = "") -> Rows:
    """The rows, by law, of an audit in a folder where these settings lie alone; as the successor of
    another record where there is one.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "streamgauge.toml").write_text(settings, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", str(invariants_folder())]
        command += ["--record", str(record.absolute()), "--report", folder, "-q"]
        if before is not None:
            command += ["--baseline", str(before.absolute()), "--same", "trained"]
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
