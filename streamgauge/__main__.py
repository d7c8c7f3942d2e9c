"""The command line: `python -m streamgauge laws`, `measure`, `replay`, `diff`, `calibrate`,
`report`, `history` and `attest`.

Audits themselves are run by pytest.
"""

import argparse
import difflib
import json
import os
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from streamgauge.catalogued import location, part
from streamgauge.errors import (
    PromptError,
    RecordError,
    SettingsError,
    StreamgaugeError,
    UnknownModelError,
)
from streamgauge.laws import laws
from streamgauge.numerics.draws import LAWS, NAMES, NO_NUMBER, TWINS, Draw

if TYPE_CHECKING:
    from streamgauge.diff import Comparison
    from streamgauge.store import Store

FAILED, INTERRUPTED, USAGE = 1, 2, 4
LISTED = 10  # differences of a kind that `diff` prints
MOST_DRAWS = 100_000  # of sequences of tokens that a search may be asked for


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns 0, or 1 where it could not be done or `diff` found something, 2 where it was
    interrupted, or 4 where a name or an option is wrong.
    """
    options = _parser().parse_args(arguments)
    try:
        code = int(options.run(options) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who reads has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (PromptError, SettingsError, UnknownModelError) as error:
        print(f"streamgauge: {error}", file=sys.stderr)
        return USAGE
    except StreamgaugeError as error:
        print(f"streamgauge: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("streamgauge: interrupted.", file=sys.stderr)
        return INTERRUPTED


class _Parser(argparse.ArgumentParser):
    """A mistake on the command line has the exit code that the others have."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m streamgauge", description="Audit the weights of transformer models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser(
        "laws", help="list every law: id, kind, claim, source, where it applies"
    )
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=_laws)

    instrument = _Parser(add_help=False)  # for every command that measures
    instrument.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one prompt a line, instead of the built-in set",
    )
    instrument.add_argument(
        "--allow-pickle", action="store_true", help="open pickled weights, tensors only"
    )
    instrument.add_argument(
        "--verify",
        action="store_true",
        help="hold the weight files to the sha256 published for them (the hub's, SHA256SUMS, "
        "NAME.sha256, in-toto), before any is read",
    )
    instrument.add_argument("--device", default="cpu", help="torch device (default: cpu)")

    measuring = commands.add_parser(
        "measure", parents=[instrument], help="measure checkpoints and write their records"
    )
    measuring.add_argument(
        "models", nargs="+", metavar="MODEL", help="a folder, a catalogued name or a hub repository"
    )
    measuring.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the record, FILE.safetensors; of several models, or beside --store, a folder for "
        "NAME.safetensors of each",
    )
    measuring.add_argument(
        "--store",
        metavar="DIR_OR_URL",
        help="or keep records here, where `pytest --store` finds them; what is there is not "
        "measured again",
    )
    measuring.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="measure on a Ray cluster: this one, or the one at hand, or else one of this machine; "
        "put it behind the models",
    )
    measuring.add_argument("--revision", help="a branch, tag or commit of a hub repository")
    measuring.add_argument(
        "--horizons",
        choices=["default", "all"],
        default="default",
        help="variants of the layer horizon (default: the published)",
    )
    measuring.add_argument(
        "--neighbours",
        choices=["default", "all", "none"],
        default="default",
        help="changes that may repair the checkpoint: the likeliest (default), all, or none",
    )
    measuring.add_argument(
        "--precision",
        type=float,
        metavar="WIDTH",
        help="only as many prompts as it takes until the growth rate's 95%% interval is "
        "narrower than this",
    )
    measuring.set_defaults(run=_measure)

    replaying = commands.add_parser(
        "replay",
        parents=[instrument],
        help="put one drawn sequence of tokens to a law again, as a failure's row says",
    )
    replaying.add_argument("model", help="a folder, a catalogued name or a hub repository")
    replaying.add_argument("law", help="as a failure names it, or its file: heads_have_no_order")
    replaying.add_argument("--tokens", required=True, metavar="IDS", help="as 17,3,3")
    replaying.add_argument("--kept", type=int, default=1, help="tokens that another text shares")
    replaying.add_argument("--seed", type=int, default=0, help="of what changes places")
    replaying.set_defaults(run=_replay)

    comparing = commands.add_parser(
        "diff",
        parents=[instrument],
        help="compare two checkpoints or records: what moved, where and by how much",
    )
    comparing.add_argument(
        "old", help="a folder, a catalogued name, a hub repository, or a record FILE.safetensors"
    )
    comparing.add_argument("new", help="likewise")
    comparing.add_argument(
        "--store",
        metavar="DIR_OR_URL",
        help="keep records here (default: the platform's cache folder)",
    )
    comparing.add_argument(
        "--all", action="store_true", help="every difference, rather than the ten largest of a kind"
    )
    comparing.add_argument(
        "--same",
        choices=["function", "trained", "quantised"],
        help="exit 0 where the new one is the same function in other weights, the same model "
        "trained further, or a quantisation",
    )
    comparing.add_argument(
        "--within",
        metavar="BOUNDS",
        default="",
        help="exit 1 above these, as kl=0.05,kl99=0.5,perplexity=1.02,flips=0.05",
    )
    comparing.add_argument(
        "--search",
        type=int,
        metavar="N",
        help="draw so many sequences of tokens to find the simplest on which the two part "
        "(default: 20 where the verdict leaves that open; 0: none)",
    )
    comparing.add_argument(
        "--tokens", metavar="IDS", help="look at this one sequence instead, as 17,3,3"
    )
    comparing.add_argument("--json", action="store_true", help="as JSON (docs/diff.schema.json)")
    comparing.set_defaults(run=_diff)

    calibrating = commands.add_parser(
        "calibrate", help="bands of your own, from records of checkpoints that are sound"
    )
    calibrating.add_argument(
        "records", type=Path, nargs="+", metavar="RECORD", help="FILE.safetensors of `measure`"
    )
    calibrating.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="as streamgauge.toml"
    )
    calibrating.add_argument(
        "--rate",
        type=float,
        default=0.05,
        help="the chance that a sound checkpoint fails in some law (default: 0.05)",
    )
    calibrating.add_argument(
        "--successive",
        action="store_true",
        help="each record is of a further trained state of the one before: how far the next may "
        "move, and its loss rise, is calibrated too (--baseline --same trained)",
    )
    calibrating.set_defaults(run=_calibrate)

    reporting = commands.add_parser(
        "report", help="render rows.jsonl files as a page and a summary"
    )
    reporting.add_argument(
        "rows",
        type=Path,
        nargs="+",
        metavar="ROWS",
        help="rows.jsonl of an audit, its records beside it",
    )
    reporting.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="where to write them"
    )
    reporting.set_defaults(run=_report)

    indexing = commands.add_parser(
        "history", help="write index.html over a folder of audits: what changed from run to run"
    )
    indexing.add_argument("runs", type=Path, help="a folder with audits' folders in it")
    indexing.set_defaults(run=_history)

    attesting = commands.add_parser(
        "attest", help="print what an audit found as an in-toto statement about its weight files"
    )
    attesting.add_argument("model", help="the checkpoint that was audited")
    attesting.add_argument("rows", type=Path, help="the rows.jsonl of its audit")
    attesting.set_defaults(run=_attest)
    return parser


