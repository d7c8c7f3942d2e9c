"""The matrices, biases and gains of a held block by TransformerLens's names, whatever its
architecture calls them, to be read and for a while replaced.

Modules are told by the ends of their names alone: whatever is done with a part is judged by the
loss that it leads to.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.checkpoints.untrusted import strange
from streamgauge.engine.anatomy import Anatomy
from streamgauge.engine.layout import probe_norm

if TYPE_CHECKING:
    import torch

NAMES = {
    "attn": {
        "W_Q": re.compile(r"q_proj|q_lin|query|wq"),
        "W_K": re.compile(r"k_proj|k_lin|key|wk"),
        "W_V": re.compile(r"v_proj|v_lin|value|wv"),
        "W_O": re.compile(r"o_proj|out_proj|out_lin|dense|c_proj|wo"),
        "W_QKV": re.compile(r"qkv_proj|query_key_value|c_attn|Wqkv|qkv"),
    },
    "mlp": {
        "W_in": re.compile(r"up_proj|c_fc|fc1|fc_in|dense_h_to_4h"),
        "W_gate": re.compile(r"gate_proj"),
        "W_gate_in": re.compile(r"gate_up_proj"),
        "W_out": re.compile(r"down_proj|c_proj|fc2|fc_out|dense_4h_to_h"),
    },
}
ROTARY = ("rope_parameters", "rope_theta", "rotary_dim", "rotary_pct")  # of configurations
BY_HEAD = "query_key_value"  # a fused matrix that holds one head's q, k and v after another's

Values = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Place:
    """Where a part lies: rows of a module's matrix, as (out, in), or entries of a vector."""

    module: Any
    attribute: str
    rows: Any = ...  # all

    def whole(self) -> "torch.Tensor":
        """The parameter, (out, in) for a matrix."""
        value: torch.Tensor = self.module._parameters[self.attribute]
        return self.turned(value)

    def turned(self, value: "torch.Tensor") -> "torch.Tensor":
        """From the file's order to (out, in), and back."""
        from transformers.pytorch_utils import Conv1D

        return value.T if isinstance(self.module, Conv1D) and value.dim() == 2 else value


