"""What an audit costs beside every other way to its numbers, side by side in one run.

    python -m tests.benchmarks.table [--medium FOLDER] [--xl FOLDER] [--runs 3]

Each way runs in a process of its own, in turn with those that it is compared with; the table gives
medians, ranges and ratios of runs that were neighbours. Checkpoints of random weights are written
where no folder is named (about 8 GB in all).
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS, LENGTH = 16, 64
CORE = ("stream", "neurons", "weights", "random_input")
HERE = "tests.benchmarks.table"


def rows() -> list[list[int]]:
    """The same token ids for every way."""
    import numpy as np

    return np.random.default_rng(0).integers(1000, 40000, (PROMPTS, LENGTH)).tolist()  # type: ignore[no-any-return]


def audit(folder: str) -> dict[str, float]:
    """streamgauge as it is by default: the core groups of the record, on the built-in prompts."""
    from streamgauge import measure

    record = measure(folder, groups=CORE)
    return {
        name: float(record.arrays[name].mean())
        for name in record.arrays
        if name.endswith("_samples")
    }


def norms(folder: str) -> dict[str, float]:
    """streamgauge: norms of the stream and of the weights."""
    from streamgauge import measure
    from streamgauge.numerics.rows import Prompts

    measure(folder, rows=Prompts(rows(), "benchmark", None), groups=("stream", "weights"))
    return {}


def weights_alone(folder: str) -> dict[str, float]:
    """streamgauge: norms of the weights."""
    from streamgauge import measure

    measure(folder, groups=["weights"])
    return {}


def bare_minimum(folder: str, *samples: str) -> dict[str, float]:
    """Open the file, one plain Hugging Face forward pass with sdpa over the built-in prompts, rows
    of one length together, and the multiplications of the random inputs.

    samples: how many random vectors each layer's attention and MLP are given.
    """
    import torch
    import transformers as tf

    from streamgauge.checkpoints.prompts import read_prompts, tokenise
    from streamgauge.checkpoints.tokenizers import load_tokenizer
    from streamgauge.engine.forward import BATCH_TOKENS

    prompts = tokenise(
        load_tokenizer(Path(folder)),
        read_prompts(None),
        context=1024,
        vocabulary=50257,
        shorten=True,
    )
    assert prompts is not None
    model = tf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    with torch.no_grad():
        for members in prompts.batches(BATCH_TOKENS):
            model(torch.tensor([prompts.rows[i] for i in members]), use_cache=False)
        attn, mlp = (int(float(n)) for n in samples)
        for block in model.transformer.h:
            width = block.attn.c_proj.weight.shape[0]
            for _ in range(attn // 512):
                torch.randn(512, width) @ block.attn.c_attn.weight[
                    :, -width:
                ] @ block.attn.c_proj.weight
            for _ in range(mlp // 512):
                torch.randn(512, width) @ block.mlp.c_fc.weight @ block.mlp.c_proj.weight
    return {}


def transformer_lens(folder: str) -> dict[str, float]:
    """TransformerLens's documented way to what `stream` and `weights` hold: norms of the stream, of
    weights and of products.
    """
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(folder)
    bridge.enable_compatibility_mode()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.tensor(rows()))
        for n in range(bridge.cfg.n_layers):
            for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
                cache[name, n].norm(dim=-1)
        for block in bridge.blocks:
            for name in ("W_Q", "W_K", "W_V", "W_O"):
                getattr(block.attn, name).norm(dim=(-2, -1))
            for matrix in (block.mlp.W_in, block.mlp.W_out, block.mlp.W_in @ block.mlp.W_out):
                matrix.norm()
        for product in (bridge.OV, bridge.QK):
            product.norm()
            product.svd()
    return {}


def weightwatcher(folder: str) -> dict[str, float]:
    """WeightWatcher's analysis of every matrix."""
    import torch
    import transformers as tf
    import weightwatcher as ww

    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ww.WeightWatcher(model=model).analyze()
    return {}


def nothing(folder: str) -> dict[str, float]:
    """Importing torch and transformers, which every way does."""
    import torch
    import transformers as tf

    return {"threads": torch.get_num_threads(), "version": float(tf.__version__.split(".")[0])}


