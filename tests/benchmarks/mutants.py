"""Mutation testing: is a fault put into streamgauge's own code found by its tests?

`python -m tests.benchmarks.mutants FOLDER` draws places of the code by a seed, lets cosmic-ray
change one at a time in a clone of the last commit, and runs the tests that reach the changed line,
quickest first, until one fails. About an hour for 152 changes on two cores. FOLDER keeps
which test reaches which line, and every result as it is had: the same command goes on where it was
interrupted. Writes docs/mutants.md.

A place is an operator, comparison, number, boolean, loop, decorator or handler; which of
cosmic-ray's changes it gets is drawn too. Annotations are left out: nothing runs them.
"""

import argparse
import ast
import difflib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from tests.conftest import ROOT, SHARED

# Places drawn in each room. streamgauge/ is as large as the other three together.
ROOMS = {"invariants": 32, "streamgauge": 64, "fixtures": 28, "reports": 28}
TIMEOUT = "timeout"
SECONDS = 90  # of tests that a change is given to be noticed in
TABLE = ROOT / "docs" / "mutants.md"
WORDS = Path(__file__).with_name("mutants.toml")
COVERAGE = """[run]
branch = false
parallel = true
concurrency = thread, greenlet
context = ${STREAMGAUGE_TEST-}
source = {rooms}
data_file = {data}
"""
HEAD = """# Which faults in streamgauge's own code its tests find

{drawn} places of the code, drawn with seed {seed}, each changed once by cosmic-ray {version} in a
clone; of the tests that reach the changed line, quickest first, as many are run as take
{seconds} s, until one fails. For a line that runs when its file is imported, half of these are
tests of other files. The tests that failed are run once more on unchanged code, where they pass.
*Survivors* are what no test noticed, those that cannot be noticed from outside among them;
{timeouts} of what was found ended in a test that took five times as long.

Made by `python -m tests.benchmarks.mutants`.

"""


# ---- As a pytest plugin, in the run that finds out which test reaches which line


def pytest_runtest_logstart(nodeid: str) -> None:
    """Say to coverage, here and in processes started by the test, which test it is."""
    import coverage

    os.environ["STREAMGAUGE_TEST"] = nodeid
    current = coverage.Coverage.current()
    if current is not None:
        current.switch_context(nodeid)


def pytest_collection_finish(session: Any) -> None:
    """Note which tests share fixtures: what a fixture runs for several is noted of the first."""
    wide: dict[str, list[str]] = defaultdict(list)
    for item in session.items:
        for found in item._fixtureinfo.name2fixturedefs.values():
            if found[-1].scope != "function" and found[-1].baseid.startswith("tests"):
                wide[f"{found[-1].baseid}::{found[-1].argname}"].append(item.nodeid)
    if session.items:
        Path(os.environ["STREAMGAUGE_NOTES"], "shared.json").write_text(json.dumps(wide))


