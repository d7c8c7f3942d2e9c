"""Each law holds where it should and fails where it should: its negative controls, and random
weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streamgauge
from fixtures import adopter, catalogue
from streamgauge.checkpoints import files as checkpoints
from streamgauge.laws import laws
from streamgauge.numerics.draws import LAWS, NO_NUMBER
from streamgauge.numerics.horizons import DEFAULT
from streamgauge.numerics.rows import Prompts
from streamgauge.record import Record
from streamgauge.store import Store
from tests import models
from tests.conftest import ROOT, Audit
from tests.records import DRAWN, changed, replaced, sound_record, sound_xl

Auditing = Callable[..., Audit]


def _scaled(name: str, factor: float, where: tuple[Any, ...]) -> Callable[[], Record]:
    """A record with part of one of its arrays scaled."""

    def make() -> Record:
        record = sound_record()
        values = record.array(f"stream/{name}").copy()
        values[where] *= factor
        return changed(record, **{name: values})

    return make


def _without_plateau() -> Record:
    record = sound_record()
    bos = record.array("stream/is_bos")
    pre = record.resid_pre.copy()
    pre[:, bos] = pre[:, ~bos][:, : bos.sum()]
    return changed(record, resid_pre=pre)


def _without_fall() -> Record:
    record = sound_record()
    post = record.array("stream/resid_post").copy()
    post[-1, record.array("stream/is_bos")] = 5000
    return changed(record, resid_post=post)


def _heads_reversed(n_layers: int) -> Record:
    record = sound_record(n_layers=n_layers)
    return Record(
        record.arrays
        | {"weights/W_OV_frobenius": record.array("weights/W_OV_frobenius")[::-1].copy()},
        record.metadata,
    )


def _too_large_for_fp16() -> Record:
    """Stored in bf16, run in fp16, and from layer 9 on larger than that holds."""
    record = sound_record(stored_dtype="BF16", config_dtype="F16")
    largest = record.arrays["stream/largest"]
    largest[:] = 60_000
    largest[9:, 3] = 65_504
    return record


def _repaired(number: int) -> Record:
    """A record of which one change lowers the loss, on every row."""
    record = sound_record()
    change = record.array("neighbours/change").copy()
    change[number] = -0.189
    first = {"first": {"number": number, "excess": 0.3, "slope": 0.01}}
    searched = record.metadata["neighbours"] | first
    record = Record(record.arrays, record.metadata | {"neighbours": searched})
    return replaced(record, {"neighbours/change": change})


def _faulty(kind: str) -> Callable[[], Record]:
    return lambda: sound_record(
        integrity={"not_finite": [], "dead": [], "alike": [], "reset": [], "repeated": []}
        | {kind: ["h.3.mlp.c_fc.weight"]}
    )


def _xl(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[], Record]:
    """What is claimed of gpt2-xl, with one array changed."""

    def make() -> Record:
        record = sound_xl()
        return replaced(record, {name: change(record.array(name).astype(float))})

    return make


def _of(
    model: str, name: str, change: Callable[[np.ndarray], np.ndarray], n_layers: int = 12
) -> Callable[[], Record]:
    """A sound record of so many layers, with one array changed."""
    return lambda: replaced(
        sound_record(n_layers=n_layers, model=model),
        {name: change(sound_record(n_layers=n_layers).array(name).astype(float))},
    )


def _backwards(values: np.ndarray) -> np.ndarray:
    return values[::-1].copy()


def _one_larger(sketches: np.ndarray) -> np.ndarray:
    sketches[3] *= 1.1
    return sketches


def _one_less(losses: np.ndarray) -> np.ndarray:
    losses[10] = -0.01
    return losses


def _flat(values: np.ndarray) -> np.ndarray:
    return np.broadcast_to(values[:1], values.shape).copy()


def _with_nan(values: np.ndarray) -> np.ndarray:
    values[10, 4] = np.nan
    return values


def _broken(ratios: np.ndarray) -> np.ndarray:
    ratios[4, -1] = 1.1
    return ratios


def _no_number(ratios: np.ndarray) -> np.ndarray:
    ratios[4, 0] = NO_NUMBER
    return ratios


def _parallel_without_its_product() -> Record:
    record = sound_record(parallel=True)
    return replaced(
        record,
        {
            "sublayers/attn_dot_mlp": 2
            * record.array("stream/attn_out")
            * record.array("stream/mlp_out")
        },
    )


def _dead_head() -> Record:
    norms = sound_record().array("weights/W_OV_frobenius").copy()
    norms[5, 2] = 0
    return Record(
        sound_record().arrays | {"weights/W_OV_frobenius": norms}, sound_record().metadata
    )


def _scaled_tokens() -> Record:
    record = sound_xl()
    spread = np.where(np.arange(record.resid_pre.shape[1]) % 2, 1.0, 100.0)
    return changed(
        record,
        resid_pre=record.resid_pre * spread,
        resid_post=record.array("stream/resid_post") * spread,
    )


def _opposed() -> Record:
    """Outputs larger than the growth they cause."""
    record = sound_xl()
    return changed(
        record, **{name: 30 * record.array(f"stream/{name}") for name in ("attn_out", "mlp_out")}
    )


def _gpt2_with_heads(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[], Record]:
    """The published norms of gpt2's heads, changed."""

    def make() -> Record:
        record = Record.load(catalogue.models()["gpt2"].published_path("58-prompts"))
        return replaced(
            record,
            {"weights/W_OV_frobenius": change(record.array("weights/W_OV_frobenius")).copy()},
        )

    return make


