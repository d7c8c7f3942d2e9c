"""The `stream` group:

norms of what flows through the residual stream, reduced inside the hooks of one forward pass.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.forward import Found, Readings, by_token, note
from streamgauge.engine.layout import Layout
from streamgauge.groups.reasons import NO_LN1, NO_MID, POST_NORM
from streamgauge.numerics.rows import Prompts

if TYPE_CHECKING:
    import torch

ROWS = 128  # tokens at a time: a few hundred thousand numbers, which stay in a core's cache
TINY = 1e-30  # 0 / 0 is 0: a zero vector is the sum of zero vectors


def _tokens(prompts: Prompts) -> dict[str, np.ndarray]:
    lengths = [len(row) for row in prompts.rows]
    ids = np.concatenate(prompts.rows)
    position = np.concatenate([np.arange(length) for length in lengths])
    return {
        "prompt": np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        "position": position.astype(np.int32),
        "is_bos": (position == 0) & (ids == (-1 if prompts.bos is None else prompts.bos)),
        "is_padding": np.zeros(len(ids), bool),
    }


class StreamMeter:
    """Hooks that keep one block's activations just long enough to take their norms."""

    def __init__(self, layout: Layout, prompts: Prompts) -> None:
        self.layout, self.prompts = layout, prompts
        self.readings: Readings = {}

    def visit(self, layer: int) -> None:
        """Nothing: hooks read."""

    def found(self) -> Found:
        """Arrays by token in the order of the prompts, and why others are absent."""
        return by_token(self.readings, self.layout.n_layers, self.prompts) | _tokens(
            self.prompts
        ), self._absent()

    def _absent(self) -> dict[str, str]:
        reasons = {"resid_mid": NO_MID} if self.layout.parallel else {}
        if not self.layout.pre_norm:
            reasons |= dict.fromkeys(
                [
                    "additivity_error",
                    "attn_out",
                    "mlp_out",
                    "pre_dot_attn",
                    "mid_dot_mlp",
                    "resid_mid",
                ],
                POST_NORM,
            )
        if not self.layout.has_ln1:
            reasons |= dict.fromkeys(
                ["ln1_scale", "ln1_residual"], NO_LN1 if self.layout.pre_norm else POST_NORM
            )
        return reasons

    def hooks(self) -> list[tuple[str, Any]]:
        """What bridge.hooks takes; the hook on resid_post comes last in each block and empties
        it.
        """
        names = ["hook_resid_pre", "hook_resid_post"]
        if self.layout.pre_norm:
            names += ["hook_attn_out", "hook_mlp_out"] + (
                [] if self.layout.parallel else ["hook_resid_mid"]
            )
        if self.layout.has_ln1:
            names += ["ln1.hook_out"]
        block: dict[str, torch.Tensor] = {}
        return [
            (f"blocks.{n}.{name}", self._hook(block, n, name))
            for n in range(self.layout.n_layers)
            for name in names
        ]

    def _hook(self, block: "dict[str, torch.Tensor]", layer: int, name: str) -> Any:
        def keep(x: "torch.Tensor", hook: Any) -> None:
            block[name.removeprefix("hook_")] = x
            if name == "hook_resid_post":
                self._read(layer, block)
                block.clear()

        return keep

    def _read(self, layer: int, block: "dict[str, torch.Tensor]") -> None:
        flat = {name: x.reshape(-1, x.shape[-1]) for name, x in block.items()}
        for start in range(0, len(flat["resid_pre"]), ROWS):
            self._read_rows(layer, {name: x[start : start + ROWS] for name, x in flat.items()})

    def _read_rows(self, layer: int, raw: "dict[str, torch.Tensor]") -> None:
        import torch

        norm = torch.linalg.vector_norm
        block = {name: self.layout.centre(x) for name, x in raw.items() if name != "ln1.hook_out"}
        for name, x in block.items():
            self._note(layer, name, norm(x, dim=-1))
        if self.layout.has_ln1:
            self._read_norm(layer, block["resid_pre"], raw["ln1.hook_out"])
        if not self.layout.pre_norm:
            return
        before_mlp = block["resid_pre" if self.layout.parallel else "resid_mid"]
        self._note(layer, "pre_dot_attn", (block["resid_pre"] * block["attn_out"]).sum(-1))
        self._note(layer, "mid_dot_mlp", (before_mlp * block["mlp_out"]).sum(-1))
        parts = [raw["resid_pre"], raw["attn_out"], raw["mlp_out"]]
        error = norm(raw["resid_post"] - parts[0] - parts[1] - parts[2], dim=-1)
        # Rounding is relative to the raw vectors, whose mean the convention takes away.
        self._note(
            layer, "additivity_error", error / sum(norm(x, dim=-1) for x in parts).clamp_min(TINY)
        )

    def _read_norm(self, layer: int, resid: "torch.Tensor", output: "torch.Tensor") -> None:
        """The factor between gain * resid and the norm's output, by least squares, and what it
        leaves unexplained.
        """
        import torch

        expected = resid.double() * torch.as_tensor(self.layout.gains[layer], device=resid.device)
        found = output.double() - torch.as_tensor(self.layout.biases[layer], device=resid.device)
        size = (found * found).sum(-1)
        # A zero vector says nothing about the scale; the norm divides by the root of its epsilon
        # then.
        scale = torch.where(
            size > 0, (expected * found).sum(-1) / size.clamp_min(TINY), self.layout.epsilon**0.5
        )
        rest = torch.linalg.vector_norm(expected - scale[..., None] * found, dim=-1)
        self._note(layer, "ln1_scale", scale)
        self._note(
            layer, "ln1_residual", rest / torch.linalg.vector_norm(expected, dim=-1).clamp_min(TINY)
        )

    def _note(self, layer: int, name: str, values: "torch.Tensor") -> None:
        note(self.readings, name, layer, values)
