"""The `random_input` group: what attention's W_OV and the MLP answer to inputs that know nothing of
layer or text.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.forward import Found, Lacking, stacked
from streamgauge.engine.heads import Heads
from streamgauge.engine.layout import Layout, behind_attention, run_mlp
from streamgauge.groups.reasons import EXPERTS, NO_LN1, NO_MLP_NORM, POST_NORM
from streamgauge.numerics.convention import random_inputs

if TYPE_CHECKING:
    import torch

EARLY = slice(1, 7)  # positions 1 to 6, whose vectors are resampled
EARLY_PROMPTS = 32  # how many prompts lend theirs; 192 values a coordinate
PRECISION = 0.01  # standard error of each layer's mean norm, relative to it
BATCH = 256
KEPT_BATCHES = 8  # of the Gaussian sequence, which every layer is given from its start
SHORT = f"no prompt has positions {EARLY.start} to {EARLY.stop - 1}"

Sampler = Callable[[int], "torch.Tensor"]  # from a batch's number to its vectors, (BATCH, d_model)


class EarlyInputs:
    """Hooks that keep what the MLP's norm reads, raw, at positions 1 to 6 of the first prompts that
    have them.

    inputs: by layer, a list of (tokens, d_model).
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.inputs: dict[int, list[torch.Tensor]] = {}

    def hooks(self) -> list[tuple[str, Any]]:
        """What `hooked` takes."""
        names = dict.fromkeys(self.layout.layers_reading("pre"), "hook_resid_pre")
        names |= dict.fromkeys(self.layout.layers_reading("mid"), "hook_resid_mid")
        read = self.layout.norms_before("mlp")
        return [(f"blocks.{n}.{name}", self._keeper(n)) for n, name in names.items() if n in read]

    def _keeper(self, layer: int) -> Any:
        def keep(x: "torch.Tensor", hook: Any) -> None:
            kept = self.inputs.setdefault(layer, [])
            room = EARLY_PROMPTS - sum(len(rows) for rows in kept)
            if room > 0 and x.shape[1] >= EARLY.stop:
                kept.append(x[:room, EARLY].clone())

        return keep


