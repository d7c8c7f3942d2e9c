"""Measure a checkpoint: one function from a name to a record."""

import difflib
import hashlib
import importlib.metadata
import json
import re
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.catalogued import location
from streamgauge.checkpoints.contents import pickles_that_differ, shards_that_differ
from streamgauge.checkpoints.files import Checkpoint, open_checkpoint, stored_dtypes, weights_sha256
from streamgauge.checkpoints.prompts import read_prompts
from streamgauge.checkpoints.tokenizers import load_tokenizer
from streamgauge.engine.accounts import Accounts
from streamgauge.engine.forward import Group, Lacking, walk
from streamgauge.engine.memory import reused, searched_rarely
from streamgauge.engine.rows import rows_for
from streamgauge.errors import NotInstalledError, NotMeasured, PromptError, UnknownModelError
from streamgauge.groups.patching import tasks_sha256
from streamgauge.groups.sampling import enough_prompts
from streamgauge.numerics.circuits import Task
from streamgauge.numerics.horizons import variants_of
from streamgauge.numerics.rows import Prompts
from streamgauge.progress import PARTS, auditing, in_notebook
from streamgauge.record import Record
from streamgauge.store import Store

if TYPE_CHECKING:
    from streamgauge.engine.layout import Layout
    from streamgauge.groups.tensors import Tensors
    from streamgauge.plan import Plan

LARGE = 2**29  # bytes of weights
MEASURING = ("torch", "transformers", "transformer_lens", "accelerate", "greenlet", "psutil")

# Raise a group's number whenever a change to it alters what is measured: stored records gain it
# anew, and keep the others.
GROUPS = {
    "instrument": 2,
    "stream": 4,
    "weights": 5,
    "neurons": 1,
    "sublayers": 3,
    "random_input": 4,
    "padding": 1,
    "horizon": 4,
    "sublayer_effect": 5,
    "patching": 1,
    "sketch": 2,
    "prediction": 2,
    "rounding": 4,
    "neighbours": 3,
    "draws": 3,
}
NOT_SKIPPED = (
    "not measured: leaving out each block in turn costs half a forward pass for every layer"
)
DRAWS = 10  # through the model, unless --hypothesis-profile says otherwise

CONFIG_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}

# Entries of a configuration that change nothing of what the model computes when it is not trained.
NOT_FUNCTION = re.compile(
    r"^_|version|dtype|architectures|^use_cache|^chunk_size|drop|initializer|_token_id$|^summary_|^task_|^problem_type|label"
    r"|^return_|^output_|gradient|^is_encoder_decoder|^tokenizer_class|aux_loss|router_jitter"
)


def measure(
    model: str | Path | Checkpoint,
    *,
    revision: str | None = None,
    prompts: Path | None = None,
    device: str = "cpu",
    horizons: str = "default",
    tasks: Sequence[Task] = (),
    precision: float | None = None,
    neighbours: str = "default",
    draws: int = DRAWS,
    rows: Prompts | None = None,
    groups: Sequence[str] | None = None,
    known: Record | None = None,
    store: Store | Path | str | None = None,
    show: bool | None = None,
) -> Record:
    """Measure a checkpoint folder, a catalogued name or a hub model: all groups of
    `streamgauge.record`, or those named.

    prompts: a file with one prompt a line instead of the built-in set. horizons: the variants of
    the layer horizon that are tried, `default` or `all` (see `streamgauge.numerics.horizons`).
    tasks: prompt pairs on which heads are patched. precision: only as many prompts as it takes
    until the 95% interval of the growth rate is narrower than this. neighbours: `default`, `all`
    for every change of the checkpoint that may repair it, or `none`. draws: how many sequences of
    tokens hypothesis draws for the laws that hold of any; 0 leaves them out. rows: token ids to
    measure on instead of any text. known: an earlier record of the same checkpoint and prompts,
    whose groups are taken over where they are as this instrument would measure them. store: a
    folder or URL of records, as --store names it: the record of this very checkpoint is taken from
    there where it holds what is asked for, and what is measured is added to it; `known` counts
    where there is none. show: progress on stderr, by default in notebooks alone.
    Raises UnknownModelError, CheckpointError, HubError, PromptError, StoreError, NotInstalledError,
    or NotMeasured where files change meanwhile, each with one sentence for the user.

    >>> record = measure("./checkpoint")  # doctest: +SKIP
    >>> record.resid_pre.shape  # layers, tokens  # doctest: +SKIP
    (16, 1304)
    """
    if store is None:
        _require_measuring()  # before anything is fetched
    if isinstance(model, Checkpoint):
        checkpoint = model
    else:
        checkpoint = open_checkpoint(location(model), revision)
    texts = rows or read_prompts(prompts)
    if precision is not None and not precision > 0:
        raise PromptError(f"precision {precision} is no width of an interval; give one above 0.")
    unknown = sorted(set(groups or ()) - set(GROUPS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], GROUPS, n=3, cutoff=0)
        raise UnknownModelError(
            f"a record has no group {unknown[0]!r}; the nearest are {', '.join(near)}."
        )
    wanted = Wanted(
        horizons,
        tuple(tasks),
        # Nothing is measured of a model whose forward pass was not seen to agree.
        tuple(
            name
            for name in GROUPS
            if (groups is None or name in ("instrument", *groups))
            and (name != "neighbours" or neighbours != "none")
            and (name != "draws" or draws)
        ),
        precision,
        neighbours,
        draws,
    )
    asked = Asked(
        checkpoint,
        texts,
        built_in=prompts is None,
        device=device,
        wanted=wanted,
        show=in_notebook() if show is None else show,
    )
    if store is None:
        return _measure(asked, known)
    if not isinstance(store, Store):
        store = Store.at(store)
        store.prepare("store=")
    return _stored(asked, known, store, store.key(checkpoint, prompts, device, rows, precision))


