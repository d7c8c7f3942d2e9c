"""The `neighbours` group: whether a change of the checkpoint that undoes what conversions do wrong
makes it predict text better.

A trained model lies where its loss is lowest; a change of it that lowers the loss undoes a fault.
Every candidate of a block is screened by what it does to the loss to first order: one pass with
gradients, and one run of the block alone. Those that promise something, those of the first block,
where first order says little, and those of the whole model are raced on other rows of text: a few
rows for all, twice as many for the better half of those that are not clearly worse, and so on.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.checkpoints.files import Checkpoint
from streamgauge.checkpoints.ordinary_text import ordinary_text
from streamgauge.checkpoints.prompts import tokenise
from streamgauge.checkpoints.tokenizers import load_tokenizer
from streamgauge.checkpoints.untrusted import strange
from streamgauge.engine.anatomy import first
from streamgauge.engine.blockwise import Batch, Blockwise, grouped
from streamgauge.engine.clean_runs import token_losses
from streamgauge.engine.forward import Found
from streamgauge.engine.gradients import loss_gradient, through_block
from streamgauge.engine.load import context_length
from streamgauge.engine.mapped import Mapped
from streamgauge.engine.parts import Parts
from streamgauge.engine.repairs import repaired, repairs_of
from streamgauge.engine.together import calling_instead
from streamgauge.engine.variants import Variant, in_place, logits_of, variants_of
from streamgauge.errors import CheckpointError, PromptError, first_line
from streamgauge.numerics.neighbours import KINDS, LEAST, findings, paired, upper_bounds
from streamgauge.numerics.rows import Prompts
from streamgauge.numerics.unigram import unigram_loss
from streamgauge.progress import track

if TYPE_CHECKING:
    import torch

LENGTH = 64  # tokens of a row
SCREEN, RACE = 8, 192  # rows of that length on which candidates are screened, and raced at most
HEATS = (48, 24, 12, 6, 3, 1)  # what part of the rows each heat ends with; the last two are tested
FIRST_ROWS = 4
SPARSEST = 4  # of so many positions one is unembedded at least
CHARACTERS = 8  # of text for a token, so that a row is full
FEWEST = 24  # rows, all together
PROMISING = -1.25  # t of the screen's estimate below which a candidate is raced
FIRST_HEAT = 140  # candidates of blocks that are raced at most, unless all are asked for; fewer
# where each costs more, as its loss is read off few tokens of a large vocabulary.
CLEARLY_WORSE, CLEARLY_NO_BETTER = 1.0, 2.0  # standard errors
ALSO = 3  # changes of a block that are tried once more where one seems to help
AFTERMATH_ROWS = 24
STREAMS = 2**28  # bytes of streams that are kept of the screen's rows
LOGITS = 2**24  # numbers held at once of a whole model's
SUBLAYERS = ("attn", "mlp")
SAMPLED = "its tokenizer can write no text that it was trained for, and its own samples are blind"
FAILED = "trying changes on it ended in an error, whose cause is not known"
BETWEEN = "the model does something to the stream between its blocks, whose repairs are not known"


@dataclass(eq=False)
class Candidate:
    """A change of a layer, or of the whole model where that is None: what was seen of it so far.

    values: losses with the change, summed by row, of each heat; infinite where it cannot be run.
    """

    kind: str
    layer: int | None
    variant: Variant | None = None
    promise: float = 0.0
    values: list[np.ndarray] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.values))


@dataclass(frozen=True)
class Text:
    """Rows of token ids: those to screen on, those to race on, and what they are."""

    screen: list[list[int]]
    race: list[list[int]]
    source: str


def text_for(
    model: Blockwise, checkpoint: Checkpoint, prompts: Prompts, *, built_in: bool
) -> Text | str:
    """The adopter's own prompts, or Python's documentation in the place of ours; or why not."""
    if prompts.sampled:
        return SAMPLED
    rows, source = [row[:LENGTH] for row in prompts.rows if len(row) > 1], "the prompts"
    if built_in:
        length = min(LENGTH, context_length(model.mapped.model.config))
        pieces, source = ordinary_text((SCREEN + RACE) * LENGTH // length, CHARACTERS * length)
        if not pieces:
            return source
        try:
            written = tokenise(
                load_tokenizer(checkpoint.folder),
                pieces,
                context=length,
                vocabulary=model.vocabulary,
                shorten=True,
            )
        except PromptError as error:  # our prompts may have done without such tokens
            return f"{source} cannot be given to it: {error}"
        if written is None:
            return SAMPLED
        rows = [row for row in written.rows if len(row) > 1]
    if len(rows) < FEWEST:
        return f"{len(rows)} rows of text are too few to tell repairs by; {FEWEST} are needed"
    # As many tokens as full rows would have.
    most = (SCREEN + RACE) * LENGTH
    share = min(1.0, most / sum(map(len, rows)))
    rows = [rows[i] for i in np.linspace(0, len(rows) - 1, int(len(rows) * share)).astype(int)]
    every = (SCREEN + RACE) // SCREEN
    screen = rows[::every]
    return Text(screen, [row for n, row in enumerate(rows) if n % every], source)


class Search:
    """Candidates on their way: screened, then raced.

    spent: tokens times blocks that were run, a block with gradients for three. tried: by kind how
    many candidates there were.
    """

    def __init__(self, model: Blockwise, text: Text, *, to_the_end: bool, show: bool) -> None:
        self.model, self.text, self.to_the_end, self.show = model, text, to_the_end, show
        self.config = model.mapped.model.config.get_text_config()
        self.spent = 0.0
        self.tried: Counter[str] = Counter()
        most = len(text.race)
        self.ends = sorted({max(FIRST_ROWS, most // part) for part in HEATS})
        # Half as long where all candidates are run on them.
        self.rows = [
            row[: LENGTH // 2] if n < self.ends[0] else row for n, row in enumerate(text.race)
        ]
        self.clean: list[np.ndarray] = []  # sums of losses by row, of each heat
        self.tokens: list[np.ndarray] = []
        self.head = model.head
        # Of so many positions one is unembedded, so that it takes no longer than the blocks do,
        # half of which a change in the middle leaves as they were.
        self.every = min(SPARSEST, max(1, round(2 * self.head / model.n_layers)))
        self.bytes = (
            4 * LENGTH * (model.n_layers + 1) * self.config.hidden_size
        )  # of a row's streams
        self.shares = {kind: self._share(kind) for kind in SUBLAYERS}  # and a sublayer

    def run(self) -> list[Candidate]:
        """All candidates that were raced."""
        found = screened = sorted(self._screen(), key=lambda c: c.promise)
        variants = [Candidate(v.name, None, v) for v in variants_of(self.model.mapped)]
        self.tried = Counter(c.kind for c in [*found, *variants])
        if not self.to_the_end:
            found = [c for c in found if c.promise < PROMISING][: FIRST_HEAT // self.every]
        raced = [*found, *variants]
        alive, heats = list(raced), list(zip([0, *self.ends], self.ends, strict=False))
        for start, end in track(heats, "racing repairs", self.show):
            if alive and not (end == self.ends[-1] and self._decided(raced)):
                self._heat(alive, self.rows[start:end])
                alive = self._left(alive)
        self._beside(raced, screened)
        return raced

    def _decided(self, raced: list[Candidate]) -> bool:
        """Whether some candidate is an improvement beyond chance already."""
        seen = [(*self.judged(c), len(c)) for c in raced]
        change, error, skew, rows = map(np.array, zip(*seen, strict=True))
        return bool((upper_bounds(change, error, rows, skew) < -LEAST).any())

    def _left(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that are not clearly worse than the checkpoint, nor clearly no better by LEAST: the
        better half of them, unless all are asked for.
        """
        seen = [(c, *self.judged(c)[:2]) for c in candidates]
        left = [
            (c, m / e)
            for c, m, e in seen
            if e and m <= CLEARLY_WORSE * e and m - CLEARLY_NO_BETTER * e < -LEAST
        ]
        left.sort(key=lambda one: one[1])
        most = len(left) if self.to_the_end else max(1, len(candidates) // 2)
        return [c for c, _ in left[:most]]

    def judged(self, candidate: Candidate) -> tuple[float, float, float]:
        """Mean change of loss, nats a token, its standard error, and the skewness of rows."""
        values = np.concatenate(candidate.values)
        clean = np.concatenate(self.clean)[: len(values)]
        return paired(values - clean, np.concatenate(self.tokens)[: len(values)])

    def aftermath(self, candidate: Candidate) -> tuple[float, float]:
        """What is left where a change leads to, nats a token: by how much the loss exceeds what the
        model itself expects it to be, and, for a change of a block, how the loss goes on along it,
        by as much again as it changes the stream (0 for others).
        """
        few = min(AFTERMATH_ROWS, max(FIRST_ROWS, STREAMS // self.bytes))
        ids, counted = padded(self.rows[self.ends[0] :][:few], self.model.device)
        if candidate.variant is not None:
            with in_place(self.model.mapped, candidate.variant) as changed:
                parts = self._whole_parts(changed, ids)
                return _excess(ids, counted, parts), 0.0
        streams, lane, unchanged = self._along(candidate, ids)
        model, last = self.model, streams[-1]
        parts = (model.logits(ids[part], last[part])[:, :-1] for part in model.in_parts(ids))
        excess = _excess(ids, counted, parts)
        gradient = loss_gradient(model, ids, last, counted)
        behind = model.n_layers + 1 - len(streams)
        for n in reversed(range(behind, model.n_layers)):
            with model.held(n):
                gradient, _ = through_block(model, n, lane, streams[n - behind], gradient)
        self._spend(ids, 4 * model.n_layers)
        return excess, float(((streams[0] - unchanged) * gradient).double().sum() / counted.sum())

    def _along(
        self, candidate: Candidate, ids: "torch.Tensor"
    ) -> "tuple[list[torch.Tensor], Batch, torch.Tensor]":
        """The streams from where a change of a block ends to behind the last one, what they were
        computed in, and the first of them without the change.
        """
        model, layer = self.model, candidate.layer
        assert layer is not None
        batch = model.enter(ids)
        exchanged = candidate.kind == "layers exchanged"
        behind = layer + (2 if exchanged else 1)
        for n in range(layer):
            with model.held(n):
                model.step(batch, n)
        lane = Batch(ids, batch.stream.clone(), None, batch.calls)
        with model.held(layer):
            if exchanged:
                lane.stream = self._exchanged(layer, batch, batch.stream)
            else:
                self._start(candidate, lane, layer)
        for n in range(layer, behind):
            with model.held(n):
                model.step(batch, n)
        return self._onward(lane, behind), lane, batch.stream

    def _onward(self, batch: Batch, layer: int) -> "list[torch.Tensor]":
        """The streams from before a layer to behind the last one."""
        streams = [batch.stream.clone()]
        for n in range(layer, self.model.n_layers):
            with self.model.held(n):
                streams.append(self.model.step(batch, n).clone())
        return streams

    def _beside(self, raced: list[Candidate], screened: list[Candidate]) -> None:
        """Where a change of a block seems to help, run what else may be said of that block on the
        same rows: without its sublayer, and with the best of all its other changes, whatever the
        screen made of them.
        """
        last = [c for c in raced if c.layer is not None and len(c) == sum(map(len, self.tokens))]
        better = [c for c in last if self.judged(c)[0] < -LEAST]
        if not better:
            return
        best = min(better, key=lambda c: self.judged(c)[0])
        others = [c for c in screened if c.layer == best.layer and c not in last]
        self._bring([c for c in others if not len(c)], heats=1)
        others.sort(key=lambda c: self.judged(c)[0])
        without = [c for c in others if c.kind == f"without {KINDS[best.kind].part}"]
        chosen = list(dict.fromkeys([*others[:ALSO], *without]))
        self._bring(chosen, heats=len(self.tokens))
        raced += [c for c in others if c not in raced]

    def _bring(self, candidates: list[Candidate], heats: int) -> None:
        """Run candidates on what they lack of the rows of so many heats."""
        start = 0
        for tokens in self.tokens[:heats]:
            lacking = [c for c in candidates if len(c) == start]
            if lacking:
                self._run_blocks(lacking, *self._padded(self.rows[start : start + len(tokens)]))
            start += len(tokens)

    def _share(self, kind: str) -> float:
        """What part of the first block's parameters a sublayer has."""
        anatomy, block = self.model.anatomies[0], self.model.blocks[0]
        paths = [term.chain[0] for term in anatomy.of(kind)] if anatomy else []
        own = [p for path in paths for p in block.get_submodule(path).parameters()]
        whole = sum(p.numel() for p in block.parameters())
        return sum(p.numel() for p in own) / whole if own else 1.0

    def _screen(self) -> list[Candidate]:
        """Every change of a block, with the t of what it changes the loss by to first order."""
        import torch

        model = self.model
        rows = self.text.screen[: max(FIRST_ROWS, STREAMS // self.bytes)]
        ids, counted = padded(rows, model.device)
        batch = model.enter(ids)
        streams = self._onward(batch, 0)
        gradient = loss_gradient(model, ids, streams[-1], counted)
        self._spend(ids, model.n_layers + 3 * self.head)
        found, later = [], None
        for layer in track(list(reversed(range(model.n_layers))), "screening repairs", self.show):
            with model.held(layer):
                before, inside = through_block(model, layer, batch, streams[layer], gradient)
                self._spend(ids, 3)
                for kind, part, stream in self._changed(layer, batch, streams):
                    by = gradient if part != "attn" or inside is None else inside
                    delta = ((stream - streams[layer + 1]) * by).double().sum((1, 2))
                    found.append(Candidate(kind, layer, promise=self._promise(layer, delta)))
                if later is not None and self._alike(layer):
                    stream = self._exchanged(layer, batch, streams[layer])
                    delta = ((stream - streams[layer + 2]) * later).double().sum((1, 2))
                    promise = self._promise(layer, delta)
                    found.append(Candidate("layers exchanged", layer, promise=promise))
                later, gradient = gradient, before
        if not bool(torch.isfinite(gradient).all()):
            raise CheckpointError("the loss has no finite gradient")
        return found

    def _promise(self, layer: int, delta: "torch.Tensor") -> float:
        """The t of first-order changes by row; the first block's candidates are raced whatever it
        is: what they change is too large for it.
        """
        if layer == 0:
            return -np.inf
        mean, error, _ = paired(delta.cpu().numpy(), np.ones(len(delta)))
        return mean / error if error else 0.0

    def _changed(
        self, layer: int, batch: Batch, streams: "list[torch.Tensor]"
    ) -> "Iterator[tuple[str, str, torch.Tensor]]":
        """The stream behind a held block, by how it is changed and by the sublayer (attn, mlp)
        beside which everything else is kept as it was, if it is one.
        """
        yield "without layer", "", streams[layer]
        kept = self._outputs(layer, batch, streams[layer])
        for kind in self._kinds(layer):
            own = KINDS[kind].part
            part = own if kept.keys() >= set(SUBLAYERS) and own in SUBLAYERS else ""
            others = kept["mlp" if part == "attn" else "attn"] if part else {}
            lane = Batch(batch.ids, streams[layer].clone(), None, batch.calls)
            with calling_instead(others), self._with(layer, kind):
                yield kind, part, self.model.step(lane, layer)
            self._spend(batch.ids, self.shares.get(part, 1.0))

    def _outputs(
        self, layer: int, batch: Batch, stream: "torch.Tensor"
    ) -> dict[str, dict[Any, Any]]:
        """What stands in for the modules of a block's attention, and of its MLP: they return what
        they did on this stream. None where the block changes an output in place.
        """
        anatomy = self.model.anatomies[layer]
        kept: dict[str, dict[Any, Any]] = {}
        if anatomy is None or any(term.mutated for term in anatomy.terms):
            return {}

        def keep(own: dict[Any, Any]) -> Any:
            def note(module: Any, args: Any, output: Any) -> None:
                own[module] = lambda *args, **kwargs: output

            return note

        with contextlib.ExitStack() as stack:
            for kind in SUBLAYERS:
                for term in anatomy.of(kind):
                    module = self.model.module(layer, term.chain[0])
                    own = kept.setdefault(kind, {})
                    stack.callback(module.register_forward_hook(keep(own)).remove)
            self.model.step(Batch(batch.ids, stream.clone(), None, batch.calls), layer)
        return kept

    def _kinds(self, layer: int) -> Iterator[str]:
        """The changes that a held block can have within itself."""
        anatomy = self.model.anatomies[layer]
        yield from (f"without {kind}" for kind in SUBLAYERS if anatomy and anatomy.of(kind))
        yield from repairs_of(self._parts(layer))

    @lru_cache(maxsize=2)  # noqa: B019
    def _parts(self, layer: int) -> Parts:
        return Parts(self.model.blocks[layer], self.model.anatomies[layer], self.config)

    @contextlib.contextmanager
    def _with(self, layer: int, kind: str) -> Iterator[None]:
        """Let a held block be changed for a while."""
        if not kind.startswith("without "):
            parts = self._parts(layer)
            with parts.having(repaired(kind, parts)):
                yield
            return
        anatomy = self.model.anatomies[layer]
        terms = anatomy.of(kind.removeprefix("without ")) if anatomy else []
        modules = [self.model.module(layer, term.path) for term in terms]
        handles = [module.register_forward_hook(_nothing) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _alike(self, layer: int) -> bool:
        """Whether a block and the next have matrices of the same names and shapes."""
        stored, model = self.model.mapped.stored, self.model
        own, next_one = (
            {name.removeprefix(model.paths[n]): stored[name].shape for name in model.names_in(n)}
            for n in (layer, layer + 1)
        )
        return own == next_one

    @contextlib.contextmanager
    def _swapped(self, at: int, layer: int) -> Iterator[None]:
        """Let a held block, one of a layer and the next, have the other's weights."""
        mapped, (one, other) = self.model.mapped, self.model.paths[layer : layer + 2]

        def change(name: str, values: "torch.Tensor", rows: Any, room: Any) -> "torch.Tensor":
            here, there = (one, other) if name.startswith(f"{one}.") else (other, one)
            weight = mapped.stored[there + name.removeprefix(here)]
            return weight.to(values.device, values.dtype)

        with mapped.changes(self.model.paths[at]) as use:
            use(change)
            yield

    def _exchanged(self, layer: int, batch: Batch, stream: "torch.Tensor") -> "torch.Tensor":
        """The stream behind a held block and the next, each with the other's weights."""
        lane = Batch(batch.ids, stream.clone(), None, batch.calls)
        with self._swapped(layer, layer):
            self.model.step(lane, layer)
        with self.model.held(layer + 1), self._swapped(layer + 1, layer):
            found = self.model.step(lane, layer + 1)
        self._spend(batch.ids, 2)
        return found

    def _heat(self, candidates: Sequence[Candidate], rows: list[list[int]]) -> None:
        """Run the checkpoint and all candidates on more rows."""
        ids, counted = self._padded(rows)
        self.tokens.append(counted.sum(1).double().cpu().numpy())
        blocks = [c for c in candidates if c.variant is None]
        self.clean.append(self._run_blocks(blocks, ids, counted))
        for candidate in candidates:
            if candidate.variant is not None:
                candidate.values.append(self._run_whole(candidate.variant, ids, counted))

    def _padded(self, rows: list[list[int]]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Rows filled up to one length, and which of the next tokens that are predicted are
        theirs.
        """
        ids, counted = padded(rows, self.model.device)
        return ids, counted[:, self.every - 1 :: self.every]

    def _run_blocks(
        self, candidates: Sequence[Candidate], ids: "torch.Tensor", counted: "torch.Tensor"
    ) -> np.ndarray:
        """Take rows through the model, and through every candidate from where it differs. Returns
        the checkpoint's own losses, summed by row.
        """
        model = self.model
        clean = model.enter(ids)
        lanes: dict[Candidate, Batch] = {}
        starting: dict[int | None, list[Candidate]] = defaultdict(list)
        for candidate in candidates:
            starting[candidate.layer].append(candidate)
        for layer in range(model.n_layers):
            with model.held(layer):
                held_back = starting[layer - 1] if layer else []
                second = [c for c in held_back if c.kind == "layers exchanged"]
                others = [lane for c, lane in lanes.items() if c not in second]
                fresh = {
                    c: Batch(ids, clean.stream.clone(), None, clean.calls) for c in starting[layer]
                }
                for candidate in second:
                    with self._swapped(layer, layer - 1):
                        model.step(lanes[candidate], layer)
                for candidate, lane in fresh.items():
                    self._start(candidate, lane, layer)
                self._step([clean, *others], layer)
                lanes |= fresh
                self._spend(ids, 1 + len(lanes))
        for candidate, lane in lanes.items():
            candidate.values.append(self._sums(ids, lane.stream, counted))
        return self._sums(ids, clean.stream, counted)

    def _start(self, candidate: Candidate, lane: Batch, layer: int) -> None:
        """Take a batch through the block in which a candidate first differs."""
        if candidate.kind == "without layer":
            return
        exchanged = candidate.kind == "layers exchanged"
        change = self._swapped(layer, layer) if exchanged else self._with(layer, candidate.kind)
        with change:
            self.model.step(lane, layer)

    def _step(self, batches: list[Batch], layer: int) -> None:
        for numbers in grouped([batch.ids.numel() for batch in batches]):
            self.model.step_together([batches[n] for n in numbers], layer)

    def _sums(
        self, ids: "torch.Tensor", stream: "torch.Tensor", counted: "torch.Tensor"
    ) -> np.ndarray:
        """Losses summed by row, nats."""
        self._spend(ids, self.head / self.every)
        losses = token_losses(self.model, ids, stream, self.every)
        return np.asarray((losses * counted.cpu().numpy()).sum(1))

    def _run_whole(
        self, variant: Variant, ids: "torch.Tensor", counted: "torch.Tensor"
    ) -> np.ndarray:
        """Losses of a variant of the whole model, summed by row; infinite where it cannot be
        run.
        """
        import torch

        self._spend(ids, self.model.n_layers + self.head / self.every)
        right = ids[:, 1:][:, self.every - 1 :: self.every]
        try:
            losses = []
            with in_place(self.model.mapped, variant) as changed:
                start = 0
                for logits in self._whole_parts(changed, ids, self.every):
                    some = right[start : start + len(logits)]
                    start += len(logits)
                    own = torch.nn.functional.cross_entropy(
                        logits.flatten(0, 1), some.flatten(), reduction="none"
                    )
                    losses.append(own.view(some.shape))
            found: np.ndarray = (torch.cat(losses).double() * counted).sum(1).cpu().numpy()
        except strange(CheckpointError):
            return np.full(len(ids), np.inf)
        return found

    def _whole_parts(
        self, changed: Mapped, ids: "torch.Tensor", every: int = 1
    ) -> "Iterator[torch.Tensor]":
        """Logits of a changed model, some rows at a time."""
        size = max(1, LOGITS * every // (len(self.model.unembedding) * ids.shape[1]))
        return (logits_of(changed, some, every) for some in ids.split(size))

    def _spend(self, ids: "torch.Tensor", blocks: float) -> None:
        self.spent += ids.numel() * blocks


def padded(rows: list[list[int]], device: Any) -> "tuple[torch.Tensor, torch.Tensor]":
    """Rows filled up to one length behind their ends, which nothing before them reads; and which
    next tokens are theirs, (rows, positions - 1).
    """
    import torch

    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
    ends = torch.tensor([len(row) for row in rows], device=device)
    counted = torch.arange(1, length, device=device)[None] < ends[:, None]
    return ids, counted.float()


def _excess(ids: "torch.Tensor", counted: "torch.Tensor", parts: "Iterator[torch.Tensor]") -> float:
    """By how much the mean loss exceeds the mean entropy of what is predicted, nats a token."""
    import torch

    found: list[torch.Tensor] = []
    for logits in parts:
        some = ids[len(found) : len(found) + len(logits)]
        log_odds = logits.log_softmax(-1)
        loss = -log_odds.gather(-1, some[:, 1:, None])[..., 0]
        found += list(loss + (log_odds.exp() * log_odds).sum(-1))
    return float((torch.stack(found) * counted).double().sum() / counted.sum())


def _nothing(module: Any, args: Any, output: Any) -> Any:
    """In place of what a module returns: zeros, and beside them what it returned beside it."""
    import torch

    if isinstance(output, torch.Tensor):
        return torch.zeros_like(output)
    return (torch.zeros_like(first(output)), *output[1:])


def measure_neighbours(
    model: Blockwise,
    text: Text | str,
    prompts: Prompts,
    *,
    to_the_end: bool = False,
    show: bool = False,
) -> tuple[Found, dict[str, Any]]:
    """Arrays by candidate that was raced: layer (-1 for the whole model), change of loss, nats a
    token, error (its standard error), skew (of the rows' changes), rows, tokens; and what is said
    of them.
    """
    if isinstance(text, str):
        return ({}, {"neighbours": text}), {}
    if model.seen.between:
        return ({}, {"neighbours": BETWEEN}), {}
    search = Search(model, text, to_the_end=to_the_end, show=show)
    try:
        raced = search.run()
    except strange(CheckpointError, NotImplementedError) as trouble:
        why = f"{type(trouble).__name__}: {first_line(trouble)}"
        return ({}, {"neighbours": f"{FAILED} ({why})"}), {}
    clean, tokens = np.concatenate(search.clean), np.concatenate(search.tokens)
    if not any(np.isfinite(search.judged(candidate)[:2]).all() for candidate in raced):
        return ({}, {"neighbours": "no change of it can be tried"}), {}
    arrays: dict[str, list[float]] = defaultdict(list)
    kept = []
    for candidate in raced:
        change, error, skew = search.judged(candidate)
        if not np.isfinite([change, error]).all():
            continue  # a configuration that transformers cannot build
        kept.append(candidate)
        arrays["layer"].append(-1 if candidate.layer is None else candidate.layer)
        arrays["change"].append(change)
        arrays["error"].append(error)
        arrays["rows"].append(len(candidate))
        arrays["tokens"].append(tokens[: len(candidate)].sum())
        arrays["skew"].append(skew)
    counted = unigram_loss([np.array(row) for row in search.rows])
    passes = search.spent / ((model.n_layers + search.head) * sum(map(len, prompts.rows)))
    said: dict[str, Any] = {
        "kinds": [candidate.kind for candidate in kept],
        "search": "all" if to_the_end else "default",
        "text": text.source,
        "loss": float(clean.sum() / tokens.sum()),
        "unigram_loss": float(counted.mean()),
        "tokens": int(tokens.sum()),
        "tried": dict(sorted(search.tried.items())),
        "passes": round(passes, 1),
    }
    counts = ("layer", "rows", "tokens")
    typed = {n: np.array(a, np.int32 if n in counts else float) for n, a in arrays.items()}
    said["first"] = _first(search, kept, typed)
    return (typed, {}), said


def _first(
    search: Search, raced: list[Candidate], arrays: dict[str, np.ndarray]
) -> dict[str, float]:
    """Of what lowers the loss most beyond chance its number, excess and slope; nothing where there
    is none.
    """
    bounds = upper_bounds(*(arrays[name] for name in ("change", "error", "rows", "skew")))
    kinds = [candidate.kind for candidate in raced]
    found = findings(kinds, arrays["layer"], arrays["change"], bounds < -LEAST)
    if not found:
        return {}
    excess, slope = search.aftermath(raced[found[0]])
    return {"number": found[0], "excess": excess, "slope": slope}