DECLARED = (
    "declared"  # a law that no source claims of any model, claimed here by a band of the test's own
)
OWN_BANDS = [
    {"law": "residual/exponential", "model": "pystdlib-3m", "low": 0.9, "source": "the test's own"},
    {"law": "residual/decrease", "model": "pystdlib-3m", "high": 1.0, "source": "the test's own"},
    {
        "law": "attention/gain_share",
        "model": "pystdlib-3m",
        "low": 0.0,
        "high": 2.0,
        "source": "the test's own",
    },
    {"law": "mlp/hidden_structure", "model": "pystdlib-3m", "low": 1.0, "source": "the test's own"},
    {
        "law": "attention/circuit_spectral",
        "model": "pystdlib-3m",
        "low": 1.5,
        "source": "the test's own",
    },
    {
        "law": "attention/circuit_patching",
        "model": "pystdlib-3m",
        "low": 1.5,
        "source": "the test's own",
    },
    {
        "law": "attention/spectral_trajectory",
        "model": "pystdlib-3m",
        "low": -0.01,
        "high": 0.1,
        "source": "the test's own",
    },
    {
        "law": "mlp/gain_share",
        "model": "pystdlib-3m",
        "low": 0.0,
        "high": 0.5,
        "source": "the test's own",
    },
]

OWN_CIRCUITS = Path(__file__).with_name("circuits.toml")
LOSS = f"horizon/loss.{DEFAULT.name}"


def _instrument(name: str, error: float) -> Callable[[], Record]:
    """A record in which one layer, or the logits, are not what transformers computes."""

    def broken() -> Record:
        sound = sound_record()
        values = sound.arrays[f"instrument/{name}"].copy()
        values[-1] = error
        return Record({**sound.arrays, f"instrument/{name}": values}, sound.metadata)

    return broken


