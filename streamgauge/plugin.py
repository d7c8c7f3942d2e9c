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
    """Start again where `--model FOLDER` was written in two words.

    pytest looks for its configuration before it knows our options, and takes FOLDER for a test
    path: root folder, ini file and cache would be sought there. `--model=FOLDER` cannot be
    mistaken.
    """
    given = list(config.invocation_params.args)
    joined = _join(given)
    return int(pytest.main(joined)) if joined != given else None


def _join(arguments: list[str]) -> list[str]:
    joined: list[str] = []
    words = iter(arguments)
    for word in words:
        value = next(words, None) if word in TAKE_PATHS else None
        joined.append(word if value is None else f"{word}={value}")
    return joined