def _attest(options: argparse.Namespace) -> None:
    from streamgauge.attest import statement
    from streamgauge.checkpoints.files import open_checkpoint

    said = statement(open_checkpoint(location(options.model)), options.rows)
    print(json.dumps(said, indent=1))


def _laws(options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps([asdict(law) for law in laws()], indent=1, ensure_ascii=False))
        return
    for law in laws():
        print(
            f"{law.id}  ({law.kind})\n  {law.claim}\n  {law.formula}\n  source: {law.source}\n  "
            f"applies to: {law.applies_to}\n"
        )


def _measure(options: argparse.Namespace) -> int:
    if options.store is None and options.output is None:
        raise SettingsError("name a place for what is measured: -o FILE, or --store.")
    if options.store is None and (len(options.models) > 1 or options.ray is not None):
        raise SettingsError(
            "several models, and a cluster, need a --store; with -o FOLDER each record also lies "
            "there by its model's name."
        )
    opening = {"allow_pickle": options.allow_pickle, "verify": options.verify}
    measuring = {
        "prompts": options.prompts,
        "device": options.device,
        "horizons": options.horizons,
        "precision": options.precision,
        "neighbours": options.neighbours,
    }
    if options.store is None:
        _measure_one(options, opening, measuring)
        return 0
    return _measure_into_store(options, opening, measuring)


def _measure_one(
    options: argparse.Namespace, opening: dict[str, Any], measuring: dict[str, Any]
) -> None:
    from streamgauge.checkpoints.files import open_checkpoint
    from streamgauge.measure import measure
    from streamgauge.record import Record

    if options.output.is_dir():
        raise SettingsError(f"{options.output} is a folder; name a file with -o.")
    if options.output.is_file():
        Record.load(options.output)  # raises where somebody else's file would be overwritten
    checkpoint = open_checkpoint(location(options.models[0]), options.revision, **opening)
    record = measure(checkpoint, show=True, **measuring)
    record.save(options.output)
    print(f"{options.output}: {record.n_layers} layers, {record.metadata['seconds']} s")


