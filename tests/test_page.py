"""The page as its readers meet it: in a browser without a network, filtered, sorted, linked to,
saved from, printed, by keyboard and by screen reader, of one model and of many.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reports.packed import inflated, packed_figures, packed_rows
from reports.render import read_rows, render
from reports.trajectories import step_of, trajectories
from tests.conftest import Audit
from tests.packed import carried_rows
from tests.records import sound_record

HOSTILE = "<img src=x onerror=alert(1)>|`]</script>"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
Row = dict[str, Any]
Open = Callable[..., Any]


@pytest.fixture
def rows(audit: Callable[..., Audit], tmp_path: Path) -> list[Row]:
    """Rows of two records, one of which breaks a law."""
    sound_record().save(tmp_path / "sound.safetensors")
    sound_record(0.99).save(tmp_path / "shrinking.safetensors")
    return audit(
        "--record", tmp_path / "sound.safetensors", "--record", tmp_path / "shrinking.safetensors"
    ).rows


def written(rows: list[Row], folder: Path) -> Path:
    """The page of some rows."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    render([folder / "rows.jsonl"], folder)
    return folder / "report.html"


def many(rows: list[Row], models: int) -> list[Row]:
    """The same of so many models, none of which has a record; every fifth fails a law."""
    first = [row for row in rows if row["model"] == "sound"]
    made = []
    for n in range(models):
        own = [row | {"model": f"family-{n % 3}:step{n}", "record": None} for row in first]
        if n % 5 == 0:
            bad = next(row for row in own if row["law"] == "residual/growth_rate")
            bad |= {"outcome": "fail", "reason": f"{bad['model']}: growth 0.9{n}", "value": 0.9}
        made += own
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield running
        running.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a page in a new tab; afterwards nothing may have been said on the console, and nothing
    asked of a network.
    """
    troubles: list[str] = []
    requests: list[str] = []
    tabs = []

    def open_page(path: Path, address: str = "", **options: Any) -> Any:
        tab = browser.new_page(viewport={"width": 1280, "height": 900}, **options)
        tabs.append(tab)
        tab.on("console", lambda message: troubles.append(message.text))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri() + address)
        tab.wait_for_selector("html[data-ready]", state="attached")
        return tab

    yield open_page
    for tab in tabs:
        tab.close()
    assert not troubles
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []


def shown(tab: Any) -> int:
    """Verdicts in tables of laws."""
    return int(tab.locator("tr[data-row]").count())


def comes_to_show(tab: Any, count: int) -> None:
    """After a link, whose address the page hears of a moment later."""
    tab.wait_for_function(
        "count => document.querySelectorAll('tr[data-row]').length == count", arg=count
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_filters_leave_what_they_say(
    scheme: Any, rows: list[Row], opened: Open, tmp_path: Path
) -> None:
    tab = opened(tmp_path / "report" / "report.html", color_scheme=scheme)
    assert shown(tab) == len(rows)
    tab.select_option("[data-filter=outcome]", "fail")
    assert shown(tab) == sum(row["outcome"] == "fail" for row in rows) > 0
    tab.select_option("[data-filter=model]", "sound")
    assert shown(tab) == 0 and not tab.locator("article.trouble").count()
    assert "Nothing fits this filter" in tab.locator("main").inner_text()
    tab.click("text=Show everything")
    comes_to_show(tab, len(rows))
    tab.select_option("[data-filter=model]", "sound")
    assert shown(tab) == len(rows) / 2
    tab.select_option("[data-filter=law]", "residual/growth_rate")
    assert shown(tab) == 1
    tab.select_option("[data-filter=law]", "")
    tab.select_option("[data-filter=kind]", "theorem")
    assert shown(tab) == sum(r["kind"] == "theorem" and r["model"] == "sound" for r in rows)
    tab.fill("[data-filter=q]", "causal")
    assert 0 < shown(tab) < 4
    tab.reload()  # the filter lives in the address
    tab.wait_for_selector("html[data-ready]", state="attached")
    assert 0 < shown(tab) < 4 and tab.input_value("[data-filter=q]") == "causal"
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 24, 28)")


def test_charts_are_drawn_and_saved(rows: list[Row], opened: Open, tmp_path: Path) -> None:
    tab = opened(tmp_path / "report" / "report.html", "#model=sound")
    tab.locator("#models .chart").first.scroll_into_view_if_needed()
    tab.wait_for_selector(".js-plotly-plot .scatterlayer .trace path")
    with tab.expect_download() as saved:
        tab.locator("#models button", has_text="CSV").first.click()
    assert saved.value.suggested_filename == "residual-stream.csv"
    head, *lines = Path(saved.value.path()).read_text().splitlines()
    assert head == '"series","layer","norm"'
    median = [line.split(",")[2] for line in lines if line.startswith('"median token"')]
    assert len(median) == 17 and all(float(value) > 0 for value in median)
    with tab.expect_download() as saved:
        tab.locator("#models button", has_text="SVG").first.click()
    assert Path(saved.value.path()).read_text().startswith("<svg")
    # Printed, the others are there too.
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    tab.wait_for_function(
        "document.querySelectorAll('.chart').length == "
        "document.querySelectorAll('.chart.js-plotly-plot').length"
    )


def test_one_model_has_its_laws_as_rows(rows: list[Row], opened: Open, tmp_path: Path) -> None:
    own = [row | {"record": None} for row in rows if row["model"] == "shrinking"]
    listed = next(row for row in own if row["outcome"] == "pass")
    values = [{"what": "growth", "unit": "", "of": f"head {n}", "value": 1.0} for n in range(12)]
    listed["values"] = values
    counted = next(row for row in own if row["outcome"] == "pass" and row is not listed)
    counted["values"] = [one | {"of": f"part {n}"} for n, one in enumerate([*values, values[0]])]
    tab = opened(written(own, tmp_path / "one"))
    assert not tab.locator(".matrix").count()
    titles = tab.locator(".laws .group").all_inner_texts()
    starts = [title.split(" ")[0].rstrip(",:") for title in titles]
    assert starts == ["Fail", "Unusual", "Hold", "Measured", "Do"]
    text = tab.locator(".laws").inner_text()
    assert all(f"head {n}" in text for n in range(12)) and "part 3" not in text
    assert "the least margin of 13 values, which are in rows.jsonl" in text
    assert tab.locator("svg.strip").count()


def test_a_table_of_many_models(rows: list[Row], opened: Open, tmp_path: Path) -> None:
    tab = opened(written(many(rows, 300), tmp_path / "many"))
    laws = len({row["law"] for row in rows})
    assert "of 300" not in tab.locator("h3").first.inner_text()
    assert tab.locator("h3").first.inner_text() == "residual/growth_rate fails on 60 models"
    assert tab.locator("article.trouble").count() == 1
    assert tab.get_attribute(".matrix", "aria-rowcount") == "301"
    drawn = tab.locator(".matrix tbody tr:not(.room)")
    assert 20 < drawn.count() < 80
    assert not tab.locator("section.model").count()
    # What lies below comes when it is scrolled to, and headers stay in sight.
    tab.evaluate("document.querySelector('.matrix-box').scrollTop = 1e6")
    tab.wait_for_selector(".matrix a >> text=family-2:step299")
    box = tab.locator(".matrix-box").bounding_box()
    head = tab.locator(".matrix thead th").first.bounding_box()
    assert abs(head["y"] - box["y"]) < 3
    # By a column's values, the least first and then the largest.
    button = tab.locator(".matrix thead button[title^='residual/growth_rate:']")
    button.click()
    button = tab.locator(".matrix thead button[title^='residual/growth_rate:']")
    button.click()
    assert tab.locator(".matrix [aria-sort=ascending]").count() == 1
    number = 1 + sorted({row["law"] for row in rows}).index("residual/growth_rate")
    # Sorted, it is at its beginning again.
    assert tab.locator(".matrix tbody tr:not(.room)").first.get_attribute("aria-rowindex") == "2"
    assert tab.evaluate("document.activeElement.title").startswith("residual/growth_rate:")
    first = drawn.nth(0).locator("td").nth(number - 1)
    assert first.get_attribute("class") == "fail"
    # A cell is a link to its law on its model, by keyboard too.
    first.locator("a").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("section.model")
    assert shown(tab) == 1 and "law=residual%2Fgrowth_rate" in tab.url
    assert tab.locator(".matrix tbody tr").count() == 1
    tab.goto(tab.url.partition("#")[0] + "#model=family-2%3Astep299")
    comes_to_show(tab, laws)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_nothing_keeps_a_screen_reader_out(
    width: int, scheme: str, rows: list[Row], opened: Open, tmp_path: Path
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    for path in (tmp_path / "report" / "report.html", written(many(rows, 30), tmp_path / "many")):
        tab = opened(path, color_scheme=scheme)
        tab.set_viewport_size({"width": width, "height": 900})
        found = Axe().run(tab).response["violations"]
        assert [one["id"] for one in found] == []
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_hostile_names_do_nothing(rows: list[Row], opened: Open, tmp_path: Path) -> None:
    spoilt = [row | {"model": HOSTILE, "reason": HOSTILE, "record": None} for row in rows]
    dialogs: list[str] = []
    tab = opened(written(spoilt, tmp_path / "hostile"))
    tab.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    assert tab.locator("h2", has_text="<img src=x").count() == 1
    assert not tab.locator("img").count() and not dialogs


def test_what_changed_since_the_last_run(rows: list[Row], opened: Open, tmp_path: Path) -> None:
    for name, outcome in (("before", "pass"), ("after", "fail")):
        law = next(r for r in rows if r["model"] == "sound" and r["law"] == "residual/growth_rate")
        law |= {"outcome": outcome, "reason": "so it is" if outcome == "fail" else None}
        written(rows, tmp_path / name)
    paths = [tmp_path / name / "rows.jsonl" for name in ("before", "after")]
    assert sum(row["changed"] for row in read_rows(paths)) == 1
    render(paths, tmp_path / "both")
    tab = opened(tmp_path / "both" / "report.html")
    tab.select_option("[data-filter=outcome]", "changed")
    assert shown(tab) == 1 and "sound (run 2)" in tab.locator("section.model h2").inner_text()


def test_a_page_of_many_models_is_small(rows: list[Row], tmp_path: Path) -> None:
    """Strings are there once, and what is alike is deflated away."""
    path = written(many(rows, 300), tmp_path / "many")
    plotly = 2_000_000
    assert path.stat().st_size < plotly + 300 * len(rows) / 2 * 60
    assert (tmp_path / "many" / "rows.jsonl").stat().st_size > 300 * len(rows) / 2 * 900
    assert len(carried_rows(path)["columns"]["law"]) == 300 * len(rows) / 2


def test_packed_figures_are_filled_in_again() -> None:
    figure = {
        "data": [{"y": [1.0, None, 3.0], "name": "a", "x": [0, 1, 2]}],
        "layout": {"title": {"text": "T"}, "xaxis": {"range": [0, 1]}},
    }
    packed = packed_figures([("one", [figure]), ("other", [figure]), ("none", [])])
    assert len(packed["frames"]) == 1  # what they have in common is there once
    frame = json.loads(packed["frames"][0])
    assert frame["data"][0]["x"] == frame["data"][0]["y"] == {"$": 0}
    assert frame["layout"] == figure["layout"]
    numbers, series = packed["models"]["one"]
    assert numbers == [0] and inflated(series) == [[0, 1, 2], [1.0, None, 3.0]]


def test_what_is_no_number_in_a_frame_breaks_no_page() -> None:
    figure = {"data": [], "layout": {"shapes": [{"y0": float("nan"), "y1": float("inf")}]}}
    (frame,) = packed_figures([("one", [figure])])["frames"]
    assert json.loads(frame)["layout"]["shapes"] == [{"y0": None, "y1": None}]


def test_curves_stop_where_a_page_has_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reports.packed.CARRIED", 1000)
    figure = {"data": [{"y": np.random.default_rng(0).random(40).tolist()}], "layout": {}}
    models = packed_figures((f"m{n}", [figure]) for n in range(20))["models"]
    assert models["m0"] and models["m19"] is None


def test_packed_rows_hold_each_text_once(rows: list[Row]) -> None:
    packed = packed_rows(rows, [None] * len(rows))
    assert len(set(packed["texts"])) == len(packed["texts"])
    for n, row in enumerate(rows):
        at = packed["columns"]["reason"][n]
        assert (packed["texts"][at] if at >= 0 else None) == row["reason"]
        assert packed["columns"]["value"][n] == row["value"]


def test_steps_of_training_are_lines(rows: list[Row]) -> None:
    for text, found in (
        ("EleutherAI/pythia-70m:step1000", ("EleutherAI/pythia-70m", 1000)),
        ("pystdlib-3m-step-400", ("pystdlib-3m", 400)),
        ("checkpoint-500", ("one model", 500)),
        ("step-500 (run 2)", ("one model (run 2)", 500)),
        ("pythia:step1000 (run 2)", ("pythia (run 2)", 1000)),
        ("arbiter-13b", None),
        ("writer2", None),
        ("gpt2-xl", None),
    ):
        assert step_of({"model": text, "revision": None}) == found
    assert step_of({"model": "a/b", "revision": "step3000"}) == ("a/b", 3000)
    drawn = trajectories(many(rows, 30))
    growth = next(one for one in drawn if one["layout"]["title"]["text"].startswith("Growth"))
    assert [line["name"] for line in growth["data"]] == ["family-0", "family-1", "family-2"]
    assert growth["data"][1]["x"] == list(range(1, 30, 3))
    assert not trajectories(many(rows, 6))  # two checkpoints each are no line
