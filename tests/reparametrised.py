"""One function in other weights: changes of a checkpoint folder that leave what it computes alone.

Beside the faults (`tests.faults`), which these are easily taken for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.faults import Files

PADDING = 4


@dataclass(frozen=True)
class Rewriting:
    """A reparametrisation by name: what it does, False where it cannot be done to this checkpoint,
    and words of the verdict that name it.
    """

    name: str
    change: Callable[[Files], Any]
    words: str


def _every_layer(change: Callable[[Files], Any]) -> Callable[[Files], Any]:
    def everywhere(f: Files) -> Any:
        for layer in range(f.n_layers):
            f.layer = layer
            if change(f) is False:
                return False
        return True

    return everywhere


def _heads(f: Files) -> tuple[int, int]:
    """How many heads of queries, and of keys and values."""
    return f.n_heads, int(f.config.get("num_key_value_heads", f.n_heads))


def _fold(f: Files) -> None:
    """The gains, and biases, of both norms of a block into what reads behind them."""
    if f.is_gpt2:
        block = f"transformer.h.{f.layer}."
        for norm, weight, bias in (
            ("ln_1", "attn.c_attn.weight", "attn.c_attn.bias"),
            ("ln_2", "mlp.c_fc.weight", "mlp.c_fc.bias"),
        ):
            gain, shift = f.tensors[f"{block}{norm}.weight"], f.tensors[f"{block}{norm}.bias"]
            matrix = f.tensors[block + weight].double()
            f.tensors[block + bias] = (
                f.tensors[block + bias].double() + shift.double() @ matrix
            ).to(gain.dtype)
            f.tensors[block + weight] = (matrix * gain.double()[:, None]).to(gain.dtype)
            f.tensors[f"{block}{norm}.weight"] = torch.ones_like(gain)
            f.tensors[f"{block}{norm}.bias"] = torch.zeros_like(shift)
        return
    for norm, parts in (("ln1", ("W_Q", "W_K", "W_V")), ("ln2", ("W_in", "W_gate"))):
        for part in parts:
            f[part] = f[part] * f[norm]
        f[norm] = torch.ones_like(f[norm])


def _fold_all(f: Files) -> Any:
    """With the last norm's gain in a head of its own."""
    _every_layer(_fold)(f)
    if f.is_gpt2:
        return True
    head = f.tensors.get("lm_head.weight", f["embed"])
    f.tensors["lm_head.weight"] = head * f["final"]
    f["final"] = torch.ones_like(f["final"])
    f.config["tie_word_embeddings"] = False
    return True


def _values_scaled(f: Files) -> Any:
    """W_V × 1.7, what reads its values / 1.7."""
    if f.is_gpt2:
        for part, axis in (("qkv", 1), ("b_qkv", 0)):
            q, k, v = f[part].chunk(3, axis)
            f[part] = torch.cat([q, k, v * 1.7], axis)
    else:
        f["W_V"] = f["W_V"] * 1.7
    f["W_O"] = f["W_O"] / 1.7


def _neurons_scaled(f: Files) -> Any:
    if f.is_gpt2:
        return False  # its activation is not homogeneous
    times = torch.linspace(0.5, 2, len(f["W_in"]))[:, None]
    f["W_in"], f["W_out"] = f["W_in"] * times, f["W_out"] / times.T
    return True


def _neurons_permuted(f: Files) -> None:
    order = torch.randperm(
        f["W_in"].shape[1 if f.is_gpt2 else 0], generator=torch.Generator().manual_seed(f.layer)
    )
    if f.is_gpt2:
        f["W_in"], f["b_in"], f["W_out"] = f["W_in"][:, order], f["b_in"][order], f["W_out"][order]
    else:
        f["W_in"], f["W_gate"] = f["W_in"][order], f["W_gate"][order]
        f["W_out"] = f["W_out"][:, order]


