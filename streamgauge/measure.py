"""Measure a checkpoint: one function from a name to a record."""

import hashlib
import importlib.metadata
import json
import re
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamgauge.checkpoint import Checkpoint, open_checkpoint, stored_dtypes, weights_sha256
from streamgauge.circuits import Task
from streamgauge.errors import PromptError
from streamgauge.horizon import Variant, variants_of
from streamgauge.patching import tasks_sha256
from streamgauge.prompts import Prompts, load_tokenizer, prompts_for, read_prompts
from streamgauge.record import Record

# Raise a group's number whenever a change to it alters what is measured: stored records gain it anew, and keep the others.
GROUPS = {
    "stream": 1,
    "weights": 3,
    "neurons": 1,
    "sublayers": 2,
    "random_input": 1,
    "padding": 1,
    "horizon": 1,
    "sublayer_effect": 2,
    "patching": 1,
    "sketch": 1,
    "prediction": 1,
    "rounding": 1,
}

# Entries of a configuration that change nothing of what the model computes when it is not trained.
NOT_FUNCTION = re.compile(
    r"^_|version|dtype|architectures|^use_cache|^chunk_size|drop|initializer|_token_id$|^summary_|^task_|^problem_type|label"
    r"|^return_|^output_|gradient|^is_encoder_decoder|^tokenizer_class|aux_loss|router_jitter"
)

Found = tuple[dict[str, np.ndarray], dict[str, str]]  # a group's arrays, and why others are absent


