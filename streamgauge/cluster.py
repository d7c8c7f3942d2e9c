"""Measure many checkpoints on a Ray cluster: what is missing from a store that its nodes share,
largest first, each once more where its node dies.

Ray schedules, retries and moves; each task is `measure` of one checkpoint. Nodes need streamgauge
installed, and see checkpoints by the same paths, or fetch them from the hub.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from streamgauge.checkpoints.files import open_checkpoint, stored_shapes
from streamgauge.errors import NotInstalledError, NotMeasured, SettingsError, StreamgaugeError
from streamgauge.measure import measure
from streamgauge.numerics.names import layer_of
from streamgauge.store import Store

RETRIES = 2  # of a checkpoint whose node died
BASE, BLOCKS = 1.5e9, 3  # bytes that a measurement stays below, and blocks: docs/performance.md
PER_PROCESSOR = 4e9  # bytes of fp32 weights for which one more is asked
FP32 = 4  # bytes a number


@dataclass(frozen=True)
class Job:
    """One checkpoint to measure. key: what its caller calls it; size: bytes of its weights in fp32;
    memory: bytes that measuring takes; both 0 where its files are not at hand.
    """

    key: str
    location: str | Path
    revision: str | None = None
    size: float = 0
    memory: float = 0

    @property
    def processors(self) -> int:
        """How many it is to have."""
        return 1 + int(self.size // PER_PROCESSOR)


@dataclass(frozen=True)
class Arrival:
    """What became of one job. measured: whether that took a measurement, or the store had it;
    starts: how often it was begun; problem: why there is no record.
    """

    key: str
    measured: bool = False
    starts: int = 1
    problem: StreamgaugeError | None = None


@dataclass(frozen=True)
class Asked:
    """How checkpoints are opened and measured: arguments of `open_checkpoint` and `measure`."""

    store: Store
    opening: dict[str, Any] = field(default_factory=dict)
    measuring: dict[str, Any] = field(default_factory=dict)


def job_of(key: str, location: str | Path, revision: str | None = None) -> Job:
    """A job, with what its files say it takes; a hub model is taken as it comes."""
    if not Path(location).exists():
        return Job(key, location, revision)
    location = Path(location).absolute()
    try:
        shapes = stored_shapes(open_checkpoint(location))
    except StreamgaugeError:
        return Job(key, location, revision)  # its node will say what is wrong with it
    sizes = {name: FP32 * math.prod(shape) for name, shape in shapes.items()}
    blocks: dict[int | None, float] = {}
    for name, size in sizes.items():
        blocks[layer_of(name)] = blocks.get(layer_of(name), 0) + size
    largest = max((size for layer, size in blocks.items() if layer is not None), default=0.0)
    # In whole GB: Ray keeps workers for each size that is asked for.
    memory = math.ceil((BASE + BLOCKS * largest) / 1e9) * 1e9
    return Job(key, location, revision, sum(sizes.values()), memory)


def measured(jobs: Sequence[Job], asked: Asked, address: str) -> Iterator[Arrival]:
    """Send all jobs, and give each as it is done. Where this ends early, what runs is given up, and
    what was finished is in the store.

    address: as `ray.init` takes it; empty for the cluster that this machine belongs to, or else one
    of this machine alone. Raises NotInstalledError, or SettingsError where the
    cluster is out of reach.
    """
    with _connected(address) as ray:
        starts = ray.remote(_Starts).options(**_beside_this(ray)).remote()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        waiting: dict[Any, Job] = {}
        for job in sorted(jobs, key=lambda job: (job.size == 0, job.size), reverse=True):
            needs = _needs(job, nodes, str(asked.measuring.get("device", "cpu")))
            if isinstance(needs, StreamgaugeError):
                yield Arrival(job.key, starts=0, problem=needs)
            else:
                task = ray.remote(_measure).options(max_retries=RETRIES, **needs)
                waiting[task.remote(job, asked, starts)] = job
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(done[0])
            begun = ray.get(starts.of.remote(job.key))
            yield _arrival(ray, done[0], job, begun)


def measured_here(jobs: Sequence[Job], asked: Asked) -> Iterator[Arrival]:
    """The same one after another in this process."""
    for job in jobs:
        try:
            yield Arrival(job.key, _into_store(job, asked, show=True))
        except StreamgaugeError as error:
            yield Arrival(job.key, problem=error)


def _arrival(ray: Any, task: Any, job: Job, starts: int) -> Arrival:
    try:
        found = ray.get(task)
    except ray.exceptions.RayTaskError as error:  # a fault of ours, on a node
        found = NotMeasured(f"{type(error.cause).__name__} on a node: {error.cause}")
    except ray.exceptions.RayError as error:  # a node that died, or had no memory left
        found = NotMeasured(
            f"the cluster gave up after {starts} starts ({type(error).__name__}); the memory of "
            "its nodes may be too small."
        )
    if isinstance(found, StreamgaugeError):
        return Arrival(job.key, starts=starts, problem=found)
    return Arrival(job.key, found, starts)


class _Starts:
    """How often each job was begun, which nodes that died cannot tell."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def begin(self, key: str) -> None:
        """Count one."""
        self.counts[key] = self.counts.get(key, 0) + 1

    def of(self, key: str) -> int:
        """How many there were."""
        return self.counts.get(key, 0)


def _measure(job: Job, asked: Asked, starts: Any) -> bool | StreamgaugeError:
    """On a node: the same as a task, whose refusals come back as what they are."""
    import ray

    ray.get(starts.begin.remote(job.key))
    try:
        asked.store.prepare()
        return _into_store(job, asked, show=False)
    except StreamgaugeError as error:
        return error


def _into_store(job: Job, asked: Asked, *, show: bool) -> bool:
    """Put a checkpoint's record into the store. Returns whether that took a measurement."""
    opening = asked.opening | {"store": asked.store.folder}
    checkpoint = open_checkpoint(job.location, job.revision, **opening)
    how = asked.measuring
    key = asked.store.key(
        checkpoint, how.get("prompts"), how.get("device", "cpu"), precision=how.get("precision")
    )
    before = asked.store.find(key)
    after = measure(checkpoint, store=asked.store, show=show, **how)
    return before is None or before.groups != after.groups


def _beside_this(ray: Any) -> dict[str, Any]:
    """Options of an actor that lives as long as this process: on its node, for no processor."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


def _needs(job: Job, nodes: list[dict[str, float]], device: str) -> Any:
    """The resources that a job is given, or why no node has them."""
    most = {
        name: max((node.get(name, 0) for node in nodes), default=0)
        for name in ("CPU", "GPU", "memory")
    }
    if job.memory > most["memory"]:
        return NotMeasured(
            f"it needs {job.memory / 1e9:.1f} GB, and the cluster's largest node has "
            f"{most['memory'] / 1e9:.1f}."
        )
    if device != "cpu" and not most["GPU"]:
        return NotMeasured(f"no node of the cluster has a GPU for --device {device}.")
    needs = {"num_cpus": min(job.processors, int(most["CPU"])), "memory": int(job.memory)}
    return needs if device == "cpu" else needs | {"num_gpus": 1}


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    if find_spec("ray") is None:
        raise NotInstalledError("--ray needs ray; install 'streamgauge[cluster]'.")
    import ray

    if ray.is_initialized():  # by whoever calls this, who also ends it
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anyone unasked
    try:
        ray.init(address=address or None, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SettingsError(
            f"no Ray cluster answers at {address} ({error}); give the address of one, or none for "
            "one on this machine."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