def _stored(asked: "Asked", known: Record | None, store: Store, key: str) -> Record:
    """The stored record where it holds what is asked for, or a new one, measured and stored.

    A damaged one is measured again; of one of an older instrument, what is out of date.
    """
    found = store.find(key)
    if found is not None:  # of these weights, whatever they were called when they were measured
        named = {"model": asked.checkpoint.name, "revision": asked.checkpoint.revision}
        found = Record(found.arrays, found.metadata | named)
    if found is not None and set(asked.wanted.groups) <= set(current_groups(found, asked.wanted)):
        return found
    _require_measuring()
    digest = store.weights_sha256(asked.checkpoint)
    record = _measure(asked, found or known, digest)
    if store.weights_sha256(asked.checkpoint) != digest:
        raise NotMeasured(
            f"the weights in {asked.checkpoint.folder} changed while they were measured; run again."
        )
    # Read again: another process may have added to it in the meantime.
    record = _with_others(record, store.find(key) or found)
    store.keep(key, record)
    return record


def _with_others(record: Record, stored: Record | None) -> Record:
    """A record with the groups that a stored one of the same checkpoint and prompts has besides;
    not with those of an older instrument, whose numbers may be others.
    """
    if stored is None or stored.metadata.get("prompts_sha256") != record.metadata.get(
        "prompts_sha256"
    ):
        return record
    others = {
        name: version
        for name, version in stored.groups.items()
        if name not in record.groups and version == GROUPS.get(name)
    }
    said = {name: dict(record.metadata[name]) for name in ("absent", "failed", "lacking")}
    metadata = record.metadata | said | {"groups": record.groups | others}
    return Record(record.arrays | _take_over(stored, list(others), metadata), metadata)


def _require_measuring() -> None:
    """Raise NotInstalledError where something is missing that measuring alone needs."""
    missing = [name for name in MEASURING if find_spec(name) is None]
    if missing:
        raise NotInstalledError(
            f"measuring needs {', '.join(missing)}, which this installation lacks; install "
            "'streamgauge[measure]', or assert a record that was measured elsewhere (--record)."
        )


@dataclass(frozen=True)
class Wanted:
    """What a record is asked to hold: variants of the layer horizon (`default` or `all`), tasks for
    patching, and groups.

    precision: how narrow the growth rate's interval is to be, where not all prompts are wanted.
    neighbours: how far repairs are searched for, `default` or `all`. draws: how many sequences of
    tokens are drawn.
    """

    horizons: str = "default"
    tasks: tuple[Task, ...] = ()
    groups: tuple[str, ...] = field(default_factory=lambda: tuple(GROUPS))
    precision: float | None = None
    neighbours: str = "default"
    draws: int = DRAWS


@dataclass(frozen=True)
class Asked:
    """What is to be measured, and how. texts: prompts, or rows of token ids; built_in: whether they
    are our own.
    """

    checkpoint: Checkpoint
    texts: list[str] | Prompts
    built_in: bool
    device: str
    wanted: Wanted
    show: bool


