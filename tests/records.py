"""Made-up records that keep every law, to be broken one law at a time."""

from typing import Any

import numpy as np

from streamgauge.record import Record

D_MODEL, N_HEADS, PROMPTS, LENGTH = 64, 4, 8, 6


def sound_record(
    rate: float = 1.045, *, model: str = "somebody's", n_layers: int = 16, bend: float = 0.0, **metadata: Any
) -> Record:
    """Layers whose every token grows by `rate` a layer, the log rate rising by `bend` a layer; BOS a hundred times larger.

    Blocks write straight along the stream, attention and MLP half each.
    """
    position = np.tile(np.arange(LENGTH), PROMPTS)
    jitter = np.random.default_rng(0).uniform(0.9, 1.1, position.size)
    size = np.where(position == 0, 1000.0, 10.0) * jitter
    layers = np.arange(n_layers + 1)
    resid = size * np.exp(np.log(rate) * layers + bend * layers**2 / 2)[:, None]
    bos = position == 0
    resid[:, bos] = np.minimum(np.array([10.0, *[1000.0] * (n_layers - 1), 300.0]), 1000)[:, None] * jitter[bos]
    pre, post = resid[:-1], resid[1:]
    half = np.abs(post - pre) / 2
    stream = {
        "resid_pre": pre, "resid_mid": (pre + post) / 2, "resid_post": post, "attn_out": half, "mlp_out": half,
        "pre_dot_attn": pre * (post - pre) / 2, "mid_dot_mlp": (pre + post) / 2 * (post - pre) / 2,
        "additivity_error": np.full(pre.shape, 1e-8), "ln1_scale": np.sqrt(pre**2 / D_MODEL + 1e-5),
        "ln1_residual": np.full(pre.shape, 1e-8),
    }  # fmt: skip
    arrays = {f"stream/{name}": values.astype(np.float32) for name, values in stream.items()}
    arrays |= {
        "stream/prompt": np.repeat(np.arange(PROMPTS), LENGTH).astype(np.int32),
        "stream/position": position.astype(np.int32),
        "stream/is_bos": position == 0,
        "stream/is_padding": np.zeros(position.size, bool),
        "weights/W_OV_frobenius": np.outer(1.05 ** np.arange(n_layers), np.linspace(1, 2, N_HEADS)),
    }
    defaults = {
        "model": model,
        "n_layers": n_layers, "d_model": D_MODEL, "epsilon": 1e-5, "pre_norm": True, "absent": {}, "failed": {}, "matrices": {},
        "integrity": {"not_finite": [], "dead": [], "alike": []}, "convention": "folded, centred", "revision": "test",
        "weights_sha256": None, "stored_dtype": "F32", "arithmetic": "float32", "device": "cpu", "versions": {},
        "centres": True,
    }  # fmt: skip
    return Record(arrays, defaults | metadata)


def changed(record: Record, **arrays: np.ndarray) -> Record:
    """The record with arrays of `stream` replaced."""
    return Record(record.arrays | {f"stream/{name}": values for name, values in arrays.items()}, record.metadata)
