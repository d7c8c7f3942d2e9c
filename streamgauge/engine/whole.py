"""The whole model as transformers runs it: on rows beside each other, with a cache, and with
another implementation of attention.

These passes keep abreast of a walk over the blocks: each waits before a block until the walk has it
in memory, so that no weight is read again for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from streamgauge.engine.anatomy import first
from streamgauge.engine.blockwise import Batch, Blockwise
from streamgauge.engine.mapped import Mapped
from streamgauge.engine.probe import quiet
from streamgauge.engine.variants import with_attention

if TYPE_CHECKING:
    import torch

BIASED = ("alibi", "position_bias")  # what attention adds by head beside its weights


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


@dataclass(frozen=True)
class Whole:
    """Passes for some rows. passes: each with the layer at which it begins; where there are two,
    each has a part of the positions. lengths: of the rows, without what fills them up.
    """

    passes: list[tuple[int, Abreast]]
    lengths: list[int]

    def visit(self, layer: int) -> None:
        """Take all that have begun through a block. Raises what they raise."""
        for start, one in self.passes:
            if layer >= start:
                one.go_through(layer)

    def streams(self) -> "list[torch.Tensor]":
        """Of each row what the last block returned, (positions, d_model)."""
        import torch

        streams = torch.cat([one.stream for _, one in self.passes], 1)
        return [stream[:n] for stream, n in zip(streams, self.lengths, strict=False)]


def in_a_batch(model: Blockwise, rows: Sequence[Sequence[int]]) -> Whole:
    """All rows at once, and another where there is one, so that none is alone."""
    import torch

    ids = _as_one_batch(model, rows)
    ids = ids if len(ids) > 1 else torch.cat([ids, ids.roll(1, 1)])
    one = _abreast(model, model.mapped, ids, **quiet(model.mapped.model))
    return Whole([(0, one)], list(map(len, rows)))


def with_a_cache(model: Blockwise, rows: Sequence[Sequence[int]]) -> Whole | None:
    """The second half of the positions with the keys and values of the first; None where it is not
    attention alone that is cached.
    """
    from transformers import DynamicCache

    plain = model.mapped.model
    config = plain.config.get_text_config()
    ids = _as_one_batch(model, rows)
    half = ids.shape[1] // 2
    if not half or not quiet(plain) or any(path is None for path in model.seen.attention):
        return None
    cache = DynamicCache(config=config)
    begun, rest = (
        _abreast(model, model.mapped, part, past_key_values=cache, use_cache=True)
        for part in (ids[:, :half], ids[:, half:])
    )
    # The second begins with a mask for each type of layer, as long as the keys that the first layer
    # of that type has by then.
    types = getattr(config, "layer_types", None) or [""]
    return Whole([(0, begun), (max(map(types.index, types)), rest)], list(map(len, rows)))


def with_other_attention(model: Blockwise, rows: Sequence[Sequence[int]]) -> Whole | None:
    """With torch's attention in one step; None where transformers has none for this model, or it
    would have to take a bias by head.
    """
    mapped = with_attention(model.mapped, "sdpa")
    if mapped is None or is_biased(model.enter([list(rows[0])]), 0):
        return None
    one = _abreast(model, mapped, _as_one_batch(model, rows), **quiet(mapped.model))
    return Whole([(0, one)], list(map(len, rows)))


def is_biased(batch: Batch, layer: int) -> bool:
    """Whether a block is handed something that tells its heads from each other."""
    return any(batch.calls[layer][1].get(name) is not None for name in BIASED)


def padding_token(model: Blockwise) -> int | None:
    """The token that pads, where the configuration names one."""
    pad: int | None = getattr(model.mapped.model.config.get_text_config(), "pad_token_id", None)
    return pad


def _abreast(model: Blockwise, mapped: Mapped, ids: "torch.Tensor", **more: Any) -> Abreast:
    blocks = [mapped.model.get_submodule(path) for path in model.paths]
    return Abreast(lambda: mapped.model(input_ids=ids, **more), blocks)


def _as_one_batch(model: Blockwise, rows: Sequence[Sequence[int]]) -> "torch.Tensor":
    """Rows filled up behind their ends, which nothing before them reads."""
    import torch

    longest = max(map(len, rows))
    fill = min({0, 1} - {padding_token(model)})  # some architectures count positions by what pads
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows]).to(model.device)
