"""Made-up records that keep every law, to be broken one law at a time."""

from typing import Any

import numpy as np

from streamgauge.numerics.draws import LAWS, TWINS
from streamgauge.numerics.horizons import DEFAULT
from streamgauge.record import Record

QUIET_HEADS = (
    "W_Q_raw",
    "W_K_raw",
    "W_V_raw",
    "W_OV_raw_frobenius",
    "W_QK_spectral",
    "W_QK_frobenius",
)
REPAIRS = {  # and the layers that they are tried in
    "W_gate W_in": 12,
    "without mlp": 12,
    "without attn": 12,
    "layers exchanged": 12,
    "config.json with n_head 8": -1,
}
D_MODEL, N_HEADS, PROMPTS, LENGTH = 64, 4, 8, 6
DRAWS = 10
DRAWN_ALONE = {  # laws about draws and nothing else, and what the record calls them
    "mlp/neurons_have_no_order": "neurons",
    "attention/heads_have_no_order": "heads",
    "attention/value_basis_is_free": "value_basis",
    "predictions/rows_are_apart": "batch",
    "predictions/cache_changes_nothing": "cache",
    "predictions/any_attention_kernel": "attention_implementation",
}
DRAWN = {
    "residual/additivity": "additivity",
    "sublayers/contribution_bound": "contribution_bound",
    "sublayers/scale_blindness": "scale_blindness",
    "attention/causality": "causality",
    **DRAWN_ALONE,
}
WHOLE = ("batch", "cache", "attention_implementation")  # of which there is one value a draw


