"""What visits a model's blocks for the groups of a record that are wanted, in which order, and what
becomes of what they found.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streamgauge.checkpoints.files import Checkpoint
from streamgauge.engine.accounts import Accounts
from streamgauge.engine.blockwise import Blockwise
from streamgauge.engine.bridge import Bridge, NoBridgeError, build_bridge
from streamgauge.engine.clean_runs import CleanRuns
from streamgauge.engine.forward import Absent, Found, Group, PromptRun
from streamgauge.engine.heads import MATRICES, Heads
from streamgauge.engine.layout import Layout
from streamgauge.engine.memory import give_back
from streamgauge.groups import (
    draws,
    horizon,
    instrument,
    neighbours,
    neurons,
    padding,
    patching,
    prediction,
    random_input,
    rounding,
    sketch,
    stream,
    sublayer_effect,
    sublayers,
    weights,
)
from streamgauge.groups.reasons import NO_LN_FINAL, POST_NORM, SCALED, SHORT
from streamgauge.groups.tensors import Tensors
from streamgauge.numerics.circuits import Task
from streamgauge.numerics.horizons import variants_of
from streamgauge.numerics.rounding import other_order
from streamgauge.numerics.rows import Prompts
from streamgauge.progress import track

BRIDGED = ("instrument", "weights", "sketch", "random_input", "patching")  # groups that need it
ALL_RUN = (  # groups that rest on the walk over the blocks
    *("stream", "neurons", "sublayers", "random_input", "padding", "horizon", "sublayer_effect"),
    *("prediction", "rounding", "neighbours", "draws"),
)


@dataclass(frozen=True)
class Repairs:
    """How repairs are searched for: with every candidate on all rows, or no further than it takes;
    and whether prompts are our own, which ordinary text stands in for.
    """

    to_the_end: bool
    built_in: bool


@dataclass
class Plan:
    """The visitors of one walk by name, and what they share.

    bridge: TransformerLens's, None where it has none for this model or nobody needs it. said: what
    the metadata say of what was found. failed: arrays that could not be measured, and why.
    """

    model: Blockwise
    layout: Layout
    rows: Prompts
    missing: list[str]
    bridge: Bridge | None
    no_bridge: str | None
    visitors: dict[str, Group] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def needs(self, *names: str) -> bool:
        """Whether one of these groups is missing."""
        return bool(set(names) & set(self.missing))


def make_plan(
    model: Blockwise,
    layout: Layout,
    rows: Prompts,
    missing: list[str],
    horizons: str,
    drawn: int,
    checkpoint: Checkpoint,
) -> Plan:
    """What visits the blocks for the missing groups, in the order in which they need each other.

    The model is run over the prompts only for groups that need it.
    """
    bridge, why = None, None
    if set(BRIDGED) & set(missing):
        try:
            bridge = build_bridge(model)
        except NoBridgeError as error:
            why = str(error)
    plan = Plan(model, layout, rows, missing, bridge, why)
    # First, so that a block is compared before anything else has run through it.
    if plan.needs("instrument"):
        plan.visitors["instrument"] = instrument.InstrumentGroup(model, bridge, why)
    early = random_input.EarlyInputs(layout)
    run = _run_over_prompts(plan, early)
    if plan.needs("sublayers") and sublayers.is_scale_blind(layout):
        plan.visitors["scale_blindness"] = sublayers.ScaleBlindness(
            model, layout, max(rows.rows, key=len)
        )
    _read_weights(plan, early, checkpoint)
    if plan.needs("padding"):
        plan.visitors["padding"] = padding.padding_group(model, layout, rows)
    if run is not None and plan.needs("prediction"):
        plan.visitors["prediction"] = prediction.PredictionGroup(model, run)
    if run is not None and plan.needs("horizon", "sublayer_effect"):
        _start_from_clean_runs(plan, run, horizons)
    if plan.needs("rounding"):
        plan.visitors["rounding"] = rounding.rounding_group(model, layout, rows)
    if plan.needs("draws"):
        plan.visitors["draws"] = draws.draws_group(model, layout, rows, drawn)
    return plan


def _run_over_prompts(plan: Plan, early: random_input.EarlyInputs) -> PromptRun | None:
    meters: dict[str, Any] = {}
    if plan.needs("stream"):
        meters["stream"] = stream.StreamMeter(plan.layout, plan.rows)
    if plan.needs("neurons"):
        meters["neurons"] = neurons.NeuronMeter(plan.layout, plan.rows)
    if plan.needs("sublayers"):
        meters["sublayers"] = sublayers.OutputsMeter(plan.layout, plan.rows)
    readers = list(meters.values()) + ([early] if plan.needs("random_input") else [])
    if not readers and not plan.needs("prediction", "horizon", "sublayer_effect"):
        return None
    run = PromptRun(plan.model, plan.rows, readers)
    plan.visitors["prompts"] = run
    plan.visitors |= meters
    return run


def _read_weights(plan: Plan, early: random_input.EarlyInputs, checkpoint: Checkpoint) -> None:
    heads = Heads(plan.bridge, plan.no_bridge)
    if plan.needs("weights"):
        plan.visitors["weights"] = weights.WeightsGroup(plan.layout, heads)
        plan.visitors["matrices"] = weights.Locator(plan.model, heads, checkpoint)
    if plan.needs("sketch"):
        plan.visitors["sketch"] = sketch.heads_group(heads)
    if plan.needs("random_input"):
        tokens = sum(map(len, plan.rows.rows))
        group = random_input.RandomInputGroup(plan.model, plan.layout, early, heads, tokens)
        plan.visitors["random_input"] = group


def _start_from_clean_runs(plan: Plan, run: PromptRun, horizons: str) -> None:
    """The groups that start from some prompts' streams at every layer."""
    asked = [name for name in ("horizon", "sublayer_effect") if plan.needs(name)]
    if not plan.layout.is_sum:
        why = SCALED if plan.layout.pre_norm else POST_NORM
        plan.visitors |= {name: Absent({name: why}) for name in asked}
        return
    clean = CleanRuns(run)
    if not clean.rows:
        plan.visitors |= {name: Absent({name: SHORT}) for name in asked}
        return
    plan.visitors["clean_runs"] = clean
    if "horizon" in asked:
        variants = variants_of(horizons, plan.layout.n_layers)
        plan.visitors["horizon"] = horizon.Horizons(clean, variants)
    if "sublayer_effect" in asked and plan.model.ln_final is None:
        plan.visitors["sublayer_effect"] = Absent({"sublayer_effect": NO_LN_FINAL})
    elif "sublayer_effect" in asked:
        effects = sublayer_effect.SublayerEffects(plan.layout, clean)
        plan.visitors["sublayer_effect"] = effects


