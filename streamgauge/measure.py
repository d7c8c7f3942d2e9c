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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.checkpoints.files import Checkpoint, open_checkpoint, stored_dtypes, weights_sha256
from streamgauge.checkpoints.prompts import read_prompts
from streamgauge.checkpoints.tokenizers import load_tokenizer
from streamgauge.engine import forward
from streamgauge.engine.accounts import Accounts
from streamgauge.engine.forward import Absent, Found, Group, walk
from streamgauge.engine.memory import give_back, reused
from streamgauge.engine.rows import rows_for
from streamgauge.errors import UnknownModelError
from streamgauge.groups.patching import measure_patching, tasks_sha256
from streamgauge.groups.reasons import POST_NORM, SHORT
from streamgauge.groups.sampling import enough_prompts
from streamgauge.numerics.circuits import Task
from streamgauge.numerics.horizons import variants_of
from streamgauge.numerics.rows import Prompts
from streamgauge.progress import track
from streamgauge.record import Record

if TYPE_CHECKING:
    from streamgauge.engine.blockwise import Blockwise
    from streamgauge.engine.layout import Layout
    from streamgauge.groups.tensors import Tensors

LARGE = 2**29  # bytes of weights

# Raise a group's number whenever a change to it alters what is measured: stored records gain it
# anew, and keep the others.
GROUPS = {
    "stream": 1,
    "weights": 4,
    "neurons": 1,
    "sublayers": 2,
    "random_input": 1,
    "padding": 1,
    "horizon": 2,
    "sublayer_effect": 3,
    "patching": 1,
    "sketch": 1,
    "prediction": 1,
    "rounding": 2,
}

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
    rows: Prompts | None = None,
    groups: Sequence[str] | None = None,
    known: Record | None = None,
    digest: str | None = None,
    show: bool = False,
) -> Record:
    """Measure a checkpoint folder or hub model: all groups of `streamgauge.record`, or those named.

    prompts: a file with one prompt a line instead of the built-in set. horizons: the variants of
    the layer horizon that are tried, `default` or `all` (see `streamgauge.numerics.horizons`).
    tasks: prompt pairs on which heads are patched. precision: only as many prompts as it takes
    until the 95% interval of the growth rate is narrower than this. rows: token ids to measure on
    instead of any text. known: an earlier record of the same checkpoint and prompts, whose groups
    are taken over where they are as this instrument would measure them. digest: the weights'
    sha256, where it is known. show: progress on stderr.
    Raises UnknownModelError, CheckpointError, HubError or PromptError, each with one sentence for
    the user.

    >>> record = measure("./checkpoint")  # doctest: +SKIP
    >>> record.resid_pre.shape  # layers, tokens  # doctest: +SKIP
    (16, 1304)
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model, revision)
    texts = rows or read_prompts(prompts)
    unknown = sorted(set(groups or ()) - set(GROUPS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], GROUPS, n=3, cutoff=0)
        raise UnknownModelError(
            f"a record has no group {unknown[0]!r}; the nearest are {', '.join(near)}."
        )
    wanted = Wanted(
        horizons,
        tuple(tasks),
        tuple(name for name in GROUPS if groups is None or name in groups),
        precision,
    )
    return _measure(
        checkpoint,
        texts,
        built_in=prompts is None,
        device=device,
        wanted=wanted,
        known=known,
        digest=digest,
        show=show,
    )


@dataclass(frozen=True)
class Wanted:
    """What a record is asked to hold: variants of the layer horizon (`default` or `all`), tasks for
    patching, and groups.

    precision: how narrow the growth rate's interval is to be, where not all prompts are wanted.
    """

    horizons: str = "default"
    tasks: tuple[Task, ...] = ()
    groups: tuple[str, ...] = field(default_factory=lambda: tuple(GROUPS))
    precision: float | None = None


def _measure(
    checkpoint: Checkpoint,
    texts: list[str] | Prompts,
    *,
    built_in: bool,
    device: str,
    wanted: Wanted,
    known: Record | None,
    digest: str | None,
    show: bool,
) -> Record:
    from streamgauge.engine.blockwise import Blockwise
    from streamgauge.engine.layout import probe_layout
    from streamgauge.engine.load import load_model
    from streamgauge.groups.tensors import Tensors

    with reused(), Accounts() as accounts:
        with accounts.of("loading"):
            _say_size(checkpoint, show)
            # Beside what follows: it reads the files from end to end, and needs one core only.
            hashing = None if digest else _hash(checkpoint)
            mapped, unread = load_model(checkpoint, device)
            beyond = _beyond(checkpoint, mapped.model)
        with accounts.of("prompts"):
            rows, why = rows_for(mapped, checkpoint, texts, built_in=built_in)
        with accounts.of("loading"):
            model = Blockwise(mapped)
            layout = probe_layout(model)
        reached = None
        if wanted.precision is not None and rows is not None and not isinstance(texts, Prompts):
            with accounts.of("sampling"):
                rows, reached = enough_prompts(model, layout, rows, wanted.precision, show)
        kept = _kept(known, rows, wanted)
        missing = [name for name in wanted.groups if name not in kept]
        tensors = Tensors(model, with_sketches="sketch" in missing)
        groups = {} if rows is None else _groups(model, layout, rows, missing, wanted, checkpoint)
        walk(
            model,
            {"tensors": tensors} | groups,
            accounts=accounts,
            show=show,
            stop=lambda: tensors.broken,
        )

        metadata = _metadata(checkpoint, tensors, layout, wanted)
        metadata["integrity"] |= {"unread": unread, "tokenizer": beyond}
        metadata["precision"] = reached
        arrays: dict[str, np.ndarray] = {}
        if rows is None or tensors.broken:
            broken = [
                f"the weights are not finite: {line}" for line in tensors.problems["not_finite"]
            ]
            metadata["failed"] = dict.fromkeys(wanted.groups, [*broken, why][0])
        else:
            metadata |= _said_of(rows, texts) | {"matrices": _matrices(groups, known)}
            found = _found(groups, tensors, missing, accounts, show)
            if "patching" in missing:
                with accounts.of("patching"):
                    found["patching"] = measure_patching(
                        model, checkpoint.folder, wanted.tasks, show
                    )
            if known is not None:
                arrays = _take_over(
                    known, [name for name in wanted.groups if name not in missing], metadata
                )
            for group, (values, absent) in found.items():
                arrays |= _take_in(group, values, absent, metadata)
        metadata["weights_sha256"] = digest if hashing is None else hashing.result()
        return Record(arrays, metadata | accounts.sums())


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
    size = sum(path.stat().st_size for path in checkpoint.files)
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


def _beyond(checkpoint: Checkpoint, model: Any) -> list[str]:
    """One line where the tokenizer has tokens that the embedding has no row for."""
    tokenizer, rows = load_tokenizer(checkpoint.folder), model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values(), default=0) if tokenizer is not None else 0
    return (
        [f"the tokenizer has token ids up to {largest}, the embedding {rows} rows"]
        if largest >= rows
        else []
    )


def _config(model: Any) -> dict[str, Any]:
    """The configuration as transformers read it, without what says nothing about the function that
    the model computes.
    """
    said = json.loads(model.config.to_json_string(use_diff=False))
    return {name: value for name, value in sorted(said.items()) if not NOT_FUNCTION.search(name)}


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
    if "patching" in current and record.metadata.get("tasks_sha256") != tasks_sha256(wanted.tasks):
        current.remove("patching")
    return current


def is_current(record: Record, wanted: Wanted | None = None) -> bool:
    """Whether every group is as this instrument would measure it."""
    return current_groups(record, wanted or Wanted()) == list(GROUPS)


def _kept(known: Record | None, rows: Prompts | None, wanted: Wanted) -> list[str]:
    """The groups of an earlier record that need not be measured again."""
    if known is None or rows is None or known.metadata.get("prompts_sha256") != rows.sha256():
        return []
    return current_groups(known, wanted)


def _groups(
    model: "Blockwise",
    layout: "Layout",
    rows: Prompts,
    missing: list[str],
    wanted: Wanted,
    checkpoint: Checkpoint,
) -> dict[str, Group]:
    """What visits the blocks for the missing groups, in the order in which they need each other.

    The model is run over the prompts only for groups that need it.
    """
    from streamgauge.groups import (
        neurons,
        padding,
        prediction,
        random_input,
        rounding,
        sketch,
        stream,
        sublayers,
        weights,
    )

    def needed(*names: str) -> bool:
        return bool(set(names) & set(missing))

    groups: dict[str, Group] = {}
    meters: dict[str, Any] = {}
    if needed("stream"):
        meters["stream"] = stream.StreamMeter(layout, rows)
    if needed("neurons"):
        meters["neurons"] = neurons.NeuronMeter(layout, rows)
    if needed("sublayers"):
        meters["sublayers"] = sublayers.OutputsMeter(layout, rows)
    early = random_input.EarlyInputs(layout)
    readers = list(meters.values()) + ([early] if needed("random_input") else [])
    if readers or needed("prediction", "horizon", "sublayer_effect"):
        run = groups["prompts"] = forward.PromptRun(model, rows, readers)
    groups |= meters
    if needed("sublayers") and sublayers.is_scale_blind(layout):
        groups["scale_blindness"] = sublayers.ScaleBlindness(model, layout, rows)
    no_heads = (
        weights.reason_without_heads(model, layout)
        if needed("weights", "random_input", "sketch")
        else None
    )
    if needed("weights") and no_heads:
        groups["weights"] = Absent({"weights": no_heads})
    elif needed("weights"):
        groups |= {
            "weights": weights.WeightsGroup(model, layout),
            "matrices": weights.Locator(model, checkpoint),
        }
    if needed("sketch"):
        groups["sketch"] = sketch.heads_group(model, no_heads)
    if needed("random_input"):
        groups["random_input"] = random_input.RandomInputGroup(model, layout, early, no_heads)
    if needed("padding"):
        groups["padding"] = padding.padding_group(model, layout, rows)
    if needed("prediction"):
        groups["prediction"] = prediction.PredictionGroup(model, run)
    if needed("horizon", "sublayer_effect"):
        groups |= _on_clean_runs(run, layout, missing, wanted)
    if needed("rounding"):
        groups["rounding"] = rounding.rounding_group(model, layout, rows)
    return groups


def _on_clean_runs(
    run: forward.PromptRun, layout: "Layout", missing: list[str], wanted: Wanted
) -> dict[str, Group]:
    """The groups that start from some prompts' streams at every layer."""
    from streamgauge.engine.clean_runs import CleanRuns
    from streamgauge.groups import horizon, sublayer_effect

    asked = [name for name in ("horizon", "sublayer_effect") if name in missing]
    if not layout.pre_norm:
        return {name: Absent({name: POST_NORM}) for name in asked}
    clean = CleanRuns(run)
    if not clean.rows:
        return {name: Absent({name: SHORT}) for name in asked}
    groups: dict[str, Group] = {"clean_runs": clean}
    if "horizon" in asked:
        groups["horizon"] = horizon.Horizons(clean, variants_of(wanted.horizons, layout.n_layers))
    if "sublayer_effect" in asked:
        groups["sublayer_effect"] = sublayer_effect.SublayerEffects(layout, clean)
    return groups