def _measure(asked: Asked, known: Record | None, digest: str | None = None) -> Record:
    """Measure it; digest: the weights' sha256, where it is known."""
    from streamgauge.engine.blockwise import Blockwise
    from streamgauge.engine.layout import probe_layout
    from streamgauge.engine.load import load_model
    from streamgauge.groups.tensors import Tensors
    from streamgauge.plan import make_plan

    checkpoint, texts, wanted, show = asked.checkpoint, asked.texts, asked.wanted, asked.show
    with searched_rarely(), reused(), auditing(checkpoint.name) as audit, Accounts() as accounts:
        with accounts.of("loading"):
            _say_size(checkpoint, show)
            # Beside what follows: it reads the files from end to end, and needs one core only.
            hashing = None if digest else _hash(checkpoint)
            opened = load_model(checkpoint, asked.device)
            tokenizer = load_tokenizer(checkpoint.folder)  # once: a large one takes seconds
            beyond = _beyond(checkpoint, tokenizer, opened.mapped.model)
            model = Blockwise(opened.mapped)
            layout = probe_layout(model)
        with accounts.of("prompts"):
            rows, why = rows_for(model, checkpoint, tokenizer, texts, built_in=asked.built_in)
            del tokenizer  # its vocabulary takes memory
        reached = None
        if wanted.precision is not None and rows is not None and not isinstance(texts, Prompts):
            with accounts.of("sampling"):
                rows, reached = enough_prompts(model, layout, rows, wanted.precision, show)
        kept = _kept(known, rows, wanted)
        missing = [name for name in wanted.groups if name not in kept]
        if missing and "instrument" not in missing:
            missing = ["instrument", *missing]
        audit.parts = [part for part in PARTS if "repairs" not in part or "neighbours" in missing]
        tensors = Tensors(model, with_sketches="sketch" in missing)
        plan = None
        if rows is not None:
            plan = make_plan(
                model, layout, rows, missing, wanted.horizons, wanted.draws, checkpoint
            )
        visitors: dict[str, Group] = {"tensors": tensors, **(plan.visitors if plan else {})}
        walk(model, visitors, accounts=accounts, show=show, stop=lambda: tensors.broken)
        tensors.say_twins()

        metadata = _metadata(checkpoint, tensors, layout, wanted)
        metadata["integrity"] |= {
            "unread": opened.unread + (checkpoint.origin.unread if checkpoint.origin else []),
            "tokenizer": beyond,
            "untied": opened.untied,
            "beside": _beside(checkpoint),
        }
        metadata |= {"precision": reached, "left_out": opened.left_out}
        arrays: dict[str, np.ndarray] = {}
        if plan is None or tensors.broken:
            lines = tensors.problems["not_finite"]
            why = f"the weights are not finite: {lines[0]}" if lines else why
            metadata["failed"] = dict.fromkeys(wanted.groups, why)
            metadata["draws"] = {"asked": wanted.draws}
        else:
            metadata |= _said_of(plan.rows, texts)
            arrays = _take_all(plan, tensors, asked, known, metadata, accounts)
        metadata["weights_sha256"] = digest if hashing is None else hashing.result()
        return Record(arrays, metadata | accounts.sums())


def _take_all(
    plan: "Plan",
    tensors: "Tensors",
    asked: Asked,
    known: Record | None,
    metadata: dict[str, Any],
    accounts: Accounts,
) -> dict[str, np.ndarray]:
    """All arrays, of an earlier record and of the walk that has ended; metadata say the rest."""
    from streamgauge.plan import Repairs, distrusted, results

    wanted, repairs = asked.wanted, Repairs(asked.wanted.neighbours == "all", asked.built_in)
    metadata["matrices"] = _matrices(plan.visitors, known)
    found = results(plan, tensors, asked.checkpoint, wanted.tasks, repairs, accounts, asked.show)
    metadata |= plan.said
    metadata["failed"] |= plan.failed
    if "draws" in plan.missing:
        metadata["draws"] = metadata.get("draws", {}) | {"asked": wanted.draws}
    arrays: dict[str, np.ndarray] = {}
    if known is not None:
        kept = [name for name in wanted.groups if name not in plan.missing]
        arrays = _take_over(known, kept, metadata)
    for group, (values, absent) in found.items():
        arrays |= _take_in(group, values, absent, metadata)
    for name, why in distrusted(plan, found).items():
        gone = [array for array in arrays if array == name or array.startswith(f"{name}/")]
        for array in gone:
            del arrays[array]
        if gone:
            metadata["failed"][name] = why
    return arrays


def _hash(checkpoint: Checkpoint) -> "Future[str]":
    """The weights' sha256, on a thread that does not keep a process that has failed from ending."""
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(weights_sha256(checkpoint))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _say_size(checkpoint: Checkpoint, show: bool) -> None:
    """A line before files are opened that are large enough to wait for."""
    size = sum(path.stat().st_size for path in checkpoint.own_files)
    if show and size > LARGE:
        print(
            f"streamgauge: {checkpoint.name}: {size / 1e9:.1f} GB of weights",
            file=sys.stderr,
            flush=True,
        )


