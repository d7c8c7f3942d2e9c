"""Fixtures of the suite's own tests: audits run in this process, small checkpoints, and what lies
beside the clone.
"""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

collect_ignore = ["adopter"]  # somebody else's repository, in miniature
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


@dataclass(frozen=True)
class Audit:
    """What an audit left: exit code, verdict rows, and what it printed."""

    exit: int
    rows: list[dict[str, Any]]
    output: str

    def outcomes(self, model: str | None = None) -> dict[str, str]:
        """Outcome by law."""
        return {row["law"]: row["outcome"] for row in self.rows if model in (None, row["model"])}

    def row(self, law: str) -> dict[str, Any]:
        """The one row about a law."""
        (row,) = [row for row in self.rows if row["law"] == law]
        return row


@pytest.fixture
def audit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Audit]:
    """audit("--model", folder, …):

    run the suite on it in this process, with a store and a report of the test's own.
    """

    def run(*arguments: object, laws: str = "invariants", neighbours: str | None = "none") -> Audit:
        report = tmp_path / "report"
        (report / "rows.jsonl").unlink(missing_ok=True)
        own = [
            "--report",
            str(report),
            "--store",
            str(tmp_path / "store"),
            "-p",
            "no:cacheprovider",
            "-c",
            str(ROOT / "pyproject.toml"),
            *(["--neighbours", neighbours] if neighbours else []),
        ]
        capfd.readouterr()
        code = pytest.main([str(ROOT / laws), *own, *map(str, arguments)])
        text = "".join(capfd.readouterr())
        rows = report / "rows.jsonl"
        found = (
            [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []
        )
        return Audit(int(code), found, text)

    return run


@pytest.fixture
def run_pytest(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run pytest as its own process in the clone, as a user would, but for the search for repairs,
    which takes as long as the rest.
    """

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]
        command += [] if "--neighbours" in command else ["--neighbours", "none"]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def run_streamgauge() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m streamgauge` as its own process in the clone."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "streamgauge", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the wheel is what python finds, and nothing of the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    # PYTHONSAFEPATH keeps the clone off the path; the editable install behind it would come later
    # anyway.
    return os.environ | {"PYTHONPATH": str(folder / "site"), "PYTHONSAFEPATH": "1"}


def shared_checkpoint(name: str) -> Path:
    """A trained checkpoint that lies beside the clone on the developers' machines; skips where it
    does not.
    """
    folder = SHARED / "checkpoints" / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not on this machine")
    return folder
