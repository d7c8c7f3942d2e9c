"""Fetching from the hub, against a stand-in on loopback; and a hub that cannot be reached."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests import models

COMMIT = "c" * 40
REPOSITORY = "somebody/tiny"


def commit_of(revision: str) -> str:
    """The commit that a branch of the stand-in is at."""
    return COMMIT if revision == "main" else hashlib.sha1(revision.encode()).hexdigest()


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download of one repository takes."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}"):
            return self._json()
        name = path.rsplit("/", 1)[-1]
        if path.startswith(f"/{REPOSITORY}/resolve/") and name in self.files:
            return self._send(
                self.files[name], {"ETag": f'"{hashlib.sha256(self.files[name]).hexdigest()}"'}
            )
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def commit(self) -> str:
        """Of the revision that is asked for; commits are asked for by themselves."""
        found = re.search(r"/(?:revision|resolve|tree)/([^/?]+)", self.path)
        name = found[1] if found else "main"
        return name if len(name) == 40 else commit_of(name)

    def _json(self) -> None:
        siblings = [
            {"rfilename": name, "size": len(content)} for name, content in self.files.items()
        ]
        entries = [
            {"type": "file", "path": n, "size": len(c), "oid": "0" * 40}
            for n, c in self.files.items()
        ]
        refs = [{"name": f"step{n}", "ref": f"refs/heads/step{n}"} for n in (0, 512, 1000, 2000)]
        refs += [{"name": "main", "ref": "refs/heads/main"}]
        branches = [ref | {"targetCommit": commit_of(ref["name"])} for ref in refs]
        answer: Any = (
            {"branches": branches, "tags": [], "converts": []}
            if self.path.split("?")[0].endswith("/refs")
            else entries
            if "/tree/" in self.path
            else {"id": REPOSITORY, "sha": self.commit(), "siblings": siblings}
        )
        self._send(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in (
            {"X-Repo-Commit": self.commit(), "Content-Length": str(len(content))} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Be quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a stand-in hub with one repository, and what it was asked."""
    folder = models.save(models.gpt2(3), tmp_path / "published")
    content = {path.name: path.read_bytes() for path in folder.iterdir()} | {
        "training.bin": b"\0" * 1000
    }
    handler = type("Hub", (_Hub,), {"files": content, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()


def _environment(address: str, tmp_path: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def test_a_named_model_is_fetched_once(
    hub: tuple[str, list[str]], run_pytest: Callable[..., Any], tmp_path: Path
) -> None:
    address, asked = hub
    environment = _environment(address, tmp_path)
    arguments = [
        "invariants",
        "--model",
        REPOSITORY,
        "--store",
        tmp_path / "store",
        "-m",
        "theorem",
    ]
    done = run_pytest(*arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert any("model.safetensors" in path for path in asked)
    assert not any("training.bin" in path for path in asked)
    asked.clear()
    again = run_pytest(*arguments, **environment)
    assert again.returncode == 0 and not asked


def test_a_model_the_hub_does_not_have(
    hub: tuple[str, list[str]], run_pytest: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = [
        "invariants",
        "--model",
        "somebody/absent",
        "--store",
        tmp_path / "store",
        "-k",
        "additivity",
    ]
    done = run_pytest(*arguments, **_environment(hub[0], tmp_path))
    assert done.returncode == 1
    assert "the hub has no somebody/absent" in done.stdout and "Traceback" not in done.stdout


def test_a_range_of_revisions_is_fetched_and_evicted(
    hub: tuple[str, list[str]], run_pytest: Callable[..., Any], tmp_path: Path
) -> None:
    environment = _environment(hub[0], tmp_path)
    asked = ["invariants", "-k", "additivity", "--store", tmp_path / "store", "-v", "--evict"]
    done = run_pytest(*asked, "--model", f"{REPOSITORY}:step500..step2000", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    audited = re.findall(r"test_additivity\[(\S+)\] PASSED", done.stdout)
    assert audited == ["tiny:step512", "tiny:step1000", "tiny:step2000"]
    assert not list((tmp_path / "cache").glob("hub/models--*/snapshots/*"))
    # One alone stays where nothing was said of evicting, and one that was there is not taken.
    one = ["invariants", "-k", "additivity", "--store", tmp_path / "again"]
    one += ["--model", f"{REPOSITORY}:step512"]
    assert run_pytest(*one, **environment).returncode == 0
    assert run_pytest(*one, "--evict", **environment).returncode == 0
    (kept,) = (tmp_path / "cache").glob("hub/models--*/snapshots/*")
    assert kept.name == commit_of("step512")
    for wrong, says in (
        (f"{REPOSITORY}:step5000..step6000", "no revision step5000..step6000"),
        (f"{REPOSITORY}:step1..main", "is no range of revisions"),
        ("somebody/absent:step1..step2", "the hub has no somebody/absent"),
    ):
        done = run_pytest(*asked, "--model", wrong, **environment)
        assert done.returncode == 4 and says in done.stderr, done.stdout + done.stderr


def test_a_hub_out_of_reach_is_never_green(run_pytest: Callable[..., Any], tmp_path: Path) -> None:
    environment = _environment("http://127.0.0.1:9", tmp_path)
    for name in (["-k", "gpt2-xl and additivity"], ["--model", "gpt2-xl", "-k", "additivity"]):
        done = run_pytest(*name, "--store", tmp_path / "store", **environment)
        assert done.returncode == 1, done.stdout
    assert (
        "could not be measured: the hub could not be reached for openai-community/gpt2-xl"
        in done.stdout
    )
    assert "Traceback" not in done.stdout


def test_models_that_are_not_here_are_left_alone(
    run_pytest: Callable[..., Any], tmp_path: Path
) -> None:
    environment = _environment("http://127.0.0.1:9", tmp_path)
    chosen = run_pytest("--collect-only", "-q", **environment).stdout
    assert "[pystdlib-3m]" in chosen and "gpt2" not in chosen
    named = run_pytest("--collect-only", "-q", "-k", "gpt2-xl", **environment).stdout
    assert "[gpt2-xl]" in named and "[gpt2]" not in named


def test_a_model_in_the_cache_needs_no_name(run_pytest: Callable[..., Any], tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "hub" / "models--EleutherAI--pythia-14m" / "snapshots" / COMMIT
    models.save(models.random_model("gpt-neox-parallel"), snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    done = run_pytest(
        "-k",
        "additivity",
        "--store",
        tmp_path / "store",
        "-v",
        **_environment("http://127.0.0.1:9", tmp_path),
    )
    assert done.returncode == 0, done.stdout
    assert "test_additivity[pythia-14m] PASSED" in done.stdout
