"""The page, the summary and the rows: whole, safe, and usable in a browser without a network."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from reports.across import _correlation, against_properties, horizon_and_growth
from reports.render import page, read_rows
from reports.summary import summary
from streamgauge.numerics.horizons import DEFAULT
from tests import models
from tests.conftest import ROOT, Audit
from tests.packed import carried_rows
from tests.records import replaced, sound_record

HOSTILE = "<img src=x onerror=alert(1)>|`]</script>"
SCHEMA = json.loads((ROOT / "reports" / "row.schema.json").read_text())


@pytest.fixture
def rows(audit: Callable[..., Audit], tmp_path: Path) -> list[dict[str, Any]]:
    """Rows of two records, one of which breaks a law."""
    sound_record().save(tmp_path / "sound.safetensors")
    sound_record(0.99).save(tmp_path / "shrinking.safetensors")
    return audit(
        "--record", tmp_path / "sound.safetensors", "--record", tmp_path / "shrinking.safetensors"
    ).rows


def test_rows_keep_their_schema(rows: list[dict[str, Any]], audit: Callable[..., Audit]) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert {row["outcome"] for row in rows} >= {"pass", "fail", "not_applicable"}
    for row in rows + audit("--published").rows:
        validator.validate(row)


@pytest.mark.parametrize(
    "change",
    [
        {"outcome": "maybe"},
        {"value": None},
        {"extra": 1},
        {"outcome": "fail", "reason": None},
        {"band": [1]},
    ],
)
def test_schema_refuses(change: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    row = next(row for row in rows if row["outcome"] == "pass")
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(row | change)


def test_failing_row_says_all_that_is_needed(rows: list[dict[str, Any]]) -> None:
    row = next(
        row for row in rows if row["law"] == "residual/growth_rate" and row["outcome"] == "fail"
    )
    assert (
        row["value"] == pytest.approx(0.99)
        and row["band"] == [1.0, None]
        and row["layers"] == [2, 13]
    )
    assert row["margin"] == pytest.approx(-0.01, rel=1e-3)
    assert (
        "shrinking, layers 2 to 13: growth 0.99 a layer, outside above 1 (mean of 40 tokens"
        in row["reason"]
    )
    assert row["reproduce"].startswith("pytest invariants/residual/test_growth_rate.py --record ")


def test_reproduce_command_shows_the_failure_again(
    rows: list[dict[str, Any]], run_pytest: Callable[..., Any]
) -> None:
    import shlex

    row = next(
        row for row in rows if row["law"] == "residual/growth_rate" and row["outcome"] == "fail"
    )
    done = run_pytest(*shlex.split(row["reproduce"])[1:])
    # Alone, a record is called what it was made from.
    assert done.returncode == 1 and row["reason"].partition(",")[2] in done.stdout


def test_page_is_a_pure_function(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    paths = [tmp_path / "report" / "rows.jsonl"]
    assert page(read_rows(paths)) == page(read_rows(paths))


def test_nothing_from_a_checkpoint_is_rendered_unescaped(rows: list[dict[str, Any]]) -> None:
    spoilt = [
        row
        | {
            "model": HOSTILE,
            "reason": HOSTILE,
            "source": HOSTILE,
            "reproduce": HOSTILE,
            "record": None,
        }
        for row in rows
    ]
    assert "<img src=x" not in page(spoilt)
    assert "<img" not in summary(spoilt).replace("\\<", "").replace("    <img", "")


@pytest.mark.parametrize(("models", "said"), [(1, "1 model:"), (2, "2 models:")])
def test_models_are_counted(
    models: int, said: str, audit: Callable[..., Audit], tmp_path: Path
) -> None:
    given: list[Any] = []
    for number in range(models):
        sound_record(model=f"m{number}").save(tmp_path / f"m{number}.safetensors")
        given += ["--record", tmp_path / f"m{number}.safetensors"]
    found = audit(*given, "-k", "additivity")
    assert f"laws on {said} {models} hold, 0 fail" in found.output


def test_summary_counts_and_explains(rows: list[dict[str, Any]]) -> None:
    text = summary(rows)
    assert "| shrinking | " in text and "## residual/growth_rate fails on shrinking" in text
    assert "Reproduce with:" in text


def test_report_command_renders_several_runs(
    rows: list[dict[str, Any]], tmp_path: Path, run_streamgauge: Callable[..., Any]
) -> None:
    shutil.copytree(tmp_path / "report", tmp_path / "second")
    done = run_streamgauge(
        "report",
        tmp_path / "report" / "rows.jsonl",
        tmp_path / "second" / "rows.jsonl",
        "-o",
        tmp_path / "both",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "both" / "report.html").is_file() and (
        tmp_path / "both" / "summary.md"
    ).is_file()
    missing = run_streamgauge("report", tmp_path / "none.jsonl", "-o", tmp_path / "x")
    assert missing.returncode == 4 and "there is no file" in missing.stderr


def test_a_model_whose_stream_overflows_does_not_take_the_page_along(
    audit: Callable[..., Audit], tmp_path: Path
) -> None:
    model = models.random_model("llama")
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(1e21)
    sound = models.save(models.random_model("llama"), tmp_path / "sound")
    found = audit("--model", models.save(model, tmp_path / "overflows"), "--model", sound)
    assert found.exit == 1 and "Traceback" not in found.output
    assert "first in" in next(
        r["reason"]
        for r in found.rows
        if r["model"] == "overflows" and r["law"] == "residual/growth_rate"
    )
    carried = carried_rows(tmp_path / "report" / "report.html")
    assert [model["name"] for model in carried["models"]] == ["overflows", "sound"]


def test_horizon_and_growth_are_compared_across_models(
    audit: Callable[..., Audit], tmp_path: Path
) -> None:
    for number, rate in enumerate((1.02, 1.03, 1.04, 1.05, 1.06)):
        record = sound_record(rate)
        k = record.array("horizon/k")
        nearer = record.array(f"horizon/loss.{DEFAULT.name}") - 0.2 * number * (k < 8)[:, None]
        replaced(record, {f"horizon/loss.{DEFAULT.name}": nearer}).save(
            tmp_path / f"model-{number}.safetensors"
        )
    audit(*(word for n in range(5) for word in ("--record", tmp_path / f"model-{n}.safetensors")))
    figure = horizon_and_growth(read_rows([tmp_path / "report" / "rows.jsonl"]))
    assert figure is not None
    np.testing.assert_allclose(figure["data"][0]["x"], [1.02, 1.03, 1.04, 1.05, 1.06], rtol=1e-4)
    assert figure["data"][0]["y"] == sorted(figure["data"][0]["y"], reverse=True)
    rows = read_rows([tmp_path / "report" / "rows.jsonl"])
    layers = [row["value"] for row in rows if row["law"] == "depth/layer_horizon"]
    np.testing.assert_allclose(figure["data"][0]["y"], np.array(layers) / 16, rtol=1e-4)
    assert "over 5 models is -1.00" in figure["read"]
    # Bonett and Wright 2000: ρ = 0.7 of six, error √((1 + ρ²/2) / 3) of its artanh.
    growth, horizon = np.arange(6.0), np.array([0.0, 3, 1, 2, 4, 5])
    rank = 1 - 6 * ((growth - horizon) ** 2).sum() / (6 * 35)
    error = 1.96 * np.sqrt((1 + rank**2 / 2) / 3)
    low, high = np.tanh(np.arctanh(rank) - error), np.tanh(np.arctanh(rank) + error)
    said = _correlation(growth, horizon)
    assert said.endswith(f"models is {rank:.2f}, 95% interval {low:.2f} to {high:.2f}.")
    assert _correlation(growth[:3], horizon[:3]) == "3 models are too few for a correlation."
    assert "do not differ" in _correlation(growth, 0 * horizon)
    carried = carried_rows(tmp_path / "report" / "report.html")
    assert carried["across"][0]["layout"]["title"]["text"] == "Layer horizon and growth"
    assert horizon_and_growth(read_rows([tmp_path / "report" / "rows.jsonl"])[:40]) is None


def test_an_index_says_what_changed_from_run_to_run(
    run_streamgauge: Callable[..., Any], tmp_path: Path
) -> None:
    row = {
        "law": "residual/growth_rate", "outcome": "pass", "reason": None, "kind": "phenomenon",
    }  # fmt: skip
    runs = tmp_path / "runs"
    for number, (outcome, reason) in enumerate(
        [("pass", None), ("fail", "growth 0.9 <b>bold</b>"), ("fail", "growth 0.9")]
    ):
        folder = runs / f"run {number}"
        folder.mkdir(parents=True)
        own = [row | {"model": "m", "outcome": outcome, "reason": reason}]
        own += [row | {"model": "n"}] * (number != 1)
        (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in own))
        os.utime(folder / "rows.jsonl", (1e9 + number, 1e9 + number))
    done = run_streamgauge("history", runs)
    assert done.returncode == 0, done.stderr
    page = (runs / "index.html").read_text()
    assert [page.index(f"run {number}") for number in (2, 1, 0)] == sorted(
        page.index(f"run {number}") for number in range(3)
    )
    assert page.count("✓ holds → ") == 1  # run 1's; n has not changed since run 0
    assert "&lt;b&gt;bold" in page and "<b>bold" not in page
    assert run_streamgauge("history", runs).returncode == 0  # its own index is replaced
    (runs / "index.html").write_text("mine")
    done = run_streamgauge("history", runs)
    assert done.returncode == 4 and "was written by somebody else" in done.stderr
    for nothing in (tmp_path / "nowhere", runs / "run 0" / "rows.jsonl"):
        assert run_streamgauge("history", nothing).returncode == 4
    (runs / "run 0" / "rows.jsonl").write_text("{}\n")
    (runs / "index.html").unlink()
    done = run_streamgauge("history", runs)
    assert done.returncode == 1 and "is not of an audit" in done.stderr
    assert "Traceback" not in done.stderr


def test_quantities_are_compared_with_what_models_are(
    audit: Callable[..., Audit], tmp_path: Path
) -> None:
    """Deeper ones grow more slowly here; all have one width, which nothing can go with."""
    asked: list[object] = []
    for number, (layers, rate) in enumerate([(12, 1.06), (16, 1.05), (24, 1.04), (32, 1.03)]):
        path = tmp_path / f"m{number}.safetensors"
        sound_record(rate, model=f"m{number}", n_layers=layers).save(path)
        asked += ["--record", path]
    rows = audit(*asked, laws="invariants/residual/test_growth_rate.py").rows
    rows = [row | {"record": str(tmp_path / f"{row['model']}.safetensors")} for row in rows]
    (figure,) = against_properties(rows)
    assert figure["layout"]["title"]["text"] == "Growth of the stream a layer, by layers"
    (data,) = figure["data"]
    assert sorted(data["x"]) == [12, 16, 24, 32]
    np.testing.assert_allclose(sorted(data["y"]), [1.03, 1.04, 1.05, 1.06], rtol=1e-4)
    assert "over 4 models is -1.00" in figure["read"]
    assert "One of 1 such comparisons" in figure["read"]
    assert against_properties(rows[:3]) == []
    assert against_properties([row | {"record": None} for row in rows]) == []
