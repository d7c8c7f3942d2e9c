"""The `rounding` group: how far activations and losses move when every weight is off by a rounding
error.

What two checkpoints that differ by rounding alone may differ by in behaviour is not a constant: it
is measured, by running the model with relative noise of a known size on every weight.
"""

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.clean_runs import token_losses
from streamgauge.engine.forward import Absent, Found, Group, Lacking
from streamgauge.engine.layout import Layout
from streamgauge.groups.reasons import NOTHING, POST_NORM, SHORT, lacking, only_said
from streamgauge.numerics.rows import Prompts

if TYPE_CHECKING:
    import torch

KINDS = ("attn", "mlp")  # of outputs that are compared
NOISE = 2.0**-12  # largest relative error of a weight
DRAWS = 6
TOKENS = 64
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
        self.kinds = KINDS if layout.pre_norm else ()
        self.noises = [None, *(Noise(draw) for draw in range(DRAWS))]
        # By noise: log norms of the stream from the embedding on, and of outputs by layer.
        self.streams: list[list[torch.Tensor]] = [[] for _ in self.noises]
        self.outputs: list[dict[tuple[str, int], torch.Tensor]] = [{} for _ in self.noises]
        self.batches = []
        with model.mapped.changes() as use:
            for streams, noise in zip(self.streams, self.noises, strict=True):
                use(noise)
                self.batches.append(model.enter(rows))
                streams.append(log_norms(self.layout, self.batches[-1].stream))

    def visit(self, layer: int) -> None:
        """Take all batches through a block, each with its own weights."""
        kinds = [kind for kind in self.kinds if layer in self.layout.layers_with(kind)]
        runs = zip(self.batches, self.streams, self.outputs, self.noises, strict=True)
        with self.model.mapped.changes(self.model.paths[layer]) as use:
            for batch, streams, outputs, noise in runs:
                hooks = [
                    (f"blocks.{layer}.hook_{kind}_out", self._reader(outputs, (kind, layer)))
                    for kind in kinds
                ]
                use(noise)
                streams.append(log_norms(self.layout, self.model.step(batch, layer, hooks)))

    def found(self) -> Found:
        """Arrays of the group."""
        import torch

        arrays = {"resid": self._moved([torch.stack(streams) for streams in self.streams])}
        absent: dict[str, str | Lacking | None] = {}
        for kind in self.kinds:
            layers = self.layout.layers_with(kind)
            absent[f"{kind}_out"] = lacking(self.layout, layers, NOTHING[kind], axis=1)
            if layers:
                logs = [torch.stack([own[kind, n] for n in layers]) for own in self.outputs]
                moved = np.full((DRAWS, self.layout.n_layers), np.nan)
                moved[:, layers] = self._moved(logs)
                arrays[f"{kind}_out"] = moved
        arrays["loss"] = self._moved(list(self._losses()))
        if not self.layout.pre_norm:
            absent = dict.fromkeys([f"{kind}_out" for kind in KINDS], POST_NORM)
        return arrays, only_said(absent)

    def _losses(self) -> "Iterator[torch.Tensor]":
        """The loss of each token under each noise, (1, tokens)."""
        import torch

        with self.model.mapped.changes() as use, torch.no_grad():
            for noise, batch in zip(self.noises, self.batches, strict=True):
                use(noise)
                losses = token_losses(self.model, batch.ids, batch.stream)
                yield torch.as_tensor(losses).flatten()[None]

    def _moved(self, values: "list[torch.Tensor]") -> np.ndarray:
        """Root mean square over tokens of each noise's change, over NOISE: (DRAWS, …)."""
        clean, *noisy = values
        changes = [((one - clean) / NOISE).square().mean(-1).sqrt() for one in noisy]
        return np.array([change.cpu().numpy() for change in changes])

    def _reader(self, outputs: "dict[tuple[str, int], torch.Tensor]", key: tuple[str, int]) -> Any:
        return lambda x, hook: outputs.__setitem__(key, log_norms(self.layout, x))


def log_norms(layout: Layout, x: "torch.Tensor") -> "torch.Tensor":
    """Of a stream's vectors, centred as the convention has it, one behind the other, in fp64."""
    import torch

    norms = torch.linalg.vector_norm(layout.centre(x).double(), dim=-1)
    return norms.flatten().clamp_min(1e-300).log()


class Noise:
    """Relative noise on weights: a sequence of PERIOD numbers, over and over, from a start that
    depends on name and draw.
    """

    def __init__(self, draw: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(draw)
        self.draw = draw
        self.twice = (
            torch.rand(PERIOD, generator=generator).mul_(2 * NOISE).add_(1 - NOISE).repeat(2)
        )

    def __call__(
        self,
        name: str,
        values: "torch.Tensor",
        rows: "torch.Tensor | None",
        room: "torch.Tensor | None",
    ) -> "torch.Tensor":
        """Weights with noise; rows: which of the parameter's rows these are, all where None; room:
        where they may be put.
        """
        import torch

        start = zlib.crc32(f"{name} {self.draw}".encode()) % PERIOD
        if rows is not None:
            width = values.shape[-1]
            if int(rows[-1] - rows[0]) != len(rows) - 1 or (rows.diff() != 1).any():
                return values * self.twice.unfold(0, width, 1)[
                    (start + rows.cpu() * width) % PERIOD
                ].to(values.device)
            start = (start + int(rows[0]) * width) % PERIOD
        noisy = torch.empty(values.shape, device=values.device) if room is None else room
        factors = self.twice[start : start + min(PERIOD, values.numel())].to(values.device)
        # PERIOD at a time: the noise of all of them would be as large as they are.
        for some, own in zip(
            values.reshape(-1).split(PERIOD), noisy.view(-1).split(PERIOD), strict=True
        ):
            torch.mul(some, factors[: len(some)], out=own)
        return noisy
