"""Run a model one block at a time, in TransformerLens's raw bridge."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from streamgauge.engine.mapped import Mapped, stand_in
from streamgauge.engine.together import calling_instead, run_together
from streamgauge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

LOGITS = 2**24  # held at once, several times over
TOGETHER = 1024  # tokens whose matrix products are shared; with more, products are hardly faster

Hooks = Sequence[tuple[str, Any]]  # as bridge.hooks takes them


class _Entered(Exception):
    """The last block was reached."""


@dataclass
class Batch:
    """Rows of token ids on their way through the model.

    ids: (rows, positions). stream: what the next block reads, (rows, positions, d_model). calls:
    what each block is called with beside the stream: masks, positions.
    """

    ids: "torch.Tensor"
    stream: Any = None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class Blockwise:
    """A model as its bridge runs it, block by block, so that a block's weights are read once for
    many batches.

    The model's own forward pass embeds tokens, makes masks and positions, and turns the stream into
    logits; meanwhile its blocks hand on what they are given and note what they were called with.
    Raises CheckpointError for a model that does something to the stream between its blocks.
    """

    def __init__(self, mapped: Mapped) -> None:
        from accelerate import init_empty_weights

        from streamgauge.engine.bridge import bridging, build_bridge

        self.mapped, self.device = mapped, mapped.device
        self.vocabulary = int(mapped.model.get_input_embeddings().num_embeddings)
        with init_empty_weights(include_buffers=False), mapped.without_tables():
            self.bridge = build_bridge(mapped.model, self.device)
        self._seen: dict[
            Any, torch.Tensor
        ] = {}  # the last tensor of each shape that blocks were called with
        self._beside: tuple[Any, ...] | None = (
            None  # what blocks return beside the stream, None where they return it bare
        )
        with bridging(mapped.model):
            self.blocks = list(self.bridge.blocks)
            self.n_layers = len(self.blocks)
            self._derived = {
                block.original_component: list(_splitting(block)) for block in self.blocks
            }
            mapped.after_taking.append(self._split)
            mapped.after_leaving.append(self._forget)
            self._learn_to_pass_on()

    @contextlib.contextmanager
    def held(self, layer: int) -> Iterator[Any]:
        """A block's bridge, with its weights in memory."""
        with self.mapped.held(self.blocks[layer].original_component):
            yield self.blocks[layer]

    def names_in(self, layer: int) -> list[str]:
        """The names of a block's parameters, as the plain model has them."""
        return self.mapped.names_in(self.blocks[layer].original_component)

    def enter(self, rows: "Sequence[Sequence[int]] | torch.Tensor") -> Batch:
        """Rows of one length, embedded."""
        import torch

        batch = Batch(torch.as_tensor(rows, device=self.device))

        def note(layer: int, stream: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if layer and stream is not batch.stream:
                raise CheckpointError(
                    f"{type(self.mapped.model).__name__} changes the stream between its blocks, "
                    "which cannot be followed."
                )
            batch.stream = stream
            batch.calls.append(
                (
                    tuple(map(self._shared, args)),
                    {key: self._shared(value) for key, value in kwargs.items()},
                )
            )
            if layer == self.n_layers - 1:
                raise _Entered
            return stream

        with self._passing_on(note), contextlib.suppress(_Entered):
            self.bridge(batch.ids, return_type=None, use_cache=False)
        return batch

    def _shared(self, value: Any) -> Any:
        """A tensor that another batch was called with, if it is equal:

        masks of many long prompts would fill the memory.
        """
        import torch

        if not isinstance(value, torch.Tensor):
            return value
        known = self._seen.get((value.shape, value.dtype))
        if known is None or not torch.equal(known, value):
            known = self._seen[value.shape, value.dtype] = value
        return known

    def hooked(self, hooks: Hooks) -> contextlib.AbstractContextManager[Any]:
        """Let hooks read for a while.

        To put them there costs milliseconds, so it is done once for many batches.
        """
        return self.bridge.hooks(fwd_hooks=list(hooks)) if hooks else contextlib.nullcontext()

    def step(self, batch: Batch, layer: int, hooks: Hooks = ()) -> "torch.Tensor":
        """Take a batch through one block. Returns the stream behind it."""
        args, kwargs = batch.calls[layer]
        with self.hooked(hooks):
            output = self.blocks[layer](batch.stream, *args, **kwargs)
        batch.stream = output[0] if isinstance(output, tuple) else output
        if getattr(self.blocks[layer], "attn", None) is not None:
            self.blocks[
                layer
            ].attn._pattern = None  # a bridge keeps its last attention pattern otherwise
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
        run_together(
            [partial(self.step, batch, layer) for batch in batches],
            self.linear_maps(layer),
            turn_to,
        )
        return [batch.stream for batch in batches]

    def linear_maps(self, layer: int) -> list[Any]:
        """A held block's plain linear maps, but for those in lists, such as experts, of which a
        batch calls some.
        """
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        block = self.blocks[layer]
        listed = {
            part
            for module in block.modules()
            if isinstance(module, nn.ModuleList)
            for part in module.modules()
        }
        return [
            module
            for module in block.modules()
            if type(module) in (nn.Linear, Conv1D) and module not in listed
        ]

    def logits(
        self, ids: "torch.Tensor", stream: "torch.Tensor", hooks: Hooks = ()
    ) -> "torch.Tensor":
        """What the model's own last norm and unembedding make of a stream.

        Of ids, (rows, positions), the shape matters.
        """
        with self._passing_on(lambda layer, *_: stream), self.hooked(hooks):
            logits: torch.Tensor = self.bridge(ids, return_type="logits", use_cache=False)
        return logits.float()

    @property
    def unembedding(self) -> "torch.Tensor":
        """The unembedding's rows as the file has them, (d_vocab, d_model)."""
        return self.mapped.unembedding

    def in_parts(self, ids: "torch.Tensor") -> list[slice]:
        """Slices of rows whose logits are LOGITS numbers at most, or single rows."""
        size = max(1, LOGITS // (len(self.unembedding) * ids.shape[1]))
        return [slice(start, start + size) for start in range(0, len(ids), size)]

    def _learn_to_pass_on(self) -> None:
        """Find out by running the first block on a token what blocks return."""

        def run(layer: int, stream: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._first_call = stream, args, kwargs
            raise _Entered

        import torch

        with self._passing_on(run), contextlib.suppress(_Entered):
            self.bridge(
                torch.tensor([[1, 0]], device=self.device), return_type=None, use_cache=False
            )
        stream, args, kwargs = self._first_call
        with torch.no_grad():
            output = self.blocks[0](stream, *args, **kwargs)
        self._beside = output[1:] if isinstance(output, tuple) else None

    def _passing_on(self, note: Any) -> contextlib.AbstractContextManager[None]:
        """Let blocks return what `note` makes of their number, the stream and the other
        arguments.
        """

        def forward(layer: int) -> Any:
            def pass_on(*args: Any, **kwargs: Any) -> Any:
                stream, *others = args or (kwargs.pop("hidden_states"),)
                stream = note(layer, stream, tuple(others), kwargs)
                return stream if self._beside is None else (stream, *self._beside)

            return pass_on

        return calling_instead({block: forward(layer) for layer, block in enumerate(self.blocks)})

    def _split(self, original: Any) -> None:
        """Let the bridge take a block's fused tensors apart again, now that their values have
        come.
        """
        from transformers.initialization import no_init_weights

        with no_init_weights():
            for component in self._derived.get(original, []):
                component.set_original_component(component.original_component)
                component.eval()

    def _forget(self, original: Any) -> None:
        """Let go of what the bridge took a block's fused tensors apart into."""
        import torch

        for component in self._derived.get(original, []):
            for module in set(component.modules()) - self.mapped.modules:
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = torch.nn.Parameter(
                            stand_in(parameter), requires_grad=False
                        )


def _splitting(block: Any) -> Iterator[Any]:
    """The parts of a block's bridge that hold copies of pieces of a fused tensor."""
    from transformer_lens.model_bridge.generalized_components import (
        JointGateUpMLPBridge,
        JointQKVAttentionBridge,
    )

    for component in block.modules():
        if isinstance(component, (JointQKVAttentionBridge, JointGateUpMLPBridge)):
            yield component


def grouped(tokens: Sequence[int]) -> Iterator[range]:
    """Numbers of neighbouring batches, of so many tokens each, that have TOGETHER at most or are a
    single one.
    """
    first = total = 0
    for number, more in enumerate(tokens):
        if first < number and total + more > TOGETHER:
            yield range(first, number)
            first, total = number, 0
        total += more
    if tokens:
        yield range(first, len(tokens))


def by_layer(hooks: Hooks, n_layers: int) -> list[list[tuple[str, Any]]]:
    """Hooks sorted by the block that they are on."""
    sorted_hooks: list[list[tuple[str, Any]]] = [[] for _ in range(n_layers)]
    for name, hook in hooks:
        sorted_hooks[int(name.split(".")[1])].append((name, hook))
    return sorted_hooks
