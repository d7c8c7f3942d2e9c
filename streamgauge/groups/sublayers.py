"""The `sublayers` group: how the two outputs of a parallel block lie to each other, and what
rescaled inputs change.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.forward import Found, Lacking, Readings, by_token, note
from streamgauge.engine.layout import Layout
from streamgauge.engine.points import KINDS, Hooks
from streamgauge.groups.reasons import NO_LN1, NOTHING, POST_NORM, lacking, only_said
from streamgauge.numerics.rows import Prompts

if TYPE_CHECKING:
    import torch

SEQUENTIAL = (
    "no mixer and MLP there both read resid_pre; where the MLP reads resid_mid, mid_dot_mlp "
    "holds it"
)
SCALE_BLIND = ("attn_scale_error", "mlp_scale_error", "largest_shift")
DRAWS, TOKENS = 4, 16
# Norms' inputs are brought to this root mean square, which takes their epsilon out of play.
LARGE = 2.0**20
SMALLEST = 1e-30  # of a stream that is not zero
# Relative size of the perturbation that says how sensitive an output is: far above rounding,
# still small.
NUDGE = 2.0**-16
SCALES = (2.0**-10, 2.0**10)
SHIFT = 4.0  # largest constant added, in root mean squares of the input


class OutputsMeter:
    """Raw norms of what a block sums up, and inner products that the stream group does not hold.

    Those of attn_out and mlp_out, which parallel blocks add at once, and of the stream with what
    the first MLP wrote to it.
    """

    def __init__(self, layout: Layout, prompts: Prompts) -> None:
        self.layout, self.prompts = layout, prompts
        self.first_mlp: list[torch.Tensor] = []  # by batch
        self.readings: Readings = {}

    def hooks(self) -> Hooks:
        """What `hooked` takes."""
        if not self.layout.pre_norm:
            return []
        block: dict[str, torch.Tensor] = {}
        hooks: list[tuple[str, Any]] = []
        for n in range(self.layout.n_layers):
            names = [f"{kind}_out" for kind in KINDS if n in self.layout.layers_with(kind)]
            names = ["resid_pre", *names]
            hooks += [(f"blocks.{n}.hook_{name}", self._keep(block, name)) for name in names]
            hooks.append((f"blocks.{n}.hook_resid_post", self._read(block, n)))
        return hooks

    def visit(self, layer: int) -> None:
        """Nothing: hooks read."""

    def found(self) -> Found:
        """Arrays of the group but for those of ScaleBlindness, and why others are absent."""
        return by_token(self.readings, self.layout.n_layers, self.prompts), self._absent()

    def _absent(self) -> dict[str, str | Lacking]:
        layout = self.layout
        names = ["attn_dot_mlp", "raw_norm", "pre_dot_mlp_0"]
        if not layout.pre_norm:
            return dict.fromkeys([*names, *SCALE_BLIND], POST_NORM)
        beside = lacking(layout, layout.parallel_layers, SEQUENTIAL)
        first_mlp = None if 0 in layout.layers_with("mlp") else f"layer 0: {NOTHING['mlp']}"
        reasons = only_said({"attn_dot_mlp": beside, "pre_dot_mlp_0": first_mlp})
        if not is_scale_blind(layout):
            reasons |= dict.fromkeys(SCALE_BLIND, NO_LN1)
            return reasons
        for kind in ("attn", "mlp"):
            none = lacking(layout, layout.norms_before(kind), "no such sublayer behind a norm")
            reasons |= only_said({f"{kind}_scale_error": none})
        return reasons

    def _keep(self, block: "dict[str, torch.Tensor]", name: str) -> Any:
        def keep(x: "torch.Tensor", hook: Any) -> None:
            block[name] = x

        return keep

    def _read(self, block: "dict[str, torch.Tensor]", layer: int) -> Any:
        import torch

        def read(x: "torch.Tensor", hook: Any) -> None:
            number = len(self.readings.get(("raw_norm", layer), []))  # of the batch
            parts = [part.reshape(x.shape) for part in block.values()]
            sizes = sum(torch.linalg.vector_norm(part, dim=-1) for part in parts)
            note(self.readings, "raw_norm", layer, sizes)
            centred = {n: self.layout.centre(part.reshape(x.shape)) for n, part in block.items()}
            if layer == 0 and "mlp_out" in centred:
                self.first_mlp.append(centred["mlp_out"].clone())
            if self.first_mlp:
                product = centred["resid_pre"] * self.first_mlp[number]
                note(self.readings, "pre_dot_mlp_0", layer, product.sum(-1))
            if layer in self.layout.parallel_layers:
                product = centred["attn_out"] * centred["mlp_out"]
                note(self.readings, "attn_dot_mlp", layer, product.sum(-1))
            block.clear()

        return read


def is_scale_blind(layout: Layout) -> bool:
    """Whether any sublayer reads the stream through a norm."""
    return bool(layout.norms_before("attn") or layout.norms_before("mlp"))


class ScaleBlindness:
    """What becomes of attn_out and mlp_out when every norm's input is scaled and shifted, at each
    layer and draw.

    One batch of copies of one prompt: as it is, nudged at random, and then DRAWS times with a
    factor and a constant of its own for every norm and token. The error, (n_layers, DRAWS), is the
    relative nudge of the norms' inputs that would change the output as much, so that rounding is
    all there may be. All inputs are brought to one large size first.
    """

    def __init__(self, model: Blockwise, layout: Layout, row: list[int]) -> None:
        import torch

        self.model, self.layout = model, layout
        self.generator = torch.Generator().manual_seed(0)
        self.errors: dict[str, dict[int, np.ndarray]] = {"attn": {}, "mlp": {}}
        self.batch = model.enter([row[:TOKENS]] * (2 + DRAWS))

    def visit(self, layer: int) -> None:
        """Take the batch through a block."""
        before = {kind: self.layout.norms_before(kind).get(layer) for kind in self.errors}
        points = {path: name for name, path in (("ln2", before["mlp"]), ("ln1", before["attn"]))}
        hooks = [
            (f"blocks.{layer}.{name}.hook_in", _rescaler(self.layout, self.generator))
            for path, name in reversed(points.items())
            if path is not None
        ]
        hooks += [self._reader(layer, kind) for kind, path in before.items() if path is not None]
        self.model.step(self.batch, layer, hooks)

    def found(self) -> Found:
        """Arrays of the sublayers group that OutputsMeter does not have."""
        arrays = {"largest_shift": np.array([SHIFT if self.layout.centres else 0.0])}
        for kind, by_layer in self.errors.items():
            if by_layer:
                errors = arrays[f"{kind}_scale_error"] = np.full(
                    (self.layout.n_layers, DRAWS), np.nan
                )
                errors[list(by_layer)] = list(by_layer.values())
        return arrays, {}

    def _reader(self, layer: int, kind: str) -> tuple[str, Any]:
        def read(x: "torch.Tensor", hook: Any) -> None:
            self.errors[kind][layer] = _errors(x.reshape(2 + DRAWS, -1).double())

        return f"blocks.{layer}.hook_{kind}_out", read


def _rescaler(layout: Layout, generator: "torch.Generator") -> Any:
    import torch

    def rescale(x: "torch.Tensor", hook: Any) -> "torch.Tensor":
        copies = x.reshape(2 + DRAWS, -1, x.shape[-1])  # OPT folds batch and position into one
        rms = copies.square().mean(-1, keepdim=True).sqrt()
        copies = copies / rms.clamp_min(SMALLEST)
        noise = torch.randn(copies.shape[1:], generator=generator).to(x.device)
        per_token = (DRAWS, copies.shape[1], 1)
        low, high = np.log(SCALES)
        scale = torch.empty(per_token).uniform_(low, high, generator=generator).exp().to(x.device)
        shift = torch.empty(per_token).uniform_(-SHIFT, SHIFT, generator=generator).to(x.device)
        changed = LARGE * copies
        changed[1] += LARGE * NUDGE * noise
        changed[2:] = scale * (changed[2:] + (LARGE * shift if layout.centres else 0))
        return changed.reshape(x.shape)

    return rescale


def _errors(copies: "torch.Tensor") -> np.ndarray:
    import torch

    change = torch.linalg.vector_norm(copies[1:] - copies[0], dim=1).cpu().numpy()
    if change[0] == 0:  # a dead sublayer answers to nothing, and then has no error either
        return np.where(change[1:] == 0, 0.0, 1.0)
    return np.asarray(NUDGE * change[1:] / change[0])
