"""The `draws` group: the laws that hold of any tokens, on sequences that hypothesis draws.

All draws go through the blocks in one walk, each three times: as it is; with other tokens behind
its beginning; and with noise of a known size on the stream before every block, which says what
rounding may do. A fourth time through blocks whose weights are the same function in another order.
A few go through the whole model besides, as transformers itself runs it.
A draw that breaks a law is then made as small as it can be, with walks of its own.
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgauge.checkpoints.untrusted import strange
from streamgauge.engine.blockwise import Batch, Blockwise
from streamgauge.engine.forward import Found, PromptRun, walk
from streamgauge.engine.layout import Layout
from streamgauge.engine.load import context_length
from streamgauge.engine.parts import Parts, Values
from streamgauge.engine.whole import (
    Whole,
    in_a_batch,
    is_biased,
    padding_token,
    with_a_cache,
    with_other_attention,
)
from streamgauge.errors import CheckpointError, first_line
from streamgauge.groups.reasons import NO_LN1, POST_NORM
from streamgauge.groups.stream import StreamMeter
from streamgauge.groups.sublayers import ScaleBlindness, is_scale_blind
from streamgauge.numerics.draws import LAWS, NO_NUMBER, TWINS, Draw, broken, worst
from streamgauge.numerics.rounding import (
    additivity_rounding,
    beyond_contributions,
    contribution_rounding,
    other_order,
    scale_rounding,
)
from streamgauge.numerics.rows import Prompts

if TYPE_CHECKING:
    import torch

NUDGE = 2.0**-16  # relative size of the noise that says how sensitive the stream is
ROUGH = 2  # a noise's answer may be so much smaller than that of another one of its size
NOT_PLAIN = "it holds more there than matrices and biases that are known to change places"
NOT_DRAWN = {
    "additivity": POST_NORM,
    "contribution_bound": POST_NORM,
    "scale_blindness": NO_LN1,
    "neurons": NOT_PLAIN,
    "heads": f"{NOT_PLAIN}, or positions that heads read each in their own way",
    "value_basis": NOT_PLAIN,
    "cache": "it is not attention alone that transformers caches keys and values for",
    "attention_implementation": "transformers has no other implementation of its attention that "
    "does all it does: soft caps, a bias by position",
}
# Parameters that choose among others, by their names.
CHOOSING = re.compile(r"router|expert|indexer")
CHOOSES = "it chooses among experts or tokens, and rounding alone may turn a choice"
# Draws that are kept of POOL times as many, which together have no more tokens than this for each:
# one that takes up to half of them, and the first tokens of others, at most so many.
TOKENS, POOL, SHORT = 10, 4, 6
WHOLE = 512  # tokens of those that the whole model is run on: scores of all heads are held at once
COPIES = 3  # of a draw: itself, with another end, with noise
STREAMS = 2**29  # bytes of streams that are held
WALKS = 100  # by which a draw that breaks a law is made smaller
# Architectures whose fused q, k and v are known to lie as parts take them to.
FUSED = ("gpt2", "gpt_neox", "bloom", "phi3")
SHARED_NORM = re.compile(r"(^|\.)(q|k|query|key)_?(layer_?)?norm$")
# How the whole model is run otherwise, by the law that it is to make no difference.
WAYS: dict[str, Callable[[Blockwise, Sequence[Sequence[int]]], Whole | None]] = {
    "batch": in_a_batch,
    "cache": with_a_cache,
    "attention_implementation": with_other_attention,
}
# Laws that compare two runs, which rounding may send different ways.
COMPARED = [law for law in LAWS if law not in ("additivity", "contribution_bound")]


class DrawsGroup:
    """Arrays by law, (n_draws, n_layers) or (n_draws, 1): its error on each draw over what rounding
    explains, NO_NUMBER where it is none; -1 for draws that it was not asked of.

    laws: those that are put to the draws. failed: what could not be measured, and why.
    """

    def __init__(
        self,
        model: Blockwise,
        layout: Layout,
        draws: Sequence[Draw],
        laws: Collection[str] = tuple(LAWS),
    ) -> None:
        import torch

        self.model, self.layout, self.draws, self.laws = model, layout, draws, laws
        self.failed: dict[str, str] = {}
        rows = [
            list(ids)
            for draw in draws
            for ids in (draw.ids, draw.other(model.vocabulary), draw.ids)
        ]
        self.rows = Prompts(rows, "drawn", None)
        self.meter = StreamMeter(layout, self.rows)
        reads = {"additivity", "contribution_bound"} & set(laws)
        self.run = PromptRun(model, self.rows, [self.meter] if reads else [])
        self.place = {
            row: (batch, n)
            for batch, rows in enumerate(self.run.members)
            for n, row in enumerate(rows)
        }
        names = (name for layer in range(model.n_layers) for name in model.names_in(layer))
        self.chooses = any(CHOOSING.search(name) for name in names)
        by_length = sorted(range(len(draws)), key=lambda n: len(draws[n].ids))
        # Those that are rescaled, and that the whole model is run on: the shortest and the longest.
        self.few = list(dict.fromkeys([by_length[0], by_length[-1]]))
        self.blind = (
            [ScaleBlindness(model, layout, list(draws[n].ids)) for n in self.few]
            if is_scale_blind(layout) and not self.chooses and "scale_blindness" in laws
            else []
        )
        # What the whole model makes of a few draws beside each other, with a cache, and with
        # another implementation of attention.
        self.whole: dict[str, tuple[list[int], Whole]] = {}
        for name in [] if self.chooses else [name for name in WAYS if name in laws]:
            with self._failing(name):
                # A batch needs several lengths; the others would run the short one filled up.
                chosen = self.few if name == "batch" else self.few[-1:]
                whole = WAYS[name](model, [draws[n].ids[:WHOLE] for n in chosen])
                if whole is not None:
                    self.whole[name] = (chosen, whole)
        twinned = set(TWINS) & set(laws) and not self.chooses
        self.twins = [model.enter([list(draw.ids)]) for draw in draws] if twinned else []
        self.generator = torch.Generator().manual_seed(0)
        shape = (len(draws), model.n_layers)
        self.ratios = {name: np.full(shape, -1.0) for name in ("causality", *TWINS)}

    def visit(self, layer: int) -> None:
        """Take all of it through a block."""
        self._add_noise()
        self.run.visit(layer)
        for blind in self.blind:
            blind.visit(layer)
        for name, (_, whole) in list(self.whole.items()):
            with self._failing(name):
                whole.visit(layer)
        if self.chooses:
            return
        parts = Parts(
            self.model.blocks[layer],
            self.model.anatomies[layer],
            self.model.mapped.model.config.get_text_config(),
        )
        allowed = []
        for n, draw in enumerate(self.draws):
            clean, other, noisy = (self._stream(n, copy) for copy in range(COPIES))
            allowed.append(self._allowed(noisy, clean))
            change = _change(other[: draw.kept], clean[: draw.kept])
            self.ratios["causality"][n, layer] = change / allowed[n]
        for kind in TWINS if self.twins else ():
            alike = [n for n, draw in enumerate(self.draws) if draw.twin == kind]
            changes = self._through_twin(layer, parts, alike)
            for n, change in zip(alike, changes, strict=False):
                self.ratios[kind][n, layer] = change / allowed[n]

    @contextlib.contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        """What a law asks for may be something that this architecture cannot do."""
        try:
            yield
        except strange(CheckpointError, NotImplementedError) as error:
            self.failed[name] = f"{type(error).__name__}: {first_line(error)}"
            self.whole.pop(name, None)

    def found(self) -> Found:
        """Arrays of the group, and why others are absent."""
        arrays = dict(self.ratios) | self._of_streams() | self._of_scale() | self._of_the_whole()
        reasons = dict.fromkeys(COMPARED, CHOOSES) if self.chooses else NOT_DRAWN
        kept = {
            name: np.nan_to_num(ratios, nan=NO_NUMBER, posinf=NO_NUMBER)
            for name, ratios in arrays.items()
            if (ratios != -1).any()
        }
        return kept, {
            name: why
            for name, why in reasons.items()
            if name not in kept and name not in self.failed
        }

    def _through_twin(self, layer: int, parts: Parts, alike: list[int]) -> list[float]:
        """How streams of draws of one kind change where the block's parts change places, as the
        first of them says; nothing where it has others besides.
        """
        if not alike:
            return []
        batches = [self.twins[n] for n in alike]
        for batch in batches:
            self.model.bring(batch, layer)
        values = twin(self.draws[alike[0]], parts, self.model, layer, batches[0])
        with parts.having(values):
            streams = self.model.step_together(batches, layer)
        if not values:
            return []
        pairs = zip(alike, streams, strict=True)
        return [_change(stream[0], self._stream(n, 0)) for n, stream in pairs]

    def _stream(self, draw: int, copy: int) -> "torch.Tensor":
        batch, n = self.place[COPIES * draw + copy]
        stream: torch.Tensor = self.run.batches[batch].stream[n]
        return stream

    def _allowed(self, noisy: "torch.Tensor", clean: "torch.Tensor") -> float:
        """By how much rounding may change a stream, relatively, if it does as noise did."""
        answer = np.array(ROUGH * _change(noisy, clean) / NUDGE)
        return float(other_order(answer, self.layout.d_model))

    def _add_noise(self) -> None:
        import torch

        for batch in self.run.batches:
            batch.stream = batch.stream.clone()
        for n in range(len(self.draws)):
            x = self._stream(n, 2)
            noise = torch.randn(x.shape, generator=self.generator).to(x.device)
            x += NUDGE * x.abs() * noise

    def _of_streams(self) -> dict[str, np.ndarray]:
        if not self.meter.readings:
            return {}
        arrays, _ = self.meter.found()
        if "additivity_error" not in arrays:
            return {}
        of = arrays["prompt"] // COPIES
        d_model, terms = self.layout.d_model, max(len(a.terms) for a in self.layout.anatomies if a)
        outputs = {
            name: arrays[f"{name}_out"]
            for name in ("attn", "mlp", "other")
            if f"{name}_out" in arrays
        }
        added = np.nansum(list(outputs.values()), 0)
        pre, post = (arrays[f"resid_{name}"].astype(float) for name in ("pre", "post"))
        by_token = {
            "additivity": arrays["additivity_error"] / additivity_rounding(terms),
            "contribution_bound": beyond_contributions(pre, post, added)
            / contribution_rounding(d_model),
        }
        found = {}
        for name, ratios in by_token.items():
            largest = [np.maximum(ratios[:, of == n], 0).max(1) for n in range(len(self.draws))]
            found[name] = np.array(largest)
        return found

    def _of_scale(self) -> dict[str, np.ndarray]:
        if not self.blind:
            return {}
        ratios = np.full((len(self.draws), self.model.n_layers), -1.0)
        for n, blind in zip(self.few, self.blind, strict=True):
            arrays, _ = blind.found()
            allowed = scale_rounding(self.layout.d_model, float(arrays["largest_shift"][0]))
            errors = [a for name, a in arrays.items() if name.endswith("_scale_error")]
            errors = np.nan_to_num(np.concatenate(errors, 1), nan=-1.0)  # of layers without a norm
            ratios[n] = errors.max(1) / allowed
        return {"scale_blindness": ratios}

    def _of_the_whole(self) -> dict[str, np.ndarray]:
        """The whole model's streams, held to those of the walk over the blocks."""
        found: dict[str, np.ndarray] = {}
        for name, (chosen, whole) in list(self.whole.items()):
            ratios = np.full((len(self.draws), 1), -1.0)
            with self._failing(name):
                for stream, n in zip(whole.streams(), chosen, strict=True):
                    clean, noisy = self._stream(n, 0), self._stream(n, 2)
                    ratios[n] = _change(stream, clean[: len(stream)]) / self._allowed(noisy, clean)
                found[name] = ratios
        return found


