"""The record: everything a law needs to know about one checkpoint, in one small file read with
numpy alone.

Arrays are named `group/name`:

================================  =====================  =========================================
instrument/block_error            (n_layers,)            difference from transformers' own forward
                                                         pass, relative to what the block adds;
                                                         bridge_error: of TransformerLens's bridge;
                                                         logits_error, (1,), of the logits
instrument/gain                   (n_layers,)            by how much a block enlarges a relative
                                                         change of its input
stream/resid_pre                  (n_layers, n_tok)      norm of the residual stream at each
                                                         block's input
stream/resid_mid                  (n_layers, n_tok)      norm between attention and MLP (sequential
                                                         blocks only)
stream/resid_post                 (n_layers, n_tok)      norm of the residual stream at each
                                                         block's output
stream/attn_out, mlp_out          (n_layers, n_tok)      norms of what the two sublayers add
stream/other_out                  (n_layers, n_tok)      norms of what blocks add that is neither:
                                                         per-layer inputs, a factor on the stream
stream/pre_dot_attn               (n_layers, n_tok)      inner product of resid_pre and attn_out
stream/mid_dot_mlp                (n_layers, n_tok)      inner product of resid_mid and mlp_out (of
                                                         resid_pre in parallel blocks)
stream/additivity_error           (n_layers, n_tok)      norm of resid_post - resid_pre - attn_out
                                                         - mlp_out
stream/block_influence            (n_layers, n_tok)      1 - cosine of resid_pre and resid_post
stream/largest                    (n_layers, n_tok)      largest number, raw, in any of these
                                                         vectors
stream/ln1_scale                  (n_layers, n_tok)      what the first norm of the block divides
                                                         by, read off its output
stream/ln1_residual               (n_layers, n_tok)      relative part of that norm's output that
                                                         scaling does not explain
stream/prompt, position           (n_tok,)               which prompt, and where in it
stream/is_bos, is_padding         (n_tok,)               booleans
weights/W_OV_frobenius            (n_layers, n_heads)    Frobenius norm of W_V W_O, in the
                                                         convention
weights/W_OV_spectral             (n_layers, n_heads)    largest singular value of the same
weights/W_QK_frobenius            (n_layers, n_heads)    Frobenius norm of W_Q W_K^T, W_QK_spectral
                                                         its largest singular value; the part
                                                         without positions where these are rotary
weights/W_OV_raw_frobenius        (n_layers, n_heads)    Frobenius norm without gain and centring,
                                                         as the file has it
weights/W_Q, W_O                  (n_layers, n_heads)    Frobenius norms by head; W_Q_raw and so on
                                                         as the file has them
weights/W_K, W_V                  (n_layers, n_kv)       likewise, of the heads that the file has
weights/b_Q, b_K                  (n_layers, heads)      norms of biases, with what the norm's bias
                                                         adds; b_Q_raw, b_K_raw, b_V_raw
weights/b_O                       (n_layers,)            with what value biases carry into it;
                                                         b_O_raw
weights/W_in, W_gate, W_out       (n_layers,)            Frobenius norms; W_in_raw and so on; b_in,
                                                         b_gate, b_out likewise
weights/W_in_W_out                (n_layers,)            Frobenius norm of the product, and norm of
                                                         b_in W_out (b_in_W_out); no gate
weights/ln1_gain, ln2_gain        (n_layers, d_model)    the gains folded into W_V and W_in (ones
                                                         where no norm precedes them)
neurons/activation_rate           (n_layers, n_tok)      fraction of MLP pre-activations (of the
                                                         gate's, if gated) above 0
neurons/singular_values           (n_layers, n_rows)     of the prompts x d_mlp matrix of hidden
                                                         activations at one position
sublayers/attn_dot_mlp            (n_layers, n_tok)      inner product of attn_out and mlp_out
                                                         (parallel blocks only)
sublayers/pre_dot_mlp_0           (n_layers, n_tok)      inner product of resid_pre and the mlp_out
                                                         of layer 0
sublayers/raw_norm                (n_layers, n_tok)      sum of the norms of raw resid_pre,
                                                         attn_out and mlp_out, before centring
sublayers/attn_scale_error        (n_layers, draws)      relative change of the norms' inputs that
                                                         would change attn_out as much as scaling
                                                         and shifting them did; mlp_scale_error
                                                         likewise
sublayers/largest_shift           (1,)                   the largest constant that was added, in
                                                         root mean squares of the input
random_input/attn_norm            (n_layers,)            mean norm of the sum over heads of x W_OV
                                                         for normalised Gaussian x
random_input/mlp_norm             (n_layers,)            mean norm of the MLP's output for
                                                         normalised Gaussian x
random_input/resampled_norm       (n_layers,)            the same for resid_mid of positions 1 to
                                                         6, each coordinate drawn by itself
random_input/…_error              (n_layers,)            standard errors of these three; …_samples:
                                                         how many vectors it took
random_input/mlp_activation_rate  (n_layers,)            activation rate on the Gaussian inputs;
                                                         resampled_activation_rate likewise
horizon/k                         (n_k,)                 layer horizons that were tried
horizon/loss.VARIANT              (n_k, n_rows)          loss of each prompt at each horizon, nats
                                                         a token (see `numerics.horizons`)
horizon/clean_loss, tokens        (n_rows,)              loss of each prompt as the model runs it;
                                                         how many tokens were predicted
sublayer_effect/attn_kl           (n_layers, n_pred)     KL(full ‖ without attn_out), for each
                                                         prediction; mlp_kl likewise, nats
sublayer_effect/attn_loss         (n_layers, n_pred)     change of loss; attn_frozen_kl and so on:
                                                         the last norm's scale kept
sublayer_effect/attn_share        (n_layers, n_pred)     attn_out·final / ‖final‖², the part of the
                                                         final residual
sublayer_effect/attn_size         (n_layers, n_pred)     ‖attn_out‖ over the scale that the last
                                                         norm divides the final residual by
sublayer_effect/largest_row       (1,)                   largest norm of a row of the unembedding,
                                                         the last norm's gain folded in
block_skip/loss                   (n_layers, n_texts)    rise of the loss without one whole block,
                                                         nats a token (published records alone)
patching/TASK                     (n_layers, n_heads)    part of a task that each head's output,
                                                         patched in, brings back; TASK.n_pairs
sketch/parameters                 (n_params, 16)         sketches of every tensor (see
                                                         `numerics.sketches`), named in the
                                                         metadata
sketch/norms                      (n_params,)            their Frobenius norms, as the file has
                                                         them
sketch/W_Q, W_K, W_V, W_O         (n_layers, heads, 16)  sketches by head
prediction/token                  (n_tok,)               token ids
prediction/loss                   (n_tok,)               of the next token, nats; 0 and is_last at
                                                         the last token of each prompt
prediction/entropy, first         (n_tok,)               entropy of what is predicted, nats, and
                                                         the token that is most likely
prediction/later_changes          (n_layers+1,)          relative change of the stream at first
                                                         tokens when later ones are exchanged
prediction/row_sum_error          (n_layers,)            largest |Σ - 1| of an attention row;
                                                         future_weight: largest on a later position
rounding/resid                    (6, n_layers+1)        change of log norms a unit of relative
                                                         noise on every weight, by draw; attn_out,
                                                         mlp_out and loss likewise (see
                                                         `streamgauge.groups.rounding`)
neighbours/layer                  (n_raced,)             where a change was made that may repair the
                                                         checkpoint, -1 for the whole model (kinds:
                                                         `metadata["neighbours"]`)
neighbours/change, error          (n_raced,)             mean change of the loss and its standard
                                                         error, nats a token
neighbours/rows, tokens           (n_raced,)             rows of text and predicted tokens that it
                                                         was raced on
neighbours/skew                   (n_raced,)             skewness of the rows' changes
draws/LAW                         (n_draws, n_layers)    an error on sequences of tokens that
                                                         hypothesis drew, over what rounding
                                                         explains (see `numerics.draws`); 1 for
                                                         n_layers where the whole model is run
padding/resid                     (n_layers+1, n_pad)    norms of the stream at padding positions
                                                         behind texts, no mask
================================  =====================  =========================================

All norms are L2 over d_model in the folded and centred convention (see
`streamgauge.numerics.convention`), without unit. Rows that a published record does not cover are
NaN, and so are those of layers that have no such quantity, which `metadata["lacking"]` names with
the reason. `metadata["absent"]` says why an array is missing.
"""