class RandomInputGroup:
    """What a block's two sublayers make of random inputs.

    early: whose inputs are resampled. heads: by layer, W_V and W_O or why they cannot be had. Every
    layer is given vectors of one Gaussian sequence from its start, so layers differ by their
    weights. Batches are drawn until the standard error of the mean norm is below PRECISION of it,
    of Gaussian vectors as long as they are fewer than the tokens of the prompts, so that they cost
    no more than these. Of resampled ones there is one batch: laws read their activation rate, which
    that many numbers know well, while the few tokens with massive activations give their norms
    tails that no number of them would average out.
    """

    def __init__(
        self, model: Blockwise, layout: Layout, early: EarlyInputs, heads: Heads, tokens: int
    ) -> None:
        self.model, self.layout, self.early, self.heads = model, layout, early, heads
        self.most = max(1, tokens // BATCH)
        self.layers: list[dict[str, np.ndarray]] = []

    def visit(self, layer: int) -> None:
        """Draw a layer's random inputs; it must have seen the prompts before, for those that are
        resampled.
        """
        found: dict[str, np.ndarray] = {}
        heads = self.heads.of(layer)
        plain = layer in self.layout.with_plain_attention
        if heads and plain and layer in self.layout.norms_before("attn"):
            found |= _measure_attention(self.model, self.layout, layer, heads, self.most)
        if layer in self.layout.norms_before("mlp"):
            early = self.early.inputs.pop(layer, [])
            found |= _measure_mlp(self.model, self.layout, layer, early, self.most)
        self.layers.append(found)

    def found(self) -> Found:
        """Arrays of the group, and the reasons for those that this architecture does not have."""
        arrays, absent = stacked(self.layers, "no such sublayer behind a norm")
        return arrays, absent | {n: w for n, w in self._absent().items() if n not in arrays}

    def _absent(self) -> dict[str, str | Lacking]:
        layout = self.layout
        no_norm = None if layout.pre_norm else POST_NORM
        short = SHORT if layout.norms_before("mlp") else NO_MLP_NORM
        reasons: dict[str, str | Lacking] = dict.fromkeys(
            _names("attn"), no_norm or self.heads.why or NO_LN1
        )
        reasons |= dict.fromkeys(_names("mlp"), no_norm or NO_MLP_NORM)
        reasons |= dict.fromkeys(_names("resampled"), no_norm or short)
        if not layout.with_neurons:
            reasons |= dict.fromkeys(["mlp_activation_rate", "resampled_activation_rate"], EXPERTS)
        return reasons


def _names(kind: str) -> list[str]:
    rates = [] if kind == "attn" else [f"{kind}_activation_rate"]
    return [f"{kind}_norm", f"{kind}_error", f"{kind}_samples", *rates]


def _measure_attention(
    model: Blockwise, layout: Layout, layer: int, heads: "dict[str, torch.Tensor]", most: int
) -> dict[str, np.ndarray]:
    sample = _gaussian(layout, layer, model.device, for_mlp=False)

    def answer(x: "torch.Tensor") -> "torch.Tensor":
        return layout.centre(_attention(model, layout, layer, heads, x))

    return _respond("attn", sample, answer, None, most)


def _measure_mlp(
    model: Blockwise, layout: Layout, layer: int, early: "list[torch.Tensor]", most: int
) -> dict[str, np.ndarray]:
    rates: list[float] = []
    has_neurons = layer in layout.with_neurons

    def note(x: "torch.Tensor", hook: Any) -> None:
        rates.append(float((x > 0).sum()) / x.numel())

    def answer(x: "torch.Tensor") -> "torch.Tensor":
        return layout.centre(run_mlp(model, layer, x))

    with model.hooked([(f"blocks.{layer}.mlp.hook_pre", note)] if has_neurons else ()):
        gaussian = _gaussian(layout, layer, model.device, for_mlp=True)
        found = _respond("mlp", gaussian, answer, rates if has_neurons else None, most)
        if early:
            resampled = _resampled(model, layout, layer, early)
            found |= _respond("resampled", resampled, answer, rates if has_neurons else None, 1)
    return found


def _respond(
    kind: str,
    sample: Sampler,
    answer: "Callable[[torch.Tensor], torch.Tensor]",
    rates: list[float] | None,
    most: int,
) -> dict[str, np.ndarray]:
    """Mean norm of the answers, its standard error and the number of samples, of so many batches at
    most; the activation rate where one was read.
    """
    import torch

    norms: list[np.ndarray] = []
    if rates is not None:
        rates.clear()
    for batch in range(most):
        answers = answer(sample(batch)[:, None])[:, 0]
        norms.append(torch.linalg.vector_norm(answers, dim=-1).double().cpu().numpy())
        every = np.concatenate(norms)
        error = every.std(ddof=1) / np.sqrt(every.size)
        if not error > PRECISION * every.mean():
            break
    found = {
        f"{kind}_norm": every.mean(),
        f"{kind}_error": error,
        f"{kind}_samples": np.array(every.size),
    }
    return found | ({f"{kind}_activation_rate": np.array(np.mean(rates))} if rates else {})


def _gaussian(layout: Layout, layer: int, device: Any, *, for_mlp: bool) -> Sampler:
    """Normalised Gaussian vectors as this layer's norm hands them on: times its gain, and for the
    MLP plus its bias.

    For attention the bias is left out: the convention folds what it contributes into b_O.
    """
    import torch

    gain = layout.mlp_gains[layer] if for_mlp else layout.gains[layer]
    bias = layout.mlp_biases[layer] if for_mlp else np.zeros(1)
    gain, bias = (torch.as_tensor(x, dtype=torch.float32, device=device) for x in (gain, bias))

    def sample(batch: int) -> "torch.Tensor":
        return torch.addcmul(bias, _inputs(layout.d_model, layout.centres, batch).to(device), gain)

    return sample


@lru_cache(KEPT_BATCHES)
def _inputs(d_model: int, centres: bool, batch: int) -> "torch.Tensor":
    import torch

    return torch.from_numpy(random_inputs(BATCH, d_model, centres, seed=batch).astype(np.float32))


def _resampled(
    model: Blockwise, layout: Layout, layer: int, early: "list[torch.Tensor]"
) -> Sampler:
    """Vectors whose every coordinate is drawn by itself from the values it takes in the model's own
    run, then normalised.
    """
    import torch

    norm = model.module(layer, layout.norms_before("mlp")[layer])
    pool = torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in early])  # (tokens, d_model)

    def sample(batch: int) -> "torch.Tensor":
        chosen = _places(len(pool), pool.shape[1], batch)
        normalised: torch.Tensor = norm(torch.gather(pool, 0, chosen.to(pool.device)))
        return normalised

    return sample


@lru_cache(1)
def _places(rows: int, columns: int, batch: int) -> "torch.Tensor":
    """For each number of a batch, the row that it is taken from."""
    import torch

    numbers = np.random.default_rng(batch).integers(rows, size=(BATCH, columns))
    return torch.from_numpy(numbers)


def _attention(
    model: Blockwise,
    layout: Layout,
    layer: int,
    heads: "dict[str, torch.Tensor]",
    x: "torch.Tensor",
) -> "torch.Tensor":
    """Sum over heads of x W_V W_O, without biases, through the norm behind it if there is one."""
    W_V, W_O = heads["W_V"], heads["W_O"]
    values = x @ W_V.transpose(0, 1).reshape(x.shape[-1], -1)  # (…, n_kv · d_head)
    values = values.unflatten(-1, W_V.shape[::2]).repeat_interleave(len(W_O) // len(W_V), dim=-2)
    output = values.flatten(-2) @ W_O.reshape(-1, W_O.shape[-1])
    return layout.factor(layer, "attn") * behind_attention(model, layer, output)
