"""Forward passes of transformers' own that keep abreast of a walk over the blocks: each waits
before a block until the walk has it in memory, so that no weight is read again for them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from streamgauge.engine.anatomy import first

if TYPE_CHECKING:
    import torch


class Abreast:
    """A forward pass that stops before every block until it is told to go through it, and ends
    behind the last one.

    forward: makes the pass. blocks: its modules, in the order in which they run. stream: what the
    last of them has returned, in the end.
    """

    def __init__(self, forward: Callable[[], Any], blocks: Sequence[Any]) -> None:
        from greenlet import getcurrent, greenlet

        self.run = greenlet(forward)
        self.reached, self.back = -1, getcurrent()
        self.stream: torch.Tensor | None = None
        self.handles = [
            block.register_forward_pre_hook(partial(self._wait, layer), prepend=True)
            for layer, block in enumerate(blocks)
        ]
        self.handles.append(blocks[-1].register_forward_hook(self._end))

    def go_through(self, layer: int) -> None:
        """Begin, or go on, until the block behind this one is called, or to the end. Raises what
        the pass raises.
        """
        from greenlet import getcurrent

        self.reached, self.back, self.run.parent = layer, getcurrent(), getcurrent()
        try:
            self.run.switch()
        finally:
            if self.run.dead:
                for handle in self.handles:
                    handle.remove()

    def _wait(self, layer: int, *_: Any) -> None:
        from greenlet import getcurrent

        while getcurrent() is self.run and layer > self.reached:
            self.back.switch()

    def _end(self, module: Any, args: Any, output: Any) -> None:
        from greenlet import GreenletExit, getcurrent

        if getcurrent() is self.run:
            self.stream = first(output).float().clone()
            raise GreenletExit