def _change(stream: "torch.Tensor", clean: "torch.Tensor") -> float:
    """The largest relative change of a token's vector; infinite where it is no number."""
    import torch

    one, other = clean.double(), stream.double()
    norm = torch.linalg.vector_norm
    change = float((norm(other - one, dim=-1) / norm(one, dim=-1).clamp_min(1e-30)).max())
    return change if np.isfinite(change) else np.inf


def twin(draw: Draw, parts: Parts, model: Blockwise, layer: int, batch: Batch) -> Values:
    """A held block's parts in another order that makes the same function of them; nothing where it
    has others besides.
    """
    generator = np.random.default_rng([draw.seed, layer])
    kind = "mlp" if draw.twin == "neurons" else "attn"
    if not _is_all(parts, model, layer, kind):
        return {}
    if kind == "mlp":
        order = generator.permutation(parts["W_in"].shape[0])
        roles = [role for role in ("W_in", "W_gate", "b_in", "b_gate") if role in parts]
        values = {role: parts.reordered(role, order) for role in roles}
        return values | {"W_out": parts.reordered("W_out", order, 1)}
    if not parts.d_head or (draw.twin == "heads" and is_biased(batch, layer)):
        return {}
    groups = parts.n_heads // parts.n_kv
    of_kv = np.arange(parts.n_kv * parts.d_head).reshape(parts.n_kv, parts.d_head)
    of_heads = np.arange(parts.n_heads * parts.d_head).reshape(parts.n_kv, groups, parts.d_head)
    if draw.twin == "heads":
        order, inside = generator.permutation(parts.n_kv), generator.permutation(groups)
        kv, heads = of_kv[order].ravel(), of_heads[order][:, inside].ravel()
        rows = {"W_Q": heads, "b_Q": heads, **dict.fromkeys(("W_K", "W_V", "b_K", "b_V"), kv)}
    else:
        order = generator.permutation(parts.d_head)
        kv, heads = of_kv[:, order].ravel(), of_heads[..., order].ravel()
        rows = dict.fromkeys(("W_V", "b_V"), kv)
    values = {role: parts.reordered(role, own) for role, own in rows.items() if role in parts}
    return values | {"W_O": parts.reordered("W_O", heads, 1)}


