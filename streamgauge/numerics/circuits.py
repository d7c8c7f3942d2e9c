"""Circuits, the heads that a task was traced to, and how their weights compare with those of all
other heads.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamgauge.errors import NotApplicable, NotMeasured, SettingsError
from streamgauge.numerics.student_t import quantile
from streamgauge.settings import numbered, read_toml

SUBSTANTIAL = 1.5  # a ratio above this would be: mechanistic-validity, B05 Norm Trajectory
TASK_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Pair:
    """Two prompts of equal length in tokens, and the next token: `answer` after clean, `wrong`
    after corrupted.
    """

    clean: str
    corrupted: str
    answer: str
    wrong: str


@dataclass(frozen=True)
class Task:
    """A task by name, with the prompt pairs that tell heads that do it from heads that do not."""

    name: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Circuit:
    """A task of a model, its heads as (layer, head), and where that was found.

    ratio: the published ratio of mean ‖W_OV‖_F of these heads to that of all others, where there is
    one.
    """

    model: str
    task: str
    heads: tuple[tuple[int, int], ...]
    source: str
    ratio: float | None = None


def read_circuits(path: Path) -> tuple[list[Circuit], list[Task]]:
    """The [[circuit]] and [[task]] entries of a TOML file.

    Raises SettingsError, which names the entry that is wrong.
    """
    content = read_toml(path)
    unknown = sorted(set(content) - {"circuit", "task"})
    if unknown:
        raise SettingsError(
            f"{path} has {unknown[0]!r}, but a circuits file holds [[circuit]] and [[task]] "
            "entries only."
        )
    circuits = [
        _entry(path, "circuit", number, entry, _circuit)
        for number, entry in numbered(path, content, "circuit")
    ]
    tasks = [
        _entry(path, "task", number, entry, _task)
        for number, entry in numbered(path, content, "task")
    ]
    return circuits, tasks


def _entry(path: Path, kind: str, number: int, entry: dict[str, Any], make: Any) -> Any:
    try:
        return make(**entry)
    except (TypeError, ValueError, AttributeError) as error:
        why = (
            str(error)
            .replace("_circuit()", "it")
            .replace("_task()", "it")
            .replace("Pair.__init__()", "a pair")
        )
        raise SettingsError(f"{path}: {kind} {number} is not understood ({why}).") from None


def _circuit(
    *, model: str, task: str, heads: list[str], source: str, ratio: float | None = None
) -> Circuit:
    if not heads:
        raise ValueError("no heads")
    if not all(isinstance(head, str) and re.fullmatch(r"\d+\.\d+", head) for head in heads):
        raise ValueError('heads are written as "LAYER.HEAD"')
    numbered = [tuple(map(int, head.split("."))) for head in heads]
    return Circuit(model, task, tuple((layer, head) for layer, head in numbered), source, ratio)


def _task(*, name: str, pairs: list[dict[str, str]]) -> Task:
    if not TASK_NAME.fullmatch(name):
        raise ValueError(f"the name {name!r} has more in it than letters, digits, - and _")
    made = tuple(Pair(**pair) for pair in pairs)
    if not made or not all(
        isinstance(text, str) and text for pair in made for text in vars(pair).values()
    ):
        raise ValueError("a task has pairs of clean, corrupted, answer and wrong, each a text")
    return Task(name, made)


def norm_ratio(norms: np.ndarray, heads: tuple[tuple[int, int], ...]) -> float:
    """Mean norm of some heads over the mean of all others; norms: (n_layers, n_heads)."""
    mask = head_mask(norms.shape, heads)
    return float(norms[mask].mean() / norms[~mask].mean())


def head_mask(shape: tuple[int, ...], heads: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Which heads are in a circuit. Raises NotMeasured for one that the model does not have."""
    beyond = [f"{layer}.{head}" for layer, head in heads if layer >= shape[0] or head >= shape[1]]
    if beyond:
        raise NotMeasured(
            f"the circuit names head {beyond[0]}, but the model has {shape[0]} layers of "
            f"{shape[1]} heads"
        )
    mask = np.zeros(shape, bool)
    mask[tuple(np.array(heads).T)] = True
    return mask


def chance_of_ratio(
    norms: np.ndarray, heads: tuple[tuple[int, int], ...], *, same_layers: bool, draws: int = 10_000
) -> float:
    """How often heads drawn at random have a norm_ratio at least as large, (count + 1) / (draws +
    1). Seeded.

    same_layers: as many heads from each layer as the circuit has there, since late layers have
    larger norms anyway.
    """
    rng, mask = np.random.default_rng(0), head_mask(norms.shape, heads)
    keys = rng.random((draws, *norms.shape))
    if same_layers:
        order = keys.argsort(-1).argsort(-1)
        drawn = order < mask.sum(1)[:, None]
    else:
        order = keys.reshape(draws, -1).argsort(-1).argsort(-1).reshape(keys.shape)
        drawn = order < mask.sum()
    inside, total, count = (norms * drawn).sum((1, 2)), norms.sum(), mask.sum()
    ratios = (inside / count) / ((total - inside) / (mask.size - count))
    # Drawing the circuit itself counts, in whatever order its norms were added.
    reached = int((ratios >= norm_ratio(norms, heads) * (1 - 1e-12)).sum())
    return (reached + 1) / (draws + 1)


def compared(values: np.ndarray, circuit: Circuit) -> tuple[float, str]:
    """The ratio of a circuit's heads to all others, and in words how often heads drawn at random
    reach it.
    """
    ratio = norm_ratio(values, circuit.heads)
    anywhere, matched = (
        chance_of_ratio(values, circuit.heads, same_layers=same) for same in (False, True)
    )
    reading = "substantial" if ratio > SUBSTANTIAL else "not substantial"
    chance = f"as large by chance: {anywhere:.3f}, from the same layers: {matched:.3f}"
    return ratio, f"{len(circuit.heads)} heads; {reading}; {chance}"


@dataclass(frozen=True)
class Trajectory:
    """How the mean over heads runs over the layers.

    slope: of its log, a layer; error: the slope's standard error; peak: the layer where it is
    largest; reading: rises, falls, or flat where the slope cannot be told from 0 at 95%.
    """

    slope: float
    error: float
    peak: int
    reading: str


def trajectory(norms: np.ndarray) -> Trajectory:
    """The shape of (n_layers, n_heads) norms over layers.

    Raises NotApplicable for fewer than three layers.
    """
    mean = norms.mean(1)
    if len(mean) < 3:
        raise NotApplicable(f"{len(mean)} layers are too few to tell a slope from scatter")
    if not (mean > 0).all():
        raise NotMeasured(f"all heads of layer {int(mean.argmin())} are zero")
    x, logs = np.arange(len(mean)) - (len(mean) - 1) / 2, np.log(mean)
    slope, freedom = float(x @ logs / (x @ x)), len(mean) - 2
    scatter = ((logs - logs.mean() - slope * x) ** 2).sum() / freedom
    error = float(np.sqrt(scatter / (x @ x)))
    told = abs(slope) > quantile(0.975, freedom) * error
    return Trajectory(
        slope, error, int(mean.argmax()), ("rises" if slope > 0 else "falls") if told else "flat"
    )