def _measure_into_store(
    options: argparse.Namespace, opening: dict[str, Any], measuring: dict[str, Any]
) -> int:
    """Measure what a store lacks, here or on a cluster; a model that cannot be measured keeps none
    of the others from it.
    """
    from streamgauge.cluster import Asked, job_of, measured, measured_here
    from streamgauge.progress import track
    from streamgauge.store import Store, prepare_folder

    if options.output is not None and options.output.is_file():
        raise SettingsError(f"{options.output} is a file; beside --store name a folder with -o.")
    if options.output is not None:
        prepare_folder(options.output, "the folder of records", "-o")
    asked = Asked(Store.at(options.store), opening, measuring)
    asked.store.prepare()
    jobs = [job_of(name, location(name), options.revision) for name in options.models]
    arrivals = (
        measured_here(jobs, asked) if options.ray is None else measured(jobs, asked, options.ray)
    )
    found = [next(arrivals) for _ in track(range(len(jobs)), "records", options.ray is not None)]
    problems = [one for one in found if one.problem]
    for one in problems:
        print(f"streamgauge: {one.key}: {one.problem}", file=sys.stderr)
    if options.output is not None:
        _copy_by_name([one.stored for one in found if one.stored], asked.store, options.output)
    new, again = sum(one.measured for one in found), sum(one.starts > 1 for one in found)
    print(
        f"{asked.store}: {new} measured, {len(found) - new - len(problems)} were there, "
        f"{len(problems)} could not be measured"
        + (f"; {again} begun again after a node was lost" if again else "")
    )
    return FAILED if problems else 0


def _copy_by_name(keys: list[str], store: "Store", folder: Path) -> None:
    """Records of a store as FOLDER/NAME.safetensors: by their models, and revisions."""
    from streamgauge.record import Record

    taken: set[str] = set()
    for key in dict.fromkeys(keys):  # a model may have been named twice
        record = store.find(key)
        if record is None:
            continue  # somebody else has cleared the store meanwhile
        named = (record.metadata["model"], record.metadata["revision"])
        plain = re.sub(r"[^\w.-]+", "-", "-".join(str(part) for part in named if part)).strip("-.")
        name = next(n for n in (plain, f"{plain}-{key[:8]}") if n not in taken)
        taken.add(name)
        path = folder / f"{name}.safetensors"
        if path.is_file():
            Record.load(path)  # raises where somebody else's file would be overwritten
        record.save(path)


def _replay(options: argparse.Namespace) -> int:
    asked = options.law.rpartition("/")[2]
    law = NAMES.get(asked, asked)
    if law not in LAWS:
        near = difflib.get_close_matches(asked, [*LAWS, *NAMES], n=1, cutoff=0)[0]
        raise UnknownModelError(f"no law {options.law!r} draws sequences; the nearest is {near}.")
    ids = _ids(options.tokens)
    from streamgauge.checkpoints.files import open_checkpoint
    from streamgauge.replay import replay

    checkpoint = open_checkpoint(
        location(options.model), allow_pickle=options.allow_pickle, verify=options.verify
    )
    twin = law if law in TWINS else TWINS[0]
    draw = Draw(ids, options.kept, twin, options.seed)
    ratio, layer = replay(checkpoint, law, draw, options.device)
    times = "no number" if ratio >= NO_NUMBER else f"{ratio:.4g} times what rounding explains"
    print(f"{LAWS[law]}: {times}, layer {layer}")
    return FAILED if ratio > 1 else 0