def pytest_unconfigure() -> None:
    """xdist ends its workers before coverage would write by itself."""
    import coverage

    current = coverage.Coverage.current()
    if current is not None:
        current.save()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Note how long each test took, its fixtures included."""
    seconds: dict[str, float] = defaultdict(float)
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if hasattr(report, "duration") and hasattr(report, "nodeid"):
            seconds[report.nodeid] += report.duration
    Path(os.environ["STREAMGAUGE_NOTES"], "seconds.json").write_text(json.dumps(seconds))


# ---- Clones, and which test reaches which line


def clone(folder: Path, commit: str) -> Path:
    """A commit in a folder of its own, with what lies beside the clone beside it."""
    if not folder.is_dir():
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        beside = folder.parent / SHARED.name
        if SHARED.is_dir() and not beside.exists():
            beside.symlink_to(SHARED)
    subprocess.run(["git", "-C", folder, "fetch", "-q"], check=True)
    subprocess.run(["git", "-C", folder, "reset", "-q", "--hard", commit], check=True)
    clean(folder)
    return folder


def clean(house: Path) -> None:
    """Take away what a test or a change may have left in a clone."""
    for command in (["checkout", "-q", "--", "."], ["clean", "-fdqx"]):
        subprocess.run(["git", "-C", house, *command], check=True)


def git(*arguments: str) -> str:
    """What git prints in this repository."""
    done = subprocess.run(
        ["git", "-C", ROOT, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def environment(house: Path) -> dict[str, str]:
    """The clone's code is imported, and never from a compiled file that is older than a change."""
    own = {"PYTHONPATH": str(house), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | own | {"CI": "true"}


@dataclass(frozen=True)
class Reached:
    """Unchanged code, the tests that reach each of its lines, how long tests take, and which of
    them share a fixture.
    """

    house: Path
    tests: dict[tuple[str, int], set[str]]
    seconds: dict[str, float]
    shared: list[set[str]]

    def covering(self, path: str, line: int) -> list[str]:
        """Tests that run a line, quickest first, as many as SECONDS lets be run.

        What runs when its file is imported was run before any test: half of the time goes to tests
        that reach the file, half to all others.
        """
        lines, once = statement(ast.parse((self.house / path).read_text()), line)
        if once:
            near = set().union(*(found for (file, _), found in self.tests.items() if file == path))
            first = self.quickest(near, SECONDS / 2)
            return [*first, *self.quickest(self.seconds.keys() - set(first), SECONDS / 2)]
        found = set().union(*(self.tests.get((path, number), set()) for number in lines))
        found |= set().union(*(tests for tests in self.shared if tests & found))
        return self.quickest(found, SECONDS)

    def quickest(self, tests: Collection[str], seconds: float) -> list[str]:
        """As many of the tests as end in so many seconds."""
        in_order = sorted(tests, key=lambda test: (self.seconds.get(test, 0), test))
        ends = itertools.accumulate(self.seconds.get(test, 0) for test in in_order)
        return [test for test, end in zip(in_order, ends, strict=True) if end <= seconds]


def reached(folder: Path, commit: str) -> Reached:
    """What the whole suite reaches, which has to pass on unchanged code."""
    import coverage

    data, note = folder / "reached" / "coverage", folder / "reached" / "commit"
    house = clone(folder / "unchanged", commit)
    if not note.is_file() or git("diff", "--name-only", note.read_text(), commit, *ROOMS, "tests"):
        shutil.rmtree(data.parent, ignore_errors=True)
        data.parent.mkdir(exist_ok=True)
        settings = data.with_name("settings.ini")
        rooms = ", ".join(str(house / room) for room in ROOMS)
        settings.write_text(COVERAGE.replace("{rooms}", rooms).replace("{data}", str(data)))
        # Every process starts coverage by itself, and reads there which test started it.
        own = {"COVERAGE_PROCESS_START": str(settings), "STREAMGAUGE_NOTES": str(data.parent)}
        plugin = ["-p", "tests.benchmarks.mutants", "-p", "no:cacheprovider", "-q", "-n", "2"]
        subprocess.run(
            [sys.executable, "-m", "pytest", *plugin, "tests", "--ignore", "tests/benchmarks"],
            cwd=house,
            env=environment(house) | own,
            check=True,
        )
        combine = [sys.executable, "-m", "coverage", "combine", "-q", "--rcfile", settings]
        subprocess.run(combine, cwd=house, check=True)
        note.write_text(commit)
    found = coverage.CoverageData(str(data))
    found.read()
    tests: dict[tuple[str, int], set[str]] = defaultdict(set)
    for file in found.measured_files():
        for line, contexts in found.contexts_by_lineno(file).items():
            # "|" stands between what a process was started for and the test that it runs itself.
            names = {name for context in contexts for name in context.split("|")}
            tests[str(Path(file).relative_to(house)), line] |= {n for n in names if "::" in n}
    seconds, shared = (
        json.loads((data.parent / f"{name}.json").read_text()) for name in ("seconds", "shared")
    )
    return Reached(house, tests, seconds, [set(names) for names in shared.values()])


def statement(tree: ast.AST, line: int) -> tuple[range, bool]:
    """Lines of the innermost statement that a line is of (of a compound one, those of its head),
    and whether it runs once, when its file is imported.
    """
    lines, once, inside = range(line, line + 1), True, tree
    while True:
        within = [
            child
            for child in statements(inside)
            if first(child) <= line <= (child.end_lineno or child.lineno)
        ]
        if not within:
            return lines, once
        (inside,) = within[:1]
        body = getattr(inside, "body", None)
        end = first(body[0]) if body else (inside.end_lineno or inside.lineno) + 1
        if line >= end and isinstance(inside, ast.FunctionDef):
            once = False
        lines = range(first(inside), end)


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements directly below a node, those of handlers and other branches too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        elif isinstance(child, ast.ExceptHandler | ast.match_case):
            yield from statements(child)


def first(node: ast.stmt) -> int:
    """Where a statement starts, its decorators included."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


# ---- Drawing places


@dataclass(frozen=True)
class Mutant:
    """One change: cosmic-ray's name for it, and which of the places it fits in the file."""

    room: str
    path: str
    line: int
    operator: str
    occurrence: int

    @property
    def name(self) -> str:
        """What it is told by, also after an interruption."""
        return f"{self.path}:{self.line}:{self.operator}:{self.occurrence}"


def annotations(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """First and last position of each annotation."""
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            found = getattr(node, name, None)
            if isinstance(found, ast.expr):
                end = found.end_lineno or 0, found.end_col_offset or 0
                yield (found.lineno, found.col_offset), end


def places(house: Path, room: str) -> dict[str, list[Mutant]]:
    """The changes that each place of a room can get; a place is told by its file, its line's text
    and where in it, which stay when other code changes.
    """
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import WorkDB, use_db

    found: dict[str, list[Mutant]] = defaultdict(list)
    files = sorted((house / room).rglob("*.py"))
    with use_db(":memory:", WorkDB.Mode.create) as work:
        init(files, work, {})
        items = [item.mutations[0] for item in work.work_items]
    texts = {file: file.read_text() for file in files}
    silent = {file: list(annotations(ast.parse(text))) for file, text in texts.items()}
    for item in sorted(items, key=lambda i: (i.module_path, i.operator_name, i.occurrence)):
        start = tuple(item.start_pos)
        if any(first <= start < end for first, end in silent[item.module_path]):
            continue
        path, text = str(item.module_path.relative_to(house)), texts[item.module_path]
        place = f"{path}|{text.splitlines()[start[0] - 1]}|{start[1]}|{item.end_pos[1]}"
        mutant = Mutant(room, path, start[0], item.operator_name, item.occurrence)
        found[place].append(mutant)
    return found


def drawn(house: Path, seed: int) -> list[Mutant]:
    """As many places of each room as ROOMS says, and a change for each."""

    def lot(text: str) -> str:
        return hashlib.sha256(f"{seed}|{text}".encode()).hexdigest()

    chosen = []
    for room, number in ROOMS.items():
        found = places(house, room)
        for place in sorted(found, key=lot)[:number]:
            chosen.append(min(found[place], key=lambda m: lot(f"{place}|{m.operator}|{m.line}")))
    return chosen


# ---- Trying one


def attempt(mutant: Mutant, house: Path, tests: list[str], seconds: float) -> dict[str, Any]:
    """Change the clone, run the tests, put the clone back."""
    from cosmic_ray.mutating import use_mutation
    from cosmic_ray.plugins import get_operator

    operator = get_operator(mutant.operator)()
    with use_mutation(house / mutant.path, operator, mutant.occurrence) as (before, after):
        changed = [
            line
            for line in difflib.unified_diff(before.split("\n"), after.split("\n"), n=0)
            if line[0] in "+-" and line[:3] not in ("+++", "---")
        ]
        killer = run(house, tests, seconds) if tests else None
    return {"changed": changed, "killer": killer, "tests": len(tests)}


def run(house: Path, tests: list[str], seconds: float) -> str | None:
    """The first test that fails, or None where all pass.

    Raises InterruptedError where pytest was ended from outside.
    """
    names = house.with_suffix(".txt")
    names.write_text("\n".join(tests))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"@{names}"]
    process = subprocess.Popen(
        command,
        cwd=house,
        env=environment(house),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120 + 5 * seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with all that tests have started
        process.communicate()
        return TIMEOUT
    if process.returncode == 0:
        return None
    if process.returncode < 0 or process.returncode == pytest.ExitCode.INTERRUPTED:
        raise InterruptedError(f"pytest ended with {process.returncode}")
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else f"pytest: exit {process.returncode}"


def sound(house: Path, rows: list[dict[str, Any]]) -> None:
    """See that the tests that found something pass on unchanged code, and that pytest can start
    there where it ended before any test.

    Raises RuntimeError where they do not: what they found is then nothing.
    """
    clean(house)
    said = [(row["killer"] or "").partition(" ")[2].partition(" - ")[0] for row in rows]
    found = run(house, sorted({name for name in said if "::" in name}), 600.0)
    if found is not None:
        raise RuntimeError(f"on unchanged code too: {found}")


def work(
    house: Path, waiting: "SimpleQueue[Mutant]", known: dict[str, Any], results: Path, told: Reached
) -> None:
    """Try mutants until none waits; one that could not be tried is tried the next time."""
    while True:
        try:
            mutant = waiting.get_nowait()
        except Empty:
            return
        tests, start = told.covering(mutant.path, mutant.line), time.monotonic()
        clean(house)
        try:
            found = attempt(mutant, house, tests, sum(told.seconds.get(test, 0) for test in tests))
        except InterruptedError as error:
            print(f"not tried: {mutant.name} ({error})", flush=True)
            return
        row = asdict(mutant) | found | {"seconds": round(time.monotonic() - start, 1)}
        known[mutant.name] = row
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row["killer"] or f"SURVIVED {mutant.name} {row['changed']}", flush=True)


# ---- The page


def page(seed: int, rows: list[dict[str, Any]]) -> str:
    """docs/mutants.md."""
    from importlib.metadata import version

    words = tomllib.loads(WORDS.read_text())
    text = HEAD.format(
        drawn=len(rows),
        seed=seed,
        seconds=SECONDS,
        version=version("cosmic-ray"),
        timeouts=sum(row["killer"] == TIMEOUT for row in rows),
    )
    text += words.get("note", "").lstrip() + "\n\n"
    text += "| room | changes | found | of them |\n|---|---|---|---|\n"
    for room in [*ROOMS, "all"]:
        own = [row for row in rows if room in (row["room"], "all")]
        killed = sum(row["killer"] is not None for row in own)
        text += f"| {room} | {len(own)} | {killed} | {killed / len(own):.0%} |\n"
    text += "\n## Survivors\n\n"
    for row in rows:
        if row["killer"] is None:
            name = f"{row['path']}:{row['line']}"
            text += f"- `{name}` {words.get(changed(row), 'not looked at')}\n\n"
            text += "".join(f"      {line}\n" for line in row["changed"]) + "\n"
    return text


def changed(row: dict[str, Any]) -> str:
    """What a word about a survivor is kept under: the changed line itself."""
    return "\n".join(line[1:].strip() for line in row["changed"] if line.startswith("+"))


def main() -> None:
    """Draw, try what has not been tried, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where clones, coverage and results are kept")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    commit = git("rev-parse", "HEAD")
    told = reached(folder, commit)
    results = folder / f"results-{commit}-{options.seed}.jsonl"
    known = {row_name(row): row for row in read(results)}
    mutants, waiting = drawn(told.house, options.seed), SimpleQueue()
    for mutant in mutants:
        if mutant.name not in known:
            waiting.put(mutant)
    houses = [clone(folder / f"changed{index}", commit) for index in range(2)]
    threads = [
        threading.Thread(target=work, args=(house, waiting, known, results, told))
        for house in houses
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [known[mutant.name] for mutant in mutants if mutant.name in known]
    if len(rows) < len(mutants):
        sys.exit(f"{len(mutants) - len(rows)} of {len(mutants)} are left; run it again.")
    sound(houses[0], rows)
    TABLE.write_text(page(options.seed, rows))


def read(results: Path) -> list[dict[str, Any]]:
    """What was found before; a line that was not finished is left out."""
    lines = results.read_text().splitlines() if results.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def row_name(row: dict[str, Any]) -> str:
    """The name of the change that a row is about."""
    return Mutant(**{name: row[name] for name in Mutant.__annotations__}).name


if __name__ == "__main__":
    main()
