"""A page for each law, from its own file: claim, formula, source, where it applies; its value and
its charts on the bundled model, where real models lie, how to read a failure, how often one is
false.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plotly

from reports.figures import figures
from reports.render import read_rows
from streamgauge.laws import Law, laws

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
MODEL = "pystdlib-3m"  # the bundled one
SPECIAL = str.maketrans({mark: f"\\{mark}" for mark in "*<[$"})  # that formulas have as they are
WORDS = {
    "pass": "It holds",
    "fail": "It fails",
    "unusual": "It is unusual",
    "not_applicable": "It is not asserted",
}
FALSE = {
    "theorem": "None is expected: what is allowed is derived from rounding. Of 276 random models "
    "of all architectures none failed a theorem.",
    "regression": "One comparison in a thousand, of all quantities together, where two checkpoints "
    "are one but for rounding; a band of your own has the rate that it was made for.",
    "reference": "None, on the very weights and conditions that were published.",
    "phenomenon": "A band is its source's, which states no rate. What is outside the range of real "
    "models is called unusual, not false.",
}


def write_pages(docs: Path) -> None:
    """Write laws/*.md and their index beside the other pages, and the charts' library."""
    rows = {row["law"]: row for row in _audited(docs / "_audit")}
    drawn = figures(list(rows.values()))
    triage = _triage(docs / "triage.md")
    folder = docs / "laws"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for law in laws():
        own = [one for one in drawn if law.id in one["laws"]]
        text = "\n\n".join(_page(law, rows.get(law.id), own, triage.get(law.id)))
        (folder / f"{_name(law.id)}.md").write_text(text + "\n", encoding="utf-8")
    (folder / "index.md").write_text(_index(), encoding="utf-8")
    static = docs / "_static"
    static.mkdir(exist_ok=True)
    library = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    shutil.copy(library, static / library.name)


def _audited(folder: Path) -> list[Row]:
    """The rows of an audit of the bundled model, with its record."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "invariants"), f"--model={MODEL}"]
    command += [f"--report={folder}", f"--store={folder / 'store'}", "-q", f"--rootdir={ROOT}"]
    subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, check=True, capture_output=True)
    return read_rows([folder / "rows.jsonl"])


def _triage(path: Path) -> dict[str, str]:
    """What a failure of each law usually means, and what to look at."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3:
            found |= {
                law.strip(): f"{cells[1]}. Look at: {cells[2]}." for law in cells[0].split(",")
            }
    return found


def _name(law: str) -> str:
    return law.replace("/", "-")


def _index() -> str:
    """All laws by their folders, one line each."""
    lines = ["# The laws", "Each is a file of `invariants/`, one phenomenon, one test.", ""]
    folder = ""
    for law in laws():
        if folder != (folder := law.id.split("/")[0]):
            lines += ["", f"## {folder}", ""]
        lines.append(f"- [{law.id}]({_name(law.id)}.md) ({law.kind}): {law.claim}")
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", ":glob:", "", "*", "```", ""])


def _page(law: Law, row: Row | None, drawn: list[Any], triage: str | None) -> Iterator[str]:
    yield f"# {law.id}"
    yield f"**{law.claim}**" + f" A {law.kind}."
    yield law.formula.translate(SPECIAL)
    yield f"**Source:** {law.source.translate(SPECIAL)}"
    yield f"**Applies to:** {law.applies_to.translate(SPECIAL)}"
    yield "## On the bundled model"
    yield _said(row)
    for number, one in enumerate(drawn):
        yield _chart(one, f"chart-{number}")
        yield one["read"]
    yield "## If it fails"
    yield triage or "See [triage](../triage.md)."
    yield f"**False alarms:** {FALSE.get(law.kind, '')}"
    yield f"`pytest invariants/{law.id.replace('/', '/test_', 1)}.py --model ./checkpoint`"


def _said(row: Row | None) -> str:
    """Its verdict in a sentence, and where real models lie."""
    if row is None:
        return "It is about a comparison with a baseline, and says nothing of one model alone."
    said = WORDS.get(row["outcome"], row["outcome"])
    said += f" ({row['reason']})" if row["reason"] else ""
    if row["value"] is not None:
        said += f": {row['what']} {row['value']:.4g} {row['unit'] or ''}".rstrip()
    if row["band"]:
        said += f"; {_band(*row['band'])}"
    lies = row["population"]
    if lies:
        said += (
            f". Of {lies['models']} real models it lies between {lies['low']:.4g} and "
            f"{lies['high']:.4g}"
        )
    return said + "."


def _band(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"at most {high:.4g}" if low is None else f"at least {low:.4g}"
    return f"within {low:.4g} to {high:.4g}"


def _chart(drawn: Any, name: str) -> str:
    """A chart as the page draws it, in a few lines of HTML."""
    layout = drawn["layout"] | {"height": 380, "margin": {"t": 40}}
    data = json.dumps([drawn["data"], layout]).replace("<", "\\u003c")
    return (
        f'<div id="{name}"></div>\n<script>\naddEventListener("load", () => Plotly.newPlot('
        f'"{name}", ...{data}, {{responsive: true, displaylogo: false}}))\n</script>'
    )