def _said_of(rows: Prompts, texts: list[str] | Prompts) -> dict[str, Any]:
    """What the metadata says of prompts: asked for, and as the model read them."""
    asked = "\n".join(texts) if isinstance(texts, list) else json.dumps(texts.rows)
    return {
        "texts_sha256": hashlib.sha256(asked.encode()).hexdigest(), "prompts": rows.source,
        "prompts_sha256": rows.sha256(), "bos": rows.bos, "sampled": rows.sampled,
    }  # fmt: skip


def _matrices(groups: dict[str, Group], known: Record | None) -> dict[str, Any]:
    """Where W_V and W_O lie in the files: as was found now, or before."""
    located: Any = groups.get("matrices")
    if located is not None:
        return located.places  # type: ignore[no-any-return]
    return {} if known is None else known.metadata["matrices"]


def _beside(checkpoint: Checkpoint) -> list[str]:
    """Lines of files beside the weights that hold others, where these are safetensors."""
    files = checkpoint.own_files
    if any(path.suffix != ".safetensors" for path in files):
        return []
    folder = files[0].parent
    return pickles_that_differ(folder, files) + shards_that_differ(folder, files)


def _beyond(checkpoint: Checkpoint, tokenizer: Any, model: Any) -> list[str]:
    """One line where the tokenizer has tokens that the embedding has no row for."""
    if checkpoint.origin and checkpoint.origin.format == "GGUF":
        return []  # the file lists a token for each row; transformers adds what it misses there
    rows = model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values(), default=0) if tokenizer is not None else 0
    return (
        [f"the tokenizer has token ids up to {largest}, the embedding {rows} rows"]
        if largest >= rows
        else []
    )


def _config_dtype(config: dict[str, Any]) -> str | None:
    """The dtype that a configuration names for the model, as safetensors spells it."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        said = place.get("dtype") or place.get("torch_dtype")
        if isinstance(said, str):
            return CONFIG_DTYPES.get(said.removeprefix("torch."), said)
    return None


def _config(model: Any) -> dict[str, Any]:
    """The configuration as transformers read it, without what says nothing about the function that
    the model computes; of a model with vision beside it that of its language model.
    """
    said = json.loads(model.config.get_text_config().to_json_string(use_diff=False))
    return {name: value for name, value in sorted(said.items()) if not NOT_FUNCTION.search(name)}


def _undeclared(model: Any) -> list[str]:
    """Entries of config.json that transformers' configuration of this kind does not know, and so
    keeps without a use; none where it cannot be made without being told something.
    """
    from streamgauge.checkpoints.untrusted import strange

    kind = type(model.config.get_text_config())
    try:
        known = set(kind().to_dict()) | set(kind.attribute_map)
    except strange():
        return []
    return sorted(set(_config(model)) - known)


def current_groups(record: Record, wanted: Wanted) -> list[str]:
    """The groups that are as this instrument would measure them."""
    current = [name for name, version in GROUPS.items() if record.groups.get(name) == version]
    tried = [
        f"horizon/loss.{variant.name}" for variant in variants_of(wanted.horizons, record.n_layers)
    ]
    if (
        "horizon" in current
        and "horizon/k" in record.arrays
        and not set(tried) <= set(record.arrays)
    ):
        current.remove("horizon")
    # Where no task is asked for, those that were measured do no harm.
    tasks = tasks_sha256(wanted.tasks)
    # Where fewer repairs are asked for, those that were tried besides do no harm.
    searched = record.metadata.get("neighbours", {}).get("search", wanted.neighbours)
    if "neighbours" in current and wanted.neighbours == "all" and searched != "all":
        current.remove("neighbours")
    asked = record.metadata.get("draws", {}).get("asked", 0)
    if "draws" in current and wanted.draws > asked:
        current.remove("draws")
    if "patching" in current and wanted.tasks and record.metadata.get("tasks_sha256") != tasks:
        current.remove("patching")
    return current


def _kept(known: Record | None, rows: Prompts | None, wanted: Wanted) -> list[str]:
    """The groups of an earlier record that need not be measured again."""
    if known is None or rows is None or known.metadata.get("prompts_sha256") != rows.sha256():
        return []
    return current_groups(known, wanted)


def _take_over(known: Record, kept: list[str], metadata: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of an earlier record's groups; what is said of them goes into the new metadata."""
    if "patching" in kept:
        metadata["tasks_sha256"] = known.metadata.get("tasks_sha256")
    for said in ("neighbours", "draws"):
        if said in kept:
            metadata[said] = known.metadata.get(said, {})
    for said in ("absent", "failed", "lacking"):
        of_old = known.metadata.get(said, {}).items()
        metadata[said] |= {name: why for name, why in of_old if name.split("/")[0] in kept}
    return {name: array for name, array in known.arrays.items() if name.split("/")[0] in kept}