class Parts:
    """A held block's parts by role: W_Q, W_K, W_V, W_O, W_in, W_gate and W_out, (out, in) however
    the file has them; their biases b_Q and so on; stored gains of ln1, ln1_post, ln2 and ln2_post,
    and their biases, as `ln1 bias`.

    rotary: whether positions turn queries and keys. d_head, n_heads, n_kv: of its attention, 0
    where they do not fit its matrices. added: by norm what it adds to its stored gain, as Gemma's
    add 1.
    """

    def __init__(self, block: Any, anatomy: Anatomy | None, config: Any) -> None:
        self.places: dict[str, Place] = {}
        self.rotary = any(getattr(config, name, None) for name in ROTARY)
        self.d_head = self.n_heads = self.n_kv = 0
        found = _modules(block, anatomy)
        self._attention(found, config)
        for role in ("W_in", "W_gate", "W_out"):
            if role in found:
                self._put(role, found[role][1])
        if "W_gate_in" in found:
            self._put_pieces({"W_gate": 1, "W_in": 1}, found["W_gate_in"][1])
        self.added: dict[str, float] = {}
        for role, path in _norms(anatomy).items():
            self._norm(role, block.get_submodule(path))

    def _norm(self, role: str, module: Any) -> None:
        gain = module._parameters.get("weight")
        if gain is None or gain.dim() != 1:
            return
        self.places[role] = Place(module, "weight")
        if module._parameters.get("bias") is not None:
            self.places[f"{role} bias"] = Place(module, "bias")
        real, _, _ = probe_norm(module, len(gain))
        self.added[role] = float(np.median(real - gain.double().cpu().numpy()).round())

    def _attention(self, found: dict[str, tuple[str, Any]], config: Any) -> None:
        if "W_O" not in found:
            return
        self._put("W_O", found["W_O"][1])
        for role in ("W_Q", "W_K", "W_V"):
            if role in found:
                self._put(role, found[role][1])
        try:
            heads = int(getattr(config, "num_attention_heads", 0) or 1)
            d_head = int(getattr(config, "head_dim", 0) or config.hidden_size // heads)
        except strange():
            return  # layers differ, and the configuration says so
        n_heads, rest = divmod(self["W_O"].shape[1], d_head)
        if rest:
            return
        if "W_QKV" in found:
            path, module = found["W_QKV"]
            n_kv = (len(Place(module, "weight").whole()) // d_head - n_heads) // 2
            by_head = path.endswith(BY_HEAD)
            if by_head and n_kv != n_heads:
                return  # Falcon's groups: queries of a group, then its key and value
            sizes = {"W_Q": n_heads * d_head, "W_K": n_kv * d_head, "W_V": n_kv * d_head}
            self._put_pieces(sizes, module, n_heads if by_head else 1)
        rows = [len(self[role]) for role in ("W_Q", "W_K", "W_V") if role in self]
        if len(rows) == 3 and rows[0] == n_heads * d_head and not rows[1] % d_head:
            self.d_head, self.n_heads, self.n_kv = d_head, n_heads, rows[1] // d_head

    def _put(self, role: str, module: Any, rows: Any = ...) -> None:
        self.places[role] = Place(module, "weight", rows)
        if module._parameters.get("bias") is not None:
            self.places[f"b_{role[2:]}"] = Place(module, "bias", rows)

    def _put_pieces(self, shares: dict[str, int], module: Any, groups: int = 1) -> None:
        """Roles that share a matrix, one after the other in each of its groups of rows."""
        import torch

        rows = torch.arange(len(Place(module, "weight").whole())).view(groups, -1)
        sizes = [n * rows.shape[1] // sum(shares.values()) for n in shares.values()]
        for role, piece in zip(shares, rows.split(sizes, 1), strict=True):
            self._put(role, module, piece.flatten())

    def __contains__(self, role: str) -> bool:
        return role in self.places

    def __getitem__(self, role: str) -> "torch.Tensor":
        place = self.places[role]
        return place.whole()[place.rows]

    def reordered(self, role: str, order: np.ndarray, axis: int = 0) -> "torch.Tensor":
        """A part with its rows, or columns, as (out, in), in another order; in the file's layout,
        in which it is at once what `having` puts in place.
        """
        import torch

        place = self.places[role]
        stored = place.module._parameters[place.attribute]
        chosen = torch.from_numpy(order)
        if axis == 0 and place.rows is not ...:
            chosen = place.rows[chosen]
        flipped = stored.dim() == 2 and place.turned(stored) is not stored
        found = stored.index_select(1 - axis if flipped else axis, chosen.to(stored.device))
        return place.turned(found)

    @contextlib.contextmanager
    def having(self, values: Values) -> Iterator[None]:
        """Let the block compute with other values of some parts for a while."""
        import torch

        own: dict[tuple[Any, str], Any] = {}
        try:
            for role, value in values.items():
                place = self.places[role]
                parameters, key = place.module._parameters, (place.module, place.attribute)
                if place.rows is ...:
                    new = value
                else:  # others have pieces of the same matrix, perhaps values too
                    new = place.whole() if key in own else place.whole().clone()
                    new[place.rows] = value
                own.setdefault(key, parameters[place.attribute])
                new = torch.nn.Parameter(place.turned(new).contiguous(), requires_grad=False)
                parameters[place.attribute] = new
            yield
        finally:
            for (module, attribute), parameter in own.items():
                module._parameters[attribute] = parameter


def _modules(block: Any, anatomy: Anatomy | None) -> dict[str, tuple[str, Any]]:
    """The path and module of each role that exactly one module of the block's attention, or of its
    MLP, has a name for.
    """
    found: dict[str, tuple[str, Any]] = {}
    for kind, names in NAMES.items():
        roots = [term.chain[0] for term in anatomy.of(kind)] if anatomy else []
        inside = [
            (path, module)
            for path, module in block.named_modules()
            if any(_within(path, root) for root in roots)
        ]
        for role, pattern in names.items():
            fitting = [
                (path, module)
                for path, module in inside
                if pattern.fullmatch(path.rpartition(".")[2])
                and getattr(module.__dict__["_parameters"].get("weight"), "ndim", 0) == 2
            ]
            if len(fitting) == 1:
                found[role] = fitting[0]
    return found


def _norms(anatomy: Anatomy | None) -> dict[str, str]:
    """Paths of the norms before and behind the attention and the MLP."""
    found: dict[str, str] = {}
    for role, kind in (("ln1", "attn"), ("ln2", "mlp")):
        path = anatomy.norm_before(kind) if anatomy else None
        if path is not None:
            found[role] = path
        behind = {path for term in anatomy.of(kind) for path in term.behind} if anatomy else set()
        if len(behind) == 1:
            found[f"{role}_post"] = behind.pop()
    return found


def _within(path: str, root: str) -> bool:
    """Whether a module is another one or lies in it; OPT's MLP is no module, its maps lie in the
    block.
    """
    return path == root or path.startswith(f"{root}.") or ("." not in path and "." not in root)
