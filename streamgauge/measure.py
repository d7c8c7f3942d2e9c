"""Measure a checkpoint: one function from a name to a record."""

import importlib.metadata
import resource
import time
from pathlib import Path
from typing import Any

from streamgauge.checkpoint import Checkpoint, open_checkpoint, stored_dtypes, weights_sha256
from streamgauge.prompts import prompts_for, read_prompts
from streamgauge.record import Record

INSTRUMENT = 1  # raise it whenever a change here or in a group alters what is measured


def measure(
    model: str | Path | Checkpoint,
    *,
    revision: str | None = None,
    prompts: Path | None = None,
    device: str = "cpu",
    show: bool = False,
) -> Record:
    """Measure a checkpoint folder or hub model: groups `stream` and `weights`.

    prompts: a file with one prompt a line instead of the built-in set. show: progress on stderr.
    Raises UnknownModelError, CheckpointError, HubError or PromptError, each with one sentence for the user.

    >>> record = measure("./checkpoint")  # doctest: +SKIP
    >>> record.resid_pre.shape  # layers, tokens  # doctest: +SKIP
    (16, 1304)
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model, revision)
    texts = read_prompts(prompts)
    return _measure(checkpoint, texts, built_in=prompts is None, device=device, show=show)


def _measure(checkpoint: Checkpoint, texts: list[str], *, built_in: bool, device: str, show: bool) -> Record:
    from streamgauge import model as opening
    from streamgauge import stream, weights

    started = time.monotonic()
    model = opening.load_model(checkpoint, device)
    integrity = weights.measure_integrity(model)
    # A model with NaN in its weights cannot be run, and so cannot write prompts either.
    rows = None if integrity["not_finite"] else prompts_for(model, checkpoint.folder, texts, built_in=built_in)
    n_parameters = sum(p.numel() for p in model.parameters())
    names = weights.parameter_names(model)
    bridge = opening.build_bridge(model)
    layout = opening.probe_layout(bridge)

    metadata = _metadata(checkpoint, model, layout, device) | {"integrity": integrity, "n_parameters": n_parameters}
    arrays = {}
    if rows is None:
        reason = f"the weights are not finite: {integrity['not_finite'][0]}"
        metadata["failed"] = {"stream": reason, "weights": reason}
    else:
        metadata |= {"prompts": rows.source, "prompts_sha256": rows.sha256(), "bos": rows.bos}
        readings, absent = stream.measure_stream(bridge, layout, rows, show)
        metadata["absent"] = {f"stream/{name}": why for name, why in absent.items()}
        try:
            arrays = {f"weights/{k}": v for k, v in weights.measure_weights(bridge, layout).items()}
            metadata["matrices"] = weights.locate_matrices(bridge, names, checkpoint)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            reason = f"TransformerLens shows no W_V and W_O by head for {metadata['architecture']} ({type(error).__name__})"
            metadata["absent"]["weights"] = reason
        overflow = _first_not_finite(readings)
        if overflow:
            metadata["failed"] = {"stream": overflow}
        else:
            arrays |= {f"stream/{k}": v for k, v in readings.items()}
    metadata["seconds"] = round(time.monotonic() - started, 3)
    metadata["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Record(arrays, metadata)


def _first_not_finite(readings: dict[str, Any]) -> str | None:
    import numpy as np

    for name, values in readings.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            layer = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
            return f"the forward pass gave NaN or Inf, first in {name} of layer {layer}, although every weight is finite"
    return None


def _metadata(checkpoint: Checkpoint, model: Any, layout: Any, device: str) -> dict[str, Any]:
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
        "stored_dtype": stored_dtypes(checkpoint),
        "arithmetic": "float32",
        "norm": norm,
        "centres": layout.centres,
        "parallel": layout.parallel,
        "pre_norm": layout.pre_norm,
        "epsilon": layout.epsilon,
        "convention": "folded, centred" if layout.centres else "folded, not centred",
        "n_layers": layout.n_layers,
        "d_model": layout.d_model,
        "instrument": INSTRUMENT,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "transformer_lens")},
        "device": device,
        "matrices": {},
        "absent": {},
        "failed": {},
    }