def _take_in(
    group: str,
    arrays: dict[str, np.ndarray],
    absent: "dict[str, str | Lacking]",
    metadata: dict[str, Any],
) -> dict[str, np.ndarray]:
    """A new group's arrays under their full names, none where some number is not finite."""
    for name, why in absent.items():
        full = name if name == group else f"{group}/{name}"
        if isinstance(why, str):
            metadata["absent"][full] = why
        else:
            metadata["lacking"][full] = {"why": why.why, "layers": list(why.layers)}
    overflow = _first_not_finite(arrays, absent)
    if overflow:
        metadata["failed"][group] = overflow
        return {}
    return {f"{group}/{name}": array for name, array in arrays.items()}


def _first_not_finite(
    arrays: dict[str, np.ndarray], absent: "dict[str, str | Lacking]"
) -> str | None:
    for name, values in arrays.items():
        if values.dtype.kind != "f" or np.isfinite(values).all():
            continue
        why = absent.get(name)
        said = Lacking("", ()) if why is None or isinstance(why, str) else why
        bad = ~np.isfinite(np.moveaxis(values, said.axis, 0))
        layers = [n for n in range(len(bad)) if bad[n].any() and n not in said.layers]
        if layers:
            return (
                f"the model gave NaN or Inf, first in {name} of layer {layers[0]}, although every "
                "weight is finite"
            )
    return None


def _metadata(
    checkpoint: Checkpoint, tensors: "Tensors", layout: "Layout", wanted: Wanted
) -> dict[str, Any]:
    """What is said of a model and of the way it was measured."""
    from streamgauge.groups.weights import reset_gains

    model, resets = tensors.model.mapped.model, reset_gains(tensors.model)
    origin = checkpoint.origin
    dtypes = origin.dtypes if origin else stored_dtypes(checkpoint)
    norm = "LayerNorm" if layout.centres else "RMSNorm"
    # NaN in the weights leaves nothing to tell a block's anatomy from.
    pre_norm = layout.pre_norm or tensors.broken
    if not pre_norm:
        norm = f"{norm}, blocks do more than add"
    elif not layout.norms_before("attn"):
        norm = f"{norm}, none before the attention"
    multipliers = [layout.factor(layer, "attn") for layer in range(layout.n_layers)]
    return {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "architecture": type(model).__name__,
        "config": _config(model),
        "undeclared": _undeclared(model),
        "stored_dtype": ", ".join(sorted(set(dtypes.values()))),
        "config_dtype": _config_dtype(checkpoint.config()),
        "converted_from": None
        if origin is None
        else {
            "format": origin.format,
            "files": [path.name for path in origin.files],
            "done": origin.done,
            "rounding": max(origin.rounding.values(), default=None),
        },
        "arithmetic": "float32",
        "norm": norm,
        "centres": layout.centres,
        "parallel": bool(layout.parallel_layers) and not layout.layers_reading("mid"),
        "pre_norm": pre_norm,
        "sublayers": _sublayers(layout),
        "epsilon": layout.epsilon,
        "residual_multiplier": multipliers[0] if len(set(multipliers)) == 1 else multipliers,
        "convention": "folded, centred" if layout.centres else "folded, not centred",
        "n_layers": layout.n_layers,
        "d_model": layout.d_model,
        "n_parameters": sum(tensor.numel() for tensor in tensors.tensors.values()),
        "parameters": tensors.tables(dtypes, origin.rounding if origin else {}),
        "integrity": tensors.problems | ({} if resets is None else {"reset": resets}),
        "groups": {name: GROUPS[name] for name in wanted.groups},
        "tasks_sha256": tasks_sha256(wanted.tasks),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "transformer_lens")
        },
        "device": str(tensors.model.device),
        "matrices": {},
        "absent": {"block_skip": NOT_SKIPPED},
        "lacking": {},
        "failed": {},
    }


def _sublayers(layout: "Layout") -> list[list[str]]:
    """What each block adds to the stream, by the names of its modules."""
    said = []
    for anatomy in layout.anatomies:
        terms = anatomy.terms if anatomy else ()
        said.append([t.path if t.factor == 1 else f"{t.factor:g} · {t.path}" for t in terms])
    return said
