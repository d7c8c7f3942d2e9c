"""The `instrument` group: whether what is measured is what transformers' own forward pass computes.

A probe of the model, one plain forward pass over two rows of tokens, says what each block returned.
The walk over the blocks is held to it, and so is TransformerLens's bridge, by whose names heads are
read: each of its blocks is given what the plain one was given.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.bridge import Bridge
from streamgauge.engine.forward import Found

if TYPE_CHECKING:
    import torch

NUDGE = 2.0**-16  # relative size of a change of the stream that says how a block enlarges errors
PARTS = ("attn_out", "mlp_out")


class InstrumentGroup:
    """Differences by layer, each relative to what the block adds to the stream.

    block_error: of the walk's stream from the probe's; twice, so that a block that remembers its
    last call is found. bridge_error: of the bridge's block from the plain one. gain: by how much a
    block enlarges a relative change of its input, which rounding is taken for. logits_error: (1,),
    relative.
    """

    def __init__(self, model: Blockwise, bridge: Bridge | None, why: str | None) -> None:
        self.model, self.bridge, self.why = model, bridge, why
        self.batch = model.enter(model.seen.ids)
        self.readings: dict[str, list[float]] = {"block_error": [], "bridge_error": [], "gain": []}

    def visit(self, layer: int) -> None:
        """Take the probe's tokens through a block once more, and through the bridge's."""
        import torch

        self.model.bring(self.batch, layer)
        given = self.batch.stream
        expected = self.model.seen.streams[layer + 1]
        size = _norm(expected - given)
        if self.bridge is not None:
            difference = self.bridge.compare(layer, self.batch, expected)
            self.readings["bridge_error"].append(difference)
        generator = torch.Generator().manual_seed(layer)
        noise = torch.randn(given.shape, generator=generator).to(given.device)
        self.batch.stream = given + NUDGE * given.abs() * noise
        nudged = self.model.step(self.batch, layer)
        self.batch.stream = given
        found = self.model.step(self.batch, layer)
        self.readings["block_error"].append(_norm(found - expected) / size)
        self.readings["gain"].append(_norm(nudged - expected) / size / NUDGE)

    def found(self) -> Found:
        """Arrays of the group."""
        seen = self.model.seen
        logits = self.model.logits(seen.ids, self.batch.stream)
        arrays = {name: np.array(values) for name, values in self.readings.items() if values}
        # Of logits less their mean, which no prediction depends on.
        spread = _norm(seen.logits - seen.logits.mean(-1, keepdim=True))
        arrays["logits_error"] = np.array([_norm(logits - seen.logits) / spread])
        return arrays, {} if self.bridge is not None else {"bridge_error": str(self.why)}


def _norm(x: "torch.Tensor") -> float:
    import torch

    return max(float(torch.linalg.vector_norm(x.double())), 1e-300)


def differing_part(model: Blockwise, bridge: Bridge, layer: int, batch: Any) -> str | None:
    """What of a bridge's block differs first, in words: `block 0's attn_out differs by 0.23`; None
    where none of its parts does by itself.
    """
    import torch

    seen: dict[str, list[Any]] = {name: [] for name in PARTS}
    points = [f"blocks.{layer}.hook_{name}" for name in PARTS]

    def keep(name: str) -> Any:
        return lambda x, hook: seen[name].append(x.detach().clone().reshape(-1))

    hooks = [(point, keep(name)) for point, name in zip(points, PARTS, strict=True)]
    anatomy = model.anatomies[layer]
    own = [h for h, name in zip(hooks, PARTS, strict=True) if anatomy and anatomy.of(name[:-4])]
    args, kwargs = batch.calls[layer]
    given = batch.stream
    with torch.no_grad():
        model.step(batch, layer, own)
        batch.stream = given
        with bridge.bridge.hooks(fwd_hooks=[h for h in hooks if h[0] in bridge.hook_dict]):
            bridge.blocks[layer](given.clone(), *args, **kwargs)
    for name, values in seen.items():
        if len(values) == 2 and values[0].shape == values[1].shape:
            difference = _norm(values[1] - values[0]) / _norm(values[0])
            if difference > 1e-3:
                return f"block {layer}'s {name} differs by {difference:.2g}"
    return None
