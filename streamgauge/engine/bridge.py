"""TransformerLens's raw bridge around a loaded model."""

import contextlib
from collections.abc import Iterator
from typing import Any

from streamgauge.errors import CheckpointError, first_line


def build_bridge(model: Any, device: Any = "cpu") -> Any:
    """The raw bridge around a loaded model, which it changes in place; no tokenizer, no weight
    processing.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    with bridging(model):
        return build_bridge_from_module(
            model, type(model).__name__, hf_config=model.config, device=device
        )


@contextlib.contextmanager
def bridging(model: Any) -> Iterator[None]:
    """Raises CheckpointError in place of whatever TransformerLens raises where it cannot run a
    model.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"TransformerLens's bridge cannot run this {type(model).__name__} "
            f"({first_line(error)})."
        ) from error
