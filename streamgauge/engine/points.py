"""Hook points by TransformerLens's names, on transformers' own modules.

`blocks.N.` followed by

==================  ==============================================================================
hook_resid_pre      the stream before the block
hook_resid_mid      resid_pre + attn_out, where that is what the MLPs read
hook_resid_post     the stream behind the block; fires last
hook_attn_out       what the block's mixers add to the stream, all together; hook_mlp_out what its
                    MLPs add; hook_other_out all else, as per-layer inputs
ln1.hook_in         what the norm before the mixers reads, which a hook may replace; hook_out what
                    it returns; ln2 likewise before the MLPs
mlp.hook_in         what the MLP reads
mlp.hook_pre        what its activation function is given; hook_post what its last map is given
attn.hook_pattern   attention weights, (rows, heads, positions, positions)
==================  ==============================================================================

and `unembed.hook_in`, what the unembedding's norm returns, which a hook may replace.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from streamgauge.engine.anatomy import attention_weights, first, stream_of
from streamgauge.engine.together import running

if TYPE_CHECKING:
    import torch

    from streamgauge.engine.blockwise import Blockwise

Hooks = Sequence[tuple[str, Any]]  # a point's name, and a function of what is there and None
KINDS = ("attn", "mlp", "other")


@contextlib.contextmanager
def hooked(model: "Blockwise", hooks: Hooks) -> Iterator[None]:
    """Let hooks be on their points for a while. Raises KeyError for a point there is not."""
    handles: list[Any] = []
    try:
        for layer, named in _by_layer(hooks).items():
            if layer is None:
                handles += [_before_unembedding(model, hook) for _, hook in named]
            else:
                handles += _Points(model, layer, named).handles
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_layer(hooks: Hooks) -> dict[int | None, list[tuple[str, Any]]]:
    found: dict[int | None, list[tuple[str, Any]]] = {}
    for name, hook in hooks:
        parts = name.split(".", 2)
        layer = int(parts[1]) if parts[0] == "blocks" else None
        found.setdefault(layer, []).append((parts[-1], hook))
    return found


def _before_unembedding(model: "Blockwise", hook: Any) -> Any:
    return model.ln_final.register_forward_hook(lambda module, args, output: hook(output, None))


class _Points:
    """The points of one block, and what has been seen of each run of it that is under way.

    Runs take turns within a block (see `together`), so that what is kept is kept by run.
    """

    def __init__(self, model: "Blockwise", layer: int, named: list[tuple[str, Any]]) -> None:
        self.block, self.anatomy = model.blocks[layer], model.anatomies[layer]
        self.model, self.layer, self.named = model, layer, named
        self.sums: dict[tuple[Any, str], Any] = {}  # by run, and kind or "pre"
        self.handles: list[Any] = []
        wanted = {name for name, _ in named}
        self._on_stream(wanted)
        for name, hook in named:
            if not name.startswith("hook_"):
                self._on_module(name, hook)

    def _tell(self, name: str, value: Any) -> None:
        for own, hook in self.named:
            if own == name:
                hook(value, None)

    def _on_stream(self, wanted: set[str]) -> None:
        """Points that are sums, and the stream itself."""
        terms = self.anatomy.terms if self.anatomy else ()
        mids = "hook_resid_mid" in wanted
        sums = {kind for kind in KINDS if f"hook_{kind}_out" in wanted or (mids and kind == "attn")}
        rows = {"hook_resid_pre", "hook_resid_mid", "hook_other_out"}
        if wanted & (rows | {"mlp.hook_pre", "mlp.hook_post"}):
            self.handles.append(
                self.block.register_forward_pre_hook(self._keep_pre, with_kwargs=True)
            )
        for kind in sums:
            own = [term for term in terms if term.kind == kind]
            for number, term in enumerate(own):
                module = self.block.get_submodule(term.path)
                ends = number == len(own) - 1 and not (kind == "other" and self._scales)
                self.handles.append(module.register_forward_hook(self._adder(kind, term, ends)))
        self.handles.append(self.block.register_forward_hook(self._end))

    @property
    def _scales(self) -> bool:
        return bool(self.anatomy and self.anatomy.scale)

    def _keep_pre(self, block: Any, args: Any, kwargs: Any) -> None:
        pre = first(stream_of(args, kwargs))
        pre = pre.clone() if self.anatomy and self.anatomy.mutates else pre
        self.sums[running(), "pre"] = pre
        self._tell("hook_resid_pre", pre)

    def _adder(self, kind: str, term: Any, ends: bool) -> Any:
        def add(module: Any, args: Any, output: Any) -> None:
            run, value = running(), first(output)
            value = value if term.factor == 1 else term.factor * value
            value = value.clone() if term.mutated else value
            before = self.sums.pop((run, kind), None)
            value = value if before is None else before + value.reshape(before.shape)
            if ends:
                self._said(run, kind, value)
            else:
                self.sums[run, kind] = value

        return add

    def _said(self, run: Any, kind: str, value: "torch.Tensor") -> None:
        self._tell(f"hook_{kind}_out", value)
        if kind == "attn" and (run, "pre") in self.sums:
            pre = self.sums[run, "pre"]
            self._tell("hook_resid_mid", pre + value.reshape(pre.shape))

    def _end(self, block: Any, args: Any, output: Any) -> None:
        run = running()
        if self._scales:
            assert self.anatomy is not None
            # What else the block does to the stream: it multiplies it.
            more = self.sums.pop((run, "other"), 0)
            if (run, "pre") in self.sums:
                own = self.anatomy.scale * self.sums[run, "pre"]
                self._tell("hook_other_out", own + more)
        for key in [key for key in self.sums if key[0] is run]:
            del self.sums[key]
        self._tell("hook_resid_post", first(output))

    def _on_module(self, name: str, hook: Any) -> None:
        """A point at a module's input or output."""
        where, _, point = name.partition(".")
        if point in ("hook_pre", "hook_post"):
            self.handles.append(self._module(name).register_forward_pre_hook(self._reader(hook)))
            return
        module = self._module(where)
        if point == "hook_in":
            self.handles.append(
                module.register_forward_pre_hook(_replacing(hook), with_kwargs=True)
            )
        elif point == "hook_out":
            self.handles.append(
                module.register_forward_hook(lambda m, a, out: hook(first(out), None))
            )
        else:
            self.handles.append(module.register_forward_hook(_pattern(hook)))

    def _reader(self, hook: Any) -> Any:
        """A hook on what a module is given, row by row even where that has rows and positions in
        one.
        """

        def read(module: Any, args: Any) -> None:
            x, pre = args[0], self.sums.get((running(), "pre"))
            hook(x if pre is None else x.reshape(*pre.shape[:2], x.shape[-1]), None)

        return read

    def _module(self, where: str) -> Any:
        path = None
        if where == "attn":
            path = self.model.seen.attention[self.layer]
        elif self.anatomy and where in ("ln1", "ln2"):
            path = self.anatomy.norm_before("attn" if where == "ln1" else "mlp")
        elif self.anatomy and self.anatomy.of("mlp"):
            path = self.anatomy.of("mlp")[0].chain[0]
        if where in ("mlp.hook_pre", "mlp.hook_post"):
            neurons = self.anatomy.neurons if self.anatomy else None
            if neurons is not None:
                path = neurons.activation if where.endswith("pre") else neurons.out
        if path is None:
            raise KeyError(f"blocks.{self.layer}.{where}")
        return self.block.get_submodule(path)


def _replacing(hook: Any) -> Any:
    def before(module: Any, args: Any, kwargs: Any) -> Any:
        changed = hook(first(stream_of(args, kwargs)), None)
        if changed is None:
            return None
        if args:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): changed}

    return before


def _pattern(hook: Any) -> Any:
    """Of an attention's outputs the one that is square in positions."""

    def behind(module: Any, args: Any, output: Any) -> None:
        pattern = attention_weights(output, first(output).shape[1])
        if pattern is not None:
            hook(pattern, None)

    return behind
