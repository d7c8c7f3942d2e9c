"""Run a model one block at a time, through transformers' own modules."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from streamgauge.engine.anatomy import first
from streamgauge.engine.load import context_length
from streamgauge.engine.mapped import Mapped
from streamgauge.engine.points import Hooks, hooked
from streamgauge.engine.probe import probe, quiet
from streamgauge.engine.together import calling_instead, run_together
from streamgauge.errors import CheckpointError, first_line

if TYPE_CHECKING:
    import torch

LOGITS = 2**25  # held at once, several times over
CAUSAL = 1e-5  # relative change by later tokens that rounding does not explain
TOGETHER = 1024  # tokens whose matrix products are shared; with more, products are hardly faster


class _Entered(Exception):
    """The block that was asked for was reached."""


@dataclass
class Batch:
    """Rows of token ids on their way through the model.

    ids: (rows, positions). stream: what the next block reads, (rows, positions, d_model). beside:
    what the last block returned beside it. calls: what each block is called with beside the stream:
    masks, positions.
    """

    ids: "torch.Tensor"
    stream: Any = None
    beside: tuple[Any, ...] | None = None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class Blockwise:
    """A model run block by block, so that a block's weights are read once for many batches.

    The model's own forward pass embeds tokens, makes masks and positions, and turns the stream into
    logits; meanwhile its blocks hand on what they are given and note what they were called with.
    seen: what a probe of the model found. blocks: its modules, in the order in which they run.
    Raises CheckpointError for a model that cannot be followed so.
    """

    def __init__(self, mapped: Mapped) -> None:
        self.mapped, self.device = mapped, mapped.device
        self.vocabulary = int(mapped.model.get_input_embeddings().num_embeddings)
        self.seen = probe(mapped, context_length(mapped.model.config))
        self.paths = self.seen.blocks
        self.blocks = [mapped.model.get_submodule(path) for path in self.paths]
        self.anatomies = self.seen.anatomies
        self.n_layers = len(self.blocks)
        self._quiet = quiet(mapped.model)
        self._known: dict[Any, torch.Tensor] = {}  # the last tensor of each shape in a call
        self._refuse_encoder()

    def _refuse_encoder(self) -> None:
        """Raise CheckpointError where every block lets tokens see later ones, as in an encoder.

        Where only some do it is a fault of theirs, which the law of causality finds and places.
        """
        last = self.seen.streams[-1]
        half = last.shape[1] // 2
        if _change(last, half) > CAUSAL and all(map(self._leaks, range(self.n_layers))):
            raise CheckpointError(
                f"this {type(self.mapped.model).__name__} is not causal as it is saved: what it "
                "makes of a token depends on later ones; it cannot be measured."
            )

    def _leaks(self, layer: int) -> bool:
        """Whether a block's output at first tokens depends on later ones."""
        import torch

        batch = self.enter(self.seen.ids)
        half = batch.ids.shape[1] // 2
        while len(batch.calls) <= layer:
            batch.stream = self.seen.streams[len(batch.calls)]
            self.bring(batch, len(batch.calls))
        stream = self.seen.streams[layer].clone()
        stream[1, :half] = stream[0, :half]
        args, kwargs = batch.calls[layer]
        with torch.no_grad(), self.held(layer) as block:
            try:
                output = block(stream, *args, **kwargs)
            except (TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"blocks of this {type(self.mapped.model).__name__} cannot be run one by one "
                    f"({first_line(error)}); it cannot be measured."
                ) from error
        return _change(first(output), half) > CAUSAL

    @contextlib.contextmanager
    def held(self, layer: int) -> Iterator[Any]:
        """A block, with its weights in memory."""
        with self.mapped.held(self.paths[layer]):
            yield self.blocks[layer]

    def names_in(self, layer: int) -> list[str]:
        """The names of a block's parameters, as the plain model has them."""
        return self.mapped.names_in(self.paths[layer])

    def module(self, layer: int, path: str) -> Any:
        """A module of a block."""
        return self.blocks[layer].get_submodule(path)

    @property
    def ln_final(self) -> Any:
        """The norm that reads the last stream, None where there is none."""
        path = self.seen.ln_final
        return None if path is None else self.mapped.model.get_submodule(path)

    def enter(self, rows: "Sequence[Sequence[int]] | torch.Tensor") -> Batch:
        """Rows of one length, embedded."""
        import torch

        batch = Batch(torch.as_tensor(rows, device=self.device))
        last = 0 if self.seen.between else self.n_layers - 1

        def note(layer: int, stream: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if layer == 0:
                batch.stream = stream
            self._note(batch, args, kwargs)
            if layer == last:
                raise _Entered
            return stream

        self._pass(batch.ids, note)
        return batch

    def step(self, batch: Batch, layer: int, hooks: Hooks = ()) -> "torch.Tensor":
        """Take a batch through one block. Returns the stream behind it."""
        self.bring(batch, layer)
        args, kwargs = batch.calls[layer]
        anatomy = self.anatomies[layer]
        given = batch.stream if anatomy is None or not anatomy.mutates else batch.stream.clone()
        with self.hooked(hooks):
            output = self.blocks[layer](given, *args, **kwargs)
        batch.stream = first(output)
        batch.beside = None if output is batch.stream else tuple(output[1:])
        stream: torch.Tensor = batch.stream
        return stream

    def step_together(
        self,
        batches: Sequence[Batch],
        layer: int,
        turn_to: Callable[[int], None] = lambda number: None,
    ) -> "list[torch.Tensor]":
        """Take several batches, best as many as `grouped` says, through one held block, where they
        share matrix products.

        turn_to: is called with a batch's number before its turn comes; batches take turns within
        the block. Returns the streams behind it. Raises CheckpointError for a block that does other
        things to one batch than to another.
        """
        tasks = [partial(self.step, batch, layer) for batch in batches]
        run_together(tasks, self.linear_maps(layer), turn_to)
        return [batch.stream for batch in batches]

    def linear_maps(self, layer: int) -> list[Any]:
        """A held block's plain linear maps, but for those in lists, such as experts, of which a
        batch calls some.
        """
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        block = self.blocks[layer]
        lists = [module for module in block.modules() if isinstance(module, nn.ModuleList)]
        listed = {part for module in lists for part in module.modules()}
        maps = [module for module in block.modules() if type(module) in (nn.Linear, Conv1D)]
        return [module for module in maps if module not in listed]

    def hooked(self, hooks: Hooks) -> contextlib.AbstractContextManager[Any]:
        """Let hooks read for a while, by names as in `blocks.3.hook_attn_out` (see `points`)."""
        return hooked(self, hooks) if hooks else contextlib.nullcontext()

    def logits(
        self, ids: "torch.Tensor", stream: "torch.Tensor", hooks: Hooks = ()
    ) -> "torch.Tensor":
        """What the model's own last norm and unembedding make of a stream.

        Of ids, (rows, positions), the shape matters. Gradients of the stream are kept where it asks
        for some.
        """
        with self.hooked(hooks):
            output = self._pass(ids, lambda layer, *_: stream, gradient=stream.requires_grad)
        logits: torch.Tensor = first(output.logits if hasattr(output, "logits") else output)
        return logits.float()

    @property
    def unembedding(self) -> "torch.Tensor":
        """The unembedding's rows as the file has them, (d_vocab, d_model)."""
        return self.mapped.unembedding

    @property
    def head(self) -> float:
        """What the unembedding costs, in blocks."""
        per_block = sum(self.mapped.stored[name].numel() for name in self.names_in(0))
        return float(self.unembedding.numel() / per_block)

    def in_parts(self, ids: "torch.Tensor") -> list[slice]:
        """Slices of rows whose logits are LOGITS numbers at most, or single rows."""
        size = max(1, LOGITS // (len(self.unembedding) * ids.shape[1]))
        return [slice(start, start + size) for start in range(0, len(ids), size)]

    def bring(self, batch: Batch, layer: int) -> None:
        """Let the model's own forward pass do to the stream what it does between the last block and
        this one, where that is not done yet.
        """
        if layer < len(batch.calls):
            return

        def note(at: int, stream: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if at == layer - 1:
                return batch.stream
            if at == layer:
                batch.stream = stream
                self._note(batch, args, kwargs)
                raise _Entered
            return stream

        self._pass(batch.ids, note, batch.beside)

    def _note(self, batch: Batch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what a block is called with beside the stream."""
        batch.calls.append(
            (
                tuple(map(self._shared, args)),
                {key: self._shared(value) for key, value in kwargs.items()},
            )
        )

    def _shared(self, value: Any) -> Any:
        """A tensor that another batch was called with, if it is equal: masks of many long prompts
        would fill the memory. No cache: a block that is called twice would see its first tokens
        again.
        """
        import torch
        from transformers import Cache

        if isinstance(value, Cache):
            return None
        if not isinstance(value, torch.Tensor):
            return value
        known = self._known.get((value.shape, value.dtype))
        if known is None or not torch.equal(known, value):
            known = self._known[value.shape, value.dtype] = value
        return known

    def _pass(
        self,
        ids: "torch.Tensor",
        note: Any,
        beside: tuple[Any, ...] | None = None,
        gradient: bool = False,
    ) -> Any:
        """The model's own forward pass, during which blocks return what `note` makes of their
        number, the stream and the other arguments, and beside it what the last block returned; what
        the pass returns, if it was not broken off.
        """
        import torch

        returned = self.seen.beside if beside is None else beside

        def standing_in(layer: int) -> Any:
            def pass_on(*args: Any, **kwargs: Any) -> Any:
                stream, *others = args or (kwargs.pop("hidden_states"),)
                stream = note(layer, stream, tuple(others), kwargs)
                return stream if returned is None else (stream, *returned)

            return pass_on

        stubs = {block: standing_in(layer) for layer, block in enumerate(self.blocks)}
        with (
            calling_instead(stubs),
            contextlib.suppress(_Entered),
            torch.set_grad_enabled(gradient),
        ):
            return self.mapped.model(input_ids=ids, **self._quiet)
        return None


def _change(stream: "torch.Tensor", half: int) -> float:
    """How far two rows of a stream differ at their first tokens, relatively."""
    import torch

    one, other = stream[:, :half].double()
    size = torch.linalg.vector_norm(one).clamp_min(1e-300)
    return float(torch.linalg.vector_norm(other - one) / size)


def grouped(tokens: Sequence[int]) -> Iterator[range]:
    """Numbers of neighbouring batches, of so many tokens each, that have TOGETHER at most or are a
    single one.
    """
    start = total = 0
    for number, more in enumerate(tokens):
        if start < number and total + more > TOGETHER:
            yield range(start, number)
            start, total = number, 0
        total += more
    if tokens:
        yield range(start, len(tokens))


def by_layer(hooks: Hooks, n_layers: int) -> list[list[tuple[str, Any]]]:
    """Hooks sorted by the block that they are on."""
    sorted_hooks: list[list[tuple[str, Any]]] = [[] for _ in range(n_layers)]
    for name, hook in hooks:
        sorted_hooks[int(name.split(".")[1])].append((name, hook))
    return sorted_hooks
