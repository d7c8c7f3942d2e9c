"""What a block is made of, found by trying: which of its modules write to the stream, and through
which norms they read it.

A block is run on a few tokens while every module in it is watched. What it adds to the stream is
then written as a sum of module outputs, each times a number, by least squares: no name is trusted
for what a module does, and a sum that closes to rounding says that nothing was forgotten. Names
only tell mixers, which carry information between tokens, from MLPs.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from streamgauge.numerics.rounding import UNIT

if TYPE_CHECKING:
    import torch

# A factor so close to 1, or to a number of the configuration, is that number.
SNAP = 1e-5
DEEPEST = 4  # modules within modules of a block that are looked at

# Which modules are MLPs, by their own name or else by the end of their class's.
MLP_NAME = re.compile(r"mlp|ffn|feed_forward|moe|expert|^ff$|fc\d|ffw|4h_to_h|channel|glu")
MLP_CLASS = re.compile(r"(MLP|MoE|Moe|MoeBlock|SparseMoeBlock|FeedForward|FFN|Experts?)$")
MIXER_NAME = re.compile(
    r"att|mamba|conv|ssm|rnn|recurrent|temporal|time_mix|delta|rg_lru|retention"
)


@dataclass
class Event:
    """One call of a module: its path in the block, what it was given first and what it returned
    first.
    """

    path: str
    module: Any
    given: "torch.Tensor | None"
    returned: "torch.Tensor"
    mutated: bool = False  # whether what it returned was changed in place afterwards
    shows_weights: bool = False  # whether attention weights come beside what it returns


@dataclass(frozen=True)
class Term:
    """A module's output that a block adds to the stream.

    kind: `attn` for mixers, `mlp`, or `other` for what is neither. path: the module's, in the
    block. factor: what its output is multiplied by. chain: paths of the modules from the norm that
    it reads through (not included) to itself: one for a plain MLP, two with a norm behind it.
    behind: those of the chain that come after the sublayer itself, and plain whether they are norms
    all of them.
    source: the path of the norm, None where it reads the stream as it is. mutated: whether the
    block changes the module's output in place later.
    """

    kind: str
    path: str
    factor: float
    chain: tuple[str, ...]
    source: str | None
    mutated: bool = False
    behind: tuple[str, ...] = ()
    plain: bool = True


@dataclass(frozen=True)
class Neurons:
    """Where a dense MLP's neurons are: its activation function and its last linear map, by path.

    What the first is given are the pre-activations (the gate's, where it is gated), what the second
    is given are the hidden activations, each (…, d_mlp).
    """

    activation: str
    out: str


@dataclass(frozen=True)
class Anatomy:
    """What a block does to the stream: resid_post = (1 + scale) · resid_pre + Σ factor · output.

    terms: in the order in which the block calls them. scale: 0 in nearly all architectures. reads:
    what the MLPs read, through their norm: `mid`, resid_pre + attn_out; `pre`, resid_pre; or
    `other`. mutates: whether the block changes the stream that it is given in place. neurons: of
    its one MLP, None where that is no dense one. ln1_reads_pre: whether the norm before the mixers
    reads resid_pre itself.
    """

    terms: tuple[Term, ...]
    scale: float = 0.0
    reads: str = "other"
    mutates: bool = False
    neurons: Neurons | None = None
    ln1_reads_pre: bool = False

    def of(self, kind: str) -> list[Term]:
        """The terms of a kind."""
        return [term for term in self.terms if term.kind == kind]

    def norm_before(self, kind: str) -> str | None:
        """The path of the norm through which the terms of a kind read, where they all read through
        one.
        """
        sources = {term.source for term in self.of(kind)}
        return sources.pop() if len(sources) == 1 else None


def first(value: Any) -> Any:
    """The tensor itself, or the first thing in a tuple or list."""
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value


def stream_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a block or a norm was given as the stream."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))


def attention_weights(output: Any, positions: int) -> "torch.Tensor | None":
    """What eager attention returns beside its output: (rows, heads, positions, positions)."""
    import torch

    others = output[1:] if isinstance(output, tuple) else ()
    tensors = [value for value in others if isinstance(value, torch.Tensor)]
    return next((x for x in tensors if x.dim() == 4 and x.shape[-2:] == (positions,) * 2), None)


@dataclass
class Trace:
    """All calls of modules below a block during one run of it, in the order in which they ended."""

    block: Any
    positions: int
    events: list[Event] = field(default_factory=list)
    _kept: list[Any] = field(default_factory=list)

    def __enter__(self) -> "Trace":
        self._handles = [
            module.register_forward_hook(self._note(path), with_kwargs=True)
            for path, module in self.block.named_modules()
            if path
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for event, live in zip(self.events, self._kept, strict=True):
            event.mutated = not bool((event.returned == live).all())
        self._kept.clear()

    @property
    def attention(self) -> str | None:
        """The path of the module that shows attention weights."""
        return next((event.path for event in self.events if event.shows_weights), None)

    def _note(self, path: str) -> Any:
        import torch

        def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given, returned = first(stream_of(args, kwargs)), first(output)
            if isinstance(returned, torch.Tensor) and returned.is_floating_point():
                tensor = isinstance(given, torch.Tensor)
                event = Event(path, module, given.clone() if tensor else None, returned.clone())
                event.shows_weights = attention_weights(output, self.positions) is not None
                self.events.append(event)
                self._kept.append(returned)

        return note


def dissect(
    trace: Trace, pre: "torch.Tensor", post: "torch.Tensor", numbers: Sequence[float], mutates: bool
) -> Anatomy | None:
    """A block's anatomy from one run of it; None where it does not merely add to the stream.

    pre, post: the stream before and behind it, (rows, positions, d_model). numbers: of the
    configuration and the block, which a factor may be.
    """
    import torch

    if not bool(torch.isfinite(post).all()):
        return None
    candidates, instead = _candidates(trace.events, pre), None
    for depth in range(1, DEEPEST + 1):
        found = _solve([e for e in candidates if e.path.count(".") < depth], pre, post)
        if found is None:
            continue
        chosen, factors, scale = found
        terms = tuple(
            _term(event, _snapped(factor, numbers), trace.events)
            for event, factor in zip(chosen, factors, strict=True)
        )
        scale = _snapped(1 + scale, numbers) - 1 if scale else 0.0
        reads, neurons = _reads(terms, trace.events, pre), _neurons(terms, trace.events)
        ln1 = [t for t in terms if t.kind == "attn" and _read(t, trace.events, pre) == "pre"]
        anatomy = Anatomy(terms, scale, reads, mutates, neurons, bool(ln1))
        if scale != -1:
            return anatomy
        # Nothing of the stream itself is left: a module that adds it hides what it adds, or the
        # block puts another stream in its place (RWKV's first normalises the embedding) and adds
        # to that.
        whole = any(torch.equal(e.returned.reshape(-1), post.reshape(-1)) for e in chosen)
        if not whole and {"attn", "mlp"} <= {term.kind for term in terms}:
            instead = instead or anatomy
    return instead


def alike(anatomies: Sequence[Anatomy | None], shapes: Sequence[Any]) -> list[Anatomy | None]:
    """The same, but that a block has every term that others of its shape have.

    shapes: by block, equal for blocks of the same modules. A sublayer that writes nothing is part
    of no sum, but is there all the same.
    """
    fullest: dict[Any, Anatomy] = {}
    for anatomy, shape in zip(anatomies, shapes, strict=True):
        if anatomy and (shape not in fullest or len(anatomy.terms) > len(fullest[shape].terms)):
            fullest[shape] = anatomy
    return [a and _filled(a, fullest[s]) for a, s in zip(anatomies, shapes, strict=True)]


def _filled(anatomy: Anatomy, other: Anatomy) -> Anatomy:
    """An anatomy with the terms of a fuller one that it lacks."""
    own = {term.path: term for term in anatomy.terms}
    if len(own) == len(other.terms) or not own.keys() <= {term.path for term in other.terms}:
        return anatomy
    terms = tuple(own.get(term.path, term) for term in other.terms)
    return replace(other, terms=terms, scale=anatomy.scale)


def _candidates(events: list[Event], pre: "torch.Tensor") -> list[Event]:
    """Calls whose output looks like a stream and is not zero, each value once: the outermost
    module's.
    """
    import torch

    chosen: list[Event] = []
    for event in sorted(_called_once(events), key=lambda e: e.path.count(".")):
        like = event.returned.numel() == pre.numel() and event.returned.shape[-1] == pre.shape[-1]
        if not like or not bool(event.returned.any()):
            continue
        if not any(torch.equal(event.returned.reshape(-1), e.returned.reshape(-1)) for e in chosen):
            chosen.append(event)
    order = {id(event): place for place, event in enumerate(events)}
    return sorted(chosen, key=lambda e: order[id(e)])


def closed(terms: int) -> float:
    """What rounding leaves of a sum of so many terms, relative to the sum of their sizes: each is
    multiplied and added in fp32, and so are the stream before and what is left.
    """
    return 2 * (terms + 1) * UNIT


def _called_once(events: list[Event]) -> list[Event]:
    """The calls of modules that a block calls no more than once."""
    calls = Counter(event.path for event in events)
    return [event for event in events if calls[event.path] == 1]


class _Sums:
    """Sums of module outputs held against what a block adds, each token in units of its size."""

    def __init__(self, events: list[Event], pre: "torch.Tensor", post: "torch.Tensor") -> None:
        import torch

        x, y = (z.double().reshape(-1, z.shape[-1]) for z in (pre, post))  # (tokens, d_model)
        norm = torch.linalg.vector_norm
        unit = (norm(x, dim=-1) + norm(y, dim=-1)).clamp_min(1e-300)[:, None]
        self.x, self.update = (x / unit).reshape(-1), ((y - x) / unit).reshape(-1)
        self.whole = float(norm(x / unit)) + float(norm(y / unit))
        self.columns = {
            id(e): (e.returned.double().reshape(x.shape) / unit).reshape(-1) for e in events
        }

    def fit(self, chosen: list[Event], with_x: bool) -> "tuple[torch.Tensor, float]":
        """Factors by least squares, the stream's last, and what they leave, relative to sizes."""
        import torch

        columns = [self.columns[id(e)] for e in chosen] + ([self.x] if with_x else [])
        matrix = torch.stack(columns, 1)
        scales = torch.linalg.vector_norm(matrix, dim=0).clamp_min(1e-300)
        scaled = torch.linalg.lstsq(matrix / scales, self.update[:, None], driver="gelsd")
        factors = scaled.solution[:, 0] / scales
        left = torch.linalg.vector_norm(matrix @ factors - self.update)
        return factors, float(left) / (float((factors.abs() * scales).sum()) + self.whole)

    def closes(self, chosen: list[Event], with_x: bool) -> bool:
        """Whether such a sum is what the block adds, up to rounding."""
        return bool(chosen) and self.fit(chosen, with_x)[1] <= closed(len(chosen))

    def towards_x(self, event: Event) -> float:
        """The cosine of an output and the stream, unsigned."""
        import torch

        norm, column = torch.linalg.vector_norm, self.columns[id(event)]
        return float(abs(column @ self.x) / (norm(column) * norm(self.x)).clamp_min(1e-300))


def _solve(
    candidates: list[Event], pre: "torch.Tensor", post: "torch.Tensor"
) -> tuple[list[Event], list[float], float] | None:
    """The fewest outputs, with factors, that add up to what the block adds; then the stream's own
    factor.
    """
    sums, chosen, with_x = _Sums(candidates, pre, post), list(candidates), bool(pre.any())
    if not sums.closes(chosen, with_x):
        return None
    with_x = with_x and not sums.closes(chosen, with_x=False)
    # Outputs that hold the stream itself go first: where a module adds it, what it adds is sought.
    for event in sorted(candidates, key=sums.towards_x, reverse=True):
        fewer = [e for e in chosen if e is not event]
        if sums.closes(fewer, with_x):
            chosen = fewer
    factors, _ = sums.fit(chosen, with_x)
    scale = float(factors[-1]) if with_x else 0.0
    return chosen, [float(f) for f in factors[: len(chosen)]], scale


def _snapped(factor: float, numbers: Sequence[float]) -> float:
    near = (n for n in (1.0, 0.0, *numbers) if abs(factor - n) <= SNAP * (abs(n) or 1.0))
    return next(near, factor)


def _term(event: Event, factor: float, events: list[Event]) -> Term:
    """A term with the chain of modules that leads to it, and its kind."""
    chain, source = [event], None
    while before := _giver(chain[0], events):
        if is_norm(before.module):
            source = before.path
            break
        chain.insert(0, before)
    if source is None:
        source = _norm_around(chain[0], events)
    # A norm behind a sublayer says nothing of it; what comes first does.
    named = [(kind, place) for place, e in enumerate(chain) if (kind := _kind(e))]
    kind, place = named[0] if named else ("other", 0)
    behind = chain[place + 1 :]
    return Term(
        kind,
        event.path,
        factor,
        tuple(e.path for e in chain),
        source,
        event.mutated,
        tuple(e.path for e in behind),
        all(is_norm(e.module) for e in behind),
    )


def _giver(event: Event, events: list[Event]) -> Event | None:
    """The call that made what this one was given: the outermost one, if there is one."""
    import torch

    given = event.given
    if given is None:
        return None
    place = next(n for n, e in enumerate(events) if e is event)
    makers = [
        e
        for e in events[:place]
        if e.returned.numel() == given.numel()
        and not event.path.startswith(f"{e.path}.")
        and not e.path.startswith(f"{event.path}.")
        and torch.equal(e.returned.reshape(-1), given.reshape(-1))
    ]
    return min(makers, key=lambda e: e.path.count("."), default=None)


def _norm_around(event: Event, events: list[Event]) -> str | None:
    """The norm that gave the modules around this one what they work on, of which this one sees a
    part.
    """
    outer = event.path
    while outer := outer.rpartition(".")[0]:
        around = next((e for e in events if e.path == outer), None)
        before = around and _giver(around, events)
        if before and is_norm(before.module):
            return before.path
    return None


def is_norm(module: Any) -> bool:
    """Whether a module is a norm, by its class."""
    name = type(module).__name__.lower()
    return "norm" in name or name.startswith("ln")


def _kind(event: Event) -> str | None:
    if is_norm(event.module):
        return None
    name, of = event.path.rpartition(".")[2], type(event.module).__name__
    if MIXER_NAME.search(name):
        return "attn"
    if MLP_NAME.search(name) or MLP_CLASS.search(of):
        return "mlp"
    outer = event.path.lower()
    if MLP_NAME.search(outer) and not MIXER_NAME.search(outer):
        return "mlp"
    if MIXER_NAME.search(outer) or "mix" in name or "Mixer" in of:
        return "attn"
    return None


def _reads(terms: tuple[Term, ...], events: list[Event], pre: "torch.Tensor") -> str:
    """What all MLPs read through their norm: `mid`, `pre` or `other`."""
    by_path = {e.path: e for e in events}
    mid = pre.double().reshape(-1)
    for term in terms:
        if term.kind == "attn":
            mid = mid + term.factor * by_path[term.path].returned.double().reshape(-1)
    kinds = {_read(term, events, pre, mid) for term in terms if term.kind == "mlp"}
    return kinds.pop() if len(kinds) == 1 else "other"


def _read(
    term: Term, events: list[Event], pre: "torch.Tensor", mid: "torch.Tensor | None" = None
) -> str:
    """What a term reads through its norm: `pre`, `mid` or `other`."""
    import torch

    norm = torch.linalg.vector_norm
    given = next(e for e in events if e.path == (term.source or term.chain[0])).given
    if given is None or given.numel() != pre.numel():
        return "other"
    given = given.double().reshape(-1)
    for name, x in (("pre", pre.double().reshape(-1)), ("mid", mid)):
        if x is not None and float(norm(given - x)) <= closed(2) * float(norm(x)):
            return name
    return "other"


def _neurons(terms: tuple[Term, ...], events: list[Event]) -> Neurons | None:
    """The neurons of a block's one MLP, None where it has several, or another kind of MLP."""
    mlps = [term for term in terms if term.kind == "mlp"]
    if len(mlps) != 1:
        return None
    by_path = {event.path: event for event in _called_once(events)}
    chain = [
        path for path in mlps[0].chain if path in by_path and not is_norm(by_path[path].module)
    ]
    inside = [
        event
        for event in by_path.values()
        if any(event.path == path or event.path.startswith(f"{path}.") for path in chain)
    ]
    leaves = [event for event in inside if not list(event.module.children())]
    out = _last_map(by_path[chain[-1]], leaves) if chain else None
    if (
        out is None
        or out.given is None
        or ((before := _giver(out, events)) and is_norm(before.module))
    ):
        return None
    activations = [
        event
        for event in leaves
        if event.given is not None
        and not list(event.module.parameters())
        and event.given.shape == out.given.shape == event.returned.shape
        and not bool((event.given == event.returned).all())
    ]
    return Neurons(activations[0].path, out.path) if len(activations) == 1 else None


def _last_map(mlp: Event, leaves: list[Event]) -> Event | None:
    """The module with a weight matrix whose output is an MLP's."""
    import torch

    whole = mlp.returned.reshape(-1)
    return next(
        (
            event
            for event in leaves
            if getattr(event.module, "weight", None) is not None
            and event.module.weight.dim() == 2
            and event.returned.numel() == whole.numel()
            and torch.equal(event.returned.reshape(-1), whole)
        ),
        None,
    )


def numbers_in(config: dict[str, Any]) -> Iterator[float]:
    """The fractions in a configuration, which a sublayer's factor may be."""
    for value in config.values():
        if isinstance(value, dict):
            yield from numbers_in(value)
        elif isinstance(value, float) and value:
            yield value
