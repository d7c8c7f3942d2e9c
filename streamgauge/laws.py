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
    it applies, and whether an adopter may declare its band: no theorem's, and of regressions
    where the test asks for a band instead of stating a bound that is derived.
    """

    id: str
    kind: str
    claim: str
    formula: str
    source: str
    applies_to: str
    takes_band: bool


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
        tests = [
            node
            for node in module.body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
        kind = _kind(tests)
        asks = any(one.arg == "band" for test in tests for one in test.args.args)
        takes_band = kind not in ("theorem", "regression") or (kind == "regression" and asks)
        claim, formula, source, applies_to = (
            " ".join(part.split()) for part in (claim, formula, source, applies_to)
        )
        yield Law(name, kind, claim, formula, source, applies_to, takes_band)


def _kind(tests: list[ast.FunctionDef]) -> str:
    """The pytest marker of the file's one test."""
    marks = [d.attr for test in tests for d in test.decorator_list if isinstance(d, ast.Attribute)]
    return next((mark for mark in marks if mark in KINDS), "")
