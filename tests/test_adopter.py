"""An adopter's repository in miniature: bands, a law and known failures of its own, and its CI
recipe.
"""

import datetime
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures.adopter import read_settings
from streamgauge.errors import SettingsError
from tests import models
from tests.conftest import ROOT, Audit

ADOPTER = Path(__file__).with_name("adopter")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.gpt2(12), tmp_path_factory.mktemp("adopted") / "checkpoint")


@pytest.fixture
def repository(checkpoint: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(ADOPTER, tmp_path / "repository"))
    shutil.copytree(checkpoint, folder / "checkpoint")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the store is: the one checkpoint is measured once for all of these tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def recipe(repository: Path, installed: dict[str, str], cache: Path) -> Run:
    """Run the repository's CI recipe, with the store in a folder of the tests' own."""

    def run() -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = installed | {"PATH": path, "XDG_CACHE_HOME": str(cache)}
        return subprocess.run(
            ["sh", "ci.sh"],
            cwd=repository,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_recipe_runs_and_says_what_was_declared(repository: Path, recipe: Run) -> None:
    done = recipe()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        row["law"]: row
        for row in map(json.loads, (repository / "report" / "rows.jsonl").read_text().splitlines())
    }
    assert rows["residual/growth_rate"]["source"] == "our last three releases"
    assert rows["residual/growth_rate"]["band"] == [0.9, 1.2]
    assert (
        rows["residual/padding"]["outcome"] == "not_applicable"
        and "we never pad" in rows["residual/padding"]["reason"]
    )
    known = rows["laws/attention_writes_less"]
    assert known["outcome"] == "known_failure" and "until the next run" in known["reason"]
    assert "1 fail as known" in done.stdout
    for name in ("report.html", "summary.md", "badge.svg"):
        assert (repository / "report" / name).is_file()
    ET.parse(repository / "report" / "badge.svg")
    properties = {
        p.get("name"): p.get("value") for p in ET.parse(repository / "junit.xml").iter("property")
    }
    assert properties["value"] and properties["band"]


def test_a_known_failure_that_is_over_fails(repository: Path, recipe: Run) -> None:
    settings = repository / "streamgauge.toml"
    text = settings.read_text()
    settings.write_text(
        text.replace("2999-12-31", str(datetime.date.today() - datetime.timedelta(1)))
    )
    done = recipe()
    assert done.returncode == 1 and "which is over (the first block is all attention" in done.stdout
    settings.write_text(text.replace("laws/attention_writes_less", "residual/additivity"))
    done = recipe()
    assert done.returncode == 1 and "fails no longer; take it out" in done.stdout


def test_unknown_laws_are_errors(repository: Path, recipe: Run) -> None:
    settings = repository / "streamgauge.toml"
    text = settings.read_text()
    settings.write_text(text.replace("residual/padding", "residual/paddings"))
    done = recipe()
    assert done.returncode == 4 and "the nearest are residual/padding" in done.stdout + done.stderr
    settings.write_text(text.replace("residual/growth_rate", "residual/additivity"))
    done = recipe()
    assert done.returncode == 4 and "whose bound is derived" in done.stdout + done.stderr


WRONG = {
    "not TOML": ("[[band", "cannot be read as TOML"),
    "unknown table": ("[[bands]]\nlaw='x'", "has 'bands'"),
    "no source": ("[[band]]\nlaw='residual/growth_rate'\nlow=1", "lacks 'source'"),
    "unknown key": ("[[leave_out]]\nlaw='a'\nreason='b'\nuntil='c'", "has 'until'"),
    "no reason": ("[[leave_out]]\nlaw='a'\nreason=''", "something else than text"),
    "no date": ("[[known_failure]]\nlaw='a'\nreason='b'\nexpires='soon'", "needs a date"),
    "no number": ("[[band]]\nlaw='a'\nsource='b'\nlow='1'", "needs numbers"),
    "one table": ("band = 3", "under [[band]]"),
    "a single table": ("[band]\nlaw='a'\nsource='b'\nlow=1", "under [[band]]"),
    "no bounds": ("[[band]]\nlaw='a'\nsource='b'", "needs numbers"),
    "not a number": ("[[band]]\nlaw='a'\nsource='b'\nlow=nan", "needs numbers"),
    "true for a number": ("[[band]]\nlaw='a'\nsource='b'\nlow=true", "needs numbers"),
    "bounds turned round": ("[[band]]\nlaw='a'\nsource='b'\nlow=2\nhigh=1", "not below its high"),
    "one layer": ("[[band]]\nlaw='a'\nsource='b'\nlow=2\nlayers=[1]", "needs two layers"),
    "layers in words": ("[[band]]\nlaw='a'\nsource='b'\nlow=2\nlayers='ab'", "needs two layers"),
    "layers turned round": (
        "[[band]]\nlaw='a'\nsource='b'\nlow=2\nlayers=[5, 2]",
        "needs two layers",
    ),
    "model of another kind": ("[[leave_out]]\nlaw='a'\nreason='b'\nmodel=['a']", "for model"),
}


@pytest.mark.parametrize("what", WRONG)
def test_settings_that_are_not_understood_are_refused(what: str, tmp_path: Path) -> None:
    content, says = WRONG[what]
    (tmp_path / "streamgauge.toml").write_text(content)
    with pytest.raises(SettingsError) as refused:
        read_settings(tmp_path)
    assert says in str(refused.value)


def test_settings_may_stand_in_pyproject(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        "[[tool.streamgauge.leave_out]]\nlaw = 'a'\nreason = 'b'"
    )
    assert read_settings(tmp_path).entries["leave_out"][0]["reason"] == "b"
    (tmp_path / "streamgauge.toml").write_text("")
    with pytest.raises(SettingsError, match="keep one"):
        read_settings(tmp_path)


def test_a_failure_that_could_not_be_measured_is_never_known(
    audit: Callable[..., Audit], tmp_path: Path, monkeypatch: Any
) -> None:
    """A checkpoint that cannot be opened stays an error, whatever is known of it."""
    from fixtures import adopter

    known = [{"law": "residual/additivity", "reason": "r", "expires": datetime.date(2999, 1, 1)}]
    monkeypatch.setattr(
        adopter,
        "read_settings",
        lambda root: adopter.Settings(ROOT / "streamgauge.toml", {"known_failure": known}),
    )
    folder = models.save(models.gpt2(2), tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"no")
    found = audit("--model", folder, "-k", "additivity")
    assert found.row("residual/additivity")["outcome"] == "error" and found.exit == 1


def test_a_model_that_is_not_audited_is_named(
    audit: Callable[..., Audit], tmp_path: Path, monkeypatch: Any
) -> None:
    """A band of another checkpoint does no harm, and is not silently without an effect."""
    from fixtures import adopter

    left_out = [{"law": "residual/additivity", "reason": "r", "model": "last-year"}]
    monkeypatch.setattr(
        adopter,
        "read_settings",
        lambda root: adopter.Settings(ROOT / "streamgauge.toml", {"leave_out": left_out}),
    )
    folder = models.save(models.gpt2(1), tmp_path / "this-year")
    found = audit("--model", folder, "-k", "integrity")
    assert "streamgauge.toml speaks of last-year too, not audited here" in found.output