def _heads_permuted(f: Files) -> None:
    """Heads, with the queries that share their keys and values, one further."""
    heads, groups = _heads(f)

    def turned(tensor: torch.Tensor, count: int, axis: int, by: int) -> torch.Tensor:
        parts = tensor.unflatten(axis, (count, -1)).roll(by, axis)
        return parts.flatten(axis, axis + 1)

    if f.is_gpt2:
        for part, axis in (("qkv", 1), ("b_qkv", 0)):
            f[part] = torch.cat([turned(x, heads, axis, 1) for x in f[part].chunk(3, axis)], axis)
        f["W_O"] = turned(f["W_O"], heads, 0, 1)
        return
    for part in ("W_K", "W_V"):
        f[part] = turned(f[part], groups, 0, 1)
    f["W_Q"] = turned(f["W_Q"], heads, 0, heads // groups)
    f["W_O"] = turned(f["W_O"], heads, 1, heads // groups)


def _rotated(f: Files) -> Any:
    """The stream in another basis, its gains folded first."""
    if f.is_gpt2:
        return False  # LayerNorm takes a mean, which a rotation does not keep
    _fold_all(f)
    width = f["embed"].shape[1]
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double()
    basis = torch.linalg.qr(noise)[0]

    def turn(name: str, matrix: torch.Tensor) -> None:
        f.tensors[name] = matrix.to(f.tensors[name].dtype)

    for name in (f.name("embed"), "lm_head.weight"):
        turn(name, f.tensors[name].double() @ basis)
    for layer in range(f.n_layers):
        f.layer = layer
        for part in ("W_Q", "W_K", "W_V", "W_in", "W_gate"):
            turn(f.name(part), f[part].double() @ basis)
        for part in ("W_O", "W_out"):
            turn(f.name(part), basis.T @ f[part].double())
    return True


def _queries_and_keys_turned(f: Files) -> Any:
    """Each pair of a rotation turned by an angle, in queries and keys alike."""
    if f.is_gpt2:
        return False
    for part, heads in zip(("W_Q", "W_K"), _heads(f), strict=True):
        first, second = f[part].double().view(heads, 2, -1, f[part].shape[1]).unbind(1)
        angle = torch.linspace(0.3, 2, first.shape[1]).double()[None, :, None]
        turned = torch.stack(
            [
                first * angle.cos() - second * angle.sin(),
                first * angle.sin() + second * angle.cos(),
            ],
            1,
        )
        f[part] = turned.reshape(f[part].shape).to(f[part].dtype)
    return True


def _centred(f: Files) -> Any:
    """Means over d_model out of what is written to the stream, which LayerNorm takes away."""
    if not f.is_gpt2:
        return False
    for part in ("W_O", "W_out", "b_O"):
        weight = f[part].double()
        f[part] = (weight - weight.mean(-1, keepdim=True)).to(f[part].dtype)
    return True


def _padded(f: Files) -> None:
    """A few rows more in the tables, of tokens that are hardly ever predicted."""
    rows = f["embed"][:1].expand(PADDING, -1) * 0 - 1e-3
    f["embed"] = torch.cat([f["embed"], rows.to(f["embed"].dtype)])
    if "lm_head.weight" in f.tensors:
        head = f.tensors["lm_head.weight"]
        f.tensors["lm_head.weight"] = torch.cat([head, rows.to(head.dtype)])
    f.config["vocab_size"] += PADDING


def _untied(f: Files) -> Any:
    if not f.config.get("tie_word_embeddings", f.is_gpt2):
        return False
    f.config["tie_word_embeddings"] = False
    f.tensors["lm_head.weight"] = f["embed"].clone()
    return True


REWRITINGS = [
    Rewriting("gains folded", _every_layer(_fold), "folded"),
    Rewriting("gains folded, the last too", _fold_all, "folded"),
    Rewriting("W_V and W_O scaled", _every_layer(_values_scaled), "scaled against each other"),
    Rewriting("W_V and W_O scaled in one layer", _values_scaled, "scaled against each other"),
    Rewriting("up and down scaled", _every_layer(_neurons_scaled), "scaled against each other"),
    Rewriting("neurons permuted", _every_layer(_neurons_permuted), "another order"),
    Rewriting("heads permuted", _every_layer(_heads_permuted), "another order"),
    Rewriting("stream rotated", _rotated, "rotated"),
    Rewriting(
        "queries and keys turned", _every_layer(_queries_and_keys_turned), "queries and keys"
    ),
    Rewriting("writing weights centred", _every_layer(_centred), "means taken out"),
    Rewriting("vocabulary padded", _padded, "more rows"),
    Rewriting("head untied", _untied, "same"),
]