def _found(
    groups: dict[str, Group], tensors: "Tensors", missing: list[str], accounts: Accounts, show: bool
) -> dict[str, Found]:
    """What each missing group found, after the walk."""
    found: dict[str, Found] = {}
    for name in track([name for name in missing if name in groups], "predictions", show):
        with accounts.of(name):
            found[name] = groups[name].found()
        give_back()
    for name, more in (("sublayers", groups.get("scale_blindness")), ("sketch", tensors)):
        if name in found and more is not None:
            found[name][0].update(more.found()[0])
    return found


def _take_over(known: Record, kept: list[str], metadata: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of an earlier record's groups; what is said of them goes into the new metadata."""
    for reasons in ("absent", "failed"):
        metadata[reasons] |= {
            name: why for name, why in known.metadata[reasons].items() if name.split("/")[0] in kept
        }
    return {name: array for name, array in known.arrays.items() if name.split("/")[0] in kept}


def _take_in(
    group: str, arrays: dict[str, np.ndarray], absent: dict[str, str], metadata: dict[str, Any]
) -> dict[str, np.ndarray]:
    """A new group's arrays under their full names, none where some number is not finite."""
    metadata["absent"] |= {
        name if name == group else f"{group}/{name}": why for name, why in absent.items()
    }
    overflow = _first_not_finite(arrays)
    if overflow:
        metadata["failed"][group] = overflow
        return {}
    return {f"{group}/{name}": array for name, array in arrays.items()}


def _first_not_finite(arrays: dict[str, np.ndarray]) -> str | None:
    for name, values in arrays.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            layer = int(np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))[0])
            return (
                f"the model gave NaN or Inf, first in {name} of layer {layer}, although "
                "every weight is finite"
            )
    return None


