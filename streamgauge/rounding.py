"""The `rounding` group: how far activations and losses move when every weight is off by a rounding error.

What two checkpoints that differ by rounding alone may differ by in behaviour is not a constant: it is measured, by running the
model with relative noise of a known size on every weight.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.horizon import SHORT
from streamgauge.model import Layout, device_of
from streamgauge.prompts import Prompts

if TYPE_CHECKING:
    import torch

NOISE = 2.0**-12  # largest relative error of a weight
DRAWS = 6
TOKENS = 1024


def measure_rounding(bridge: Any, layout: Layout, prompts: Prompts, show: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays of the group, without its prefix, and why they are absent.

    resid: (DRAWS, n_layers + 1) root mean square over tokens of the change of log ‖stream‖, over NOISE; attn_out and mlp_out,
    (DRAWS, n_layers), likewise. loss: (DRAWS, 1) of the change of a token's loss, over NOISE.
    """
    import torch
    from tqdm import tqdm

    rows = _few(prompts)
    if not rows:
        return {}, {"rounding": SHORT}
    ids = torch.tensor(rows, device=device_of(bridge))
    changes: dict[str, list[np.ndarray]] = {}
    with torch.no_grad():
        clean = _run(bridge, layout, ids, None)
        for draw in tqdm(range(DRAWS), "rounding", unit="run", disable=None if show else True):
            for name, noisy in _run(bridge, layout, ids, draw).items():
                difference = (noisy - clean[name]) / NOISE
                changes.setdefault(name, []).append(difference.square().mean(-1).sqrt().cpu().numpy())
    return {name: np.array(values) for name, values in changes.items()}, {}


def _few(prompts: Prompts) -> list[list[int]]:
    """Prompts cut to one length, spread over the set, TOKENS tokens together."""
    usable = [row for row in prompts.rows if len(row) > 1]
    if not usable:
        return []
    length = sorted(map(len, usable))[len(usable) // 2]
    rows = [row[:length] for row in usable if len(row) >= length]
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, max(1, TOKENS // length)).astype(int))]


def _run(bridge: Any, layout: Layout, ids: "torch.Tensor", draw: int | None) -> "dict[str, torch.Tensor]":
    """Log norms (layers, tokens) of the stream and of what is added to it, and losses (1, predictions).

    With a draw every weight is noisy while it is used, and what it was again afterwards.
    """
    import torch

    norms: dict[tuple[str, int], torch.Tensor] = {}

    def keep(name: str, layer: int) -> Any:
        def take(x: "torch.Tensor", hook: Any) -> None:
            sizes = torch.linalg.vector_norm(layout.centre(x).double(), dim=-1)
            norms[name, layer] = sizes.flatten().clamp_min(1e-300).log()

        return take

    depth = layout.n_layers
    names = ["attn_out", "mlp_out"] if layout.pre_norm else []
    hooks = [(f"blocks.{n}.hook_resid_pre", keep("resid", n)) for n in range(depth)]
    hooks.append((f"blocks.{depth - 1}.hook_resid_post", keep("resid", depth)))
    hooks += [(f"blocks.{n}.hook_{name}", keep(name, n)) for name in names for n in range(depth)]
    noisy = [] if draw is None else [_Noise(module, draw * 1000 + n) for n, module in enumerate(_parts(bridge))]
    try:
        with bridge.hooks(fwd_hooks=hooks):
            logits = bridge(ids, return_type="logits")
    finally:
        for noise in noisy:
            noise.remove()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].double().transpose(1, 2), ids[:, 1:], reduction="none")
    found = {name: torch.stack([norms[name, n] for n in range(depth)]) for name in names}
    return found | {"resid": torch.stack([norms["resid", n] for n in range(depth + 1)]), "loss": loss.flatten()[None]}


def _parts(bridge: Any) -> list[Any]:
    """Modules that hold weights of their own, each of which is run as one: embeddings, blocks, last norm, unembedding."""
    model = bridge.original_model
    blocks = [block.original_component for block in bridge.blocks]
    within = {id(module) for block in blocks for module in block.modules()}
    others = [m for m in model.modules() if id(m) not in within and any(True for _ in m.parameters(recurse=False))]
    return blocks + others


class _Noise:
    """Relative noise on a module's parameters while it runs."""

    def __init__(self, module: Any, seed: int) -> None:
        self.seed = seed
        # A bridge keeps parts of a fused tensor as parameters of their own: views, which the whole stands for.
        whole = sorted(module.parameters(), key=lambda p: p.numel())
        self.parameters = list({p.untyped_storage().data_ptr(): p for p in whole}.values())
        self.kept: list[torch.Tensor] = []
        # A bridge computes norms itself, and does not run the module that holds their gains: these are noisy throughout.
        self.throughout = all(p.dim() < 2 for p in self.parameters)
        self.handles: list[Any] = []
        if self.throughout:
            self._add()
        else:
            self.handles.append(module.register_forward_pre_hook(self._add))
            self.handles.append(module.register_forward_hook(self._restore, always_call=True))

    def remove(self) -> None:
        """Take the hooks off, and the noise that lasts."""
        for handle in self.handles:
            handle.remove()
        if self.throughout:
            self._restore()

    def _add(self, *_: Any) -> None:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        for parameter in self.parameters:
            self.kept.append(parameter.data.clone())
            noise = torch.rand(parameter.shape, generator=generator).mul_(2 * NOISE).add_(1 - NOISE)
            parameter.data.mul_(noise.to(parameter.device))

    def _restore(self, *_: Any) -> None:
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            parameter.data.copy_(kept)
        self.kept.clear()
