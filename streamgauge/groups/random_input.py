"""The `random_input` group:

what attention's W_OV and the MLP answer to inputs that know nothing of layer or text.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.forward import Found
from streamgauge.engine.layout import Layout, run_mlp
from streamgauge.groups.reasons import EXPERTS, NO_LN1, POST_NORM
from streamgauge.numerics.convention import random_inputs

if TYPE_CHECKING:
    import torch

EARLY = slice(1, 7)  # positions 1 to 6, whose vectors are resampled
EARLY_PROMPTS = 32  # how many prompts lend theirs; 192 values a coordinate
PRECISION = 0.005  # standard error of each layer's mean norm, relative to it
BATCH, MOST_BATCHES = 512, 64
KEPT_BATCHES = 4  # of the Gaussian sequence, which every layer is given from its start
NO_MLP_NORM = "no norm precedes the MLP"
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
        """What bridge.hooks takes."""
        if self.layout.mlp_norm is None:
            return []
        name = "hook_resid_pre" if self.layout.parallel else "hook_resid_mid"
        return [(f"blocks.{n}.{name}", self._keeper(n)) for n in range(self.layout.n_layers)]

    def _keeper(self, layer: int) -> Any:
        def keep(x: "torch.Tensor", hook: Any) -> None:
            kept = self.inputs.setdefault(layer, [])
            room = EARLY_PROMPTS - sum(len(rows) for rows in kept)
            if room > 0 and x.shape[1] >= EARLY.stop:
                kept.append(x[:room, EARLY].clone())

        return keep


class RandomInputGroup:
    """What a block's two sublayers make of random inputs.

    early: whose inputs are resampled. no_heads: why W_V and W_O cannot be had, if so. Every layer
    is given vectors of one Gaussian sequence from its start, so layers differ by their weights.
    Batches are drawn until the standard error of the mean norm is below PRECISION of it, at most
    MOST_BATCHES.
    """

    def __init__(
        self, model: Blockwise, layout: Layout, early: EarlyInputs, no_heads: str | None
    ) -> None:
        self.model, self.layout, self.early, self.no_heads = model, layout, early, no_heads
        self.readings: dict[str, list[np.ndarray]] = {}

    def visit(self, layer: int) -> None:
        """Draw a layer's random inputs; it must have seen the prompts before, for those that are
        resampled.
        """
        block, layout = self.model.blocks[layer], self.layout
        found = (
            []
            if self.no_heads or not layout.has_ln1
            else list(_measure_attention(self.model, block, layout, layer))
        )
        if layout.mlp_norm is not None:
            found += _measure_mlp(
                self.model, block, layout, layer, self.early.inputs.pop(layer, [])
            )
        for name, values in found:
            self.readings.setdefault(name, []).append(values)

    def found(self) -> Found:
        """Arrays of the group, and the reasons for those that this architecture does not have."""
        arrays = {name: np.array(values) for name, values in self.readings.items()}
        return arrays, _absent(self.layout, arrays, self.no_heads)


def _absent(layout: Layout, arrays: dict[str, np.ndarray], no_heads: str | None) -> dict[str, str]:
    reasons: dict[str, str] = {}
    if "attn_norm" not in arrays:
        reasons |= dict.fromkeys(
            _names("attn"), no_heads or (NO_LN1 if layout.pre_norm else POST_NORM)
        )
    if "mlp_norm" not in arrays:
        reasons |= dict.fromkeys(_names("mlp"), NO_MLP_NORM if layout.pre_norm else POST_NORM)
    if "resampled_norm" not in arrays:
        no_norm = NO_MLP_NORM if layout.pre_norm else POST_NORM
        reasons |= dict.fromkeys(_names("resampled"), SHORT if layout.mlp_norm else no_norm)
    if not layout.has_neurons:
        reasons |= dict.fromkeys(["mlp_activation_rate", "resampled_activation_rate"], EXPERTS)
    return reasons


def _names(kind: str) -> list[str]:
    rates = [] if kind == "attn" else [f"{kind}_activation_rate"]
    return [f"{kind}_norm", f"{kind}_error", f"{kind}_samples", *rates]


def _measure_attention(
    model: Blockwise, block: Any, layout: Layout, layer: int
) -> Iterator[tuple[str, np.ndarray]]:
    sample = _gaussian(layout, layer, model.device, for_mlp=False)
    yield from _respond("attn", sample, lambda x: _attention(block, layout, x), None)


def _measure_mlp(
    model: Blockwise, block: Any, layout: Layout, layer: int, early: "list[torch.Tensor]"
) -> Iterator[tuple[str, np.ndarray]]:
    rates: list[float] = []
    hooks = [
        (
            f"blocks.{layer}.mlp.hook_pre",
            lambda x, hook: rates.append(float((x > 0).sum()) / x.numel()),
        )
    ]

    def answer(x: "torch.Tensor") -> "torch.Tensor":
        return layout.centre(run_mlp(block, layout, x))

    with model.hooked(hooks if layout.has_neurons else ()):
        yield from _respond(
            "mlp", _gaussian(layout, layer, model.device, for_mlp=True), answer, rates
        )
        if early:
            yield from _respond("resampled", _resampled(block, layout, early), answer, rates)


def _respond(
    kind: str,
    sample: Sampler,
    answer: "Callable[[torch.Tensor], torch.Tensor]",
    rates: list[float] | None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Mean norm of the answers, its standard error and the number of samples; the activation rate
    where one was read.
    """
    import torch

    norms: list[np.ndarray] = []
    if rates is not None:
        rates.clear()
    for batch in range(MOST_BATCHES):
        answers = answer(sample(batch)[:, None])[:, 0]
        norms.append(torch.linalg.vector_norm(answers, dim=-1).double().cpu().numpy())
        every = np.concatenate(norms)
        error = every.std(ddof=1) / np.sqrt(every.size)
        if not error > PRECISION * every.mean():
            break
    yield f"{kind}_norm", every.mean()
    yield f"{kind}_error", error
    yield f"{kind}_samples", np.array(every.size)
    if rates:
        yield f"{kind}_activation_rate", np.array(np.mean(rates))


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


def _resampled(block: Any, layout: Layout, early: "list[torch.Tensor]") -> Sampler:
    """Vectors whose every coordinate is drawn by itself from the values it takes in the model's own
    run, then normalised.
    """
    import torch

    assert layout.mlp_norm is not None
    norm = getattr(block, layout.mlp_norm).original_component
    pool = torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in early])

    def sample(batch: int) -> "torch.Tensor":
        chosen = torch.from_numpy(
            np.random.default_rng(batch).integers(len(pool), size=(BATCH, pool.shape[1]))
        )
        normalised: torch.Tensor = norm(torch.gather(pool, 0, chosen.to(pool.device)))
        return normalised

    return sample


def _attention(block: Any, layout: Layout, x: "torch.Tensor") -> "torch.Tensor":
    """Sum over heads of x W_V W_O, without biases, through the norm behind it if there is one."""
    W_V, W_O = block.attn.W_V, block.attn.W_O
    values = (x @ W_V.transpose(0, 1).reshape(x.shape[-1], -1)).unflatten(-1, W_V.shape[::2])
    values = values.repeat_interleave(len(W_O) // len(W_V), dim=-2)
    output = values.flatten(-2) @ W_O.reshape(-1, W_O.shape[-1])
    output = block.ln1_post(output) if "ln1_post" in block.submodules else output
    return layout.centre(layout.multiplier * output)
