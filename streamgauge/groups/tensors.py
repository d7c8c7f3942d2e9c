"""The state of every tensor: whether its numbers are finite, whether it is dead or another's twin,
its norm and its sketch.
"""

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.forward import Found
from streamgauge.engine.pieces import frobenius_norm, runs, sketch
from streamgauge.numerics.names import LAYER, layer_of, role_of

if TYPE_CHECKING:
    import torch


class Tensors:
    """What a model's tensors are like; those of a block are read when it is visited, all others at
    once.

    problems: what is wrong with them by kind, one line each: not finite, all zero, a range of equal
    numbers, the same in two layers, or whole blocks that stand twice. Of tensors that belong to a
    block only matrices are held to be alive and distinct: biases and gains may rightly be zero, and
    are all alike before training.
    """

    def __init__(self, model: Blockwise, *, with_sketches: bool) -> None:
        self.model, self.with_sketches = model, with_sketches
        self.tensors = dict(model.mapped.unique())
        self.problems: dict[str, list[str]] = {"not_finite": [], "dead": [], "runs": []}
        self.twins: dict[str, str] = {}  # from a block's matrix to the earlier one that it equals
        self.norms: dict[str, float] = {}
        self.sketches: dict[str, np.ndarray] = {}
        self.distinct: dict[tuple[str, float], list[str]] = defaultdict(list)  # by kind and norm
        visited = [set(model.names_in(layer)) for layer in range(model.n_layers)]
        self.names = [[name for name in self.tensors if name in names] for names in visited]
        for name in [name for name in self.tensors if not any(name in names for names in visited)]:
            self._read(name)

    def visit(self, layer: int) -> None:
        """Read a block's tensors."""
        for name in self.names[layer]:
            self._read(name)

    def found(self) -> Found:
        """Sketches and norms, in the model's order."""
        if not self.with_sketches:
            return {}, {}
        sketches, norms = (
            [kept[name] for name in self.tensors] for kept in (self.sketches, self.norms)
        )
        return {"parameters": np.array(sketches), "norms": np.array(norms)}, {}

    def tables(self, dtypes: dict[str, str], rounding: dict[str, float]) -> list[dict[str, Any]]:
        """Name and shape of each tensor, the dtype that its file has it in, and how far rounding to
        that has moved it at most where that is known; a prefix may be missing there.
        """
        dtypes, rounding = _with_short(dtypes), _with_short(rounding)
        rows = []
        for name, tensor in self.tensors.items():
            short = name.split(".", 1)[-1]
            row: dict[str, Any] = {"name": name, "shape": list(tensor.shape)}
            row["dtype"] = dtypes.get(name, dtypes.get(short))
            if (size := rounding.get(name, rounding.get(short))) is not None:
                row["rounding"] = size
            rows.append(row)
        return rows

    @property
    def broken(self) -> bool:
        """Whether a tensor holds NaN or Inf, with which the model cannot be run."""
        return bool(self.problems["not_finite"])

    def _read(self, name: str) -> None:
        import torch

        tensor = self.tensors[name]
        self.norms[name] = frobenius_norm(tensor)
        if self.with_sketches:
            whole = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor
            self.sketches[name] = sketch(whole).cpu().numpy()
        if not np.isfinite(self.norms[name]):
            bad = int((~torch.isfinite(tensor)).sum())
            self.problems["not_finite"].append(
                f"{name}: {bad} of {tensor.numel()} values are NaN or Inf"
            )
            return
        if tensor.dim() > 1 and self.norms[name]:
            self._find_runs(name, tensor)
        # Biases of all experts are one matrix.
        if LAYER.search(f".{name}") and tensor.dim() > 1 and not name.endswith("bias"):
            self._compare(name, tensor)

    def _find_runs(self, name: str, tensor: "torch.Tensor") -> None:
        for start, count in runs(tensor):
            place = [int(n) for n in np.unravel_index(start, tensor.shape)]
            value = float(tensor.reshape(-1)[start])
            self.problems["runs"].append(
                f"{name}: {count:,} numbers from {place} on are all {value:.4g}"
            )

    def _compare(self, name: str, tensor: "torch.Tensor") -> None:
        import torch

        if self.norms[name] == 0:
            self.problems["dead"].append(f"{name} is all zero")
            return
        if tensor.dim() > 2 and "expert" in name:
            # Experts that are alike may rightly be: a dense model was made into a sparse one.
            dead = (~tensor.flatten(1).any(1)).nonzero()[:, 0].tolist()
            self.problems["dead"] += [f"{name}: expert {number} is all zero" for number in dead]
        others = self.distinct[role_of(name), self.norms[name]]
        twin = next((other for other in others if torch.equal(self.tensors[other], tensor)), None)
        if twin is None:
            others.append(name)
        else:
            self.twins[name] = twin

    def say_twins(self) -> None:
        """When all are read: whole blocks that are repeated in order, and matrices that repeat by
        themselves.
        """
        matrices = [[n for n in names if self.tensors[n].dim() > 1] for names in self.names]
        runs = repeated_blocks(matrices, self.twins)
        inside = {
            n for first, last, _ in runs for names in matrices[first : last + 1] for n in names
        }
        if not self.broken:  # or not all blocks were read
            self.problems["repeated"] = [
                f"layers {first} to {last} are layers {first - back} to {last - back}"
                for first, last, back in runs
            ]
        self.problems["alike"] = [
            f"{name} equals {twin}" for name, twin in self.twins.items() if name not in inside
        ]


def _with_short(table: dict[str, Any]) -> dict[str, Any]:
    """The same, and what it says by names without their first part."""
    return {name.split(".", 1)[-1]: said for name, said in table.items()} | table


def repeated_blocks(matrices: list[list[str]], twins: dict[str, str]) -> list[tuple[int, int, int]]:
    """Runs of blocks, two or more in order, each of whose matrices is that of the block so many
    layers back, as depth upscaling leaves them: first, last, and how many back.

    matrices: names by layer; twins: from a name to the earlier one that it equals. A block that
    equals its own neighbour is none: copies that went wrong look so.
    """
    back = [_back(layer, own, twins) for layer, own in enumerate(matrices)]
    runs = []
    for number, group in itertools.groupby(range(len(back)), key=back.__getitem__):
        layers = list(group)
        if number >= 2 and len(layers) >= 2:
            runs.append((layers[0], layers[-1], number))
    return runs


def _back(layer: int, own: list[str], twins: dict[str, str]) -> int:
    """How many layers back the block lies that all matrices of this one equal; 0 for none."""
    found = {layer - (layer_of(twins[name]) or 0) if name in twins else 0 for name in own}
    return found.pop() if len(found) == 1 else 0
