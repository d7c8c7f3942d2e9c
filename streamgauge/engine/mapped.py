"""A model whose weights stay in its mapped files: a block has its own in memory, in fp32, only
while it is at work.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from streamgauge.engine.memory import give_back
from streamgauge.numerics.names import block_of

if TYPE_CHECKING:
    import torch

VOCABULARY_ROWS = 4096  # of the unembedding that are in memory at once

Place = tuple[Any, str, str]  # a module, its attribute, and the parameter's name

# From a parameter's name, some of its values in fp32, the rows that they are (all where None), and
# memory that may be written to, if there is some, to what is used instead.
Change = Callable[
    [str, "torch.Tensor", "torch.Tensor | None", "torch.Tensor | None"], "torch.Tensor"
]


class Mapped:
    """A plain Hugging Face model and where its weights lie.

    model: its modules, whose large parameters have no memory outside of `held`; buffers are real.
    stored: each parameter by name, as the file has it, mapped rather than read; tied ones under all
    their names. device: where it computes.

    Each block takes its matrices when it is run and lets go of them afterwards. The input embedding
    takes the rows it is asked for, the unembedding VOCABULARY_ROWS at a time. Everything else
    stays: vectors and positions, which are small, and whatever large tables an architecture has
    outside of its blocks beside those two.
    """

    def __init__(self, model: Any, stored: "dict[str, torch.Tensor]", device: str) -> None:
        import torch

        self.model, self.stored, self.device = model, stored, torch.device(device)
        # Told of the path of a block whose weights have come, or gone.
        self.after_taking: list[Callable[[str], None]] = []
        self.after_leaving: list[Callable[[str], None]] = []
        self.modules: set[Any] = set()  # those that have parameters of their own
        self.lender: Mapped | None = None  # has the same weights, and perhaps in memory already
        self._change: Change | None = None
        # Of a held block whose matrices change: as they are, and where others may be put, one after
        # the other, since new memory costs as much as what is done to them.
        self._unchanged: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        # One name for tied ones.
        self._first_names = {tensor.data_ptr(): name for name, tensor in reversed(stored.items())}
        self._matrices: dict[str | None, list[Place]] = defaultdict(list)  # by block
        self._small: dict[str | None, list[Place]] = defaultdict(list)  # and outside under None
        self._holds: Counter[str] = Counter()
        self._tables: dict[Any, list[Place]] = defaultdict(list)  # by skeleton
        self.add(model)

    def add(self, model: Any) -> None:
        """Let another skeleton of the same model have the same weights, when a block is at work."""
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        new: dict[str | None, list[Place]] = defaultdict(list)
        for name, stored in self.stored.items():
            path, _, attribute = name.rpartition(".")
            module, block = model.get_submodule(path), block_of(name)
            place = (module, attribute, name)
            self.modules.add(module)
            if block is not None and stored.dim() > 1:
                self._empty(*place)
                self._matrices[block].append(place)
            elif module is embedding or (module is head and attribute == "weight"):
                self._empty(*place)
                self._tables[model].append(place)
                if module is embedding:
                    self._serve_rows(module, name)
                else:
                    self._serve_chunks(module, name)
            else:
                self._small[block].append(place)
                new[block].append(place)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        for places in new.values():
            self._fill(places)
        for path in [path for path in self._matrices if path is not None]:
            self._take_when_run(model.get_submodule(path), path)

    @classmethod
    def of(cls, model: Any, device: str = "cpu") -> "Mapped":
        """A model that is in memory already, which is changed in place."""
        stored = {name: p.data for name, p in model.named_parameters(remove_duplicate=False)}
        return cls(model, stored, device)

    def unique(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Each parameter once, in the model's order, as the file has it."""
        seen: set[tuple[int, tuple[int, ...]]] = set()
        for name, tensor in self.stored.items():
            key = (tensor.data_ptr(), tuple(tensor.shape))
            if key not in seen:
                seen.add(key)
                yield name, tensor

    @contextlib.contextmanager
    def held(self, block: str) -> Iterator[None]:
        """Keep a block's weights in memory, in fp32 on the device."""
        try:
            self._take(block)
            yield
        finally:
            self._leave(block)

    @contextlib.contextmanager
    def changes(self, block: str | None = None) -> Iterator[Callable[[Change | None], None]]:
        """Let a held block, or everything outside of blocks, compute with one change after the
        other of the file's weights. Whoever was told that the block has come is not told of them.
        """

        import torch

        def use(change: Change | None) -> None:
            if change is not self._change:
                self._change = change
                self._refill(block)

        places = self._matrices[block] if block is not None and self._holds[block] else []
        self._unchanged = {
            name: (own := getattr(m, attr).data, torch.empty(own.shape, device=own.device))
            for m, attr, name in places
        }
        try:
            yield use
        finally:
            use(None)
            self._unchanged = {}

    @contextlib.contextmanager
    def without_tables(self, model: Any) -> Iterator[None]:
        """Let a skeleton's embedding and unembedding be where nothing is copied: a bridge that is
        built puts the tables of tokens and of positions together, where there are both.
        """
        import torch

        tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        if len(tables) < 2:
            yield
            return
        for module, attribute, name in self._tables[model]:
            nothing = self.stored[name].to("meta")
            module._parameters[attribute] = torch.nn.Parameter(nothing, requires_grad=False)
        try:
            yield
        finally:
            for place in self._tables[model]:
                self._empty(*place)

    @property
    def embedding(self) -> str:
        """The name of the parameter that holds the tokens' rows."""
        table = self.model.get_input_embeddings()
        return next(f"{path}.weight" for path, m in self.model.named_modules() if m is table)

    def names_in(self, block: str) -> list[str]:
        """The names of a block's parameters, each once."""
        return list(dict.fromkeys(n for _, _, n in self._matrices[block] + self._small[block]))

    def names_by_address(self, block: str) -> dict[int, str]:
        """The names of a held block's matrices, by where their memory is."""
        places = self._matrices[block]
        return {getattr(m, attr).untyped_storage().data_ptr(): name for m, attr, name in places}

    def _in_memory(self, name: str) -> "torch.Tensor | None":
        """A matrix of a held block, as the block has it now."""
        block = block_of(name)
        if not self._holds[block or ""]:
            return None
        found = (getattr(m, attr).data for m, attr, own in self._matrices[block] if own == name)
        return next(found, None)

    def _value(self, name: str, rows: "torch.Tensor | None" = None) -> "torch.Tensor":
        import torch

        stored, room = self.stored[name], None
        lent = self.lender._in_memory(name) if self.lender and rows is None else None
        if rows is None and name in self._unchanged:
            value, room = self._unchanged[name]
        elif lent is not None:
            value = lent
        else:
            value = stored if rows is None else stored[rows.to(stored.device)]
            value = value.to(self.device, torch.float32)
        if self._change is None:
            return value
        return self._change(self._first_names[stored.data_ptr()], value, rows, room)

    def _refill(self, block: str | None) -> None:
        self._fill(self._small[block])
        if block is not None:
            self._fill(self._matrices[block])

    def _fill(self, places: list[Place]) -> None:
        """Give parameters their values; skeletons share them."""
        import torch

        values: dict[str, torch.nn.Parameter] = {}
        for module, attribute, name in places:
            if name not in values:
                values[name] = torch.nn.Parameter(self._value(name), requires_grad=False)
            module._parameters[attribute] = values[name]

    def _empty(self, module: Any, attribute: str, name: str) -> None:
        import torch

        nothing = stand_in(self.stored[name])
        module._parameters[attribute] = torch.nn.Parameter(nothing, requires_grad=False)

    def _take(self, block: str) -> None:
        self._holds[block] += 1
        if self._holds[block] == 1:
            self._fill(self._matrices[block])
            for tell in self.after_taking:
                tell(block)

    def _leave(self, block: str) -> None:
        self._holds[block] -= 1
        if self._holds[block] == 0:
            for place in self._matrices[block]:
                self._empty(*place)
            for tell in self.after_leaving:
                tell(block)
            give_back()

    def _take_when_run(self, module: Any, block: str) -> None:
        """Let a block's forward have its weights.

        Whatever stands in for that forward needs none.
        """
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.held(block):
                return own(*args, **kwargs)

        module.forward = forward

    def _serve_rows(self, embedding: Any, name: str) -> None:
        """Let the input embedding, whatever it does to rows, see a table of those rows alone that
        it is asked for.
        """
        import torch

        embedding.padding_idx = None  # matters to gradients only, and lies beyond a short table

        def take(module: Any, args: Any, kwargs: Any) -> Any:
            ids, *others = args or (kwargs.pop("input"),)
            rows, places = ids.unique(return_inverse=True)
            value = self._value(name, rows)
            module._parameters["weight"] = torch.nn.Parameter(value, requires_grad=False)
            return (places, *others), kwargs

        embedding.register_forward_pre_hook(take, with_kwargs=True)
        embedding.register_forward_hook(
            lambda module, *_: self._empty(module, "weight", name), always_call=True
        )

    def _serve_chunks(self, head: Any, name: str) -> None:
        """Let the unembedding multiply by a part of the vocabulary at a time."""
        import torch

        self.unembedding = self.stored[name]

        def part(rows: "torch.Tensor") -> "torch.Tensor":
            if self._change:
                return self._value(name, rows)
            here = slice(int(rows[0]), int(rows[-1]) + 1)
            return self.stored[name][here].to(self.device, torch.float32)

        def forward(x: "torch.Tensor") -> "torch.Tensor":
            bias = head._parameters.get("bias")
            logits = multiplied_in_parts()(x, part, self.stored[name].shape[0])
            return logits if bias is None else logits.add_(bias)

        head.forward = forward


@cache
def multiplied_in_parts() -> Any:
    """Multiplication by a matrix of which VOCABULARY_ROWS rows are in memory at a time, going
    forward and going back: (x, what gives some rows, how many there are) to (…, rows).
    """
    import torch

    class InParts(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, x: Any, part: Any, size: int) -> Any:
            ctx.part, ctx.size = part, size
            logits = x.new_empty((*x.shape[:-1], size))
            for rows in torch.arange(size).split(VOCABULARY_ROWS):
                logits[..., rows[0] : rows[-1] + 1] = torch.nn.functional.linear(x, part(rows))
            return logits

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            total: Any = 0
            for rows in torch.arange(ctx.size).split(VOCABULARY_ROWS):
                total = total + gradient[..., rows[0] : rows[-1] + 1] @ ctx.part(rows)
            return total, None, None

    return InParts.apply


def stand_in(tensor: "torch.Tensor") -> "torch.Tensor":
    """A tensor of the same shape that takes no memory, and makes NaN of whatever is computed with
    it by mistake.
    """
    import torch

    return torch.full((), torch.nan).expand(tensor.shape)
