"""One forward pass over the prompts, read by meters: objects whose hooks reduce activations as they come."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from streamgauge.model import device_of
from streamgauge.prompts import Prompts

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = 1024

Readings = dict[tuple[str, int], list[np.ndarray]]


class Meter(Protocol):
    """What run_prompts reads with."""

    def hooks(self) -> list[tuple[str, Any]]:
        """Hook names and functions, as bridge.hooks takes them."""


def run_prompts(bridge: Any, prompts: Prompts, meters: Sequence[Meter], show: bool) -> None:
    """Run the model on every prompt, in the order of prompts.batches(BATCH_TOKENS), with the hooks of all meters."""
    import torch
    from tqdm import tqdm

    batches = list(prompts.batches(BATCH_TOKENS))
    hooks = [hook for meter in meters for hook in meter.hooks()]
    with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
        for batch in tqdm(batches, "forward pass", unit="batch", disable=None if show else True):
            bridge(torch.tensor([prompts.rows[i] for i in batch], device=device_of(bridge)), return_type=None)


def note(readings: Readings, name: str, layer: int, values: "torch.Tensor") -> None:
    """Append one batch's values, one a token, to what was read of a layer."""
    readings.setdefault((name, layer), []).append(values.float().reshape(-1).cpu().numpy())


def by_token(readings: Readings, n_layers: int, prompts: Prompts) -> dict[str, np.ndarray]:
    """Arrays (n_layers, n_tokens) of what run_prompts read, put from the order of batches into that of the prompts."""
    starts = np.cumsum([0, *map(len, prompts.rows)])
    order = [np.arange(starts[i], starts[i + 1]) for batch in prompts.batches(BATCH_TOKENS) for i in batch]
    columns = np.concatenate(order)
    arrays: dict[str, np.ndarray] = {}
    for (name, layer), parts in readings.items():
        target = arrays.setdefault(name, np.full((n_layers, len(columns)), np.nan, np.float32))
        target[layer, columns] = np.concatenate(parts)
    return arrays