@dataclass
class Cost:
    """Seconds and the peak of private memory of one process."""

    seconds: float
    peak: int
    said: dict[str, float]


def cost_of(way: Callable[..., dict[str, float]], *arguments: str) -> Cost:
    """Run a way in a process of its own, watched from within."""
    command = [sys.executable, "-m", HERE, "--way", way.__name__, *arguments]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{way.__name__}: {(done.stderr.strip().splitlines() or [str(done.returncode)])[-1]}"
        )
    said = json.loads(done.stdout.splitlines()[-1])
    return Cost(time.monotonic() - started, said.pop("peak"), said)


def run_here(way: str, arguments: list[str]) -> None:
    """The other side of cost_of."""
    from streamgauge.engine.accounts import Accounts

    with Accounts() as accounts:
        said = globals()[way](*arguments)
        print(json.dumps(said | {"peak": accounts.sums()["peak_private_bytes"]}))


def heads(folder: str) -> dict[str, float]:
    """Seconds a head for Frobenius and spectral norms of W_OV and W_QK, ours and FactoredMatrix's,
    and errors against fp64.
    """
    import numpy as np
    import torch
    from transformer_lens.FactoredMatrix import FactoredMatrix

    from streamgauge.engine.memory import reused
    from streamgauge.groups.weights import gram
    from streamgauge.numerics.convention import product_frobenius, product_spectral

    torch.manual_seed(0)
    n, d_model, d_head = 25, 1600, 64
    spread = 1 + torch.arange(d_head) / 8
    V, O = 0.02 * torch.randn(n, d_model, d_head) * spread, 0.02 * torch.randn(n, d_head, d_model)  # noqa: E741
    exact = torch.linalg.svdvals(V.double() @ O.double())
    expected = {"frobenius": exact.square().sum(-1).sqrt().numpy(), "spectral": exact[:, 0].numpy()}

    def ours() -> tuple[Any, Any]:
        grams = gram(V.mT.contiguous().double()), gram(O.double())
        return product_frobenius(*grams), product_spectral(*grams)

    def theirs() -> tuple[Any, Any]:
        product = FactoredMatrix(V, O)
        return product.norm().numpy(), product.svd()[1][:, 0].numpy()

    found: dict[str, float] = {}
    for name, way, repeats in (("ours", ours, 10), ("theirs", theirs, 2)):
        with reused():  # as in an audit; for both
            way()
            started = time.monotonic()
            for _ in range(repeats):
                values = way()
        found[f"{name}_ms_a_head"] = (time.monotonic() - started) / repeats / n * 1e3
        for kind, value in zip(expected, values, strict=True):
            found[f"{name}_{kind}_error"] = float(np.max(np.abs(value / expected[kind] - 1)))
    return found


