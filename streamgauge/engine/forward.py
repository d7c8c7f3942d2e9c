"""One walk over the blocks, during which every group of measurements does with a block whatever it
needs it for.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from streamgauge.engine.accounts import Accounts
from streamgauge.engine.blockwise import Blockwise, Hooks, by_layer, grouped
from streamgauge.engine.memory import give_back
from streamgauge.numerics.rows import Prompts
from streamgauge.progress import track

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 1024

Readings = dict[tuple[str, int], list[np.ndarray]]
Found = tuple[
    dict[str, np.ndarray], dict[str, str]
]  # a group's arrays without its prefix, and why others are absent


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
        """Hook names and functions, as bridge.hooks takes them, anew for each batch:

        batches take turns within a block.
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
    """A group that reads each block for itself: `read` gives a layer's values by name."""

    def __init__(self, read: Callable[[int], dict[str, Any]]) -> None:
        self.read = read
        self.layers: list[dict[str, Any]] = []

    def visit(self, layer: int) -> None:
        """Read a layer."""
        self.layers.append(self.read(layer))

    def found(self) -> Found:
        """The values of all layers, stacked."""
        return {
            name: np.array([values[name] for values in self.layers]) for name in self.layers[0]
        }, {}


class Absent:
    """A group that this model does not have."""

    def __init__(self, reasons: dict[str, str]) -> None:
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