def measure(
    model: str | Path | Checkpoint,
    *,
    revision: str | None = None,
    prompts: Path | None = None,
    device: str = "cpu",
    horizons: str = "default",
    tasks: Sequence[Task] = (),
    rows: Prompts | None = None,
    known: Record | None = None,
    show: bool = False,
) -> Record:
    """Measure a checkpoint folder or hub model: all groups of `streamgauge.record`.

    prompts: a file with one prompt a line instead of the built-in set. horizons: the variants of the layer horizon that are
    tried, `default` or `all` (see `streamgauge.horizon`). tasks: prompt pairs on which heads are patched. rows: token
    ids to measure on instead of any text. known: an earlier record of the same checkpoint and prompts, whose groups are
    taken over where they are as this instrument would measure them. show: progress on stderr.
    Raises UnknownModelError, CheckpointError, HubError or PromptError, each with one sentence for the user.

    >>> record = measure("./checkpoint")  # doctest: +SKIP
    >>> record.resid_pre.shape  # layers, tokens  # doctest: +SKIP
    (16, 1304)
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model, revision)
    texts = rows or read_prompts(prompts)
    wanted = Wanted(horizons, tuple(tasks))
    return _measure(checkpoint, texts, built_in=prompts is None, device=device, wanted=wanted, known=known, show=show)


@dataclass(frozen=True)
class Wanted:
    """What a record may be asked to hold: variants of the layer horizon (`default` or `all`), and tasks for patching."""

    horizons: str = "default"
    tasks: tuple[Task, ...] = ()


def _measure(
    checkpoint: Checkpoint,
    texts: list[str] | Prompts,
    *,
    built_in: bool,
    device: str,
    wanted: Wanted,
    known: Record | None,
    show: bool,
) -> Record:
    from streamgauge import model as opening
    from streamgauge import patching, sketch, weights

    started = time.monotonic()
    dtypes = stored_dtypes(checkpoint)
    model, unread = opening.load_model(checkpoint, device)
    integrity = weights.measure_integrity(model) | {"unread": unread, "tokenizer": _beyond(checkpoint, model)}
    # A model with NaN in its weights cannot be run, and so cannot write prompts either.
    rows = None if integrity["not_finite"] else _rows(model, checkpoint, texts, built_in=built_in)
    n_parameters = sum(p.numel() for p in model.parameters())
    kept = [] if rows is None else _kept(known, rows.sha256(), wanted)
    # Before the bridge is built, which renames tensors and adds some of its own.
    parameters = {} if rows is None or "sketch" in kept else sketch.measure_parameters(model)
    tables = _tables(model, dtypes)
    names = weights.parameter_names(model)
    bridge = opening.build_bridge(model)
    layout = opening.probe_layout(bridge)
    resets = weights.reset_gains(layout)
    integrity |= {} if resets is None else {"reset": resets}

    metadata = _metadata(checkpoint, dtypes, model, layout, device) | {"integrity": integrity, "n_parameters": n_parameters}
    metadata |= {
        "tasks_sha256": tasks_sha256(wanted.tasks),
        "parameters": tables,
        "config": _config(model),
    }
    arrays: dict[str, np.ndarray] = {}
    if rows is None:
        reason = f"the weights are not finite: {integrity['not_finite'][0]}"
        metadata["failed"] = dict.fromkeys(GROUPS, reason)
    else:
        asked = "\n".join(texts) if isinstance(texts, list) else json.dumps(texts.rows)
        metadata["texts_sha256"] = hashlib.sha256(asked.encode()).hexdigest()
        metadata |= {"prompts": rows.source, "prompts_sha256": rows.sha256(), "bos": rows.bos, "sampled": rows.sampled}
        missing = [name for name in GROUPS if name not in kept]
        found = _measure_groups(bridge, layout, rows, missing, variants_of(wanted.horizons, layout.n_layers), show)
        if "sketch" in missing:
            found["sketch"][0].update(parameters)
        if "patching" in missing:
            found["patching"] = patching.measure_patching(bridge, checkpoint.folder, wanted.tasks, show)
        if known is not None:
            arrays = _take_over(known, kept, metadata)
        for group, (values, absent) in found.items():
            arrays |= _take_in(group, values, absent, metadata)
        if "weights/W_OV_frobenius" in arrays:
            metadata["matrices"] = weights.locate_matrices(bridge, names, checkpoint)
    metadata["seconds"] = round(time.monotonic() - started, 3)
    metadata["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Record(arrays, metadata)


def _rows(model: Any, checkpoint: Checkpoint, texts: list[str] | Prompts, *, built_in: bool) -> Prompts:
    """Rows of token ids that this model can read. Raises PromptError where given ones are beyond it."""
    if not isinstance(texts, Prompts):
        return prompts_for(model, checkpoint.folder, texts, built_in=built_in)
    vocabulary, largest = model.get_input_embeddings().num_embeddings, max(map(max, texts.rows))
    if largest >= vocabulary:
        raise PromptError(
            f"the prompts hold token id {largest}, but the embedding of {checkpoint.folder} has {vocabulary} rows."
        )
    return texts


def _beyond(checkpoint: Checkpoint, model: Any) -> list[str]:
    """One line where the tokenizer has tokens that the embedding has no row for."""
    tokenizer, rows = load_tokenizer(checkpoint.folder), model.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values(), default=0) if tokenizer is not None else 0
    return [f"the tokenizer has token ids up to {largest}, the embedding {rows} rows"] if largest >= rows else []


def _tables(model: Any, dtypes: dict[str, str]) -> list[dict[str, Any]]:
    """Name and shape of each of a model's tensors, and the dtype that its file has it in; a prefix may be missing there."""
    short = {name.split(".", 1)[-1]: dtype for name, dtype in dtypes.items()} | dtypes
    return [
        {"name": name, "shape": list(p.shape), "dtype": short.get(name, short.get(name.split(".", 1)[-1]))}
        for name, p in model.named_parameters()
    ]


def _config(model: Any) -> dict[str, Any]:
    """The configuration as transformers read it, without what says nothing about the function that the model computes."""
    said = json.loads(model.config.to_json_string(use_diff=False))
    return {name: value for name, value in sorted(said.items()) if not NOT_FUNCTION.search(name)}


def current_groups(record: Record, wanted: Wanted) -> list[str]:
    """The groups that are as this instrument would measure them."""
    current = [name for name, version in GROUPS.items() if record.groups.get(name) == version]
    tried = [f"horizon/loss.{variant.name}" for variant in variants_of(wanted.horizons, record.n_layers)]
    if "horizon/k" in record.arrays and not set(tried) <= set(record.arrays):
        current.remove("horizon")
    if "patching" in current and record.metadata.get("tasks_sha256") != tasks_sha256(wanted.tasks):
        current.remove("patching")
    return current


def is_current(record: Record, wanted: Wanted | None = None) -> bool:
    """Whether every group is as this instrument would measure it."""
    return current_groups(record, wanted or Wanted()) == list(GROUPS)


