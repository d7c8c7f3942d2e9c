"""Files that the user writes for streamgauge, in TOML: circuits, and what the adopter's repository
says.
"""

import tomllib
from pathlib import Path
from typing import Any

from streamgauge.errors import SettingsError


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises SettingsError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read as TOML ({error}).") from None


def numbered(path: Path, content: dict[str, Any], kind: str) -> list[tuple[int, dict[str, Any]]]:
    """The entries under [[kind]], counted from 1.

    Raises SettingsError for anything else of that name.
    """
    entries = content.get(kind, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SettingsError(f"{path}: write each {kind} as an entry of its own, under [[{kind}]].")
    return list(enumerate(entries, 1))
