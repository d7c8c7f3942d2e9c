"""Open a checkpoint in TransformerLens's raw bridge, and find out what its norms do.

Imports torch inside functions.
"""

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.bridge import bridging

if TYPE_CHECKING:
    from streamgauge.engine.blockwise import Blockwise

PROBE_SIZE = 1e3  # large enough that a norm's epsilon does not show in fp32


@dataclass(frozen=True)
class Layout:
    """What the convention needs to know of a model.

    centres: whether the norms that read the stream subtract its mean (LayerNorm). gains, biases: of
    each block's first norm, (n_layers, d_model), ones and zeros where no norm precedes the
    attention. mlp_gains, mlp_biases: of the norm that the MLP reads through, likewise. mlp_norm:
    that norm's name, ln2 or, in parallel blocks that have but one, ln1; None where no norm precedes
    the MLP. pre_norm: whether blocks add to the stream and leave it otherwise alone. parallel:
    whether attention and MLP both read resid_pre. has_neurons: whether the MLP is one dense layer
    into another. multiplier: what a sublayer's output is multiplied by when the block adds it
    (Granite).
    """

    centres: bool
    gains: np.ndarray
    biases: np.ndarray
    mlp_gains: np.ndarray
    mlp_biases: np.ndarray
    has_ln1: bool
    mlp_norm: str | None
    pre_norm: bool
    parallel: bool
    has_neurons: bool
    epsilon: float
    multiplier: float

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.gains)

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return int(self.gains.shape[1])

    def centre(self, x: Any) -> Any:
        """Vectors of the stream in the convention:

        a tensor minus its mean over the last axis, where norms centre.
        """
        return x - x.mean(-1, keepdim=True) if self.centres else x


def probe_layout(model: "Blockwise") -> Layout:
    """Find out by trying:

    norms are run on known vectors, and a block on two tokens. Raises CheckpointError.
    """
    with bridging(model.mapped.model):
        return _probe_layout(model)


def _probe_layout(model: "Blockwise") -> Layout:
    import torch

    bridge, blocks = model.bridge, model.blocks
    seen = _first_block(model)

    def same(one: str, other: str) -> bool:
        return (
            one in seen
            and other in seen
            and seen[one].shape == seen[other].shape
            and torch.equal(seen[one], seen[other])
        )

    pre_norm = "ln1.hook_in" not in seen or same("hook_resid_pre", "ln1.hook_in")
    has_ln1 = "ln1.hook_in" in seen and pre_norm
    mlp_norm = next(
        (n for n in ("ln2", "ln1") if pre_norm and same(f"{n}.hook_out", "mlp.hook_in")), None
    )
    gains, biases, centring = _probe_norms(blocks, "ln1" if has_ln1 else None, bridge.cfg.d_model)
    mlp_gains, mlp_biases, _ = _probe_norms(blocks, mlp_norm, bridge.cfg.d_model)
    return Layout(
        centres=bool(centring) and all(centring),
        gains=gains,
        biases=biases,
        mlp_gains=mlp_gains,
        mlp_biases=mlp_biases,
        has_ln1=has_ln1,
        mlp_norm=mlp_norm,
        pre_norm=pre_norm,
        parallel="blocks.0.hook_resid_mid" not in bridge.hook_dict,
        # A mixture of experts answers to mlp.hook_pre too, but with its input.
        has_neurons=all({"in", "out"} <= set(block.mlp.submodules) for block in blocks),
        epsilon=float(bridge.cfg.eps),
        multiplier=float(
            getattr(model.mapped.model.config.get_text_config(), "residual_multiplier", 1.0)
        ),
    )


def _first_block(model: "Blockwise") -> dict[str, Any]:
    """What the first block's norms and MLP read and write on two tokens, by hook."""
    import torch

    seen: dict[str, torch.Tensor] = {}
    there = model.bridge.hook_dict
    names = [
        n
        for n in ("ln1.hook_in", "ln1.hook_out", "ln2.hook_out", "mlp.hook_in")
        if f"blocks.0.{n}" in there
    ]
    names += ["hook_resid_pre"]
    hooks = [
        (f"blocks.0.{name}", lambda x, hook, name=name: seen.update({name: x})) for name in names
    ]
    with torch.no_grad():
        model.step(model.enter([[1, 0]]), 0, hooks)
    return seen


def run_mlp(block: Any, layout: Layout, x: Any) -> Any:
    """What a block's MLP adds to the stream when its norm gives it x, through the norm behind it
    where there is one.
    """
    if block.mlp.name is None:  # OPT keeps the two layers on the block itself
        output = block.mlp.out(block.original_component.activation_fn(getattr(block.mlp, "in")(x)))
    elif "residual" in inspect.signature(block.mlp.original_component.forward).parameters:
        output = block.mlp(
            x, x.new_zeros(()).expand_as(x)
        )  # BLOOM and MPT add the stream inside the MLP
    else:
        output = block.mlp(x)
    output = output[0] if isinstance(output, tuple) else output
    output = block.ln2_post(output) if "ln2_post" in block.submodules else output
    return layout.multiplier * output


def _probe_norms(
    blocks: list[Any], name: str | None, d_model: int
) -> tuple[np.ndarray, np.ndarray, list[bool]]:
    """Gain and bias of the norm called so in each block, ones and zeros for None, and which of them
    centre.
    """
    import torch

    gains, biases, centring = np.ones((len(blocks), d_model)), np.zeros((len(blocks), d_model)), []
    if name is not None:
        with torch.no_grad():
            for layer, block in enumerate(blocks):
                gains[layer], biases[layer], centres = probe_norm(
                    getattr(block, name).original_component, d_model
                )
                centring.append(centres)
    return gains, biases, centring


def probe_norm(norm: Any, d_model: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Gain, bias and whether it centres, for any norm, however its parameters are written (Gemma
    stores gain - 1).
    """
    import torch

    parameter = next(norm.parameters(), torch.zeros(1))
    probe = torch.ones(d_model, device=parameter.device)
    probe[1::2] = -1
    if d_model % 2:
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0])  # the mean must be exactly 0, and no coordinate
    bias = norm(torch.zeros_like(probe)[None, None])[0, 0]
    output = norm(PROBE_SIZE * probe[None, None])[0, 0]
    shifted = norm(PROBE_SIZE * (probe[None, None] + 0.5))[0, 0]
    scale = float(torch.linalg.vector_norm(output - bias)) or 1.0
    centres = float(torch.linalg.vector_norm(shifted - output)) < 1e-3 * scale
    gain = (output - bias) / (probe / probe.square().mean().sqrt())
    return gain.double().cpu().numpy(), bias.double().cpu().numpy(), centres
