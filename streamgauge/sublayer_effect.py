"""The `sublayer_effect` group: what the model's predictions lose when one sublayer's output is left out at the end."""

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.horizon import BATCH_TOKENS, POST_NORM, SHORT, some_prompts
from streamgauge.model import Layout, device_of, probe_norm
from streamgauge.prompts import Prompts

if TYPE_CHECKING:
    import torch

KINDS = ("attn", "mlp")
LOGITS = 2**26  # held at once
SMALL = 2.0**-3  # coordinates of a probe that no cap on logits bends noticeably
PROBED = 1.01  # leaves room for the rounding of a factor so found
STRIDE = 4  # of a prompt's predictions every fourth is looked at: each costs two unembeddings a sublayer


def measure_sublayer_effect(bridge: Any, layout: Layout, prompts: Prompts) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays of the group, without its prefix, and why they are absent.

    Each output is taken out of the final residual, which the last norm and the unembedding then read: once as it is, and
    once with the norm dividing by what it divides the full residual by (frozen).
    """
    import torch

    if not layout.pre_norm:
        return {}, {"sublayer_effect": POST_NORM}
    rows = some_prompts(prompts)
    if not rows.rows:
        return {}, {"sublayer_effect": SHORT}
    parts: dict[str, list[np.ndarray]] = {}
    with torch.no_grad():
        for batch in rows.batches(BATCH_TOKENS):
            run = _FullRun(bridge, layout, [rows.rows[i] for i in batch])
            for name, values in run.effects().items():
                parts.setdefault(name, []).append(values)
        largest = np.array([run.largest_row()])
    return {name: np.concatenate(values, axis=-1) for name, values in parts.items()} | {"largest_row": largest}, {}


class _FullRun:
    """One batch as the model runs it, with every sublayer's output, and how predictions change without one.

    Vectors are kept at the chosen positions: outputs (2, n_layers, rows, positions, d_model), attention first.
    """

    def __init__(self, bridge: Any, layout: Layout, rows: list[list[int]]) -> None:
        import torch

        self.bridge, self.layout, self.last = bridge, layout, layout.n_layers - 1
        self.ids = torch.tensor(rows, device=device_of(bridge))
        self.chosen = torch.arange(0, self.ids.shape[1] - 1, STRIDE, device=self.ids.device)
        kept: dict[Any, torch.Tensor] = {}

        def keeper(key: Any) -> Any:
            return lambda x, hook: kept.__setitem__(key, x.reshape(*self.ids.shape, -1).clone())

        names = [(kind, n) for kind in KINDS for n in range(layout.n_layers)]
        hooks = [(f"blocks.{n}.hook_{kind}_out", keeper((kind, n))) for kind, n in names]
        hooks += [(f"blocks.{self.last}.hook_{name}", keeper(name)) for name in ("resid_pre", "resid_post")]
        with bridge.hooks(fwd_hooks=hooks):
            bridge(self.ids, return_type=None)
        self.before, self.final = kept["resid_pre"], kept["resid_post"][:, self.chosen]
        outputs = torch.stack([kept[name][:, self.chosen] for name in names])
        self.outputs = outputs.unflatten(0, (2, layout.n_layers))

    def effects(self) -> dict[str, np.ndarray]:
        """Arrays of the group for this batch, predictions last."""
        import torch

        norm = self.bridge.ln_final.original_component
        gain = torch.as_tensor(probe_norm(norm, self.layout.d_model)[0], device=self.ids.device)
        final, centred = self.layout.centre(self.final).double(), self.layout.centre(self.outputs).double()
        scale = (final.square().mean(-1, keepdim=True) + self.layout.epsilon).sqrt()
        found: dict[str, torch.Tensor] = {
            "share": (centred * final).sum(-1) / final.square().sum(-1),
            "size": torch.linalg.vector_norm(centred, dim=-1) / scale[..., 0],
        }
        full = norm(self.final[None])
        found["kl"], found["loss"] = self._changes(full, norm(self.final - self.outputs))
        found["frozen_kl"], found["frozen_loss"] = self._changes(full, (full - gain * centred / scale).float())
        return {
            f"{kind}_{name}": values[row].flatten(1).double().cpu().numpy()
            for row, kind in enumerate(KINDS)
            for name, values in found.items()
        }

    def largest_row(self) -> float:
        """Largest norm of a token's row of the unembedding with the last norm's gain folded in, centred over tokens.

        A change δ of the normalised residual moves no logit, beside what moves all alike, by more than this times
        ‖δ / gain‖. What the architecture multiplies logits by counts: found by trying a small vector.
        """
        import torch

        rows = self.bridge.original_model.get_output_embeddings().weight
        norm = self.bridge.ln_final.original_component
        gain = torch.as_tensor(probe_norm(norm, self.layout.d_model)[0], device=rows.device, dtype=rows.dtype)
        mean = rows.mean(0)
        largest = max(float(torch.linalg.vector_norm((part - mean) * gain, dim=1).max()) for part in rows.split(4096))
        small = SMALL * torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
        moved = self._predict(torch.stack([0 * small, small]).expand(*self.final.shape[:2], 2, -1).movedim(2, 0))
        expected = rows @ small - mean @ small
        difference = (moved[1] - moved[0])[0, 0]
        factor = (difference - difference.mean()) @ expected / (expected @ expected)
        return largest * float(factor) * PROBED

    def _changes(self, full: "torch.Tensor", normalised: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """KL(full ‖ without) and the change of loss, (2, n_layers, rows, positions), from what the unembedding reads.

        full: the same of the whole residual, (1, rows, positions, d_model).
        """
        import torch

        vocabulary = self.bridge.original_model.get_output_embeddings().weight.shape[0]
        size = max(1, LOGITS // (self.final[..., 0].numel() * vocabulary))
        # The whole residual goes along with every part, so that the two that are compared were rounded alike.
        parts = [self._compare(self._predict(torch.cat([full, part]))) for part in normalised.flatten(0, 1).split(size)]
        kl, loss = (torch.cat(values).unflatten(0, normalised.shape[:2]) for values in zip(*parts, strict=True))
        return kl, loss

    def _predict(self, normalised: "torch.Tensor") -> "torch.Tensor":
        """Log odds of tokens: the model's own head, given these vectors in place of its own."""
        with self.bridge.hooks(fwd_hooks=[("unembed.hook_in", lambda x, hook: normalised.flatten(0, 1))]):
            logits = self.bridge(self.before, start_at_layer=self.last, return_type="logits")
        log_odds: torch.Tensor = logits.float().log_softmax(-1).unflatten(0, normalised.shape[:2])
        return log_odds

    def _compare(self, log_odds: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """The first of the log odds against each other."""
        difference = log_odds[0] - log_odds[1:]
        kl = (log_odds[0].exp() * difference).double().sum(-1)
        tokens = self.ids[:, self.chosen + 1, None].expand(*difference.shape[:-1], 1)
        return kl, difference.gather(-1, tokens)[..., 0]
