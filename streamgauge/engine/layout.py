"""What the convention needs to know of a model: its norms, and what its blocks are made of."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.anatomy import Anatomy, first
from streamgauge.engine.blockwise import Blockwise

if TYPE_CHECKING:
    import torch

PROBE_SIZE = 1e3  # large enough that a norm's epsilon does not show in fp32
SMALL = 2.0**-9  # small enough that it does, for any epsilon from 1e-12 to 1


@dataclass(frozen=True)
class Layout:
    """What the convention needs to know of a model.

    centres: whether the norms that read the stream subtract its mean (LayerNorm). gains, biases: of
    the norm before each block's mixers, (n_layers, d_model), ones and zeros where there is none.
    mlp_gains, mlp_biases: of the norm before its MLPs, likewise. anatomies: what each block is made
    of, None where it does more than add to the stream. epsilon: what norms add under their root.
    between: whether the model does something to the stream between its blocks.
    """

    centres: bool
    gains: np.ndarray
    biases: np.ndarray
    mlp_gains: np.ndarray
    mlp_biases: np.ndarray
    anatomies: tuple[Anatomy | None, ...]
    epsilon: float
    between: bool = False

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.gains)

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return int(self.gains.shape[1])

    @property
    def pre_norm(self) -> bool:
        """Whether blocks add to the stream and leave it otherwise alone."""
        return all(anatomy is not None for anatomy in self.anatomies)

    def layers_with(self, kind: str) -> list[int]:
        """The layers whose blocks have mixers (`attn`), MLPs (`mlp`), or what is neither."""
        return [n for n, a in enumerate(self.anatomies) if a and (a.of(kind) or _scales(a, kind))]

    def layers_reading(self, what: str) -> list[int]:
        """The layers whose MLPs read resid_pre (`pre`), or the mixers' outputs too (`mid`)."""
        return [n for n, a in enumerate(self.anatomies) if a and a.reads == what]

    @property
    def parallel_layers(self) -> list[int]:
        """The layers whose mixers and MLPs both read resid_pre."""
        return [n for n in self.layers_reading("pre") if n in self.layers_with("attn")]

    @property
    def with_ln1(self) -> dict[int, str]:
        """By layer the path of the norm before the mixers, where that reads resid_pre itself."""
        norms = self.norms_before("attn")
        return {n: p for n, p in norms.items() if (a := self.anatomies[n]) and a.ln1_reads_pre}

    @property
    def with_neurons(self) -> list[int]:
        """The layers whose MLP is one dense layer, an activation function, and another layer."""
        return [n for n, a in enumerate(self.anatomies) if a and a.neurons]

    @property
    def is_sum(self) -> bool:
        """Whether the last stream is the sum of the embedding and all that blocks add."""
        sums = all(anatomy is not None and not anatomy.scale for anatomy in self.anatomies)
        return sums and not self.between

    @property
    def with_plain_attention(self) -> list[int]:
        """The layers that have one mixer, with nothing but norms behind it."""
        plain = [a and [t.plain for t in a.of("attn")] == [True] for a in self.anatomies]
        return [layer for layer, is_plain in enumerate(plain) if is_plain]

    def norms_before(self, kind: str) -> dict[int, str]:
        """By layer the path of the norm through which all its mixers, or all its MLPs, read."""
        paths = {n: a.norm_before(kind) for n, a in enumerate(self.anatomies) if a and a.of(kind)}
        return {layer: path for layer, path in paths.items() if path is not None}

    def factor(self, layer: int, kind: str) -> float:
        """What a block multiplies the outputs of a kind by; of several that differ the first's."""
        anatomy = self.anatomies[layer]
        terms = anatomy.of(kind) if anatomy else []
        return terms[0].factor if terms else 1.0

    def centre(self, x: Any) -> Any:
        """Vectors of the stream in the convention: a tensor minus its mean over the last axis,
        where norms centre.
        """
        return x - x.mean(-1, keepdim=True) if self.centres else x


def _scales(anatomy: Anatomy, kind: str) -> bool:
    return kind == "other" and bool(anatomy.scale)


