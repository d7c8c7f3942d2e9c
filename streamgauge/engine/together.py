"""Let several computations that call the same linear maps run side by side, each map applied once
to the vectors of all.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from streamgauge.errors import CheckpointError

if TYPE_CHECKING:
    import torch


def run_together(
    tasks: Sequence[Callable[[], Any]], maps: Sequence[Any], tell: Callable[[int], None]
) -> None:
    """Run tasks in turns, each up to its next call of a map, whose matrix then multiplies the
    vectors of all of them.

    One product with a large matrix takes less time than many small ones, while norms and activation
    functions are faster on few vectors, which stay in the cache: so products are shared, and
    nothing else is.

    tasks: functions that call the same maps in the same order. maps: modules that act on every
    vector by itself. tell: is called with a task's number before the task goes on. Raises
    CheckpointError for tasks that call other maps than the first.
    """
    from greenlet import getcurrent, greenlet

    runs = [greenlet(task) for task in tasks]

    def go_on(number: int, *given: Any) -> Any:
        tell(number)
        return runs[number].switch(*given)

    try:
        with _asking(maps, getcurrent()):
            calls = [go_on(number) for number in range(len(runs))]
            while any(runs):
                if not all(runs) or any(multiply is not calls[0][0] for multiply, _ in calls):
                    raise CheckpointError(
                        "Blocks compute other things for one prompt than for another, which "
                        "cannot be followed."
                    )
                answers = _answers(calls[0][0], [vectors for _, vectors in calls])
                calls = [go_on(number, answer) for number, answer in enumerate(answers)]
    finally:
        for run in filter(None, runs):  # those that wait still, after an error
            run.throw()


def _asking(maps: Sequence[Any], hub: Any) -> contextlib.AbstractContextManager[None]:
    """Let maps ask the hub, which runs the tasks, for their product, and wait for it."""

    def asking(multiply: Any) -> Any:
        return lambda vectors: hub.switch((multiply, vectors))

    return calling_instead({module: asking(module.forward) for module in maps})


@contextlib.contextmanager
def calling_instead(forwards: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Let modules call these functions in place of their forward for a while; hooks on the modules
    stay.
    """
    own = {
        module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__
    }
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]
        for module, forward in own.items():
            module.__dict__["forward"] = forward


def _answers(multiply: Any, inputs: "list[torch.Tensor]") -> "list[torch.Tensor]":
    import torch

    flat = [vectors.reshape(-1, vectors.shape[-1]) for vectors in inputs]
    parts = multiply(torch.cat(flat) if len(flat) > 1 else flat[0]).split(
        [len(rows) for rows in flat]
    )
    return [part.view(*vectors.shape[:-1], -1) for part, vectors in zip(parts, inputs, strict=True)]


def running() -> Any:
    """The computation that is under way, by which what belongs to it can be kept apart."""
    from greenlet import getcurrent

    return getcurrent()
