"""The `stream` group: norms of what flows through the residual stream, reduced inside the hooks of
one forward pass.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.forward import Found, Lacking, Readings, by_token, note
from streamgauge.engine.layout import Layout
from streamgauge.engine.points import KINDS
from streamgauge.groups.reasons import (
    NO_LN1,
    NO_MID,
    NO_MLP_INPUT,
    NOTHING,
    POST_NORM,
    lacking,
    only_said,
)
from streamgauge.numerics.rows import Prompts

if TYPE_CHECKING:
    import torch

ROWS = 128  # tokens at a time: a few hundred thousand numbers, which stay in a core's cache
OUTPUTS = [f"{kind}_out" for kind in KINDS]
SUMS = [*OUTPUTS, "additivity_error", "pre_dot_attn", "mid_dot_mlp", "resid_mid"]
NORM = ["ln1_scale", "ln1_residual"]
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

    def _absent(self) -> dict[str, str | Lacking]:
        layout = self.layout
        if not layout.pre_norm:
            return dict.fromkeys(SUMS + NORM, POST_NORM)
        no_norm = lacking(layout, layout.with_ln1, NO_LN1)
        mid = lacking(layout, layout.layers_reading("mid"), NO_MID)
        mlp = lacking(layout, layout.layers_with("mlp"), NOTHING["mlp"])
        attn = lacking(layout, layout.layers_with("attn"), NOTHING["attn"])
        return only_said(
            dict.fromkeys(NORM, no_norm)
            | {"resid_mid": mid, "attn_out": attn, "pre_dot_attn": attn, "mlp_out": mlp}
            | {"mid_dot_mlp": lacking(layout, self._before_mlp(), NO_MLP_INPUT)}
            | {"other_out": lacking(layout, layout.layers_with("other"), NOTHING["other"])}
        )

    def _before_mlp(self) -> list[int]:
        return self.layout.layers_reading("mid") + self.layout.layers_reading("pre")

    def hooks(self) -> list[tuple[str, Any]]:
        """What `hooked` takes; the hook on resid_post comes last in each block and empties it."""
        block: dict[str, torch.Tensor] = {}
        return [
            (f"blocks.{n}.{name}", self._hook(block, n, name))
            for n in range(self.layout.n_layers)
            for name in self._names(n)
        ]

    def _names(self, layer: int) -> list[str]:
        layout = self.layout
        names = ["hook_resid_pre", "hook_resid_post"]
        names += [f"hook_{kind}_out" for kind in KINDS if layer in layout.layers_with(kind)]
        names += ["hook_resid_mid"] if layer in layout.layers_reading("mid") else []
        return names + (["ln1.hook_out"] if layer in layout.with_ln1 else [])

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
        """Norms and inner products of some tokens' vectors, each (tokens, d_model)."""
        import torch

        norm = torch.linalg.vector_norm
        block = {name: self.layout.centre(x) for name, x in raw.items() if name != "ln1.hook_out"}
        norms = {name: norm(x, dim=-1) for name, x in block.items()}
        for name, values in norms.items():
            self._note(layer, name, values)
        pre, post = (
            block[name] / norms[name].clamp_min(TINY)[..., None]
            for name in ("resid_pre", "resid_post")
        )
        # 1 - cos, without the rounding that a cosine near 1 suffers.
        self._note(layer, "block_influence", norm(post - pre, dim=-1) ** 2 / 2)
        sizes = [x.abs().amax(-1) for name, x in raw.items() if name != "ln1.hook_out"]
        self._note(layer, "largest", torch.stack(sizes).amax(0))
        if "ln1.hook_out" in raw:
            self._read_norm(layer, block["resid_pre"], raw["ln1.hook_out"])
        if not self.layout.pre_norm:
            return
        if "attn_out" in block:
            products = (block["resid_pre"] * block["attn_out"]).sum(-1)
            self._note(layer, "pre_dot_attn", products)
        if "mlp_out" in block and layer in self._before_mlp():
            before = block.get("resid_mid", block["resid_pre"])
            self._note(layer, "mid_dot_mlp", (before * block["mlp_out"]).sum(-1))
        parts = [raw[name] for name in ("resid_pre", *OUTPUTS) if name in raw]
        error = raw["resid_post"] - parts[0]
        for part in parts[1:]:
            error = error - part
        # Rounding is relative to the raw vectors, whose mean the convention takes away.
        total = sum(norm(x, dim=-1) for x in parts)
        self._note(layer, "additivity_error", norm(error, dim=-1) / total.clamp_min(TINY))

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
