"""What a page carries, read as it reads it."""

import re
from pathlib import Path
from typing import Any

from reports.packed import inflated


def carried(page: Path, name: str) -> Any:
    """What lies deflated in a page under a name."""
    found = re.search(rf'id="{name}">([^<]*)<', page.read_text(encoding="utf-8"))
    assert found
    return inflated(found.group(1))


def carried_rows(page: Path) -> dict[str, Any]:
    """Texts, columns, models and constants."""
    rows: dict[str, Any] = carried(page, "rows")
    return rows