# Law, the model the record says it was made from (it chooses the band), what is wrong with it, and
# which of the law's checks has to fail, with the place where there is one.
CONTROLS: list[tuple[str, str, Callable[[], Record], str]] = [
    (
        "instrument/same_function",
        "another-walk",
        _instrument("block_error", 1e-4),
        "difference of the walk over the blocks | layer 15",
    ),
    (
        "instrument/same_function",
        "another-bridge",
        _instrument("bridge_error", 1e-4),
        "difference of TransformerLens | layer 15",
    ),
    (
        "instrument/same_function",
        "other-logits",
        _instrument("logits_error", 1e-2),
        "difference of the logits",
    ),
    (
        "instrument/same_function",
        "not-a-number",
        _instrument("block_error", np.nan),
        "difference of the walk over the blocks | layer 15",
    ),
    ("residual/growth_rate", "shrinking", lambda: sound_record(0.99), "growth"),
    ("residual/growth_rate", "constant", lambda: sound_record(1.0), "growth"),
    ("residual/growth_rate", "gpt2-xl", lambda: sound_record(1.06, n_layers=48), "growth"),
    (
        "residual/exponential",
        DECLARED,
        lambda: sound_record(0.95),
        "R² of a straight line through the log norm",
    ),
    (
        "residual/exponential",
        DECLARED,
        lambda: sound_record(1.0),
        "R² of a straight line through the log norm",
    ),
    (
        "residual/exponential",
        DECLARED,
        _scaled("resid_pre", 3.0, (slice(6, 8),)),
        "R² of a straight line through the log norm",
    ),
    (
        "residual/exponential",
        DECLARED,
        lambda: sound_record(1.5, bend=-0.04),
        "R² of a straight line through the log norm",
    ),
    (
        "residual/exponential",
        DECLARED,
        _scaled("resid_pre", np.nan, (slice(5, 9), slice(0, 24))),
        "R² of a straight line through the log norm",
    ),
    (
        "residual/super_exponential",
        "gpt2",
        lambda: sound_record(1.045),
        "rise of the log growth rate",
    ),
    (
        "residual/super_exponential",
        "gpt2",
        lambda: sound_record(1.3, bend=-0.02),
        "rise of the log growth rate",
    ),
    (
        "residual/every_token_grows",
        "gpt2",
        _scaled("resid_pre", 0.3, (slice(10, None), 4)),
        "slowest growth",
    ),
    (
        "residual/every_token_grows",
        "gpt2",
        _scaled("resid_pre", np.nan, (slice(None), 4)),
        "slowest growth",
    ),
    ("residual/growth_rate", "infinite", _scaled("resid_pre", np.inf, (13, 4)), "growth"),
    ("residual/growth_rate", "zero", _scaled("resid_pre", 0.0, (2, 4)), "growth"),
    (
        "residual/position_0",
        "gpt2",
        _without_plateau,
        "norm of position 0 over the largest of any text token",
    ),
    ("residual/position_0", "gpt2", _without_fall, "last norm of position 0 over its largest"),
    (
        "residual/moments",
        "scale-off",
        _scaled("ln1_scale", 1.001, (7, 3)),
        "relative error of ‖resid_pre‖² against the norm's scale",
    ),
    (
        "residual/moments",
        "norm-is-more-than-scaling",
        lambda: changed(sound_record(), ln1_residual=np.full((16, 48), 1e-3)),
        "part of the norm's output that scaling does not explain",
    ),
    (
        "residual/additivity",
        "not-a-sum",
        lambda: changed(sound_record(), additivity_error=np.full((16, 48), 1e-3)),
        "relative error of the sum",
    ),
    (
        "sublayers/contribution_bound",
        "attn-too-small",
        _scaled("attn_out", 0.5, (9, 2)),
        "change of norm beyond the contributions, relative | layer 9",
    ),
    ("attention/ov_growth", "gpt2-xl", lambda: _heads_reversed(48), "growth of ‖W_OV‖"),
    ("attention/ov_growth", "gpt2", lambda: sound_record(n_layers=12), "growth of ‖W_OV‖"),
    (
        "weights/integrity",
        "not-finite",
        _faulty("not_finite"),
        "tensors that are not finite | h.3.mlp",
    ),
    ("weights/integrity", "dead", _faulty("dead"), "matrices that are all zero | h.3.mlp"),
    ("weights/integrity", "runs", _faulty("runs"), "ranges of equal numbers | h.3.mlp"),
    ("weights/integrity", "alike", _faulty("alike"), "matrices that repeat | h.3.mlp"),
    ("weights/integrity", "dead-head", _dead_head, "heads with ‖W_OV‖ = 0 | layer 5 head 2"),
    (
        "weights/repeated_blocks",
        "upscaled",
        _faulty("repeated"),
        "runs of repeated blocks | h.3.mlp",
    ),
    (
        "residual/fits_dtype",
        "fp16",
        _too_large_for_fp16,
        "largest activation over the largest number of F16 | layer 9 first",
    ),
    ("weights/integrity", "untied", _faulty("untied"), "the embedding they are tied to"),
    ("weights/integrity", "beside", _faulty("beside"), "files beside that hold other weights"),
    ("weights/gains_vary", "gain-reset", _faulty("reset"), "gains that are constant"),
    (
        "residual/fast_start",
        "gpt2-xl",
        lambda: sound_record(n_layers=48),
        "norm after two blocks over the embedding's",
    ),
    (
        "residual/padding",
        "gpt2-xl",
        _xl("padding/resid", lambda x: x * np.nan),
        "lower end of the curve over its lowest point",
    ),
    (
        "residual/padding",
        "gpt2-xl",
        _xl("padding/resid", lambda x: np.sort(x, axis=0)),
        "lower end of the curve over its lowest point",
    ),
    ("residual/spread", "gpt2-xl", _scaled_tokens, "spread over tokens, part of the growth"),
    ("residual/decrease", DECLARED, lambda: sound_record(1.01), "growth over the last layers"),
    (
        "sublayers/addition_law",
        "product-wrong",
        _scaled("mid_dot_mlp", 1.001, (9, 2)),
        "relative error of the addition law | layer 9",
    ),
    (
        "sublayers/addition_law",
        "not-a-number",
        _scaled("pre_dot_attn", np.nan, (9, 2)),
        "relative error of the addition law | layer 9",
    ),
    (
        "sublayers/addition_law",
        "parallel",
        _parallel_without_its_product,
        "relative error of the addition law",
    ),
    (
        "sublayers/alignment",
        "gpt2-xl",
        _opposed,
        "growth a block over that of uncorrelated outputs",
    ),
    ("sublayers/both_grow", "gpt2-xl", _xl("stream/attn_out", _backwards), "growth of attn_out"),
    ("sublayers/both_grow", "gpt2-xl", _xl("stream/mlp_out", _flat), "growth of mlp_out"),
    ("sublayers/both_grow", "gpt2-xl", _xl("stream/mlp_out", _with_nan), "growth of mlp_out"),
    (
        "sublayers/scale_blindness",
        "attn-sees-scale",
        _of("any", "sublayers/attn_scale_error", lambda x: x + 1e-2),
        "change of attn_out, as a relative change of the norms' inputs",
    ),
    (
        "sublayers/scale_blindness",
        "mlp-sees-scale",
        _of("any", "sublayers/mlp_scale_error", lambda x: x + 1e-2),
        "change of mlp_out, as a relative change of the norms' inputs",
    ),
    (
        "attention/fall_off",
        "gpt2-xl",
        _xl("stream/attn_out", lambda x: x * 1.04 ** np.arange(48)[:, None]),
        "growth of attn_out over the stream's",
    ),
    (
        "attention/output_bias",
        "gpt2-xl",
        _xl("weights/b_O", lambda x: 1e5 * x),
        "‖b_O‖ over ‖attn_out‖",
    ),
    (
        "attention/last_output_bias",
        "gpt2-xl",
        _xl("weights/b_O", _backwards),
        "‖b_O‖ of the last layer over the median of the others",
    ),
    (
        "attention/last_output_bias",
        "gpt2",
        _of("gpt2", "weights/b_O", lambda x: np.append(x[:-1], 1.1 * x[-1])),
        "‖b_O‖ of the last layer over the median of the others",
    ),
    (
        "attention/random_sum",
        "gpt2-xl",
        _xl("random_input/attn_norm", lambda x: x / 5),
        "answer to random input over ‖attn_out‖",
    ),
    (
        "attention/random_sum",
        "gpt2-xl",
        _xl("random_input/attn_norm", lambda x: x * 5),
        "answer to random input over ‖attn_out‖",
    ),
    (
        "attention/hard_coded_growth",
        "gpt2-xl",
        _xl("random_input/attn_norm", _backwards),
        "share of the growth of attn_out that random input reproduces",
    ),
    (
        "mlp/hard_coded_growth",
        "gpt2-xl",
        _xl("random_input/mlp_norm", _backwards),
        "share of the growth of mlp_out that random input reproduces",
    ),
    (
        "mlp/hard_coded_growth",
        "gpt2-xl",
        _xl("random_input/mlp_norm", lambda x: x * np.nan),
        "share of the growth of mlp_out that random input reproduces",
    ),
    (
        "attention/gain_share",
        DECLARED,
        _xl("weights/W_OV_raw_frobenius", lambda x: x * 1.06 ** np.arange(48)[:, None]),
        "share of the growth of ‖W_OV‖ that is the gain's",
    ),
    (
        "mlp/gain_share",
        DECLARED,
        _of("any", "weights/W_in", lambda x: x * 1.06 ** np.arange(16), 16),
        "share of the growth of ‖W_in‖ that is the gain's",
    ),
    (
        "mlp/random_input_growth",
        "gpt2-xl",
        _xl("random_input/mlp_norm", _flat),
        "growth of ‖MLP(x)‖ on random x",
    ),
    (
        "mlp/random_input_growth",
        "gpt2-xl",
        _xl("random_input/mlp_norm", lambda x: x / 5),
        "‖MLP(x)‖ on random x over ‖mlp_out‖",
    ),
    (
        "mlp/component_norms",
        "gpt2-xl",
        _xl("weights/b_in_W_out", lambda x: x * 1.06 ** np.arange(48)),
        "growth of ‖b_in W_out‖ over the stream's",
    ),
    (
        "mlp/activation_rate",
        "gpt2-xl",
        _xl("neurons/activation_rate", _backwards),
        "growth of the activation rate",
    ),
    (
        "mlp/activation_rate",
        "pythia-160m",
        _of("pythia-160m", "neurons/activation_rate", _flat),
        "growth of the activation rate",
    ),
    (
        "mlp/random_activation_rate",
        "gpt2-xl",
        _xl("random_input/mlp_activation_rate", lambda x: x / 4),
        "activation rate on random input over that on text",
    ),
    (
        "mlp/resampled_activation_rate",
        "gpt2-xl",
        _xl("random_input/resampled_activation_rate", lambda x: x / 4),
        "place of the resampled activation rate",
    ),
    (
        "mlp/resampled_activation_rate",
        "gpt2-xl",
        _xl("random_input/resampled_activation_rate", lambda x: x * 4),
        "place of the resampled activation rate",
    ),
    (
        "mlp/hidden_structure",
        DECLARED,
        _of("any", "neurons/singular_values", lambda x: 0 * x, 16),
        "smallest effective rank",
    ),
    (
        "mlp/hidden_structure",
        DECLARED,
        _of("any", "neurons/singular_values", _with_nan, 16),
        "smallest effective rank | layer 10",
    ),
    (
        "mlp/component_norms",
        "gpt2-xl",
        _xl("weights/W_in", lambda x: np.append(x[:20] * 0, x[20:])),
        "growth of ‖W_in‖ over the stream's",
    ),
    (
        "weights/writing_grows",
        "pythia-160m",
        _of("pythia-160m", "weights/W_out_raw", _backwards),
        "‖W_out‖ of the last layer over the first's",
    ),
    (
        "weights/writing_grows",
        "pythia-160m",
        _of("pythia-160m", "weights/W_out_raw", _flat),
        "‖W_out‖ of the last layer over the first's",
    ),
    (
        "weights/reading_stays",
        "pythia-160m",
        _of("pythia-160m", "weights/W_in_raw", lambda x: np.append(x[:-1], 1.2)),
        "‖W_in‖ of the last layer over the first's",
    ),
    (
        "weights/embedding_norm",
        "pythia-70m",
        lambda: sound_record(n_layers=6),
        "norm of the embedding",
    ),
    (
        "attention/circuit_norms",
        "gpt2",
        _gpt2_with_heads(lambda norms: norms[:, ::-1]),
        "‖W_OV‖_F of ioi's heads over all others'",
    ),
    (
        "attention/circuit_norms",
        "gpt2",
        _gpt2_with_heads(lambda norms: norms[::-1]),
        "‖W_OV‖_F of ioi's heads over all others'",
    ),
    (
        "attention/circuit_norms",
        "gpt2",
        _gpt2_with_heads(lambda norms: norms * np.nan),
        "‖W_OV‖_F of ioi's heads over all others'",
    ),
    (
        "attention/circuit_spectral",
        DECLARED,
        _of("any", "weights/W_OV_spectral", lambda x: x[:, ::-1], 16),
        "σ₁(W_OV) of own's heads over all others'",
    ),
    (
        "attention/circuit_spectral",
        DECLARED,
        _of("any", "weights/W_OV_spectral", lambda x: x * np.nan, 16),
        "σ₁(W_OV) of own's heads over all others'",
    ),
    (
        "attention/circuit_patching",
        DECLARED,
        _of("any", "patching/own", lambda x: x[:, ::-1], 16),
        "patching score of own's heads over all others'",
    ),
    (
        "attention/circuit_patching",
        DECLARED,
        _of("any", "patching/own", lambda x: 0 * x + 1, 16),
        "patching score of own's heads over all others'",
    ),
    (
        "attention/spectral_trajectory",
        DECLARED,
        _of("any", "weights/W_OV_spectral", _backwards, 16),
        "slope of log σ₁(W_OV)",
    ),
    (
        "attention/spectral_trajectory",
        DECLARED,
        _of("any", "weights/W_QK_spectral", lambda x: x * 2 ** np.arange(16)[:, None], 16),
        "slope of log σ₁(W_QK)",
    ),
    (
        "attention/causality",
        "leaks",
        _of("any", "prediction/later_changes", lambda x: x + 1e-3),
        "change of the stream by later tokens, relative",
    ),
    (
        "attention/causality",
        "sees-later-tokens",
        _of("any", "prediction/future_weight", lambda x: x + 1e-6),
        "attention weight on a later position",
    ),
    (
        "attention/causality",
        "rows-not-one",
        _of("any", "prediction/row_sum_error", lambda x: x + 1e-4),
        "|Σ - 1| of attention rows",
    ),
    (
        "attention/causality",
        "not-a-number",
        _of("any", "prediction/later_changes", lambda x: x * np.nan),
        "change of the stream by later tokens, relative",
    ),
    *(
        control
        for law, name in DRAWN.items()
        for control in (
            (law, "a-draw-breaks-it", _of("any", f"draws/{name}", _broken), LAWS[name]),
            (law, "no-number", _of("any", f"draws/{name}", _no_number), LAWS[name]),
        )
    ),
    (
        "predictions/beats_unigram",
        "worse-than-counting",
        _of("any", "prediction/loss", lambda x: 3 * x),
        "loss below the unigram's",
    ),
    (
        "predictions/beats_unigram",
        "not-a-number",
        _of("any", "prediction/loss", lambda x: x * np.nan),
        "loss below the unigram's",
    ),
    (
        "predictions/best_of_its_neighbours",
        "a-repair-helps",
        lambda: _repaired(0),
        "certain change of loss by a repair",
    ),
    (
        "predictions/best_of_its_neighbours",
        "better-without",
        lambda: _repaired(1),
        "certain change of loss by a repair",
    ),
    (
        "predictions/best_of_its_neighbours",
        "not-a-number",
        _of("any", "neighbours/change", lambda x: x * np.nan),
        "certain change of loss by a repair",
    ),
    (
        "regression/config",
        "other-heads",
        lambda: sound_record(config={"n_head": 2, "activation": "gelu"}),
        "config n_head",
    ),
    (
        "regression/config",
        "entry-missing",
        lambda: sound_record(config={"activation": "gelu"}),
        "config n_head",
    ),
    (
        "regression/weights",
        "scaled",
        _of("any", "sketch/parameters", _one_larger, 16),
        "layer 3: layer 3",
    ),
    (
        "regression/weights",
        "not-a-number",
        _of("any", "sketch/parameters", lambda x: x * np.nan, 16),
        "not finite",
    ),
    (
        "regression/norms",
        "larger",
        _of("any", "weights/W_out_raw", lambda x: x * 1.001, 16),
        "‖W_out_raw‖: 1 in the baseline, now 1.001",
    ),
    (
        "regression/norms",
        "smaller",
        _of("any", "weights/W_O_raw", lambda x: x * 0.999, 16),
        "head 0 ‖W_O_raw‖",
    ),
    (
        "regression/activations",
        "larger",
        _of("any", "stream/resid_pre", lambda x: x * 1.0001, 16),
        "stream ‖resid‖",
    ),
    (
        "regression/activations",
        "not-a-number",
        _of("any", "stream/mlp_out", lambda x: x * np.nan, 16),
        "mlp ‖mlp_out‖",
    ),
    (
        "regression/predictions",
        "other-losses",
        _of("any", "prediction/loss", lambda x: x * 1.001, 16),
        "predictions loss",
    ),
    (
        "regression/predictions",
        "other-tokens",
        _of("any", "prediction/token", lambda x: np.append(x[:-1], 99).astype(np.int32), 16),
        "tokens of the prompts",
    ),
    (
        "regression/verdict",
        "scaled",
        _of("any", "sketch/parameters", _one_larger, 16),
        "verdicts that are not accepted | other weights: layer 3 mlp h.3.mlp.c_fc",
    ),
    (
        "regression/verdict",
        "other-losses",
        _of("any", "prediction/loss", lambda x: x * 1.001, 16),
        "and yet other results",
    ),
    (
        "depth/earlier_outputs_fade",
        "gpt2-xl",
        _xl("stream/resid_pre", _flat),
        "share of the first mlp_out",
    ),
    (
        "depth/earlier_outputs_fade",
        "gpt2-xl",
        _xl("sublayers/pre_dot_mlp_0", lambda x: x * 1.06 ** np.arange(48)[:, None]),
        "share of the first mlp_out",
    ),
    (
        "depth/layer_horizon",
        "gpt2-xl",
        _xl(LOSS, lambda x: np.where(np.arange(len(x))[:, None] < len(x) - 1, x + 1, x)),
        "effective layer horizon",
    ),
    (
        "depth/layer_horizon",
        "gpt2-xl",
        _xl(LOSS, lambda x: np.full_like(x, 3.0)),
        "effective layer horizon",
    ),
    ("depth/layer_horizon", "gpt2", lambda: sound_record(n_layers=12), "effective layer horizon"),
    ("depth/loss_falls_with_horizon", "gpt2-xl", _xl(LOSS, _backwards), "largest rise of the loss"),
    ("depth/loss_falls_with_horizon", "gpt2-xl", _xl(LOSS, _with_nan), "largest rise of the loss"),
    (
        "depth/update_norms_rise",
        "pythia-160m",
        _of("pythia-160m", "stream/mlp_out", _backwards),
        "‖mlp_out‖ of the last layer over the first's",
    ),
    (
        "depth/update_norms_rise",
        "pythia-160m",
        _of("pythia-160m", "stream/attn_out", _flat),
        "‖attn_out‖ of the last layer over the first's",
    ),
    (
        "depth/block_influence",
        "gemma-2-2b",
        _of("gemma-2-2b", "stream/block_influence", _backwards),
        "block influence of the first half over the second's",
    ),
    (
        "depth/block_influence",
        "gemma-2-2b",
        _of("gemma-2-2b", "stream/block_influence", _with_nan),
        "block influence of the first half over the second's",
    ),
    (
        "depth/block_skip",
        "qwen2.5-7b",
        _of("qwen2.5-7b", "block_skip/loss", _one_less),
        "smallest rise of the loss without a block",
    ),
    (
        "depth/effect_bound",
        "effect-of-nothing",
        _of("any", "sublayer_effect/mlp_size", lambda x: 0 * x),
        "KL without mlp_out over its bound",
    ),
    (
        "depth/effect_bound",
        "larger-than-it-can-be",
        _of("any", "sublayer_effect/mlp_kl", lambda x: 1e3 * x),
        "KL without mlp_out over its bound",
    ),
    (
        "depth/effect_bound",
        "not-a-number",
        _of("any", "sublayer_effect/attn_frozen_kl", _with_nan),
        "KL without attn_out over its bound | layer 10",
    ),
]