def sound_record(
    rate: float = 1.045,
    *,
    model: str = "somebody's",
    n_layers: int = 16,
    bend: float = 0.0,
    start: float = 1.0,
    **metadata: Any,
) -> Record:
    """Layers whose every token grows by `rate` a layer, the log rate rising by `bend` a layer; BOS
    a hundred times larger.

    Blocks write straight along the stream, attention and MLP half each, attention less from layer
    30 on. `start`: what the first two blocks multiply the norm by besides, each.
    """
    position = np.tile(np.arange(LENGTH), PROMPTS)
    jitter = np.random.default_rng(0).uniform(0.9, 1.1, position.size)
    size = np.where(position == 0, 1000.0, 10.0) * jitter
    layers = np.arange(n_layers + 1)
    resid = (
        size
        * np.exp(np.log(rate) * layers + bend * layers**2 / 2)[:, None]
        * start ** np.minimum(layers, 2)[:, None]
    )
    bos = position == 0
    plateau = 10 * resid[:, ~bos].max()
    resid[:, bos] = (
        np.array([10.0, *[plateau] * (n_layers - 1), 0.3 * plateau])[:, None] * jitter[bos]
    )
    pre, post = resid[:-1], resid[1:]
    share = 0.5 * 0.97 ** np.maximum(layers[:-1] - 30, 0)[:, None]
    attn, mlp = share * np.abs(post - pre), (1 - share) * np.abs(post - pre)
    sign = np.sign(post - pre)
    stream = {
        "resid_pre": pre,
        "resid_mid": pre + sign * attn,
        "resid_post": post,
        "attn_out": attn,
        "mlp_out": mlp,
        "pre_dot_attn": sign * pre * attn,
        "mid_dot_mlp": (pre + sign * attn) * sign * mlp,
        "block_influence": np.where(np.arange(n_layers)[:, None] < n_layers // 2, 0.2, 0.1)
        * np.ones(pre.shape),
        "largest": post / 4,
        "additivity_error": np.full(pre.shape, 1e-8),
        "ln1_scale": np.sqrt(pre**2 / D_MODEL + 1e-5),
        "ln1_residual": np.full(pre.shape, 1e-8),
    }
    arrays = {f"stream/{name}": values.astype(np.float32) for name, values in stream.items()}
    arrays |= {
        "stream/prompt": np.repeat(np.arange(PROMPTS), LENGTH).astype(np.int32),
        "stream/position": position.astype(np.int32),
        "stream/is_bos": position == 0,
        "stream/is_padding": np.zeros(position.size, bool),
    }
    arrays |= {f"neighbours/{name}": values for name, values in _repairs().items()}
    arrays |= {f"draws/{law}": values for law, values in _draws(n_layers).items()}
    arrays |= {
        "instrument/block_error": np.zeros(n_layers),
        "instrument/bridge_error": np.full(n_layers, 1e-7),
        "instrument/gain": np.full(n_layers, 2.0),
        "instrument/logits_error": np.zeros(1),
    }
    arrays |= _predictions(n_layers, position)
    arrays |= _beside_the_stream(
        n_layers, attn[:, ~bos].mean(1), mlp[:, ~bos].mean(1), pre + attn + mlp
    )
    defaults = {
        "model": model,
        "n_layers": n_layers,
        "d_model": D_MODEL,
        "epsilon": 1e-5,
        "pre_norm": True,
        "absent": {},
        "lacking": {},
        "failed": {},
        "matrices": {},
        "integrity": {
            kind: [] for kind in ("not_finite", "dead", "runs", "alike", "reset", "repeated")
        },
        "convention": "folded, centred",
        "revision": "test",
        "weights_sha256": None,
        "stored_dtype": "F32",
        "arithmetic": "float32",
        "device": "cpu",
        "versions": {},
        "centres": True,
        "parallel": False,
        "sampled": False,
        "neighbours": {
            "kinds": list(REPAIRS),
            "search": "default",
            "text": "the prompts",
            "loss": 3.0,
            "unigram_loss": 5.0,
            "tokens": 3810,
            "tried": dict.fromkeys(REPAIRS, 8),
            "passes": 20.0,
            "first": {},
        },
        "draws": {"asked": DRAWS, "drawn": DRAWS, "examples": {}},
        "config": {"n_head": N_HEADS, "activation": "gelu"},
        "parameters": [
            {"name": f"h.{n}.mlp.c_fc.weight", "shape": [D_MODEL, D_MODEL]} for n in range(n_layers)
        ],
    }
    return Record(arrays, defaults | metadata)


def _beside_the_stream(
    n_layers: int, attn: np.ndarray, mlp: np.ndarray, raw: np.ndarray
) -> dict[str, np.ndarray]:
    """Weights, neurons and answers to random input that go with a stream whose sublayers write so
    much.
    """
    layers = np.arange(n_layers)
    ones, firing = np.ones(n_layers), 0.05 * 1.01**layers
    flat = dict.fromkeys(("W_in", "W_in_raw", "W_in_W_out", "b_in_W_out", "b_out"), ones)
    heads = {name: np.ones((n_layers, N_HEADS)) for name in QUIET_HEADS}
    weights = (
        flat
        | heads
        | {
            "W_OV_frobenius": np.outer(1.05**layers, np.linspace(1, 2, N_HEADS)),
            "W_OV_spectral": np.outer(1.05**layers, np.linspace(0.8, 1.6, N_HEADS)),
            "W_O_raw": np.outer(np.linspace(1, 1.5, n_layers), np.ones(N_HEADS)),
            "W_out_raw": np.linspace(1, 1.5, n_layers),
            "b_O": np.where(layers < n_layers - 1, 0.1 * attn.min(), 0.1 * attn.min() * 24.46),
        }
    )
    draws = np.full((n_layers, 4), 1e-7)
    others = {
        "neurons/activation_rate": np.outer(firing, np.ones(PROMPTS * LENGTH)).astype(np.float32),
        "neurons/singular_values": np.outer(ones, 0.5 ** np.arange(PROMPTS)),
        "sublayers/raw_norm": raw,
        "sublayers/pre_dot_mlp_0": np.full(raw.shape, mlp[0] ** 2),
        "sublayers/attn_scale_error": draws,
        "sublayers/mlp_scale_error": draws,
        "sublayers/largest_shift": np.array([4.0]),
        "random_input/attn_norm": 5 * attn,
        "random_input/attn_error": 0.005 * attn,
        "random_input/mlp_norm": 3 * mlp,
        "random_input/mlp_error": 0.003 * mlp,
        "random_input/mlp_activation_rate": 4 * firing,
        "random_input/resampled_activation_rate": 2 * firing,
        "patching/own": np.outer(0.1 * ones, np.linspace(1, 2, N_HEADS)),
        "patching/own.n_pairs": np.array([8], np.int32),
        "block_skip/loss": np.full((n_layers, 2), 0.05),
        "padding/resid": np.outer(30 + (np.arange(n_layers + 1) - n_layers / 2) ** 2, np.ones(8)),
    }
    return (
        {f"weights/{name}": values for name, values in weights.items()} | others | _depth(n_layers)
    )


def _predictions(n_layers: int, position: np.ndarray) -> dict[str, np.ndarray]:
    """Predictions better than counting, nothing that leaks, and what a comparison needs."""
    is_last = position == LENGTH - 1
    return {
        "prediction/token": np.random.default_rng(1)
        .integers(0, 50, position.size)
        .astype(np.int32),
        "prediction/loss": np.where(is_last, 0, 2.0).astype(np.float32),
        "prediction/is_last": is_last,
        "prediction/first": np.zeros(position.size, np.int32),
        "prediction/later_changes": np.zeros(n_layers + 1),
        "prediction/row_sum_error": np.full(n_layers, 1e-7),
        "prediction/future_weight": np.zeros(n_layers),
        "sketch/parameters": np.random.default_rng(2).normal(size=(n_layers, 16)),
        "sketch/norms": np.ones(n_layers),
        "rounding/resid": np.full((8, n_layers + 1), 0.3),
        "rounding/attn_out": np.full((8, n_layers), 0.3),
        "rounding/mlp_out": np.full((8, n_layers), 0.3),
        "rounding/loss": np.ones((8, 1)),
    }


def _repairs() -> dict[str, np.ndarray]:
    """Changes that all make it worse, but for one that changes next to nothing."""
    n = len(REPAIRS)
    return {
        "layer": np.array(list(REPAIRS.values()), np.int32),
        "change": np.append(np.linspace(0.04, 0.2, n - 1), -1e-4),
        "error": np.full(n, 0.01),
        "rows": np.full(n, 60, np.int32),
        "tokens": np.full(n, 3810, np.int32),
        "skew": np.full(n, 0.5),
    }


def _draws(n_layers: int) -> dict[str, np.ndarray]:
    """A twentieth of what rounding explains, a tenth at layer 2; each twin on every third draw."""
    found = {}
    for place, law in enumerate(LAWS):
        ratios = np.full((DRAWS, 1 if law in WHOLE else n_layers), 0.05 + 0.001 * place)
        ratios[1, min(2, ratios.shape[1] - 1)] *= 2
        if law in TWINS:
            ratios[TWINS.index(law) :: 3] = ratios[1]
            ratios[np.arange(DRAWS) % 3 != TWINS.index(law)] = -1
        found[law] = ratios
    return found


def _depth(n_layers: int) -> dict[str, np.ndarray]:
    """A horizon of half the depth, and sublayers whose removal costs a tenth of what it could."""
    k = np.append(np.arange(0, n_layers + 1, 2), n_layers + 1).astype(np.int32)
    rows = np.linspace(0.9, 1.1, PROMPTS)
    loss = 3 + np.outer(
        np.maximum(4 * (1 - 2 * k / n_layers), 0) + 0.01 * (1 - k / (n_layers + 1)), rows
    )
    size = np.full((n_layers, 20), 0.5)
    effect = {"size": size, "share": 0 * size, "frozen_kl": 0.1 * size, "kl": 0.1 * size}
    effects = {
        f"{kind}_{name}": values for kind in ("attn", "mlp") for name, values in effect.items()
    }
    return {
        "horizon/k": k,
        f"horizon/loss.{DEFAULT.name}": loss,
        "horizon/clean_loss": np.full(PROMPTS, 3.0),
        "horizon/tokens": np.full(PROMPTS, LENGTH - 1, np.int32),
        "sublayer_effect/largest_row": np.array([2.0]),
    } | {f"sublayer_effect/{name}": values for name, values in effects.items()}


SMALL = {  # arrays of theorems: rounding, more or less
    "stream/additivity_error": 1e-8,
    "stream/ln1_residual": 1e-8,
    "instrument/block_error": 1e-8,
    "instrument/bridge_error": 1e-8,
    "instrument/logits_error": 1e-7,
    "prediction/later_changes": 1e-7,
    "prediction/row_sum_error": 1e-8,
    "prediction/future_weight": 1e-9,
    "sublayers/attn_scale_error": 1e-7,
    "sublayers/mlp_scale_error": 1e-7,
    "sublayer_effect/attn_share": 0.5,
    "sublayer_effect/mlp_share": 0.5,
}


def made_up(n_layers: int, seed: int = 7) -> Record:
    """Every number off by a factor of its own, a padding token, a growing stream all the same."""
    sound, dice = sound_record(1.3, n_layers=n_layers), np.random.default_rng(seed)
    arrays = {}
    # Those of repairs last, so that the others keep the factors that they always had.
    by_age = sorted(
        sound.arrays.items(), key=lambda one: (one[0].startswith("neighbours/"), one[0])
    )
    for name, values in by_age:
        if name.startswith("draws/"):
            arrays[name] = values
            continue
        noise = np.exp(0.1 * dice.standard_normal(values.shape))
        if name in SMALL:
            arrays[name] = SMALL[name] * dice.uniform(0.1, 1, values.shape)
        elif values.dtype.kind == "f":
            arrays[name] = values.astype(float) * noise
        else:
            arrays[name] = values
    arrays["stream/is_padding"] = np.arange(48) == 47
    arrays["stream/ln1_scale"] = np.sqrt(arrays["stream/resid_pre"] ** 2 / D_MODEL + 1e-5)
    arrays["stream/ln1_scale"] *= 1 + 1e-7 * dice.standard_normal((n_layers, 48))
    # The last horizon leaves nothing out.
    arrays[f"horizon/loss.{DEFAULT.name}"][-1] = arrays["horizon/clean_loss"]
    arrays["horizon/tokens"] = np.arange(3, 3 + PROMPTS, dtype=np.int32)
    growing = 1.1 ** np.arange(n_layers)
    for name in ("W_in", "W_in_raw", "W_in_W_out", "b_in_W_out", "b_out"):
        arrays[f"weights/{name}"] = arrays[f"weights/{name}"] * growing
    integrity = sound.metadata["integrity"] | {"reset": ["layer 4: ln_1"]}
    return Record(arrays, sound.metadata | {"integrity": integrity})


def sound_xl() -> Record:
    """A record of which everything holds that is claimed of gpt2-xl."""
    return sound_record(model="gpt2-xl", n_layers=48, start=4.0)


def changed(record: Record, **arrays: np.ndarray) -> Record:
    """The record with arrays of `stream` replaced."""
    return replaced(record, {f"stream/{name}": values for name, values in arrays.items()})


def replaced(record: Record, arrays: dict[str, np.ndarray]) -> Record:
    """The record with arrays of any group replaced."""
    return Record(record.arrays | arrays, record.metadata)
