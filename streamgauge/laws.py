"""The list of laws, read from the files that state them, without importing or running any."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

KINDS = ("theorem", "phenomenon", "reference", "regression")


@dataclass(frozen=True)
class Law:
    """A law as its file states it: id (`residual/growth_rate`), kind, claim, formula, source, where
    it applies.
    """

    id: str
    kind: str
    claim: str
    formula: str
    source: str
    applies_to: str


def invariants_folder() -> Path:
    """Where the laws are: inside an installed package, or beside it in a clone."""
    package = Path(__file__).parent
    return (
        package / "invariants"
        if find_spec("streamgauge.invariants")
        else package.parent / "invariants"
    )


def laws() -> list[Law]:
    """All laws, by id."""
    return sorted(_read(invariants_folder()), key=lambda law: law.id)


def _read(folder: Path) -> Iterator[Law]:
    for path in folder.glob("*/test_*.py"):
        module = ast.parse(path.read_text(encoding="utf-8"))
        text = ast.get_docstring(module) or ""
        claim, _, rest = text.partition("\n\n")
        formula, _, rest = rest.partition("\nSource:")
        source, _, applies_to = rest.partition("\nApplies to:")
        name = f"{path.parent.name}/{path.stem.removeprefix('test_')}"
        yield Law(
            name,
            _kind(module),
            *(" ".join(part.split()) for part in (claim, formula, source, applies_to)),
        )


def _kind(module: ast.Module) -> str:
    """The pytest marker of the file's one test."""
    tests = [
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    marks = [d.attr for test in tests for d in test.decorator_list if isinstance(d, ast.Attribute)]
    return next((mark for mark in marks if mark in KINDS), "")