def random_inputs(folder: str) -> dict[str, float]:
    """Rate of the random inputs' matrix multiplications beside the best that this machine does on
    large matrices just then.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    from streamgauge.checkpoints.files import open_checkpoint
    from streamgauge.engine.blockwise import Blockwise
    from streamgauge.engine.bridge import build_bridge
    from streamgauge.engine.forward import PromptRun
    from streamgauge.engine.heads import Heads
    from streamgauge.engine.layout import probe_layout
    from streamgauge.engine.load import load_model
    from streamgauge.groups.random_input import EarlyInputs, RandomInputGroup
    from streamgauge.numerics.rows import Prompts

    model = Blockwise(load_model(open_checkpoint(folder), "cpu").mapped)
    layout, prompts = probe_layout(model), Prompts(rows(), "benchmark", None)
    early = EarlyInputs(layout)
    run, group = (
        PromptRun(model, prompts, [early]),
        RandomInputGroup(model, layout, early, Heads(build_bridge(model), None), tokens=2**15),
    )
    rates, peaks = [], []
    for layer in range(9):
        with torch.no_grad(), model.held(layer):
            run.visit(layer)
            with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
                group.visit(layer)
        if layer:  # the first warms up
            products = [
                e
                for e in profiled.key_averages()
                if e.key in ("aten::mm", "aten::addmm", "aten::bmm")
            ]
            rates.append(
                sum(e.flops for e in products) / sum(e.self_cpu_time_total for e in products) / 1e3
            )
            peaks.append(_peak())
    shares = [rate / peak for rate, peak in zip(rates, peaks, strict=True)]
    return {
        "gflops": statistics.median(rates),
        "peak_gflops": statistics.median(peaks),
        "share_of_peak": statistics.median(shares),
    }


def _peak() -> float:
    import torch

    n, best = 2048, 0.0
    a, b = torch.randn(n, n), torch.randn(n, n)
    for _ in range(6):
        started = time.monotonic()
        a @ b
        best = max(best, 2 * n**3 / (time.monotonic() - started) / 1e9)
    return best


def horizon_passes(folder: str) -> dict[str, float]:
    """The default horizon sweep, clean run and unembeddings included, in forward passes over the
    same prompts.

    In plain Hugging Face passes, as in bare_minimum, and in our own, whose batches share their
    products.
    """
    import torch
    import transformers as tf

    from streamgauge.checkpoints.files import open_checkpoint
    from streamgauge.checkpoints.prompts import read_prompts
    from streamgauge.checkpoints.tokenizers import load_tokenizer
    from streamgauge.engine.blockwise import Blockwise
    from streamgauge.engine.clean_runs import CleanRuns, some_rows, token_losses
    from streamgauge.engine.forward import BATCH_TOKENS, PromptRun, walk
    from streamgauge.engine.load import load_model
    from streamgauge.engine.memory import reused
    from streamgauge.engine.rows import prompts_for
    from streamgauge.groups.horizon import Horizons
    from streamgauge.numerics.horizons import Variant
    from streamgauge.numerics.rows import Prompts

    model = Blockwise(load_model(open_checkpoint(folder), "cpu").mapped)
    prompts = prompts_for(
        model,
        Path(folder),
        load_tokenizer(Path(folder)),
        read_prompts(None),
        built_in=True,
    )

    prompts = Prompts([prompts.rows[row] for row in some_rows(prompts)], "benchmark", None)

    plain = tf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()

    def plain_pass() -> None:
        for members in prompts.batches(BATCH_TOKENS):
            plain(torch.tensor([prompts.rows[i] for i in members]), use_cache=False)

    def own_pass() -> None:
        run = PromptRun(model, prompts, [])
        walk(model, {"prompts": run})
        for batch in run.batches:
            token_losses(model, batch.ids, batch.stream)

    def sweep() -> None:
        run = PromptRun(model, prompts, [])
        clean = CleanRuns(run)
        horizons = Horizons(clean, [Variant()])
        walk(model, {"prompts": run, "clean": clean, "horizon": horizons})
        horizons.found()

    def seconds(way: Callable[[], None]) -> float:
        started = time.monotonic()
        way()
        return time.monotonic() - started

    with torch.no_grad(), reused():
        plain_pass()  # warms up
        plain_before, own_before, swept = seconds(plain_pass), seconds(own_pass), seconds(sweep)
        own_after, plain_after = seconds(own_pass), seconds(plain_pass)
    return {
        "plain passes": 2 * swept / (plain_before + plain_after),
        "own passes": 2 * swept / (own_before + own_after),
    }


def warm(folder: str) -> dict[str, float]:
    """A warm audit of the bundled model and the collection of the whole catalogue, beside pytest on
    an empty test.
    """
    with tempfile.TemporaryDirectory() as scratch:
        empty = Path(scratch) / "test_empty.py"
        empty.write_text("def test_empty():\n    pass\n")
        run = [
            "-q",
            "--store",
            str(Path(scratch) / "store"),
            "--model",
            "pystdlib-3m",
            "invariants",
        ]
        bare = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", scratch, str(empty)]
        _pytest(run)
        pairs = [(_pytest(bare)[0], _pytest(run)[0]) for _ in range(5)]
        _, said = _pytest(
            ["-q", "--collect-only", "--store", str(Path(scratch) / "store"), "invariants"]
        )
        collected = re.search(r"collected.* in ([\d.]+)s", said)
        assert collected, said
        plain = statistics.median(one for one, _ in pairs)
        return {
            "empty": plain,
            "warm": statistics.median(w for _, w in pairs),
            "collection": float(collected[1]),
            "ratio": statistics.median(w / one for one, w in pairs),
        }


def _pytest(arguments: list[str]) -> tuple[float, str]:
    """Seconds, interpreter start included, and what was printed."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], capture_output=True, text=True, check=False
    )
    return time.monotonic() - started, done.stdout