def probe_layout(model: Blockwise) -> Layout:
    """Find out by trying: each norm is run on known vectors."""
    d_model = int(model.seen.streams[0].shape[-1])
    shape = (model.n_layers, d_model)
    gains, biases = np.ones(shape), np.zeros(shape)
    mlp_gains, mlp_biases = np.ones(shape), np.zeros(shape)
    centring: list[bool] = []
    epsilon = None
    for layer, anatomy in enumerate(model.anatomies):
        for kind, gain, bias in (("attn", gains, biases), ("mlp", mlp_gains, mlp_biases)):
            path = anatomy.norm_before(kind) if anatomy else None
            if path is None:
                continue
            norm = model.module(layer, path)
            gain[layer], bias[layer], centres = probe_norm(norm, d_model)
            centring.append(centres)
            epsilon = probe_epsilon(norm, d_model) if epsilon is None else epsilon
    if not centring and model.ln_final is not None:  # a post-norm model's last norm says it
        centring.append(probe_norm(model.ln_final, d_model)[2])
    return Layout(
        centres=bool(centring) and all(centring),
        gains=gains,
        biases=biases,
        mlp_gains=mlp_gains,
        mlp_biases=mlp_biases,
        anatomies=tuple(model.anatomies),
        epsilon=epsilon or 0.0,
        between=model.seen.between,
    )


def run_mlp(model: Blockwise, layer: int, x: "torch.Tensor") -> "torch.Tensor":
    """What a block's MLPs add to the stream when their norm gives them x, (…, d_model), through the
    norms behind them where there are any.
    """
    anatomy = model.anatomies[layer]
    assert anatomy is not None
    total: Any = 0
    for term in anatomy.of("mlp"):
        value = x
        for path in term.chain:
            value = first(model.module(layer, path)(value))
        total = total + term.factor * value.reshape(x.shape)
    return total


def behind_attention(model: Blockwise, layer: int, output: "torch.Tensor") -> "torch.Tensor":
    """What the norms behind a block's attention, where there are any, make of its output."""
    anatomy = model.anatomies[layer]
    assert anatomy is not None
    (term,) = anatomy.of("attn")
    for path in term.behind:
        output = model.module(layer, path)(output)
    return output


def _probe_vector(d_model: int, device: Any) -> "torch.Tensor":
    """A vector of mean 0 exactly, and no coordinate 0, nearly of unit root mean square."""
    import torch

    probe = torch.ones(d_model, device=device)
    probe[1::2] = -1
    if d_model % 2:
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0])
    return probe


def _device(norm: Any) -> Any:
    import torch

    return next(norm.parameters(), torch.zeros(1)).device


def probe_norm(norm: Any, d_model: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Gain and bias, (d_model,), and whether it centres, for any norm, however its parameters are
    written (Gemma stores gain - 1).
    """
    import torch

    with torch.no_grad():
        probe = _probe_vector(d_model, _device(norm))
        bias = norm(torch.zeros_like(probe)[None, None])[0, 0]
        output = norm(PROBE_SIZE * probe[None, None])[0, 0]
        shifted = norm(PROBE_SIZE * (probe[None, None] + 0.5))[0, 0]
    scale = float(torch.linalg.vector_norm(output - bias)) or 1.0
    centres = float(torch.linalg.vector_norm(shifted - output)) < 1e-3 * scale
    gain = (output - bias) / (probe / probe.square().mean().sqrt())
    return gain.double().cpu().numpy(), bias.double().cpu().numpy(), centres


def probe_epsilon(norm: Any, d_model: int) -> float:
    """What a norm adds to the mean square under its root; 0 where that does not show."""
    import torch

    probe = _probe_vector(d_model, _device(norm))
    size = float(probe.square().mean())
    with torch.no_grad():
        bias = norm(torch.zeros_like(probe)[None, None])[0, 0]
        large, small = (
            float(torch.linalg.vector_norm((norm(s * probe[None, None])[0, 0] - bias).double()))
            for s in (PROBE_SIZE, SMALL)
        )
    if not 0 < small < large:
        return 0.0
    return SMALL**2 * size * ((large / small) ** 2 - 1)
