"""One walk over the blocks, during which every group of measurements does with a block whatever it
needs it for.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from streamgauge.engine.accounts import Accounts
from streamgauge.engine.blockwise import Blockwise, by_layer, grouped
from streamgauge.engine.memory import give_back
from streamgauge.engine.points import Hooks
from streamgauge.numerics.rows import Prompts
from streamgauge.progress import track

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 1024

Readings = dict[tuple[str, int], list[np.ndarray]]


@dataclass(frozen=True)
class Lacking:
    """Why some layers have no value in an array, which is NaN there; axis: that of layers."""

    why: str
    layers: tuple[int, ...]
    axis: int = 0


# A group's arrays without its prefix; and why others are absent, or lack some layers.
Found = tuple[dict[str, np.ndarray], dict[str, "str | Lacking"]]


class Group(Protocol):
    """A group of the record on its way."""

    def visit(self, layer: int) -> None:
        """Do what is to be done while the weights of this block are in memory; layers come in
        order.
        """

    def found(self) -> Found:
        """What was found, after the last block."""


def walk(
    model: Blockwise,
    groups: Mapping[str, Group],
    *,
    accounts: Accounts | None = None,
    show: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Visit all blocks with all groups, in their order; once `stop` says so, with the first
    alone.
    """
    import torch

    for layer in track(range(model.n_layers), "blocks", show):
        with torch.no_grad(), model.held(layer):
            for number, (name, group) in enumerate(groups.items()):
                if number == 0 or not stop():
                    with accounts.of(name) if accounts else nullcontext():
                        group.visit(layer)
                    give_back()


class Meter(Protocol):
    """What a PromptRun reads with: hooks that reduce activations as they come."""

    def hooks(self) -> Hooks:
        """Hook names and functions, as bridge.hooks takes them, anew for each batch: batches take
        turns within a block.
        """


class PromptRun:
    """All prompts on their way through the model, batch by batch, in the order of
    prompts.batches(BATCH_TOKENS).
    """

    def __init__(self, model: Blockwise, prompts: Prompts, meters: Sequence[Meter]) -> None:
        self.model, self.prompts = model, prompts
        self.members = list(prompts.batches(BATCH_TOKENS))
        self.batches = [model.enter([prompts.rows[i] for i in members]) for members in self.members]
        self.hooks = [
            by_layer([hook for meter in meters for hook in meter.hooks()], model.n_layers)
            for _ in self.batches
        ]
        self.at = 0  # the number of the batch that is in the block

    def visit(self, layer: int) -> None:
        """Take every batch through a block, those together that have TOGETHER tokens at most."""
        with self.model.hooked(self._dispatched(layer)):
            for numbers in grouped([batch.ids.numel() for batch in self.batches]):
                self.model.step_together(
                    [self.batches[n] for n in numbers], layer, partial(self._turn_to, numbers)
                )

    def _dispatched(self, layer: int) -> Hooks:
        """Hooks that hand what they are given to those of the batch that it belongs to."""

        def dispatch(place: int) -> Any:
            return lambda x, hook: self.hooks[self.at][layer][place][1](x, hook)

        return [(name, dispatch(place)) for place, (name, _) in enumerate(self.hooks[0][layer])]

    def _turn_to(self, numbers: range, place: int) -> None:
        self.at = numbers[place]

    def read_along(self, hooks: Hooks) -> None:
        """Let others read too, who look at `at` for the batch."""
        for batch in self.hooks:
            for own, more in zip(batch, by_layer(hooks, self.model.n_layers), strict=True):
                own.extend(more)

    def found(self) -> Found:
        """Nothing: the meters have it."""
        return {}, {}


class Reading:
    """A group that reads each block for itself: `read` gives a layer's values by name.

    why: what is said of a value that some layers do not have.
    """

    def __init__(self, read: Callable[[int], dict[str, Any]], why: str) -> None:
        self.read, self.why = read, why
        self.layers: list[dict[str, Any]] = []

    def visit(self, layer: int) -> None:
        """Read a layer."""
        self.layers.append(self.read(layer))

    def found(self) -> Found:
        """The values of all layers, stacked."""
        return stacked(self.layers, self.why)


def stacked(layers: Sequence[dict[str, Any]], why: str) -> Found:
    """Values by name of each layer as arrays over layers: NaN where a layer has none, or fewer
    heads than another.
    """
    arrays: dict[str, np.ndarray] = {}
    lacking: dict[str, str | Lacking] = {}
    for name in dict.fromkeys(name for values in layers for name in values):
        rows = [np.asarray(values[name]) if name in values else None for values in layers]
        shapes = {row.shape for row in rows if row is not None}
        shape = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
        missing = tuple(n for n, row in enumerate(rows) if row is None or row.shape != shape)
        if not missing:
            arrays[name] = np.array(rows)
            continue
        array = arrays[name] = np.full((len(rows), *shape), np.nan)
        for layer, row in enumerate(rows):
            if row is not None:
                own: tuple[Any, ...] = (layer, *map(slice, row.shape))
                array[own] = row
        lacking[name] = Lacking(f"{in_words(missing)}: {why}", missing)
    return arrays, lacking


def in_words(layers: Sequence[int]) -> str:
    """`layer 3`, or `layers 0 to 2, 4 and 6 to 8`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"layer{'s' * (len(layers) > 1)} {listed}"


class Absent:
    """A group that this model does not have."""

    def __init__(self, reasons: "dict[str, str | Lacking]") -> None:
        self.reasons = reasons

    def visit(self, layer: int) -> None:
        """Nothing is read."""

    def found(self) -> Found:
        """The reasons alone."""
        return {}, self.reasons


def note(readings: Readings, name: str, layer: int, values: "torch.Tensor") -> None:
    """Append one batch's values, one a token, to what was read of a layer."""
    readings.setdefault((name, layer), []).append(values.float().reshape(-1).cpu().numpy())


def by_token(readings: Readings, n_layers: int, prompts: Prompts) -> dict[str, np.ndarray]:
    """Arrays (n_layers, n_tokens) of what a PromptRun's meters read, put from the order of batches
    into that of the prompts.
    """
    starts = np.cumsum([0, *map(len, prompts.rows)])
    order = [
        np.arange(starts[i], starts[i + 1])
        for batch in prompts.batches(BATCH_TOKENS)
        for i in batch
    ]
    columns = np.concatenate(order)
    arrays: dict[str, np.ndarray] = {}
    for (name, layer), parts in readings.items():
        target = arrays.setdefault(name, np.full((n_layers, len(columns)), np.nan, np.float32))
        target[layer, columns] = np.concatenate(parts)
    return arrays
