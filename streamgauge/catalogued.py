"""What a model's name stands for, by the catalogue of the other rooms."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from streamgauge.errors import UnknownModelError


def part(name: str) -> Any:
    """A module of the other rooms: inside an installed package, or beside it in a clone."""
    prefix = "streamgauge." if find_spec("streamgauge.fixtures") else ""
    return import_module(prefix + name)


def location(name: str | Path) -> str | Path:
    """Where a model is: a folder, or a hub repository, which catalogued names stand for.

    Raises UnknownModelError, with the nearest names.
    """
    if isinstance(name, Path) or Path(name).is_dir():
        return name
    catalogue = part("fixtures.catalogue")
    known = catalogue.models().get(name)
    if known and not known.has_weights:
        raise UnknownModelError(
            f"of {known.id} published numbers alone are known here; name its weights by a folder "
            "or a hub repository."
        )
    if known:
        return known.folder or known.hub  # type: ignore[no-any-return]
    if not Path(name).exists() and "/" not in name:
        raise UnknownModelError(
            f"no model is called {name!r}; the nearest catalogued names are "
            f"{catalogue.nearest(name)}."
        )
    return name