import difflib
import hashlib
import json
import uuid
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.errors import (
    NotApplicable,
    NotInstalledError,
    NotMeasured,
    RecordError,
    StoreError,
)
from streamgauge.numerics.growth import growth_rates, mean_rate, measured_window
from streamgauge.verdicts import verdicts

if TYPE_CHECKING:
    import pandas

FORMAT = "streamgauge-record-1"
STREAM = (
    "resid_pre resid_mid resid_post attn_out mlp_out other_out pre_dot_attn mid_dot_mlp "
    "additivity_error block_influence largest ln1_scale ln1_residual "
    "prompt position is_bos is_padding"
)
WEIGHTS = (
    "W_OV_frobenius W_OV_spectral W_QK_frobenius W_QK_spectral W_OV_raw_frobenius W_Q W_K W_V W_O "
    "W_in W_gate W_out "
    "W_Q_raw W_K_raw W_V_raw W_O_raw W_in_raw W_gate_raw W_out_raw b_Q b_K b_O b_in b_gate b_out "
    "b_Q_raw b_K_raw b_V_raw "
    "b_O_raw b_in_raw b_gate_raw b_out_raw W_in_W_out b_in_W_out ln1_gain ln2_gain"
)
OTHERS = {
    "instrument": "block_error bridge_error gain logits_error",
    "neurons": "activation_rate singular_values",
    "sublayers": (
        "attn_dot_mlp pre_dot_mlp_0 raw_norm attn_scale_error mlp_scale_error largest_shift"
    ),
    "random_input": "attn_norm attn_error attn_samples mlp_norm mlp_error mlp_samples "
    "mlp_activation_rate "
    "resampled_norm resampled_error resampled_samples resampled_activation_rate",
    "padding": "resid",
    "block_skip": "loss",
    "sketch": "parameters norms W_Q W_K W_V W_O",
    "prediction": "token loss is_last entropy first later_changes row_sum_error future_weight",
    "rounding": "resid attn_out mlp_out loss",
    "neighbours": "layer change error skew rows tokens",
    "draws": "additivity contribution_bound causality scale_blindness neurons heads value_basis "
    "batch cache attention_implementation",
    "horizon": "k clean_loss tokens loss.dropped.recomputed.mean.everywhere",
    "sublayer_effect": "attn_kl attn_loss attn_frozen_kl attn_frozen_loss attn_share attn_size "
    "mlp_kl mlp_loss mlp_frozen_kl "
    "mlp_frozen_loss mlp_share mlp_size largest_row",
}
ARRAYS = [
    f"{g}/{name}"
    for g, names in ({"stream": STREAM, "weights": WEIGHTS} | OTHERS).items()
    for name in names.split()
]
AXES = {"tokens": ("layer", "token"), "heads": ("layer", "head"), "layers": ("layer",)}
FIRST_INSTRUMENT = {"stream": 1, "weights": 1}  # what records hold that do not say


