"""Measure many checkpoints on a Ray cluster: what is missing from a store that its nodes share,
largest first, each again where its node dies.

Ray schedules, retries and moves; each task is `measure` of one checkpoint. Nodes need streamgauge
installed, and see checkpoints by the same paths, or fetch them from the hub.
"""

import math
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from streamgauge.checkpoints.files import Checkpoint, open_checkpoint, stored_shapes
from streamgauge.errors import (
    NotInstalledError,
    NotMeasured,
    SettingsError,
    StoreError,
    StreamgaugeError,
    first_line,
)
from streamgauge.measure import measure
from streamgauge.numerics.circuits import Task
from streamgauge.numerics.names import layer_of
from streamgauge.store import Store

RETRIES = 1  # of a checkpoint whose node died
BASE, BLOCKS = 1.5e9, 3  # bytes that a measurement stays below, and blocks: docs/performance.md
PER_PROCESSOR = 4e9  # bytes of fp32 weights for which one more is asked
FP32 = 4  # bytes a number
ANSWERS = 10.0  # seconds within which a cluster does


@dataclass(frozen=True)
class Job:
    """One checkpoint to measure. key: what its caller calls it; tasks: on which heads are patched;
    size: bytes of its weights in fp32; memory: bytes that measuring takes; both 0 where its files
    are not at hand.
    """

    key: str
    location: str | Path
    revision: str | None = None
    tasks: tuple[Task, ...] = ()
    size: float = 0
    memory: float = 0

    @property
    def processors(self) -> int:
        """How many it is to have."""
        return 1 + int(self.size // PER_PROCESSOR)


@dataclass(frozen=True)
class Arrival:
    """What became of one job. measured: whether that took a measurement, or the store had it;
    starts: how often it was begun; stored: the store's key of its record; problem: why there is
    none.
    """

    key: str
    measured: bool = False
    starts: int = 1
    stored: str | None = None
    problem: StreamgaugeError | None = None


@dataclass(frozen=True)
class Asked:
    """How checkpoints are opened and measured: arguments of `open_checkpoint` and `measure`."""

    store: Store
    opening: dict[str, Any] = field(default_factory=dict)
    measuring: dict[str, Any] = field(default_factory=dict)


def job_of(
    key: str, location: str | Path, revision: str | None = None, tasks: Sequence[Task] = ()
) -> Job:
    """A job, with what its files say it takes; what is not in safetensors here is taken as it
    comes.
    """
    location = Path(location).absolute() if Path(location).exists() else location
    job = Job(key, location, revision, tuple(tasks))
    if not Path(location).is_dir():
        return job
    try:
        size, memory = size_and_memory(open_checkpoint(location))
    except StreamgaugeError:
        return job  # its node will say what is wrong with it
    # In whole GB: Ray keeps workers for each size that is asked for.
    return replace(job, size=size, memory=math.ceil(memory / 1e9) * 1e9)


def size_and_memory(checkpoint: Checkpoint) -> tuple[float, float]:
    """Bytes of its weights in fp32, and those that measuring it stays below."""
    blocks: dict[int | None, float] = {}
    for name, shape in stored_shapes(checkpoint).items():
        blocks[layer_of(name)] = blocks.get(layer_of(name), 0) + FP32 * math.prod(shape)
    largest = max((size for layer, size in blocks.items() if layer is not None), default=0.0)
    return sum(blocks.values()), BASE + BLOCKS * largest


def measured(jobs: Sequence[Job], asked: Asked, address: str) -> Iterator[Arrival]:
    """Send all jobs, and give each as it is done. Where this ends early, what runs is given up, and
    what was finished is in the store.

    address: as `ray.init` takes it; empty for the cluster that this machine belongs to, or else one
    of this machine alone. Raises NotInstalledError, or SettingsError where the cluster is out of
    reach.
    """
    asked = _from_anywhere(asked)
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
            yield _arrival(ray, done[0], job, begun, asked.store)


def _from_anywhere(asked: Asked) -> Asked:
    """The same with whole paths: a node works in another folder."""
    store = replace(asked.store, folder=asked.store.folder.absolute())
    prompts = asked.measuring.get("prompts")
    whole = {} if prompts is None else {"prompts": Path(prompts).absolute()}
    return replace(asked, store=store, measuring=asked.measuring | whole)


def measured_here(jobs: Sequence[Job], asked: Asked) -> Iterator[Arrival]:
    """The same one after another in this process."""
    for job in jobs:
        try:
            stored, new = _into_store(job, asked, show=True)
            yield Arrival(job.key, new, stored=stored)
        except StreamgaugeError as error:
            yield Arrival(job.key, problem=error)


def _arrival(ray: Any, task: Any, job: Job, starts: int, store: Store) -> Arrival:
    found: tuple[str, bool] | StreamgaugeError
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
    if store.find(found[0]) is None:
        lost = StoreError(
            f"its node put the record into {store}, and here it is not there: name a store that "
            "all machines share, a folder or a URL."
        )
        return Arrival(job.key, starts=starts, problem=lost)
    return Arrival(job.key, found[1], starts, found[0])


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


def _measure(job: Job, asked: Asked, starts: Any) -> tuple[str, bool] | StreamgaugeError:
    """On a node: the same as a task, whose refusals come back as what they are."""
    import ray

    ray.get(starts.begin.remote(job.key))
    try:
        asked.store.prepare()
        return _into_store(job, asked, show=False)
    except StreamgaugeError as error:
        return error


def _into_store(job: Job, asked: Asked, *, show: bool) -> tuple[str, bool]:
    """Put a checkpoint's record into the store. Returns its key there, and whether that took a
    measurement.
    """
    opening = asked.opening | {"store": asked.store.folder}
    checkpoint = open_checkpoint(job.location, job.revision, **opening)
    how = asked.measuring
    key = asked.store.key(
        checkpoint, how.get("prompts"), how.get("device", "cpu"), precision=how.get("precision")
    )
    before = asked.store.find(key)
    after = measure(checkpoint, store=asked.store, tasks=job.tasks, show=show, **how)
    return key, before is None or before.groups != after.groups


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


def _knock(address: str) -> None:
    """Raise OSError where nobody listens: Ray would try for two minutes and end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host, int(port)), ANSWERS).close()


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
        _knock(address)
        ray.init(address=address or None, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingsError(
            f"no Ray cluster answers at {address} ({first_line(error)}); give the address of one, "
            "as 10.0.0.1:6379, or none for one on this machine."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
