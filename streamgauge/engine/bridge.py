"""TransformerLens's raw bridge beside the plain model: its names for heads, neurons and patterns.

What is measured runs through transformers' own modules. The bridge is a second skeleton of the same
model with the same weights; what it says is used only where its blocks compute what transformers'
compute (`Bridge.compare`).
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamgauge.checkpoints.untrusted import strange
from streamgauge.engine.anatomy import first
from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.mapped import stand_in
from streamgauge.errors import first_line

if TYPE_CHECKING:
    import torch

# Architectures without an adapter of their own whose blocks are a relative's. Each is used only
# where
# the bridge passes its check on the model at hand.
RELATIVES = {
    "CwmForCausalLM": "LlamaForCausalLM",
    "Dots1ForCausalLM": "Glm4MoeForCausalLM",
    "GraniteSWAForCausalLM": "GraniteForCausalLM",
    "HYV3ForCausalLM": "Glm4MoeForCausalLM",
    "MellumForCausalLM": "Qwen3MoeForCausalLM",
    "MiniMaxM3VLForCausalLM": "MiniMaxM2ForCausalLM",
    "MinistralForCausalLM": "MistralForCausalLM",
    "PhimoeForCausalLM": "PhiMoEForCausalLM",
    "SolarOpenForCausalLM": "Glm4MoeForCausalLM",
}


class NoBridgeError(Exception):
    """There is no bridge for a model; the text is the reason."""


@dataclass
class Bridge:
    """TransformerLens's bridge around a second skeleton of a model, and how far it can be trusted.

    troubles: by layer what its block raised, if it did, when it was compared.
    """

    model: Blockwise
    bridge: Any
    blocks: list[Any]
    troubles: dict[int, str] = field(default_factory=dict)

    @property
    def layers(self) -> range:
        """Numbers of its blocks."""
        return range(len(self.blocks))

    @property
    def hook_dict(self) -> dict[str, Any]:
        """The bridge's hook points by name."""
        found: dict[str, Any] = self.bridge.hook_dict
        return found

    def part(self, layer: int, name: str) -> Any:
        """A part of a block by TransformerLens's name, `attn` or `mlp`; None where it has none."""
        block = self.blocks[layer]
        return getattr(block, name) if name in block.submodules else None

    def compare(self, layer: int, batch: Any, expected: "torch.Tensor") -> float:
        """How far a held block of the bridge is from the plain one: relative, of what it adds; 1
        where it cannot be run.

        batch: with the stream before the block. expected: the plain block's output.
        """
        import torch

        args, kwargs = batch.calls[layer]
        given = batch.stream.clone()
        try:
            with torch.no_grad():
                found = first(self.blocks[layer](given.clone(), *args, **kwargs))
        except strange() as error:
            self.troubles[layer] = f"{type(error).__name__}: {first_line(error)}"
            return 1.0
        norm = torch.linalg.vector_norm
        size = norm((expected - given).double()).clamp_min(1e-300)
        # Of what the block adds: a small sublayer of a large stream would hide in the stream's
        # size.
        return float(norm((found - expected).double()) / size)


def build_bridge(model: Blockwise) -> Bridge:
    """The raw bridge around a new skeleton of a model; no tokenizer, no weight processing.

    Raises NoBridgeError, with the reason.
    """
    plain = model.mapped.model
    name = _adapter_of(type(plain).__name__)
    skeleton = _skeleton_like(plain)
    model.mapped.add(skeleton)
    try:
        with without_memory(), model.mapped.without_tables(skeleton):
            bridge = _around(skeleton, name, model.device)
            blocks = list(bridge.blocks)
    except strange() as error:  # what TransformerLens raises on models that it does not know
        raise NoBridgeError(
            f"TransformerLens's bridge cannot hold this {type(plain).__name__} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    if len(blocks) != model.n_layers:
        raise NoBridgeError(f"TransformerLens's bridge has {len(blocks)} blocks here")
    bridged = Bridge(model, bridge, blocks)
    _share_fused(bridged)
    _leave_scores_unscaled(bridged)
    return bridged


def _leave_scores_unscaled(bridged: Bridge) -> None:
    """Make up for what TransformerLens does not read of GPT-2's configuration: where
    `scale_attn_weights` is false, scores are not divided by √d_head.
    """
    config = bridged.model.mapped.model.config
    if config.model_type != "gpt2" or config.scale_attn_weights:
        return
    factor = bridged.bridge.cfg.d_head**0.5
    for block in bridged.blocks:
        block.attn.q.hook_out.add_hook(lambda q, hook: factor * q, is_permanent=True)


def _adapter_of(architecture: str) -> str:
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    name = RELATIVES.get(architecture, architecture)
    if name not in SUPPORTED_ARCHITECTURES:
        raise NoBridgeError(f"TransformerLens has no bridge for {architecture}")
    return name


def _around(skeleton: Any, name: str, device: Any) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return build_bridge_from_module(skeleton, name, hf_config=skeleton.config, device=device)


def _skeleton_like(plain: Any) -> Any:
    """Another instance of a model, without weights and with the same buffers."""
    with without_memory():
        config = copy.deepcopy(plain.config)
        skeleton = type(plain)._from_config(config, attn_implementation="eager")
    for path, module in skeleton.named_modules():
        own = plain.get_submodule(path)._buffers
        module._buffers.update({name: copy.deepcopy(value) for name, value in own.items()})
    return skeleton.eval()


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Let modules that are made have parameters without memory, which nothing fills."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def _share_fused(bridged: Bridge) -> None:
    """Let the bridge take a block's fused tensors apart anew whenever the block's values have come,
    and let go of the pieces when the block has left.
    """
    import torch
    from transformers.initialization import no_init_weights

    mapped = bridged.model.mapped
    paths = bridged.model.paths
    fused = {p: list(_splitting(b)) for p, b in zip(paths, bridged.blocks, strict=True)}

    def split(path: str) -> None:
        with no_init_weights():
            for component in fused.get(path, []):
                component.set_original_component(component.original_component)
                component.eval()

    def forget(path: str) -> None:
        for component in fused.get(path, []):
            for module in set(component.modules()) - mapped.modules:
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        nothing = torch.nn.Parameter(stand_in(parameter), requires_grad=False)
                        module._parameters[name] = nothing

    mapped.after_taking.append(split)
    mapped.after_leaving.append(forget)


def _splitting(block: Any) -> Iterator[Any]:
    """The parts of a block's bridge that hold copies of pieces of a fused tensor."""
    from transformer_lens.model_bridge.generalized_components import (
        JointGateUpMLPBridge,
        JointQKVAttentionBridge,
    )

    for component in block.modules():
        if isinstance(component, (JointQKVAttentionBridge, JointGateUpMLPBridge)):
            yield component