@pytest.mark.parametrize(
    ("law", "name", "make", "fails"), CONTROLS, ids=[f"{law}-{name}" for law, name, *_ in CONTROLS]
)
def test_fails_on_its_negative_control(
    law: str,
    name: str,
    make: Callable[[], Record],
    fails: str,
    audit: Auditing,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = make()
    if name == DECLARED:
        name = "pystdlib-3m"
        own = [
            band
            for band in catalogue._toml()["band"]
            if (band["law"], band.get("model")) != (law, name)
        ]
        toml = catalogue._toml() | {"band": own + OWN_BANDS}
        monkeypatch.setattr(catalogue, "_toml", lambda: toml)
    Record(record.arrays, record.metadata | {"model": name}).save(tmp_path / f"{name}.safetensors")
    folder, test = law.split("/")
    law_file = f"invariants/{folder}/test_{test}.py"
    options: list[object] = ["--circuits", OWN_CIRCUITS]
    if folder == "regression":
        sound_record().save(tmp_path / "sound.safetensors")
        options += ["--baseline", tmp_path / "sound.safetensors"]
    found = audit("--record", tmp_path / f"{name}.safetensors", *options, laws=law_file)
    assert found.exit == 1
    assert found.row(law)["outcome"] == "fail", found.row(law)
    check = found.row(law)["values"][-1]  # the one that ended it
    assert all(words in f"{check['what']} {check['of']}" for words in fails.split(" | ")), check
    assert found.row(law)["margin"] is None or found.row(law)["margin"] <= 0
    assert "reproduce: pytest" in found.output and "source: " in found.output


def test_every_law_has_a_negative_control() -> None:
    # What a model that was trained further may do has a bound of the adopter's alone.
    declared = {law.id for law in laws() if law.kind == "regression" and law.takes_band}
    assert declared == {"regression/loss", "regression/movement"}
    assert {law for law, *_ in [*CONTROLS, *ON_FILES]} | declared == {law.id for law in laws()}


@pytest.mark.parametrize(
    ("times", "outcome"), [(1.1, "fail"), (1.001, "pass"), (0.9, "pass"), (np.nan, "fail")]
)
def test_the_loss_may_rise_by_what_the_adopter_allows(
    times: float, outcome: str, audit: Auditing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    sound_record().save(old)
    _of("any", "prediction/loss", lambda x: x * times, 16)().save(new)
    asked = ("--record", new, "--baseline", old, "-m", "regression")
    noted = audit(*asked, "--same", "trained").row("regression/loss")
    assert (noted["outcome"], noted["reason"]) == (
        "not_applicable",
        "no source claims it of this model",
    )
    band = {"law": "regression/loss", "high": 0.05, "source": "earlier releases"}
    settings = adopter.Settings(ROOT / "streamgauge.toml", {"band": [band]})
    monkeypatch.setattr(adopter, "read_settings", lambda root: settings)
    found = audit(*asked, "--same", "trained")
    row = found.row("regression/loss")
    assert row["outcome"] == outcome
    if np.isfinite(times):  # 2 nats a token
        assert row["value"] == pytest.approx(2 * times - 2, rel=1e-5)
    assert "--same trained" in row["reproduce"]
    others = {law: found.outcomes()[f"regression/{law}"] for law in ("weights", "predictions")}
    assert set(others.values()) == {"not_applicable"}
    assert audit(*asked).row("regression/loss")["reason"] == (
        "regression/predictions holds losses to the baseline's"
    )


@pytest.mark.parametrize(("name", "bend"), [("anything", 0.0), ("gpt2", 0.02)])
def test_laws_hold_on_a_sound_record(
    name: str, bend: float, audit: Auditing, tmp_path: Path
) -> None:
    sound_record(model=name, bend=bend).save(tmp_path / f"{name}.safetensors")
    outcomes = audit("--record", tmp_path / f"{name}.safetensors").outcomes()
    broken = {law for law, outcome in outcomes.items() if outcome in ("fail", "error")}
    # These are about the weights of gpt2 itself, its twelve heads a layer, and the horizon that it
    # is said not to have.
    own = {"attention/ov_growth", "residual/fast_start", "depth/layer_horizon"}
    own |= {f"attention/circuit_{of}" for of in ("norms", "spectral")}
    assert broken == (own if name == "gpt2" else set())


def test_all_that_is_claimed_of_gpt2_xl_holds_on_a_record_made_so(
    audit: Auditing, tmp_path: Path
) -> None:
    sound_xl().save(tmp_path / "xl.safetensors")
    found = audit("--record", tmp_path / "xl.safetensors").outcomes()
    assert not {law for law, outcome in found.items() if outcome in ("fail", "error")}
    claimed = {
        band["law"] for band in catalogue._toml()["band"] if "gpt2-xl" in catalogue._models_of(band)
    }
    assert {law for law in claimed if found[law] == "pass"} == claimed


def test_what_no_source_claims_is_measured_and_not_asserted(
    audit: Auditing, tmp_path: Path
) -> None:
    sound_record(model="somebody's").save(tmp_path / "it.safetensors")
    row = audit(
        "--record", tmp_path / "it.safetensors", "-k", "mlp and hard_coded or integrity"
    ).row("mlp/hard_coded_growth")
    assert (
        row["outcome"] == "not_applicable" and row["reason"] == "no source claims it of this model"
    )
    assert (
        row["value"] == pytest.approx(1, abs=1e-3)
        and row["band"] is None
        and row["layers"] == [2, 13]
    )


def test_a_law_about_no_layers_names_none(audit: Auditing, tmp_path: Path) -> None:
    _of("any", "prediction/loss", lambda x: 3 * x)().save(tmp_path / "any.safetensors")
    row = audit(
        "--record",
        tmp_path / "any.safetensors",
        laws="invariants/predictions/test_beats_unigram.py",
    ).rows[0]
    assert row["outcome"] == "fail" and row["layers"] is None
    assert row["reason"].startswith("any: loss below the unigram's")


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_theorems_hold_on_random_weights(name: str, audit: Auditing, tmp_path: Path) -> None:
    found = audit(
        "--model", models.save(models.random_model(name), tmp_path / name), "-m", "theorem"
    )
    assert found.outcomes()["weights/integrity"] == "pass"
    assert not [row for row in found.rows if row["outcome"] in ("fail", "error")]


def test_growth_that_was_planted_is_measured(tmp_path: Path) -> None:
    from streamgauge.numerics.growth import growth_rates, mean_rate

    record = streamgauge.measure(models.save(models.planted_gpt2(1.045), tmp_path))
    assert mean_rate(growth_rates(record.text_resid, (3, 20))) == pytest.approx(1.045, abs=1e-3)


def test_untrained_weights_do_not_grow_like_trained_ones(audit: Auditing, tmp_path: Path) -> None:
    record = streamgauge.measure(models.save(models.gpt2(16), tmp_path / "untrained"))
    record.metadata.update(model="pystdlib-3m", revision="test")
    record.save(tmp_path / "untrained.safetensors")
    outcomes = audit("--record", tmp_path / "untrained.safetensors", "-m", "phenomenon").outcomes()
    # Heads of an untrained model are all alike, and its stream grows like a random walk.
    assert outcomes["attention/ov_growth"] == "fail"
    assert outcomes["residual/growth_rate"] == "fail"


def _audit_with_stored(
    audit: Auditing, tmp_path: Path, law: str, spoil: Callable[[Record], None], model: Any = None
) -> dict[str, Any]:
    """Audit a checkpoint whose stored record was spoilt, so that record and files disagree."""
    folder = models.save(model or models.gpt2(3), tmp_path / "model")
    checkpoint, store = checkpoints.open_checkpoint(folder), Store(tmp_path / "store")
    store.prepare()
    record = streamgauge.measure(checkpoint, store=store)
    spoil(record)
    record.save(store.folder / "records" / f"{store.key(checkpoint, None, 'cpu')}.safetensors")
    return audit("--model", folder, "-k", law.split("/")[1]).row(law)


def _spoil(name: str, factor: float, where: Any = ...) -> Callable[[Record], None]:
    def spoil(record: Record) -> None:
        record.arrays[f"weights/{name}"][where] *= factor

    return spoil


D_HEAD = models.WIDTH // models.HEADS
ON_FILES = [
    ("attention/frobenius_is_random_response", "all heads scaled", _spoil("W_OV_frobenius", 1.3)),
    ("attention/frobenius_is_random_response", "all heads dead", _spoil("W_OV_frobenius", 0)),
    ("attention/frobenius_is_random_response", "not a number", _spoil("W_OV_frobenius", np.nan)),
    (
        "attention/frobenius_is_random_response",
        "one head wrong",
        _spoil("W_OV_frobenius", 9, (1, 2)),
    ),
    (
        "attention/frobenius_is_random_response",
        "last head wrong",
        _spoil("W_OV_frobenius", 9, (-1, -1)),
    ),
    ("attention/frobenius_is_random_response", "gain folded wrongly", _spoil("ln1_gain", 1.3)),
    ("attention/amplification_bound", "too small", _spoil("W_OV_spectral", 0.95)),
    ("attention/amplification_bound", "one head too small", _spoil("W_OV_spectral", 0.95, (1, 2))),
    (
        "attention/amplification_bound",
        "last head too small",
        _spoil("W_OV_spectral", 0.95, (-1, -1)),
    ),
    ("attention/amplification_bound", "larger than Frobenius", _spoil("W_OV_spectral", 4)),
    ("attention/amplification_bound", "smaller than Frobenius allows", _spoil("W_OV_frobenius", 9)),
]


@pytest.mark.parametrize(
    ("law", "what", "spoil"), ON_FILES, ids=[f"{law}-{what}" for law, what, _ in ON_FILES]
)
def test_a_law_on_files_finds_a_wrong_number(
    law: str, what: str, spoil: Callable[[Record], None], audit: Auditing, tmp_path: Path
) -> None:
    assert _audit_with_stored(audit, tmp_path, law, spoil)["outcome"] == "fail"


@pytest.mark.parametrize("law", sorted({law for law, _, _ in ON_FILES}))
def test_a_law_on_files_holds_on_the_same_model_unspoilt(
    law: str, audit: Auditing, tmp_path: Path
) -> None:
    assert _audit_with_stored(audit, tmp_path, law, lambda record: None)["outcome"] == "pass"


def test_a_dead_head_with_a_norm_fails(audit: Auditing, tmp_path: Path) -> None:
    def give_it_a_norm(record: Record) -> None:
        record.arrays["weights/W_OV_frobenius"][1, 0] = 0.3

    model = models.gpt2(3)
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[:D_HEAD] = 0
    row = _audit_with_stored(
        audit, tmp_path, "attention/frobenius_is_random_response", give_it_a_norm, model
    )
    assert row["outcome"] == "fail" and row["of"] == "layer 1, head 0" and row["margin"] < 0


@pytest.mark.parametrize("law", sorted({law for law, _, _ in ON_FILES}))
@pytest.mark.parametrize("overlap", [1e-2, 1e-4, 1e-6, 0])
def test_laws_on_files_allow_what_rounding_does_to_small_products(
    law: str, overlap: float, audit: Auditing, tmp_path: Path
) -> None:
    """Heads whose W_O hardly reads what their W_V writes: the product is much smaller than its
    factors.
    """
    model, generator = models.gpt2(3), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.transformer.h:
            for head in range(0, models.WIDTH, D_HEAD):
                kept = slice(head, head + D_HEAD)
                value, output = (
                    block.attn.c_attn.weight[:, 2 * models.WIDTH :][:, kept],
                    block.attn.c_proj.weight[kept],
                )
                written = torch.nn.functional.normalize(
                    torch.randn(D_HEAD, generator=generator), dim=0
                )
                value.copy_(torch.outer(torch.randn(models.WIDTH, generator=generator), written))
                output -= (1 - overlap) * torch.outer(written, written @ output)
    assert _audit_with_stored(audit, tmp_path, law, lambda record: None, model)["outcome"] == "pass"


def test_additivity_finds_a_stream_that_is_rounded_to_bf16() -> None:
    from streamgauge.engine.forward import PromptRun, walk
    from streamgauge.engine.layout import probe_layout
    from streamgauge.groups.stream import StreamMeter

    model = models.blockwise(models.random_model("llama"))
    meter = StreamMeter(probe_layout(model), Prompts([[1, 2, 3, 4]], "test", 1))
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, x: x.bfloat16().float())
    walk(model, {"prompts": PromptRun(model, meter.prompts, [meter])})
    assert meter.found()[0]["additivity_error"].max() > 8 * 2.0**-24


def _nan(model: Any) -> None:
    model.transformer.h[1].mlp.c_fc.weight[3, 4] = torch.nan


def _infinite(model: Any) -> None:
    model.transformer.h[1].attn.c_attn.weight[0, 0] = torch.inf


@pytest.mark.parametrize("break_it", [_nan, _infinite])
def test_nan_is_named_and_nothing_passes_over_it(
    break_it: Callable[[Any], None], audit: Auditing, tmp_path: Path
) -> None:
    model = models.gpt2()
    with torch.no_grad():
        break_it(model)
    found = audit("--model", models.save(model, tmp_path / "broken"))
    assert found.exit == 1
    row = found.row("weights/integrity")
    assert row["outcome"] == "fail" and "transformer.h.1." in row["reason"]
    others = {
        law: outcome for law, outcome in found.outcomes().items() if law != "weights/integrity"
    }
    assert set(others.values()) <= {"error", "not_applicable"}
    assert "the weights are not finite" in found.row("residual/additivity")["reason"]


def _reset_gain(model: Any) -> None:
    for block in model.transformer.h:
        torch.nn.init.normal_(block.ln_2.weight, 1, 0.1)
    model.transformer.h[4].ln_2.weight.fill_(1)


def test_a_gain_that_was_reset_is_found(audit: Auditing, tmp_path: Path) -> None:
    model = models.gpt2()
    with torch.no_grad():
        _reset_gain(model)
    row = audit(
        "--model", models.save(model, tmp_path / "reset"), "-k", "gains_vary or integrity"
    ).row("weights/gains_vary")
    assert row["outcome"] == "fail" and "layer 4: the gain of ln_2 is constant" in row["reason"]


def _dead_layer(model: Any) -> None:
    model.transformer.h[4].mlp.c_proj.weight.zero_()


def _twin_layers(model: Any) -> None:
    model.transformer.h[4].mlp.c_fc.weight.copy_(model.transformer.h[5].mlp.c_fc.weight)


def _dead_head_in_weights(model: Any) -> None:
    model.transformer.h[4].attn.c_proj.weight[:8] = 0


@pytest.mark.parametrize("break_it", [_dead_layer, _twin_layers, _dead_head_in_weights])
def test_integrity_finds_broken_layers(
    break_it: Callable[[Any], None], audit: Auditing, tmp_path: Path
) -> None:
    model = models.gpt2()
    with torch.no_grad():
        break_it(model)
    row = audit("--model", models.save(model, tmp_path / "broken"), "-k", "integrity").row(
        "weights/integrity"
    )
    assert row["outcome"] == "fail"
    assert "4" in row["reason"]


def _tiny_stream(model: Any) -> None:
    model.transformer.wte.weight.mul_(1e-3)
    model.transformer.wpe.weight.mul_(1e-3)


def _large_mean(model: Any) -> None:
    model.transformer.wte.weight.add_(1000.0)


@pytest.mark.parametrize("change", [_tiny_stream, _large_mean])
def test_theorems_hold_where_layernorm_sees_nothing_unusual(
    change: Callable[[Any], None], audit: Auditing, tmp_path: Path
) -> None:
    model = models.random_model("gpt2")
    with torch.no_grad():
        change(model)
    found = audit("--model", models.save(model, tmp_path / "odd"), "-m", "theorem")
    assert not [row for row in found.rows if row["outcome"] in ("fail", "error")]


def test_a_model_of_one_layer_leaves_no_room_for_growth(audit: Auditing, tmp_path: Path) -> None:
    found = audit("--model", models.save(models.gpt2(1), tmp_path / "one"))
    assert found.exit == 0 and set(found.outcomes().values()) == {"pass", "not_applicable"}
    assert "no room for growth" in found.row("attention/ov_growth")["reason"]


def test_scale_blindness_does_not_pass_over_nan() -> None:
    from streamgauge.groups.sublayers import DRAWS, _errors

    assert np.isnan(_errors(torch.full((2 + DRAWS, 4), torch.nan))).all()
    assert not _errors(torch.zeros((2 + DRAWS, 4))).any()


def test_without_a_norm_scale_blindness_would_fail() -> None:
    from streamgauge.engine.layout import probe_layout
    from streamgauge.groups.sublayers import ScaleBlindness

    model = models.blockwise(models.random_model("gpt2"))
    layout = probe_layout(model)
    for block in model.blocks:
        block.ln_2.forward = lambda x: x / 2**20
    errors, _ = models.measure_group(model, ScaleBlindness(model, layout, [1, 2, 3, 4]))
    assert errors["mlp_scale_error"].max() > 3 * layout.d_model * 2.0**-24 * 5
