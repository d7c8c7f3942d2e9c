"""The `sublayers` group:

how the two outputs of a parallel block lie to each other, and what rescaled inputs change.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.blockwise import Blockwise, Hooks
from streamgauge.engine.forward import Found, Readings, by_token, note
from streamgauge.engine.layout import Layout
from streamgauge.groups.reasons import NO_LN1, POST_NORM
from streamgauge.numerics.rows import Prompts

if TYPE_CHECKING:
    import torch

SEQUENTIAL = "mid_dot_mlp holds it: the MLP of a sequential block reads what attention has written"
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
        """What bridge.hooks takes."""
        if not self.layout.pre_norm:
            return []
        layers, names = range(self.layout.n_layers), ("resid_pre", "attn_out", "mlp_out")
        block: dict[str, torch.Tensor] = {}
        hooks = [
            (f"blocks.{n}.hook_{name}", self._keep(block, name)) for n in layers for name in names
        ]
        return hooks + [(f"blocks.{n}.hook_resid_post", self._read(block, n)) for n in layers]

    def visit(self, layer: int) -> None:
        """Nothing: hooks read."""

    def found(self) -> Found:
        """Arrays of the group but for those of ScaleBlindness, and why others are absent."""
        return by_token(self.readings, self.layout.n_layers, self.prompts), self._absent()

    def _absent(self) -> dict[str, str]:
        reasons: dict[str, str] = {}
        if not self.layout.parallel or not self.layout.pre_norm:
            reasons["attn_dot_mlp"] = SEQUENTIAL if self.layout.pre_norm else POST_NORM
        if not self.layout.pre_norm:
            reasons |= dict.fromkeys(["raw_norm", "pre_dot_mlp_0"], POST_NORM)
        if not is_scale_blind(self.layout):
            why = POST_NORM if not self.layout.pre_norm else NO_LN1
            reasons |= dict.fromkeys(["attn_scale_error", "mlp_scale_error", "largest_shift"], why)
        return reasons

    def _keep(self, block: "dict[str, torch.Tensor]", name: str) -> Any:
        def keep(x: "torch.Tensor", hook: Any) -> None:
            block[name] = x

        return keep

    def _read(self, block: "dict[str, torch.Tensor]", layer: int) -> Any:
        import torch

        def read(x: "torch.Tensor", hook: Any) -> None:
            number = len(self.readings.get(("raw_norm", layer), []))  # of the batch
            note(
                self.readings,
                "raw_norm",
                layer,
                sum(torch.linalg.vector_norm(part, dim=-1) for part in block.values()),
            )
            if layer == 0:
                self.first_mlp.append(self.layout.centre(block["mlp_out"]).clone())
            product = self.layout.centre(block["resid_pre"]) * self.first_mlp[number]
            note(self.readings, "pre_dot_mlp_0", layer, product.sum(-1))
            if self.layout.parallel:
                attn, mlp = (self.layout.centre(block[name]) for name in ("attn_out", "mlp_out"))
                note(self.readings, "attn_dot_mlp", layer, (attn * mlp).sum(-1))
            block.clear()

        return read


def is_scale_blind(layout: Layout) -> bool:
    """Whether both sublayers read the stream through a norm."""
    return layout.has_ln1 and layout.mlp_norm is not None


class ScaleBlindness:
    """What becomes of attn_out and mlp_out when every norm's input is scaled and shifted, at each
    layer and draw.

    One batch of copies of one prompt: as it is, nudged at random, and then DRAWS times with a
    factor and a constant of its own for every norm and token. The error, (n_layers, DRAWS), is the
    relative nudge of the norms' inputs that would change the output as much, so that rounding is
    all there may be. All inputs are brought to one large size first.
    """

    def __init__(self, model: Blockwise, layout: Layout, prompts: Prompts) -> None:
        import torch

        self.model, self.layout = model, layout
        self.generator = torch.Generator().manual_seed(0)
        self.errors: dict[str, list[np.ndarray]] = {"attn": [], "mlp": []}
        self.batch = model.enter([max(prompts.rows, key=len)[:TOKENS]] * (2 + DRAWS))

    def visit(self, layer: int) -> None:
        """Take the batch through a block."""
        norms = ["ln1"] if self.layout.mlp_norm == "ln1" else ["ln1", self.layout.mlp_norm]
        hooks = [
            (f"blocks.{layer}.{norm}.hook_in", _rescaler(self.layout, self.generator))
            for norm in norms
        ]
        self.model.step(
            self.batch, layer, [*hooks, *(self._reader(layer, kind) for kind in self.errors)]
        )

    def found(self) -> Found:
        """Arrays of the sublayers group that OutputsMeter does not have."""
        errors = {f"{kind}_scale_error": np.array(found) for kind, found in self.errors.items()}
        return errors | {"largest_shift": np.array([SHIFT if self.layout.centres else 0.0])}, {}

    def _reader(self, layer: int, kind: str) -> tuple[str, Any]:
        def read(x: "torch.Tensor", hook: Any) -> None:
            self.errors[kind].append(_errors(x.reshape(2 + DRAWS, -1).double()))

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
