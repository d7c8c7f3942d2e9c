"""A Ray cluster of two nodes, one of which is killed in the middle, and a store in a bucket."""

import contextlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from streamgauge.checkpoints.files import open_checkpoint
from streamgauge.cluster import Arrival, Asked, job_of, measured
from streamgauge.store import Store
from tests import models

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("ray", "moto", "s3fs")),
    reason="ray, moto or s3fs is not installed",
)
MODELS, KILLED_AFTER = 24, 12
TIMED = ("cost", "reproduce")  # what tells one run of an audit from another
Running = Callable[..., Any]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a server on this machine that speaks S3."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="fleet")
    yield "s3://fleet/records of it"
    server.stop()


@pytest.fixture
def nodes(bucket: str) -> Iterator[Any]:
    """Two nodes of one processor each, and this process connected to them."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def kill(nodes: Any) -> None:
    """The second node and all that runs on it, as when its power fails."""
    daemon = nodes.second.all_processes["raylet"][0].process.pid
    running = psutil.Process(daemon).children(recursive=True)
    nodes.remove_node(nodes.second, allow_graceful=False)
    for process in running:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_a_node_that_dies_costs_what_it_was_at(
    nodes: Any, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        models.save(models.gpt2(6 + n % 3, seed=n), tmp_path / f"m{n:02}") for n in range(MODELS)
    ]
    jobs = [job_of(folder.name, folder) for folder in folders]
    asked = Asked(Store.at(bucket), measuring={"neighbours": "none"})
    began, found = time.monotonic(), []
    for arrival in measured(jobs, asked, ""):
        found.append(arrival)
        if len(found) == KILLED_AFTER:
            kill(nodes)
    assert [one.problem for one in found] == [None] * MODELS
    assert {one.key for one in found} == {job.key for job in jobs}
    assert all(one.starts <= 2 for one in found)
    again = sum(one.starts > 1 for one in found)
    with capsys.disabled():
        took = time.monotonic() - began
        print(f"\n{MODELS} records in {took:.0f} s, {again} begun again after a node was lost")
    second = list(measured(jobs, asked, ""))
    known = {one.key: one.stored for one in found}
    assert sorted(second, key=lambda one: one.key) == [
        Arrival(job.key, stored=known[job.key]) for job in jobs
    ]
    for folder in folders:  # and this machine finds them too
        key = asked.store.key(open_checkpoint(folder), None, "cpu")
        assert asked.store.find(key) is not None


def test_rows_are_those_of_an_audit_without_a_cluster(run_pytest: Running, tmp_path: Path) -> None:
    """And what cannot be measured keeps nothing of the others."""
    for n in (1, 2):
        models.save(models.gpt2(n, seed=n), tmp_path / f"m{n}")
    broken = models.save(models.gpt2(1), tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    asked = [f"--model={tmp_path / name}" for name in ("m1", "broken", "m2")]
    rows = {}
    for name, options in (("here", []), ("cluster", ["--ray"])):
        done = run_pytest(
            "invariants", *asked, *options, f"--store={tmp_path / name}",
            f"--report={tmp_path / name / 'report'}", "-q",
            OMP_NUM_THREADS="1",  # as Ray gives tasks of one processor: sums have an order
        )  # fmt: skip
        assert done.returncode == 1, done.stdout + done.stderr
        lines = (tmp_path / name / "report" / "rows.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
    for here, there in zip(rows["here"], rows["cluster"], strict=True):
        # hypothesis draws constants of the modules that a process has imported.
        left_out = (*TIMED, "value", "of", "values", "margin") if " drawn" in str(here) else TIMED
        for name in left_out:
            here.pop(name), there.pop(name)
        assert here == there
    assert {row["outcome"] for row in rows["here"] if row["model"] == "broken"} == {"error"}
    assert {row["outcome"] for row in rows["here"] if row["model"] == "m2"} > {"pass"}
