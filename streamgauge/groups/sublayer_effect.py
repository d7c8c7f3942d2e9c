"""The `sublayer_effect` group: what the model's predictions lose when one sublayer's output is left
out at the end.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.clean_runs import CleanRuns
from streamgauge.engine.forward import Found, Lacking
from streamgauge.engine.layout import Layout, probe_norm
from streamgauge.engine.mapped import VOCABULARY_ROWS
from streamgauge.engine.memory import give_back
from streamgauge.groups.reasons import NOTHING, lacking, only_said
from streamgauge.numerics.rounding import UNIT

if TYPE_CHECKING:
    import torch

KINDS = ("attn", "mlp")
LOGITS = 2**24  # held at once, several times over
TINY = 1e-300  # a zero residual has no parts: 0 / 0 is 0
SMALL = 2.0**-3  # coordinates of a probe that no cap on logits bends noticeably
PROBED = 1.01  # leaves room for the rounding of a factor so found
STRIDE = 4  # of a prompt's predictions every fourth at most is looked at
UNEMBEDDED = 0.15  # of a pass over all prompts that unembedding without sublayers may cost


class SublayerEffects:
    """What becomes of predictions without each sublayer's output, in the runs of `clean`, which
    must be visited before.

    Each output is taken out of the final residual, which the last norm and the unembedding then
    read: once as it is, and once with the norm dividing by what it divides the full residual by
    (frozen). One unembedding serves both where the head is a matrix and no more, since the two
    differ by a factor then.
    """

    def __init__(self, layout: Layout, clean: CleanRuns) -> None:
        import torch

        self.layout, self.clean, self.model = layout, clean, clean.model
        stride = max(STRIDE, clean.sparsity(len(KINDS) * self.model.n_layers, UNEMBEDDED))
        self.chosen = [
            torch.arange(0, ids.shape[1] - 1, stride, device=ids.device) for ids in clean.ids
        ]
        self.kept: list[dict[str, list[torch.Tensor]]] = [
            {kind: [] for kind in KINDS} for _ in clean.ids
        ]
        clean.run.read_along(
            [
                (f"blocks.{n}.hook_{kind}_out", self._keeper(kind))
                for kind in KINDS
                for n in layout.layers_with(kind)
            ]
        )

    def visit(self, layer: int) -> None:
        """Nothing: hooks read."""

    def found(self) -> Found:
        """Arrays of the group, predictions last."""
        import torch

        parts: dict[str, list[np.ndarray]] = {}
        numbers = [number for number, ids in enumerate(self.clean.ids) if len(ids)]
        with torch.no_grad():
            for run in map(self._run, numbers):
                if not parts:
                    largest = np.array([run.largest_row()])
                for name, values in run.effects().items():
                    parts.setdefault(name, []).append(values)
                give_back()
        arrays = {"largest_row": largest}
        absent: dict[str, str | Lacking | None] = {}
        for name, parts_of in parts.items():
            kind = name.partition("_")[0]
            layers = self.layout.layers_with(kind)
            whole = np.concatenate(parts_of, axis=-1)
            absent[name] = lacking(self.layout, layers, NOTHING[kind])
            if layers:
                arrays[name] = np.full((self.layout.n_layers, whole.shape[-1]), np.nan)
                arrays[name][layers] = whole[layers]
        return arrays, only_said(absent)

    def _keeper(self, kind: str) -> Any:
        def keep(x: "torch.Tensor", hook: Any) -> None:
            number = self.clean.run.at
            shape = (
                *self.clean.run.batches[number].ids.shape,
                -1,
            )  # OPT folds rows and positions into one
            self.kept[number][kind].append(
                x.reshape(shape)[self.clean.places[number]][:, self.chosen[number]]
            )

        return keep

    def _run(self, number: int) -> "_Run":
        import torch

        ids, chosen = self.clean.ids[number], self.chosen[number]
        final = self.clean.streams[number][-1]
        nothing = torch.zeros_like(final[:, chosen])  # what a block without this sublayer adds
        outputs = []
        for kind in KINDS:
            kept = iter(self.kept[number].pop(kind))
            own = self.layout.layers_with(kind)
            layers = range(self.layout.n_layers)
            outputs.append(torch.stack([next(kept) if n in own else nothing for n in layers]))
        return _Run(self.model, self.layout, ids, chosen, final, torch.stack(outputs))


class _Run:
    """One batch as the model ran it, and how predictions change without one output.

    Vectors are those at the chosen positions: outputs (2, n_layers, rows, positions, d_model),
    attention first.
    """

    def __init__(
        self,
        model: Blockwise,
        layout: Layout,
        ids: "torch.Tensor",
        chosen: "torch.Tensor",
        stream: "torch.Tensor",
        outputs: "torch.Tensor",
    ) -> None:
        self.model, self.layout, self.ids, self.chosen = model, layout, ids, chosen
        self.stream, self.final, self.outputs = stream, stream[:, chosen], outputs
        self.norm = model.ln_final
        self.unembedding = model.unembedding

    def effects(self) -> dict[str, np.ndarray]:
        """Arrays of the group for this batch, predictions last."""
        import torch

        norm = self.norm
        gain = torch.as_tensor(probe_norm(norm, self.layout.d_model)[0], device=self.ids.device)
        final, centred = (
            self.layout.centre(self.final).double(),
            self.layout.centre(self.outputs).double(),
        )
        scale = (final.square().mean(-1, keepdim=True) + self.layout.epsilon).sqrt()
        found: dict[str, torch.Tensor] = {
            "share": (centred * final).sum(-1) / final.square().sum(-1).clamp_min(TINY),
            "size": torch.linalg.vector_norm(centred, dim=-1) / scale[..., 0],
        }
        frozen = (norm(self.final[None]) - gain * centred / scale).float()
        found |= self._changes(norm(self.final[None]), frozen, norm(self.final - self.outputs))
        return {
            f"{kind}_{name}": values[row].flatten(1).double().cpu().numpy()
            for row, kind in enumerate(KINDS)
            for name, values in found.items()
        }

    def largest_row(self) -> float:
        """Largest norm of a token's row of the unembedding with the last norm's gain folded in,
        centred over tokens.

        A change δ of the normalised residual moves no logit, beside what moves all alike, by more
        than this times ‖δ / gain‖. What the architecture multiplies logits by counts: found by
        trying a small vector.
        """
        import torch

        rows = self.unembedding
        gain = torch.as_tensor(probe_norm(self.norm, self.layout.d_model)[0], dtype=torch.float32)
        parts = rows.split(VOCABULARY_ROWS)
        mean = (sum(part.sum(0, dtype=torch.float32) for part in parts) / len(rows)).cpu()
        largest = max(
            float(torch.linalg.vector_norm((part.cpu().float() - mean) * gain, dim=1).max())
            for part in parts
        )
        small = SMALL * torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0))
        probes = torch.stack([0 * small, small]).to(self.final).expand(*self.final.shape[:2], 2, -1)
        moved = self._logits(probes.movedim(2, 0))
        expected = torch.cat([part.cpu().float() @ small for part in parts]) - mean @ small
        difference = (moved[1] - moved[0])[0, 0].cpu()
        factor = (difference - difference.mean()) @ expected / (expected @ expected)
        return largest * float(factor) * PROBED

    def _changes(
        self, full: "torch.Tensor", frozen: "torch.Tensor", moved: "torch.Tensor"
    ) -> "dict[str, torch.Tensor]":
        """KL(full ‖ without) and the change of loss, (2, n_layers, rows, positions), from what the
        unembedding reads, with the norm's scale kept (`frozen_`) and as it comes out.

        full: the same of the whole residual, (1, rows, positions, d_model).
        """
        import torch

        bias = torch.as_tensor(probe_norm(self.norm, self.layout.d_model)[1]).to(full)
        # What the norm's bias alone predicts: what remains of logits is as long as the vector is.
        base = self._logits(bias.expand_as(full[:1, :1, :1]))
        size = max(1, LOGITS // (self.final[..., 0].numel() * len(self.unembedding)))
        found: dict[str, list[torch.Tensor]] = {}
        is_matrix: bool | None = None  # as one vector tells
        parts = zip(*(x.flatten(0, 1).split(size) for x in (frozen, moved)), strict=True)
        for own, as_it_is in parts:
            # The whole residual goes along with every part, so that the two that are compared were
            # rounded alike.
            logits = self._logits(torch.cat([full, own]))
            found_now = {"frozen_": self._compare(logits)}
            times = _times(own - bias, as_it_is - bias)
            logits[1:] += (times - 1) * (logits[1:] - base)
            if is_matrix is None:
                is_matrix = self._is_matrix(logits[1, 0, 0], as_it_is[0, 0, 0])
            if is_matrix:
                found_now[""] = self._compare(logits)
            else:
                found_now[""] = self._compare(self._logits(torch.cat([full, as_it_is])))
            for name, (kl, loss) in found_now.items():
                found.setdefault(f"{name}kl", []).append(kl)
                found.setdefault(f"{name}loss", []).append(loss)
        return {n: torch.cat(values).unflatten(0, frozen.shape[:2]) for n, values in found.items()}

    def _is_matrix(self, logits: "torch.Tensor", normalised: "torch.Tensor") -> bool:
        """Whether logits that were got by a factor are those of the head, but for rounding."""
        own = self._logits(normalised[None, None, None])[0, 0, 0]
        allowed = 2 * UNIT * self.layout.d_model * float(own.abs().max())
        return float((own - logits).abs().max()) <= allowed

    def _logits(self, normalised: "torch.Tensor") -> "torch.Tensor":
        """The model's own head, given these vectors, (…, rows, positions, d_model), in place of its
        own.
        """
        flat = normalised.flatten(0, 1)
        hooks = [("unembed.hook_in", lambda x, hook: flat)]
        logits = self.model.logits(self.ids.new_zeros(flat.shape[:2]), flat, hooks)
        return logits.unflatten(0, normalised.shape[:2])

    def _compare(self, logits: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """The first of some logits against each other."""
        import torch

        log_odds = logits.log_softmax(-1)
        difference = log_odds[0] - log_odds[1:]
        kl = (log_odds[0].exp() * difference).sum(-1, dtype=torch.float64)
        tokens = self.ids[:, self.chosen + 1, None].expand(*difference.shape[:-1], 1)
        return kl, difference.gather(-1, tokens)[..., 0]


def _times(own: "torch.Tensor", other: "torch.Tensor") -> "torch.Tensor":
    """The factor that makes one vector of another, (…, 1)."""
    length = own.double().square().sum(-1, keepdim=True).clamp_min(TINY)
    return ((own.double() * other).sum(-1, keepdim=True) / length).float()
