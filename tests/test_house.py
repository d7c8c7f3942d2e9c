"""The arrows between rooms and wings are held: an import that goes against one is found."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = ("streamgauge", "fixtures", "invariants", "reports")
AGAINST = {
    "streamgauge/numerics/bands.py": "from streamgauge.engine import mapped",
    "streamgauge/checkpoints/files.py": "from streamgauge.engine import mapped",
    "streamgauge/engine/mapped.py": "from streamgauge.groups import stream",
    "streamgauge/groups/neurons.py": "from streamgauge.groups import weights",
    "streamgauge/compare/norms.py": "import torch",
    "invariants/residual/test_moments.py": "from fixtures import catalogue",
    "reports/summary.py": "from streamgauge import record",
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the contracts are about."""
    pytest.importorskip("importlinter")
    folder = tmp_path_factory.mktemp("house")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def _lint(folder: Path) -> "subprocess.CompletedProcess[str]":
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_all_arrows_point_as_they_should(house: Path) -> None:
    done = _lint(house)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", AGAINST)
def test_an_arrow_that_is_turned_round_is_found(path: str, house: Path) -> None:
    file = house / path
    text = file.read_text()
    try:
        file.write_text(f"{text}\n\ndef _against() -> None:\n    {AGAINST[path]}\n")
        done = _lint(house)
    finally:
        file.write_text(text)
    assert done.returncode == 1 and "BROKEN" in done.stdout