def results(
    plan: Plan,
    tensors: Tensors,
    checkpoint: Checkpoint,
    tasks: tuple[Task, ...],
    repairs: Repairs,
    accounts: Accounts,
    show: bool,
) -> dict[str, Found]:
    """What each missing group found, after the walk."""
    found: dict[str, Found] = {}
    for name in track([n for n in plan.missing if n in plan.visitors], "predictions", show):
        with accounts.of(name):
            visitor = plan.visitors[name]
            found[name] = visitor.found()
            if isinstance(visitor, draws.DrawsGroup):
                plan.said["draws"] = draws.examples(visitor, found[name][0], plan.rows)
                plan.failed |= {f"draws/{law}": why for law, why in visitor.failed.items()}
        give_back()
    if plan.needs("patching"):
        with accounts.of("patching"):
            found["patching"] = patching.measure_patching(
                plan.bridge, checkpoint.folder, tasks, show
            )
    if plan.needs("neighbours"):
        with accounts.of("neighbours"):
            found["neighbours"], plan.said["neighbours"] = _neighbours(
                plan, checkpoint, repairs, show
            )
    blind = plan.visitors.get("scale_blindness")
    for name, more in (("sublayers", blind), ("sketch", tensors)):
        if name in found and more is not None:
            found[name][0].update(more.found()[0])
    return found


def _neighbours(
    plan: Plan, checkpoint: Checkpoint, repairs: Repairs, show: bool
) -> tuple[Found, dict[str, Any]]:
    text = neighbours.text_for(plan.model, checkpoint, plan.rows, built_in=repairs.built_in)
    return neighbours.measure_neighbours(
        plan.model, text, plan.rows, to_the_end=repairs.to_the_end, show=show
    )


def distrusted(plan: Plan, found: dict[str, Found]) -> dict[str, str]:
    """Groups and arrays that rest on a function that is not transformers', each with the reason."""
    if "instrument" not in found:
        return {}
    arrays = found["instrument"][0]
    allowed = other_order(arrays["gain"], plan.layout.d_model)
    reasons: dict[str, str] = {}
    if (layer := _first_beyond(arrays["block_error"], allowed)) is not None:
        why = (
            "streamgauge's walk over the blocks gives something else than transformers' forward "
            f"pass here (block {layer} differs by {arrays['block_error'][layer]:.2g})"
        )
        reasons |= dict.fromkeys(ALL_RUN, why)
    if plan.bridge is None:
        return reasons
    if (layer := _first_beyond(arrays["bridge_error"], allowed)) is not None:
        part = _what_differs(plan, plan.bridge, layer, float(arrays["bridge_error"][layer]))
        why = f"TransformerLens runs another function than transformers here ({part})"
        named = [f"sketch/{name}" for name in MATRICES]
        named += [f"random_input/attn_{name}" for name in ("norm", "error", "samples")]
        reasons |= dict.fromkeys(["weights", "patching", *named], why)
    return reasons


def _first_beyond(error: np.ndarray, allowed: np.ndarray) -> int | None:
    """The first layer whose difference is not within what is allowed; NaN never is."""
    beyond = np.flatnonzero(~(error <= allowed))
    return int(beyond[0]) if len(beyond) else None


def _what_differs(plan: Plan, bridge: Bridge, layer: int, error: float) -> str:
    """In words: `block 0's attn_out differs by 0.23`."""
    if layer in bridge.troubles:
        return f"block {layer} cannot be run: {bridge.troubles[layer]}"
    model = plan.model
    batch = model.enter(model.seen.ids)
    if layer < len(batch.calls):
        batch.stream = model.seen.streams[layer]
        with model.held(layer):
            part = instrument.differing_part(model, bridge, layer, batch)
        if part is not None:
            return part
    return f"block {layer} differs by {error:.2g}"