def table(medium: str, xl: str, runs: int) -> Iterator[str]:
    """The lines of the table."""
    yield f"{runs} runs; median (least to most)"
    pairs = [_beside_bare_minimum(medium) for _ in range(runs)]
    yield from _compare(
        "(a) gpt2-medium, cold audit, against the bare minimum", pairs, "at most 1.25"
    )
    pairs = [_beside_bare_minimum(xl) for _ in range(runs)]
    yield from _compare("(a) gpt2-xl's size, likewise", pairs, "at most 1.25")
    pairs = [(cost_of(transformer_lens, medium), cost_of(norms, medium)) for _ in range(runs)]
    yield from _compare(
        "(b) gpt2-medium, TransformerLens's way, against ours",
        pairs,
        "at least 3 in time, 6 in memory",
    )
    try:
        pairs = [(cost_of(weightwatcher, medium), cost_of(weights_alone, medium))]
        yield from _compare(
            "    gpt2-medium, WeightWatcher, against our weights part", pairs, "one run"
        )
    except RuntimeError as error:
        yield f"    WeightWatcher: {error}"
    for title, way, folder in (
        ("(c) norms of W_OV, 25 heads of gpt2-xl", heads, xl),
        ("(d) random inputs, gpt2-xl's size", random_inputs, xl),
        ("(e) horizon sweep, gpt2-medium", horizon_passes, medium),
        ("(e) horizon sweep, gpt2-xl's size, one run", horizon_passes, xl),
        ("(f) warm audit", warm, medium),
    ):
        found = [cost_of(way, folder).said for _ in range(1 if "one run" in title else runs)]
        yield title
        yield from (f"    {name}: {_median([one[name] for one in found])}" for name in found[0])


def _beside_bare_minimum(folder: str) -> tuple[Cost, Cost]:
    ours = cost_of(audit, folder)
    attn, mlp, resampled = (
        ours.said[f"random_input/{kind}_samples"] for kind in ("attn", "mlp", "resampled")
    )
    return ours, cost_of(bare_minimum, folder, str(attn), str(mlp + resampled))


def _compare(title: str, pairs: list[tuple[Cost, Cost]], bar: str) -> Iterator[str]:
    yield f"{title} (bar: {bar})"
    for name, of in (
        ("seconds", lambda cost: cost.seconds),
        ("peak private GB", lambda cost: cost.peak / 1e9),
    ):
        one, other = ([of(pair[side]) for pair in pairs] for side in (0, 1))
        ratios = [of(a) / of(b) for a, b in pairs]
        yield f"    {name}: {_median(one)} against {_median(other)}; ratio {_median(ratios)}"


def _median(values: list[float]) -> str:
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    return f"{statistics.median(values):.3g}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--medium", help="a checkpoint of gpt2-medium's shape")
    parser.add_argument("--xl", help="a checkpoint of gpt2-xl's shape")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options, arguments = parser.parse_known_args()
    os.environ.pop(
        "PYTHONDONTWRITEBYTECODE", None
    )  # with it, every start would compile what users compile once
    if options.way:
        run_here(options.way, arguments)
        return
    from tests.benchmarks.shapes import write

    with tempfile.TemporaryDirectory() as scratch:
        medium = options.medium or str(write("gpt2-medium", Path(scratch) / "medium"))
        xl = options.xl or str(write("gpt2-xl", Path(scratch) / "xl"))
        for line in table(medium, xl, options.runs):
            print(line, flush=True)


if __name__ == "__main__":
    main()