@dataclass(frozen=True, repr=False)
class Record:
    """Arrays by `group/name`, and JSON metadata (model, revision, weights_sha256, convention,
    versions, absent …).
    """

    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]

    def array(self, name: str) -> np.ndarray:
        """The array called `group/name`.

        Raises NotApplicable where this model or record has none, or has it in some layers alone
        (see `partial`), NotMeasured where measuring it failed.
        """
        if name in self.arrays:
            if name in self.lacking:
                raise NotApplicable(self.lacking[name]["why"])
            return self.arrays[name]
        group = name.split("/")[0]
        for reasons, error in (
            (self.metadata["failed"], NotMeasured),
            (self.metadata["absent"], NotApplicable),
        ):
            for key in (name, group):
                if key in reasons:
                    raise error(reasons[key])
        if name not in ARRAYS and group != "patching":  # whose arrays are named by the task
            near = ", ".join(difflib.get_close_matches(name, ARRAYS, n=3, cutoff=0)) or "none"
            raise NotMeasured(f"no record has an array {name!r}; the nearest names are {near}")
        raise NotApplicable(f"this record has no {name}")

    @property
    def lacking(self) -> dict[str, dict[str, Any]]:
        """Arrays that not all layers have a value in: why, and which layers are NaN."""
        found: dict[str, dict[str, Any]] = self.metadata.get("lacking", {})
        return found

    def partial(self, name: str) -> np.ndarray:
        """The array called `group/name`, NaN where a layer has no such quantity (`lacking`).

        Raises as `array` does where no layer has.
        """
        if name in self.arrays:
            return self.arrays[name]
        return self.array(name)

    def rows(self, name: str) -> tuple[list[int], np.ndarray]:
        """The layers that have a value in the array called `group/name`, and its rows of these.

        Raises as `array` does where no layer has.
        """
        array = self.partial(name)
        layers = [n for n in range(len(array)) if n not in self.lacks(name)]
        return layers, array[layers]

    def lacks(self, name: str) -> list[int]:
        """The layers that have no value in an array: all of them where there is no array."""
        if name not in self.arrays:
            return list(range(self.n_layers))
        layers: list[int] = self.lacking.get(name, {"layers": []})["layers"]
        return layers

    def added(self, kind: str) -> np.ndarray:
        """Norms of what blocks add by their mixers (`attn`), MLPs (`mlp`) or otherwise (`other`).

        (n_layers, n_tokens), 0 where a block has none. Raises as `array` does where it is not known
        what blocks add.
        """
        self.array("stream/additivity_error")
        name = f"stream/{kind}_out"
        if name not in self.arrays:
            return np.zeros_like(self.resid_pre, dtype=float)
        norms: np.ndarray = np.nan_to_num(self.arrays[name].astype(float))
        return norms

    def __repr__(self) -> str:
        names = ", ".join(sorted(self.arrays))
        return (
            f"Record of {self.metadata.get('model')}, {self.n_layers} layers, "
            f"{self.metadata.get('convention')}: {names}"
        )

    def _repr_html_(self) -> str:
        """In a notebook: each array with its shape, and why others are not there."""
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{' × '.join(map(str, array.shape))}</td></tr>"
            for name, array in sorted(self.arrays.items())
        )
        why = self.metadata.get("failed", {}) | self.metadata.get("absent", {})
        gone = "".join(f"<li>{escape(name)}: {escape(said)}</li>" for name, said in why.items())
        facts = (
            f"{self.metadata.get('model')}, {self.n_layers} layers, "
            f"{self.metadata.get('convention')}; layers × tokens, heads or what the name says"
        )
        return (
            f"<p><b>Record</b> of {escape(facts)}</p><table>{rows}</table>"
            f"<details><summary>{len(why)} not there, and why</summary><ul>{gone}</ul></details>"
        )

    @property
    def groups(self) -> dict[str, int]:
        """The groups that were measured, each with its version."""
        found: dict[str, int] = self.metadata.get("groups", FIRST_INSTRUMENT)
        return found

    @property
    def resid_pre(self) -> np.ndarray:
        """Norms at each block's input, shape (n_layers, n_tokens)."""
        return self.array("stream/resid_pre")

    @property
    def resid(self) -> np.ndarray:
        """Norms at each block's input and, where it was measured, after the last block, (n_layers
        + 1, n_tokens).
        """
        last = self.arrays.get("stream/resid_post")
        return self.resid_pre if last is None else np.vstack([self.resid_pre, last[-1:]])

    @property
    def is_text(self) -> np.ndarray:
        """Which tokens are text: not at position 0, where norms follow a law of their own, and not
        padding.
        """
        text: np.ndarray = (self.array("stream/position") > 0) & ~self.array(
            "stream/is_padding"
        ).astype(bool)
        return text

    @property
    def text_resid(self) -> np.ndarray:
        """`resid` at text tokens. Raises NotApplicable for post-norm models, and for a published
        record of other tokens.
        """
        self.require_pre_norm()
        if alone := self.metadata.get("alone"):
            raise NotApplicable(f"the record is of {alone} alone")
        return self.resid[:, self.is_text]

    def text(self, name: str) -> np.ndarray:
        """The array `group/name`, (n_layers, n_tokens), at text tokens."""
        return self.array(name)[:, self.is_text]

    @property
    def count_text(self) -> str:
        """How many text tokens there are, in words; what a published aggregate stands for
        instead.
        """
        aggregate: str | None = self.metadata.get("aggregate")
        return aggregate or f"{int(self.is_text.sum()):,} tokens"

    def growth_rate(self, first: int, last: int) -> float:
        """How fast the stream's norm grows a layer from one layer's input to another's: the
        geometric mean over text tokens, as the law `residual/growth_rate` takes it.

        Raises NotApplicable where the record does not cover these layers or blocks do more than
        add, NotMeasured where it has no text.
        """
        norms = self.text_resid
        window = measured_window(norms, (first, last))
        return mean_rate(growth_rates(norms, window))

    def to_dataframe(self, rows: str = "tokens") -> "pandas.DataFrame":
        """A tidy pandas table: one row a layer and token, a layer and head, or a layer; a column
        for every array of that shape, called as in the record. Keys' and values' heads are left
        out where they are fewer than queries'.

        rows: `tokens`, `heads` or `layers`. Raises ValueError for anything else, and
        NotInstalledError without pandas.
        """
        if rows not in AXES:
            raise ValueError(f"rows is one of {', '.join(AXES)}, and not {rows!r}")
        if find_spec("pandas") is None:
            raise NotInstalledError("a data frame needs pandas, which is not installed.")
        import pandas

        names = [name for name in sorted(self.arrays) if self._rows_of(name) == rows]
        shapes = {self.arrays[name].shape for name in names}
        shape = max(shapes, default=(0,))
        kept = {n: self.arrays[n].reshape(-1) for n in names if self.arrays[n].shape == shape}
        places = np.indices(shape).reshape(len(shape), -1)
        index: dict[str, np.ndarray] = dict(zip(AXES[rows], places, strict=False))
        if rows == "tokens":
            about = ("prompt", "position", "is_bos", "is_padding")
            index |= {name: self.arrays[f"stream/{name}"][index["token"]] for name in about}
        return pandas.DataFrame(index | kept)

    def _rows_of(self, name: str) -> str | None:
        """What an array has one number for, by its shape and its name's first part."""
        shape, tokens = self.arrays[name].shape, self.arrays.get("stream/position", np.empty(0))
        if shape == (self.n_layers,):
            return "layers"
        if len(shape) != 2 or shape[0] != self.n_layers:
            return None
        if name.startswith("weights/W_"):
            return "heads"
        return "tokens" if shape[1] == len(tokens) else None

    def verdicts(
        self, baseline: "Record | None" = None, same: str | None = None
    ) -> list[dict[str, Any]]:
        """What the laws say of it: the rows of an audit, one a law (see `streamgauge.verdicts`)."""
        return verdicts(self, baseline, same)

    def require_pre_norm(self) -> None:
        """Raise NotApplicable for post-norm models, whose stream is normalised block by block."""
        if not self.metadata.get("pre_norm", True):
            raise NotApplicable(
                "blocks do more to the stream than add to it, as post-norm blocks do, so it does "
                "not "
                "grow freely"
            )

    def require_text(self) -> None:
        """Raise NotMeasured where no token but those at position 0 was measured."""
        if not self.is_text.any():
            raise NotMeasured("no token but those at position 0 was measured; use longer prompts")

    def require_tokens(self) -> None:
        """Raise NotApplicable for a published aggregate, which knows no single token."""
        if "aggregate" in self.metadata:
            raise NotApplicable(
                f"the record holds one number a layer: {self.metadata['aggregate']}"
            )

    def require_typical(self) -> None:
        """Raise NotApplicable for a published aggregate that a few tokens with massive activations
        dominate, as root mean squares are; medians do not feel them.
        """
        if not self.metadata.get("median"):
            self.require_tokens()

    @property
    def integrity(self) -> dict[str, list[str]]:
        """Faults of the tensors by kind, one line each.

        Raises NotApplicable where a record has no weights behind it.
        """
        found: dict[str, list[str]] | None = self.metadata.get("integrity")
        if found is None:
            raise NotApplicable(self.metadata["absent"].get("integrity", "no weights"))
        return found

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.metadata["n_layers"])

    def save(self, path: str | Path) -> None:
        """Write the record; the file appears whole or not at all.

        Raises StoreError where the folder cannot be written.
        """
        from safetensors.numpy import save

        path = Path(path)
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        said = json.dumps(self.metadata, allow_nan=False)
        header = {"format": FORMAT, "record": said, "sha256": _digest(arrays, said)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, save(arrays, metadata=header))
        except OSError as error:
            raise StoreError(
                f"cannot write {path}: {error.strerror}; name a folder that can be written."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """Read a record. Raises RecordError where the file is missing, damaged or no record."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise RecordError(
                        f"{path} is not a streamgauge record of format {FORMAT}; measure again."
                    )
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                # Published records and those of older instruments say none.
                if header.get("sha256") not in (None, _digest(arrays, header["record"])):
                    raise ValueError("its numbers are not those that were written")
                return cls(arrays, json.loads(header["record"]))
        except FileNotFoundError:
            raise RecordError(
                f"there is no record {path}; make one with: python -m streamgauge measure."
            ) from None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise RecordError(
                f"the record {path} is damaged, or is none ({error}); measure again."
            ) from error


def _digest(arrays: dict[str, np.ndarray], said: str) -> str:
    """A hash of everything that a record holds."""
    digest = hashlib.sha256(said.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, then rename: readers see the old file or the
    new one.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