def _is_all(parts: Parts, model: Blockwise, layer: int, kind: str) -> bool:
    """Whether a sublayer has no parameters but those of these parts, and of one norm that all heads
    share for their queries, and one for their keys.
    """
    roles = ("W_in", "W_gate", "W_out") if kind == "mlp" else ("W_Q", "W_K", "W_V", "W_O")
    anatomy, needed = model.anatomies[layer], {roles[0], roles[-1]}
    if anatomy is None or not needed <= parts.places.keys():
        return False
    modules = {parts.places[role].module for role in roles if role in parts}
    if kind == "attn" and len(modules) < len(roles) and _type(model) not in FUSED:
        return False
    roots = [term.chain[0] for term in anatomy.of(kind)]
    known = {id(parameter) for module in modules for parameter in module.parameters()}
    own = [
        (f"{root}.{name}".rpartition(".")[0], parameter)
        for root in roots
        for name, parameter in model.module(layer, root).named_parameters()
    ]
    return len(roots) == 1 and all(
        id(parameter) in known
        or (kind == "attn" and parameter.shape == (parts.d_head,) and SHARED_NORM.search(path))
        for path, parameter in own
    )


def _type(model: Blockwise) -> str:
    return str(model.mapped.model.config.get_text_config().model_type)


def draws_group(model: Blockwise, layout: Layout, texts: Prompts, drawn: int) -> DrawsGroup:
    """So many draws for a model, or fewer where one would be there twice, or they would not fit.

    Those of one kind of twin have one seed, so that they go through one block.
    """
    from streamgauge.strategies import all_draws

    most = min(TOKENS * drawn, STREAMS // (4 * (COPIES + 1) * layout.d_model))
    pool = all_draws(sequences(model, texts, drawn), POOL * drawn)
    # One that shows what goes wrong far from the beginning, the simplest, and of as many others as
    # there is room for the beginnings, of those first that have more than one token.
    fitting = [one for one in pool if len(one.ids) <= most // 2] or pool[:1]
    far = max(fitting, key=lambda one: len(one.ids))
    others = sorted(map(_beginning, pool[1:]), key=lambda one: len(one.ids) == 1)
    kept: list[Draw] = []
    for draw in dict.fromkeys([far, pool[0], *others]):
        if len(kept) < drawn and sum(len(one.ids) for one in (*kept, draw)) <= most:
            number = len(kept) % len(TWINS)
            seed = kept[number].seed if len(kept) >= len(TWINS) else draw.seed
            kept.append(replace(draw, twin=TWINS[number], seed=seed))
    return DrawsGroup(model, layout, kept)


def _beginning(draw: Draw) -> Draw:
    return replace(draw, ids=draw.ids[:SHORT], kept=min(draw.kept, SHORT))


def examples(group: DrawsGroup, arrays: dict[str, np.ndarray], texts: Prompts) -> dict[str, Any]:
    """How many draws there were, and by law that one broke the smallest draw that does: its tokens,
    the first layer, and its ratio.

    A law that is broken by draws beside each other alone has the first of them, as it was found.
    """
    found = {}
    for law, number in broken(arrays).items():
        draw = _smallest(group, law, texts) or group.draws[number]
        ratios = ratios_of(group.model, group.layout, draw, law)
        if not (ratios > 1).any():
            draw, ratios = group.draws[number], arrays[law][[number]]
        ratio, layer = worst(ratios)
        found[law] = draw.said() | {"layer": layer, "ratio": ratio}
    return {"drawn": len(group.draws), "examples": found}


def _smallest(group: DrawsGroup, law: str, texts: Prompts) -> Draw | None:
    from streamgauge.strategies import smallest

    known: dict[Draw, float] = {}

    def breaks(draw: Draw) -> bool:
        draw = replace(draw, twin=law) if law in TWINS else draw
        if draw not in known and len(known) < WALKS:
            known[draw] = worst(ratios_of(group.model, group.layout, draw, law))[0]
        return known.get(draw, 0.0) > 1

    drawn = len(group.draws)
    found = smallest(sequences(group.model, texts, drawn), breaks, max(drawn, WALKS // 2))
    return replace(found, twin=law) if found and law in TWINS else found


def ratios_of(model: Blockwise, layout: Layout, draw: Draw, law: str) -> np.ndarray:
    """Of a law on one draw, (1, n_layers) or (1, 1); -1 where it cannot be put to it."""
    group = DrawsGroup(model, layout, [draw], [law])
    walk(model, {"draws": group})
    return group.found()[0].get(law, np.full((1, 1), -1.0))


def sequences(model: Blockwise, texts: Prompts, draws: int) -> Any:
    """What is drawn for a model."""
    from streamgauge.strategies import token_sequences

    config = model.mapped.model.config
    named = [
        getattr(config.get_text_config(), f"{name}_token_id", None)
        for name in ("bos", "eos", "pad")
    ]
    listed = [i for one in named for i in (one if isinstance(one, list) else [one])]
    special = [i for i in listed if isinstance(i, int) and 0 <= i < model.vocabulary]
    drawn = token_sequences(
        model.vocabulary, context_length(config), special, texts.rows[:8], draws
    )
    pad = padding_token(model)
    if pad is None or special.count(pad) != 1 or model.vocabulary == 1:
        return drawn
    # Where it stands for nothing else, it stands for no token.
    other = (pad + 1) % model.vocabulary
    return drawn.map(
        lambda draw: replace(draw, ids=tuple(other if i == pad else i for i in draw.ids))
    )
