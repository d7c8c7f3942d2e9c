"""The `neurons` group: how many MLP neurons fire and how many directions they use."""

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.forward import Found, Lacking, Readings, by_token, note
from streamgauge.engine.layout import Layout
from streamgauge.groups.reasons import EXPERTS, NO_ANATOMY, lacking, only_said
from streamgauge.numerics.rows import Prompts

if TYPE_CHECKING:
    import torch

HIDDEN_PROMPTS = 64  # how many prompts the matrix of hidden activations has
ONE_TOKEN = "a prompt has a single token, so no position but 0 is shared by all"


class NeuronMeter:
    """Hooks on both sides of the MLP's activation function."""

    def __init__(self, layout: Layout, prompts: Prompts) -> None:
        self.layout, self.prompts = layout, prompts
        self.position = min(map(len, prompts.rows)) - 1
        self.readings: Readings = {}
        self.hidden: dict[int, list[torch.Tensor]] = {}
        self.singular_values: dict[int, np.ndarray] = {}

    def hooks(self) -> list[tuple[str, Any]]:
        """What bridge.hooks takes."""
        layers = self.layout.with_neurons
        before = [(f"blocks.{n}.mlp.hook_pre", self._hook(self._read_rate, n)) for n in layers]
        behind = [(f"blocks.{n}.mlp.hook_post", self._hook(self._keep_hidden, n)) for n in layers]
        return before + behind

    def visit(self, layer: int) -> None:
        """Reduce what the hooks kept of a layer."""
        if self.position and layer in self.hidden:
            self.singular_values[layer] = _singular_values(self.hidden.pop(layer))

    def found(self) -> Found:
        """Arrays of the group, and why others are absent."""
        arrays = by_token(self.readings, self.layout.n_layers, self.prompts)
        if self.singular_values:
            rows = next(iter(self.singular_values.values()))
            values = np.full((self.layout.n_layers, len(rows)), np.nan)
            for layer, row in self.singular_values.items():
                values[layer] = row
            arrays["singular_values"] = values
        return arrays, self._absent()

    def _absent(self) -> dict[str, str | Lacking]:
        reason = EXPERTS if self.layout.pre_norm else NO_ANATOMY
        why = lacking(self.layout, self.layout.with_neurons, reason)
        reasons = only_said({"activation_rate": why, "singular_values": why})
        return reasons if self.position else reasons | {"singular_values": ONE_TOKEN}

    def _hook(self, read: Any, layer: int) -> Any:
        def hooked(x: "torch.Tensor", hook: Any) -> None:
            read(layer, x)

        return hooked

    def _read_rate(self, layer: int, x: "torch.Tensor") -> None:
        note(self.readings, "activation_rate", layer, (x > 0).sum(-1).double() / x.shape[-1])

    def _keep_hidden(self, layer: int, x: "torch.Tensor") -> None:
        kept = self.hidden.setdefault(layer, [])
        room = HIDDEN_PROMPTS - sum(len(rows) for rows in kept)
        if self.position and room > 0:
            kept.append(x[:room, self.position].clone())


def _singular_values(rows: "list[torch.Tensor]") -> np.ndarray:
    """Singular values, descending, of the sequences x d_mlp matrix of activations, from its small
    Gram matrix in fp64.
    """
    import torch

    hidden = torch.cat(rows).double()
    values = torch.linalg.eigvalsh(hidden @ hidden.T).clamp_min(0).sqrt().flip(0)
    return np.asarray(values.cpu().numpy())