def _kept(known: Record | None, prompts_sha256: str, wanted: Wanted) -> list[str]:
    """The groups of an earlier record that need not be measured again."""
    if known is None or known.metadata.get("prompts_sha256") != prompts_sha256:
        return []
    return current_groups(known, wanted)


def _measure_groups(
    bridge: Any, layout: Any, rows: Prompts, wanted: list[str], variants: list[Variant], show: bool
) -> dict[str, Found]:
    """Each wanted group; the model is run over the prompts only for groups that need it."""
    from streamgauge import (
        forward,
        horizon,
        neurons,
        padding,
        prediction,
        random_input,
        rounding,
        sketch,
        stream,
        sublayer_effect,
        sublayers,
        weights,
    )

    meters: dict[str, Any] = {
        "stream": stream.StreamMeter(layout),
        "neurons": neurons.NeuronMeter(layout, rows),
        "sublayers": sublayers.OutputsMeter(layout),
    }
    reading = [name for name in meters if name in wanted or (name == "neurons" and "random_input" in wanted)]
    if reading:
        forward.run_prompts(bridge, rows, [meters[name] for name in reading], show)
    found: dict[str, Found] = {name: (meters[name].arrays(rows), meters[name].absent()) for name in reading if name in wanted}
    if "sublayers" in wanted and sublayers.is_scale_blind(layout):
        found["sublayers"][0].update(sublayers.measure_scale_blindness(bridge, layout, rows))
    by_head = {"weights", "random_input", "sketch"} & set(wanted)
    no_heads = weights.reason_without_heads(bridge, layout) if by_head else None
    if "weights" in wanted:
        found["weights"] = ({}, {"weights": no_heads}) if no_heads else weights.measure_weights(bridge, layout)
    if "sketch" in wanted:
        found["sketch"] = sketch.measure_heads(bridge, no_heads)
    if "random_input" in wanted:
        found["random_input"] = random_input.measure_random_input(bridge, layout, meters["neurons"].early_inputs, no_heads)
    if "padding" in wanted:
        found["padding"] = padding.measure_padding(bridge, layout, rows)
    if "horizon" in wanted:
        found["horizon"] = horizon.measure_horizon(bridge, layout, rows, variants, show)
    if "sublayer_effect" in wanted:
        found["sublayer_effect"] = sublayer_effect.measure_sublayer_effect(bridge, layout, rows)
    if "prediction" in wanted:
        found["prediction"] = prediction.measure_prediction(bridge, layout, rows, show)
    if "rounding" in wanted:
        found["rounding"] = rounding.measure_rounding(bridge, layout, rows, show)
    return found


def _take_over(known: Record, kept: list[str], metadata: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of an earlier record's groups; what is said of them goes into the new metadata."""
    for reasons in ("absent", "failed"):
        metadata[reasons] |= {name: why for name, why in known.metadata[reasons].items() if name.split("/")[0] in kept}
    return {name: array for name, array in known.arrays.items() if name.split("/")[0] in kept}


def _take_in(
    group: str, arrays: dict[str, np.ndarray], absent: dict[str, str], metadata: dict[str, Any]
) -> dict[str, np.ndarray]:
    """A new group's arrays under their full names, none where some number is not finite."""
    metadata["absent"] |= {name if name == group else f"{group}/{name}": why for name, why in absent.items()}
    overflow = _first_not_finite(arrays)
    if overflow:
        metadata["failed"][group] = overflow
        return {}
    return {f"{group}/{name}": array for name, array in arrays.items()}


def _first_not_finite(arrays: dict[str, np.ndarray]) -> str | None:
    for name, values in arrays.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            layer = int(np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))[0])
            return f"the model gave NaN or Inf, first in {name} of layer {layer}, although every weight is finite"
    return None


def _metadata(checkpoint: Checkpoint, dtypes: dict[str, str], model: Any, layout: Any, device: str) -> dict[str, Any]:
    norm = "LayerNorm" if layout.centres else "RMSNorm"
    if not layout.pre_norm:
        norm = "post-norm"
    elif not layout.has_ln1:
        norm = f"{norm}, none before the attention"
    return {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "weights_sha256": weights_sha256(checkpoint),
        "architecture": type(model).__name__,
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
        "groups": dict(GROUPS),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "transformer_lens")},
        "device": device,
        "matrices": {},
        "absent": {},
        "failed": {},
    }
