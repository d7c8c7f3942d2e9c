"""The pytest plugin: an installed streamgauge registers it, and a clone's conftest.py names it."""

from importlib.util import find_spec

import pytest

# A wheel carries fixtures and reports inside the package; in a clone they lie beside it.
PREFIX = "streamgauge." if find_spec("streamgauge.fixtures") else ""
MODULES = (
    "fixtures.options",
    "fixtures.subjects",
    "fixtures.circuits",
    "fixtures.draws",
    "fixtures.baseline",
    "fixtures.adopter",
    "fixtures.distribution",
    "fixtures.fleet",
    "fixtures.records",
    "fixtures.check",
    "fixtures.rows",
    "reports.plugin",
)
TAKE_PATHS = ("--model", "--record", "--prompts", "--store", "--report", "--circuits", "--baseline")

pytest_plugins = [PREFIX + name for name in MODULES]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Start again where `--model FOLDER` was written in two words, or laws are named as a module
    that only a wheel has.

    pytest looks for its configuration before it knows our options, and takes FOLDER for a test
    path: root folder, ini file and cache would be sought there. `--model=FOLDER` cannot be
    mistaken.
    """
    given = list(config.invocation_params.args)
    joined = [_laws(word) for word in _join(given)] if "--pyargs" in given else _join(given)
    return int(pytest.main(joined)) if joined != given else None


def _laws(word: str) -> str:
    """The folder behind `streamgauge.invariants`, or a file in it, where laws lie beside the
    package: in a clone, and where it was installed with pip -e.
    """
    name, _, rest = word.partition("streamgauge.invariants")
    if name or PREFIX or rest[:1] not in ("", "."):
        return word
    from streamgauge.laws import invariants_folder

    path = invariants_folder().joinpath(*rest.split(".")[1:])
    return str(path if path.is_dir() else path.with_suffix(".py"))


def _join(arguments: list[str]) -> list[str]:
    joined: list[str] = []
    words = iter(arguments)
    for word in words:
        value = next(words, None) if word in TAKE_PATHS else None
        joined.append(word if value is None else f"{word}={value}")
    return joined