def _diff(options: argparse.Namespace) -> int:
    from streamgauge.diff import diff
    from streamgauge.store import Store

    bounds = _bounds(options.within)
    if options.search is not None and not 0 <= options.search <= MOST_DRAWS:
        raise SettingsError(
            f"--search {options.search} is no number of draws; give 0 to {MOST_DRAWS:,}."
        )
    store = Store.at(options.store)
    store.prepare()
    found = diff(
        options.old,
        options.new,
        store,
        prompts=options.prompts,
        device=options.device,
        allow_pickle=options.allow_pickle,
        verify=options.verify,
        logits=bool(bounds),
        draws=options.search,
        tokens=None if options.tokens is None else _ids(options.tokens),
        show=True,
    )
    # Where the verdict fails already it is what there is to say.
    if bounds and found.divergence is None and found.verdict.passes(options.same):
        raise SettingsError("--within needs two checkpoints that read the same tokens.")
    above = found.divergence.beyond(bounds) if found.divergence else []
    if options.json:
        print(json.dumps(found.as_json(), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print("\n".join(_lines(found, options.all) + _parting(found, options) + above))
    return 0 if found.verdict.passes(options.same) and not above else FAILED


def _parting(found: "Comparison", options: argparse.Namespace) -> list[str]:
    """Where the two part, and the command that shows it again."""
    if found.parting is None:
        looked = "on these tokens" if options.tokens else f"in {found.drawn:,} draws"
        return [f"the two never part, {looked}"] if found.drawn or options.tokens else []
    ids = ",".join(map(str, found.parting.tokens))
    again = ["python", "-m", "streamgauge", "diff", options.old, options.new, "--tokens", ids]
    again += ["--prompts", str(options.prompts)] if options.prompts else []
    again += ["--device", options.device] if options.device != "cpu" else []
    again += ["--allow-pickle"] if options.allow_pickle else []
    return [str(found.parting), f"again: {shlex.join(again)}"]


def _ids(text: str) -> tuple[int, ...]:
    """Token ids as `17,3,3`. Raises UnknownModelError."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UnknownModelError(f"--tokens {text!r} is no list as 17,3,3.") from None


def _bounds(text: str) -> dict[str, float]:
    """Bounds as `kl=0.05,flips=0.01`. Raises SettingsError."""
    from streamgauge.divergence import BOUNDS

    found = {}
    for entry in filter(None, text.split(",")):
        name, _, bound = (word.strip() for word in entry.partition("="))
        try:
            found[name] = float(bound)
        except ValueError:
            found[name] = float("nan")
        if not found[name] >= 0:
            raise SettingsError(f"--within {entry!r} is no bound as kl=0.05.")
        if name not in BOUNDS:
            near = difflib.get_close_matches(name, BOUNDS, n=1, cutoff=0)[0]
            raise SettingsError(f"--within has no {name!r}; the nearest is {near}.")
    return found


def _lines(found: "Comparison", everything: bool) -> list[str]:
    """A comparison for a terminal."""
    from streamgauge.compare import table
    from streamgauge.compare.judgement import lines_of

    # Where every number was compared that says more than sketches and norms do.
    read = None if found.changes is None else len(found.changes)
    told = () if read is None or everything else ("weights", "norms")
    lines = lines_of(found.verdict, read, None if everything else LISTED)
    lines += table(found.differences, None if everything else 0, told)[0]
    for one in found.tokenizers or []:
        lines.append(
            f"tokenizer: {one.says}{'' if one.encodes else '; no text that was tried changes'}"
        )
    return lines + ([str(found.divergence)] if found.divergence else [])


def _calibrate(options: argparse.Namespace) -> None:
    from streamgauge.calibrate import calibrate

    said = calibrate(options.records, options.output, options.rate, successive=options.successive)
    print("\n".join(said))


def _report(options: argparse.Namespace) -> None:
    from streamgauge.store import prepare_report

    for path in options.rows:
        if path.is_dir():
            raise UnknownModelError(f"{path} is a folder; name the rows.jsonl in it.")
        if not path.is_file():
            raise UnknownModelError(
                f"there is no file {path}; name the rows.jsonl that pytest --report wrote."
            )
    prepare_report(options.output, "-o")
    rendering = part("reports.render")
    try:
        rows = rendering.read_rows(options.rows)
    except (ValueError, KeyError, TypeError) as error:
        named = ", ".join(map(str, options.rows))
        raise RecordError(
            f"{named} is not the rows.jsonl of an audit ({type(error).__name__}: {error})."
        ) from error
    rendering.write(rows, options.output)
    print(options.output / "report.html")


def _history(options: argparse.Namespace) -> None:
    from streamgauge.store import prepare_folder

    if not options.runs.is_dir():
        raise UnknownModelError(f"{options.runs} is no folder; name one with audits in it.")
    if not any(options.runs.rglob("rows.jsonl")):
        raise UnknownModelError(
            f"there is no rows.jsonl in {options.runs}; pytest --report writes one."
        )
    page = options.runs / "index.html"
    if page.is_file() and "<title>streamgauge: " not in page.read_text(encoding="utf-8"):
        raise SettingsError(f"{page} was written by somebody else; keep runs in another folder.")
    prepare_folder(options.runs, "the folder of runs", "another place")
    try:
        count = part("reports.history").index(options.runs)
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(
            f"a rows.jsonl in {options.runs} is not of an audit ({type(error).__name__}: {error})."
        ) from error
    print(f"{page}: {count} runs")


if __name__ == "__main__":
    sys.exit(main())
