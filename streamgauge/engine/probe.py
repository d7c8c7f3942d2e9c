"""One plain forward pass of transformers' own model over a few tokens, watched from outside.

It finds where the blocks are, in which order they run and what each is made of; and what each was
given and returned, to which the instrument is held later.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamgauge.checkpoints.untrusted import strange
from streamgauge.engine.anatomy import (
    Anatomy,
    Trace,
    alike,
    dissect,
    first,
    is_norm,
    numbers_in,
    stream_of,
)
from streamgauge.engine.mapped import Mapped
from streamgauge.errors import CheckpointError, first_line
from streamgauge.numerics.names import block_of

if TYPE_CHECKING:
    import torch

PLAIN = 2**16  # of the vocabulary, from its beginning, tokens are drawn
LENGTH = 23  # tokens of each of the two rows: like no size of a head


@dataclass
class Probe:
    """What was seen.

    ids: (2, positions), which differ in their second half. blocks: paths, in the order in which
    they ran. anatomies: of each, None where it does more than add to the stream. streams: what each
    was given, and last what the last returned, (2, positions, d_model). attention: the path of the
    module in each that shows attention weights. beside: what blocks return beside the stream, None
    where they return it bare. between: whether the model does something between its blocks: changes
    the stream, or carries something else along. ln_final: the path of the norm that reads the last
    stream, None where there is none. logits: (2, positions, d_vocab).
    """

    ids: "torch.Tensor"
    blocks: list[str] = field(default_factory=list)
    anatomies: list[Anatomy | None] = field(default_factory=list)
    streams: "list[torch.Tensor]" = field(default_factory=list)
    attention: list[str | None] = field(default_factory=list)
    beside: tuple[Any, ...] | None = None
    between: bool = False
    ln_final: str | None = None
    logits: Any = None


def probe(mapped: Mapped, context: int) -> Probe:
    """Watch a model. Raises CheckpointError for one that transformers cannot run, that is not
    causal, or whose blocks do not take one stream from the first to the last, once each.
    """
    watch = _Watch(mapped, context)
    try:
        with watch.watching():
            output = mapped.model(input_ids=watch.seen.ids, **quiet(mapped.model))
    except strange() as error:
        raise CheckpointError(
            f"transformers cannot run this {type(mapped.model).__name__} "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
    watch.seen.logits = first(output.logits if hasattr(output, "logits") else output).float()
    return watch.found()


def quiet(model: Any) -> dict[str, Any]:
    """Arguments that keep a model from caching what it will not be asked for again."""
    import inspect

    return (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )


class _Watch:
    """Hooks on all that may be a block, and on all that lies outside of blocks."""

    def __init__(self, mapped: Mapped, context: int) -> None:
        import torch

        self.mapped, self.model = mapped, mapped.model
        vocabulary = int(self.model.get_input_embeddings().num_embeddings)
        length = max(2, min(LENGTH, context))
        generator = torch.Generator().manual_seed(0)
        # Tokens that stand for an image, a padding or an end may be treated otherwise than text.
        special = set(_token_ids(self.model.config.to_dict()))
        plain = [token for token in range(min(vocabulary, PLAIN)) if token not in special]
        row, other = torch.tensor(plain)[
            torch.randint(len(plain), (2, length), generator=generator)
        ]
        other = torch.cat([row[: length // 2], other[length // 2 :]])
        self.seen = Probe(torch.stack([row, other]).to(mapped.device))
        self.numbers = list(numbers_in(self.model.config.to_dict()))
        self.trace: Trace | None = None
        self.given: Any = None
        self.kept: Any = None
        self.last: Any = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Let every hook be there for a while."""
        import torch

        paths = list(dict.fromkeys(p for name in self.mapped.stored if (p := block_of(name))))
        handles = []
        for path in paths:
            block = self.model.get_submodule(path)
            handles.append(block.register_forward_pre_hook(self._enter(path), with_kwargs=True))
            handles.append(block.register_forward_hook(self._leave(path)))
        for path, module in self.model.named_modules():
            if path and not any(f"{path}.".startswith(f"{block}.") for block in paths):
                handles.append(module.register_forward_hook(self._outside(path), with_kwargs=True))
        try:
            with torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Any:
        import torch

        def enter(block: Any, args: Any, kwargs: Any) -> None:
            stream = first(stream_of(args, kwargs))
            if path in self.seen.blocks:
                self._refuse("runs a block more than once, which cannot be followed")
            if stream.dim() != 3 or stream.shape[:2] != self.seen.ids.shape:
                self._refuse(
                    "does not keep one stream, a vector for each token, but tensors of shape "
                    f"{tuple(stream.shape)}"
                )
            # What a block hands to the next beside the stream is the model's own to carry.
            others = [*args[1:], *kwargs.values()]
            handed = [x for x in self.seen.beside or () if isinstance(x, torch.Tensor)]
            if any(value is x for value in others for x in handed):
                self.seen.between = True
            self.given, self.kept = stream, stream.clone()
            self.seen.blocks.append(path)
            self.trace = Trace(block, self.seen.ids.shape[1]).__enter__()

        return enter

    def _leave(self, path: str) -> Any:
        import torch

        def leave(block: Any, args: Any, output: Any) -> None:
            assert self.trace is not None
            self.trace.__exit__()
            pre, post = self.kept, first(output).clone()
            mutates = not torch.equal(self.given, pre)
            numbers = self.numbers + [float(x) for x in _scalars(block)]
            self.seen.anatomies.append(dissect(self.trace, pre, post, numbers, mutates))
            self.seen.attention.append(self.trace.attention)
            if self.seen.streams and not torch.equal(self.last, pre):
                self.seen.between = True
            self.seen.streams.append(pre)
            self.last, self.trace = post, None
            bare = isinstance(output, torch.Tensor)
            self.seen.beside = None if bare else tuple(output[1:])

        return leave

    def _outside(self, path: str) -> Any:
        import torch

        def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = first(stream_of(args, kwargs))
            if self.last is None or not is_norm(module) or not isinstance(given, torch.Tensor):
                return
            if _equal(given, self.last):
                self.seen.ln_final = path

        return note

    def found(self) -> Probe:
        """What was seen, after the pass. Raises CheckpointError likewise."""
        seen = self.seen
        if not seen.blocks:
            self._refuse("has no blocks that could be found")
        seen.streams.append(self.last)
        shapes = [_shape(self.model.get_submodule(path)) for path in seen.blocks]
        seen.anatomies = alike(seen.anatomies, shapes)
        return seen

    def _refuse(self, why: str) -> None:
        raise CheckpointError(f"this {type(self.model).__name__} {why}; it cannot be measured.")


def _token_ids(config: dict[Any, Any]) -> Iterator[int]:
    """The tokens that a configuration names."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _token_ids(value)
        elif str(name).endswith(("_token_id", "_token_index", "_token_ids")):
            yield from (n for n in [value] if isinstance(n, int))


def _shape(block: Any) -> tuple[tuple[str, str], ...]:
    """What a block is built of: its modules' paths and classes."""
    return tuple((path, type(module).__name__) for path, module in block.named_modules())


def _scalars(block: Any) -> "Iterator[torch.Tensor]":
    """A block's own parameters and buffers of one number, by which it may multiply what it adds."""
    own = [*block._parameters.values(), *block._buffers.values()]
    return (value for value in own if value is not None and value.numel() == 1)


def _equal(one: "torch.Tensor", other: "torch.Tensor") -> bool:
    import torch

    same = one.numel() == other.numel()
    return same and bool(torch.equal(one.reshape(-1), other.reshape(-1)))