def _metadata(
    checkpoint: Checkpoint, tensors: "Tensors", layout: "Layout", wanted: Wanted
) -> dict[str, Any]:
    """What is said of a model and of the way it was measured."""
    from streamgauge.groups.weights import reset_gains

    model, dtypes, resets = (
        tensors.model.mapped.model,
        stored_dtypes(checkpoint),
        reset_gains(layout),
    )
    norm = "LayerNorm" if layout.centres else "RMSNorm"
    if not layout.pre_norm:
        norm = "post-norm"
    elif not layout.has_ln1:
        norm = f"{norm}, none before the attention"
    return {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "architecture": type(model).__name__,
        "config": _config(model),
        "stored_dtype": ", ".join(sorted(set(dtypes.values()))),
        "arithmetic": "float32",
        "norm": norm,
        "centres": layout.centres,
        "parallel": layout.parallel,
        "pre_norm": layout.pre_norm,
        "epsilon": layout.epsilon,
        "residual_multiplier": layout.multiplier,
        "convention": "folded, centred" if layout.centres else "folded, not centred",
        "n_layers": layout.n_layers,
        "d_model": layout.d_model,
        "n_parameters": sum(tensor.numel() for tensor in tensors.tensors.values()),
        "parameters": tensors.tables(dtypes),
        "integrity": tensors.problems | ({} if resets is None else {"reset": resets}),
        "groups": {name: GROUPS[name] for name in wanted.groups},
        "tasks_sha256": tasks_sha256(wanted.tasks),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "transformer_lens")
        },
        "device": str(tensors.model.device),
        "matrices": {},
        "absent": {},
        "failed": {},
    }
