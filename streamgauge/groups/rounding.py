"""The `rounding` group: how far activations and losses move when every weight is off by a rounding
error.

What two checkpoints that differ by rounding alone may differ by in behaviour is not a constant: it
is measured, by running the model with relative noise of a known size on every weight.
"""

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.clean_runs import token_losses
from streamgauge.engine.forward import Absent, Found, Group
from streamgauge.engine.layout import Layout
from streamgauge.groups.reasons import SHORT
from streamgauge.numerics.rows import Prompts

if TYPE_CHECKING:
    import torch

NOISE = 2.0**-12  # largest relative error of a weight
DRAWS = 6
TOKENS = 128
PERIOD = 2**20 + 7  # prime: no width divides it, so that no two rows of a matrix are noisy alike


def rounding_group(model: Blockwise, layout: Layout, prompts: Prompts) -> Group:
    """How far norms and losses move under noise.

    resid: (DRAWS, n_layers + 1) root mean square over tokens of the change of log ‖stream‖, over
    NOISE; attn_out and mlp_out, (DRAWS, n_layers), likewise. loss: (DRAWS, 1) of the change of a
    token's loss, over NOISE.
    """
    rows = _few(prompts)
    return _Rounding(model, layout, rows) if rows else Absent({"rounding": SHORT})


def _few(prompts: Prompts) -> list[list[int]]:
    """Prompts cut to one length, spread over the set, TOKENS tokens together."""
    usable = [row for row in prompts.rows if len(row) > 1]
    if not usable:
        return []
    length = sorted(map(len, usable))[len(usable) // 2]
    rows = [row[:length] for row in usable if len(row) >= length]
    return [
        rows[i]
        for i in np.unique(np.linspace(0, len(rows) - 1, max(1, TOKENS // length)).astype(int))
    ]


class _Rounding:
    """One batch as the model runs it, and DRAWS more that see every weight with noise of their
    own.
    """

    def __init__(self, model: Blockwise, layout: Layout, rows: list[list[int]]) -> None:
        self.model, self.layout = model, layout
        self.noises = [None, *(_Noise(draw) for draw in range(DRAWS))]
        self.names = ["attn_out", "mlp_out"] if layout.pre_norm else []
        self.norms: list[dict[str, list[torch.Tensor]]] = [
            {name: [] for name in ["resid", *self.names]} for _ in self.noises
        ]
        self.batches = []
        with model.mapped.changes() as use:
            for norms, noise in zip(self.norms, self.noises, strict=True):
                use(noise)
                self.batches.append(model.enter(rows))
                norms["resid"].append(self._log_norms(self.batches[-1].stream))

    def visit(self, layer: int) -> None:
        """Take all batches through a block, each with its own weights."""
        with self.model.mapped.changes(self.model.blocks[layer].original_component) as use:
            for batch, norms, noise in zip(self.batches, self.norms, self.noises, strict=True):
                hooks = [
                    (f"blocks.{layer}.hook_{name}", self._reader(norms[name]))
                    for name in self.names
                ]
                use(noise)
                norms["resid"].append(self._log_norms(self.model.step(batch, layer, hooks)))

    def found(self) -> Found:
        """Arrays of the group."""
        import torch

        found = [
            {name: torch.stack(values) for name, values in norms.items()} for norms in self.norms
        ]
        with self.model.mapped.changes() as use, torch.no_grad():
            for noise, batch, values in zip(self.noises, self.batches, found, strict=True):
                use(noise)
                values["loss"] = torch.as_tensor(
                    token_losses(self.model, batch.ids, batch.stream)
                ).flatten()[None]
        clean, *noisy = found
        moved = {
            name: np.array(
                [
                    ((one[name] - clean[name]) / NOISE).square().mean(-1).sqrt().cpu().numpy()
                    for one in noisy
                ]
            )
            for name in clean
        }
        return moved, {}

    def _reader(self, values: "list[torch.Tensor]") -> Any:
        return lambda x, hook: values.append(self._log_norms(x))

    def _log_norms(self, x: "torch.Tensor") -> "torch.Tensor":
        import torch

        return (
            torch.linalg.vector_norm(self.layout.centre(x).double(), dim=-1)
            .flatten()
            .clamp_min(1e-300)
            .log()
        )


class _Noise:
    """Relative noise on weights:

    a sequence of PERIOD numbers, over and over, from a start that depends on name and draw.
    """

    def __init__(self, draw: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(draw)
        self.draw = draw
        self.twice = (
            torch.rand(PERIOD, generator=generator).mul_(2 * NOISE).add_(1 - NOISE).repeat(2)
        )

    def __call__(
        self, name: str, values: "torch.Tensor", rows: "torch.Tensor | None"
    ) -> "torch.Tensor":
        """Weights with noise; rows: which of the parameter's rows these are, all where None."""
        import torch

        start = zlib.crc32(f"{name} {self.draw}".encode()) % PERIOD
        if rows is not None:
            width = values.shape[-1]
            return values * self.twice.unfold(0, width, 1)[
                (start + rows.cpu() * width) % PERIOD
            ].to(values.device)
        noisy = torch.empty(values.shape, device=values.device)
        factors = self.twice[start : start + min(PERIOD, values.numel())].to(values.device)
        # PERIOD at a time: the noise of all of them would be as large as they are.
        for some, own in zip(
            values.reshape(-1).split(PERIOD), noisy.view(-1).split(PERIOD), strict=True
        ):
            torch.mul(some, factors[: len(some)], out=own)
        return noisy
