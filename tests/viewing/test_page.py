"""The HTML page of a run: what stands in it, and how it behaves in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from farms_tb import LayerRecord, Report, Verdict, analyze
from farms_tb.report import DERIVED
from farms_tb.viewing.diagnosis import diagnose
from farms_tb.viewing.history import Curve, History
from farms_tb.viewing.page import write_page
from farms_tb.viewing.plots.plane import MARKS
from farms_tb.viewing.run_folder import RunFolder, read_run_folder
from farms_tb.viewing.words import METRICS, OF_THE_NULL, VERDICTS
from tests.helpers import LIGHTNING_NOISE
from tests.runs import train_run

pytestmark = LIGHTNING_NOISE

EVIL = "</script><img src=x onerror=\"document.title='owned'\"><b>'{{css}}"
NULL: dict[str, Any] = {
    "alpha_error": 0.02,
    "null_mean": 2.09,
    "null_std": 0.05,
    "null_draws": 32,
    "num_eigenvalues": 100,
    "shape": (1, 100, 100),
}
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
]


def content(page: Path) -> dict[str, Any]:
    """Return the values that stand in a page."""
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    found: dict[str, Any] = json.loads(data)
    return found


def made_up_run(folder: Path, layers: list[str], epochs: int = 4) -> RunFolder:
    """A run with layers of any names: the first is all zeros, the others alternate between two shapes."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(size, 20) for size in (20, 80, 20, 80, 20)))
    nn.init.zeros_(net[0].weight)
    farms, full = (analyze(net, esd=esd, histogram=True) for esd in ("farms", "full"))

    def curves(start: float) -> dict[str, Curve]:
        steps, times = range(0, 10 * epochs, 10), range(epochs)
        return {
            name: Curve(tuple(map(float, times)), tuple(steps), tuple(start + index + time for time in times))
            for index, name in enumerate(layers)
        }

    def renamed(report: Report) -> Report:
        first, *others = report.layers.values()
        return Report(dict(zip(layers, chain([first], cycle(others)), strict=False)), report.options)

    history = History(curves(2.0), curves(1.0), curves(0.1), tuple(layers))
    return RunFolder(folder, history, renamed(farms), renamed(full), farms.options, "last.ckpt", "seed: 1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_run(folder)
    return folder


# ---- what stands in it


def test_values_of_a_real_run(trained: Path, tmp_path: Path) -> None:
    page = write_page(trained, tmp_path / "new" / "page.html")
    run, found = read_run_folder(trained), content(page)
    assert run.farms is not None
    assert run.full is not None
    assert [layer["name"] for layer in found["layers"]] == list(run.layers)
    assert found["when"] == {"epoch": [0, 1, 2, 3], "step": [0, 4, 8, 12]}
    for layer in found["layers"]:
        farms, full = run.farms.layers[layer["name"]], run.full.layers[layer["name"]]
        assert layer["farms"] == pytest.approx(farms.alpha, rel=1e-4)
        assert layer["error"] == pytest.approx(farms.alpha_error, rel=1e-4)
        bias = None if farms.alpha is None or full.alpha is None else full.alpha - farms.alpha
        assert layer["bias"] == (None if bias is None else pytest.approx(bias, abs=1e-4))
        assert layer["alpha"] == pytest.approx(run.history.alpha[layer["name"]].values, rel=1e-4)
        assert layer["ratio"][:3] == pytest.approx(run.history.ratio[layer["name"]].values, rel=1e-4)
        assert layer["ratio"][3:] == [None]
        assert layer["last_ratio"] == layer["ratio"][2]
        assert set(layer["esd"]) == {"farms", "full"}
        assert {spectrum["aspect"] for spectrum in layer["esd"].values()} <= set(found["laws"])
    assert found["missing"] == []
    assert found["diagnosis"] == diagnose(run.farms)
    assert "last.ckpt" in found["weights"] or "epoch=2" in found["weights"]


def test_goes_into_the_run_folder_and_replaces_itself(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    assert write_page(folder) == write_page(folder) == folder / "report.html"
    assert not [*folder.glob("*.part"), *folder.glob(".*.part")]


def test_several_writers_of_one_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,farms/alpha/a\n0,0,2\n1,1,2\n")
    with ThreadPoolExecutor(4) as threads:
        pages = list(threads.map(lambda _: write_page(tmp_path), range(40)))
    assert set(pages) == {tmp_path / "report.html"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "report.html"]


def test_needs_nothing_from_outside(trained: Path, tmp_path: Path) -> None:
    text = write_page(trained, tmp_path / "page.html").read_text()
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href)=(?!\"data:,\")", text)
    assert not re.search(r"\{\{\w+\}\}", text)


def test_what_json_has_no_number_for(tmp_path: Path) -> None:
    curve = Curve((math.nan, 1.0), (0, 5), (math.inf, 2.0))
    record = LayerRecord(alpha=2.0, ks_distance=math.nan)
    run = RunFolder(tmp_path, History({"a": curve}, layers=("a",)), Report({"a": record}, {"esd": "farms"}))
    (layer,) = content(write_page(run))["layers"]
    assert layer["alpha"] == [None, 2.0]
    assert layer["ks"] is None


def test_times_without_an_epoch_come_first(tmp_path: Path) -> None:
    lines = [f"{epoch},{step},2\n" for step in range(20) for epoch in (step + 1, "", step)]
    (tmp_path / "metrics.csv").write_text("epoch,step,farms/alpha/a\n" + "".join(lines))
    when = content(write_page(tmp_path))["when"]
    assert when["step"] == [step for step in range(20) for _ in range(3)]
    assert when["epoch"] == [epoch for step in range(20) for epoch in (None, step, step + 1)]


def test_the_stable_rank_is_the_matrixs_own(trained: Path, tmp_path: Path) -> None:
    run = read_run_folder(trained)
    assert run.full is not None
    for layer in content(write_page(run, tmp_path / "page.html"))["layers"]:
        record = run.full.layers[layer["name"]]
        expected = record.stable_rank
        assert layer["stable_rank"] == (None if expected is None else pytest.approx(expected, rel=1e-4))
        assert expected is None or expected <= min(record.shape[1:])
    alone = RunFolder(tmp_path, farms=run.farms)
    assert {layer["stable_rank"] for layer in content(write_page(alone))["layers"]} == {None}


@pytest.mark.parametrize(
    ("epoch", "step", "note"),
    [
        (3, 30, "alpha of epoch 3, curve to epoch 4"),
        (4, 35, "alpha of step 35, curve to step 40"),
        (3, None, "alpha of epoch 3, curve to epoch 4"),
        (4, 40, ""),
        (4, None, ""),
        (5, 40, ""),
        (None, None, ""),
    ],
)
def test_rows_of_two_times_say_so(tmp_path: Path, epoch: int | None, step: int | None, note: str) -> None:
    run = made_up_run(tmp_path, ["a", "b"], epochs=5)
    page = write_page(replace(run, weights_epoch=epoch, weights_step=step))
    assert {layer["note"] for layer in content(page)["layers"]} == {note}


def test_names_fill_no_place_of_the_template(tmp_path: Path) -> None:
    """Neither the title nor the data: what was filled in is not searched again."""
    run = replace(made_up_run(tmp_path, ["{{js}}", "{{title}}"]), name="{{css}} {{data}}")
    page = write_page(run)
    assert "<title>{{css}} {{data}}</title>" in page.read_text()
    assert [layer["name"] for layer in content(page)["layers"]] == ["{{js}}", "{{title}}"]


def test_scores_beyond_floats(tmp_path: Path) -> None:
    run = replace(made_up_run(tmp_path, ["a"]), summary={"test": {"huge": 10**400, "acc": 0.5, "name": "x"}})
    facts = content(write_page(run))["facts"]
    assert "acc 0.5" in facts
    assert any(fact.startswith("huge ") for fact in facts)


def test_layers_that_were_logged_alone(trained: Path, tmp_path: Path) -> None:
    run = read_run_folder(trained)
    assert run.farms is not None
    (layer, *_) = content(write_page(RunFolder(tmp_path, run.history)))["layers"]
    assert layer["farms"] is None
    assert layer["status"] == "not in the weights that were measured"


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's or anybody's Chromium; what it lacks is said once."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is on the PATH (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def view(browser: Any) -> Iterator[Any]:
    """Open a page; in the end there must have been no error and no request but for the page itself."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, has_touch=True)
    tab = context.new_page()
    tab.set_default_timeout(10_000)
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    requested: list[str] = []
    tab.on("request", lambda request: requested.append(request.url))

    def visit(page: Path) -> Any:
        tab.goto(page.resolve().as_uri())
        return tab

    yield visit
    assert said == []
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in requested if url.startswith("file:")]) == 1
    context.close()


def names(tab: Any) -> list[str]:
    """Layers of the table as they stand."""
    found: list[str] = tab.locator("tbody tr:visible td:nth-child(3)").all_inner_texts()
    return found


def test_one_layer_is_not_called_layers(view: Any, tmp_path: Path) -> None:
    run = made_up_run(tmp_path, ["conv"])
    page = write_page(run)
    assert content(page)["facts"][0] == "1 layer"
    tab = view(page)
    assert tab.inner_text("#count") == "1 layer"
    assert "of 1 layer over training" in str(tab.locator("#curves svg").get_attribute("aria-label"))


def test_click_on_a_layer_shows_its_spectrum(view: Any, trained: Path, tmp_path: Path) -> None:
    tab = view(write_page(trained, tmp_path / "page.html"))
    assert tab.locator("#detail").is_hidden()
    tab.get_by_role("button", name="net.5", exact=True).click()
    assert tab.inner_text("#detail h2") == "net.5"
    assert tab.locator("#spectrum .bins").count() == 1
    assert tab.locator("#spectrum .tail").count() == 1
    assert tab.locator("#spectrum .law").count() == 1
    assert "NaN" not in tab.inner_html("#detail") + tab.inner_html("#curves")
    shown = tab.locator("#spectrum .bins").get_attribute("d")
    tab.get_by_text("whole matrix").click()
    assert tab.locator("#spectrum .bins").get_attribute("d") != shown
    assert tab.locator("tbody tr[aria-selected=true]").count() == 1
    tab.locator("#spectrum svg").hover()
    assert re.match(r"eigenvalues [\d.e-]+ to [\d.e-]+\ndensity", tab.inner_text("#tip"))
    tab.get_by_role("button", name="Close").click()
    assert tab.locator("#detail").is_hidden()
    assert tab.evaluate("document.activeElement.textContent") == "net.5"


def test_hover_names_layer_epoch_and_value(view: Any, tmp_path: Path) -> None:
    tab = view(write_page(made_up_run(tmp_path, ["a", "b", "c"])))
    box = tab.locator("#curves path[data-layer='1']").bounding_box()
    # Layer b runs straight from 3 at epoch 0, at the lower left of its box, to 6 at epoch 3.
    tab.mouse.move(box["x"] + box["width"] - 2, box["y"] + 2)
    assert tab.inner_text("#tip") == "b\nepoch 3: alpha 6"
    tab.get_by_text("steps", exact=True).click()
    tab.mouse.move(box["x"] + box["width"] * 2 / 3 + 1, box["y"] + box["height"] / 3)
    assert tab.inner_text("#tip") == "b\nstep 20: alpha 5"
    tab.get_by_text("learning rate", exact=True).click()
    box = tab.locator("#curves path[data-layer='2']").bounding_box()
    tab.mouse.move(box["x"] + 1, box["y"] + box["height"] - 1)
    assert tab.inner_text("#tip") == "c\nstep 0: learning rate 2.1"
    tab.mouse.move(0, 0)
    assert tab.locator("#tip").is_hidden()


def test_click_on_a_curve_and_on_the_map_chooses(view: Any, tmp_path: Path) -> None:
    tab = view(write_page(made_up_run(tmp_path, ["a", "b", "c"])))
    box = tab.locator("#curves path[data-layer='1']").bounding_box()
    tab.mouse.click(box["x"] + box["width"] - 2, box["y"] + 2)
    assert tab.inner_text("#detail h2") == "b"
    assert tab.locator("#curves .chosen").get_attribute("data-layer") == "1"
    tab.get_by_text("map", exact=True).click()
    box = tab.locator("#curves canvas").bounding_box()
    tab.mouse.click(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2)
    assert tab.inner_text("#detail h2") == "c"
    tab.mouse.move(box["x"] + 2, box["y"] + 2)
    assert tab.inner_text("#tip") == "a\nepoch 0: alpha 2"


def test_table_sorts_filters_and_toggles(view: Any, tmp_path: Path) -> None:
    run = made_up_run(tmp_path, ["layer.10", "layer.9", "other.1", "layer.2"])
    tab = view(write_page(run))
    assert names(tab) == list(run.layers)
    by_name = tab.get_by_role("button", name="layer", exact=True)
    by_name.click()
    assert names(tab) == ["layer.2", "layer.9", "layer.10", "other.1"]
    assert by_name.locator("..").get_attribute("aria-sort") == "ascending"
    by_name.click()
    assert names(tab) == ["other.1", "layer.10", "layer.9", "layer.2"]
    tab.get_by_role("button", name="full", exact=True).click()
    assert run.full is not None
    alphas = {name: alpha for name, alpha in run.full.alphas.items() if alpha is not None}
    assert names(tab) == [*sorted(alphas, key=lambda name: alphas[name]), "layer.10"]  # without an alpha: last
    tab.get_by_role("button", name="full", exact=True).click()
    assert names(tab) == [*sorted(alphas, key=lambda name: -alphas[name]), "layer.10"]
    tab.get_by_role("searchbox").fill("layer 1")
    assert names(tab) == ["layer.10"]
    assert tab.inner_text("#count") == "1 of 4 layers"
    tab.locator("tbody tr:visible").hover()
    assert tab.locator("#curves .near").get_attribute("data-layer") == "0"
    tab.mouse.move(0, 0)
    assert tab.locator("#curves .near").count() == 0
    assert tab.locator("#curves path.curve").count() == 4
    tab.get_by_label("Show all listed layers in the chart").uncheck()
    assert tab.locator("#curves path.curve").count() == 3
    tab.get_by_role("searchbox").fill("")
    tab.get_by_label("Show layer.9 in the chart").uncheck()
    assert tab.locator("#curves path.curve").count() == 2
    assert "all weights are zero" in tab.locator("tbody tr", has_text="layer.10").inner_text()


def test_keyboard_alone(view: Any, tmp_path: Path) -> None:
    tab = view(write_page(made_up_run(tmp_path, ["a", "b", "c"])))
    tab.locator("#curves svg").focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#tip") == "b\nepoch 1: alpha 4"
    tab.keyboard.press("Enter")
    assert tab.inner_text("#detail h2") == "b"
    tab.keyboard.press("Escape")
    assert tab.locator("#detail").is_hidden()
    tab.get_by_role("button", name="a", exact=True).focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    assert tab.inner_text("#detail h2") == "c"
    tab.locator("#quantity input").first.focus()
    tab.keyboard.press("ArrowRight")
    assert "learning rate / scheduler's" in tab.inner_html("#curves")


def test_names_of_five_thousand_letters(view: Any, tmp_path: Path) -> None:
    tab = view(write_page(made_up_run(tmp_path, ["9" * 5000, "a" + "8" * 5000, "b"])))
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1400
    tab.get_by_role("button", name="layer", exact=True).click()
    assert [name[:1] for name in names(tab)] == ["9", "a", "b"]
    assert tab.locator("th[data-key=farms]").bounding_box()["x"] < 1300


def test_names_and_settings_are_text(view: Any, tmp_path: Path) -> None:
    run = made_up_run(tmp_path / EVIL.replace("/", ""), [EVIL, "__proto__", "constructor", "\u2028\ud800"])
    run = RunFolder(**{**vars(run), "settings": EVIL, "missing": (EVIL,), "options": {EVIL: EVIL, "esd": "farms"}})
    tab = view(write_page(run, tmp_path / "page.html"))
    title = tab.title()
    assert "owned" in title  # as a part of the name, that is
    assert title != "owned"
    tab.locator("tbody tr").first.click()
    assert tab.inner_text("#detail h2") == EVIL
    assert names(tab)[1:3] == ["__proto__", "constructor"]
    tab.get_by_text("All settings of the run").click()
    assert tab.inner_text("pre") == EVIL
    assert tab.inner_text("#missing li") == EVIL
    assert tab.locator("img, b").count() == 0
    assert tab.title() == title


def test_the_page_says_what_to_look_at(view: Any, trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    tab = view(write_page(read_run_folder(folder, null=True), tmp_path / "page.html"))
    assert "No layer can be told from random" in tab.inner_text("#diagnosis")
    tab.locator("tbody tr").first.click()
    assert "random" in tab.inner_text("#detail")
    tab.set_viewport_size({"width": 390, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_layer_that_training_warned_of_is_on_the_page(view: Any, tmp_path: Path) -> None:
    """A log of z-scores, as `verdicts=True` writes it; without a checkpoint, too."""
    metrics = ("alpha", "lr", "z", "effect")
    columns = [f"farms/{metric}/{name}" for name in ("a", "b", "idle") for metric in metrics]
    rows = [[epoch, epoch * 4, *[1.9, 0.1, -9, -0.2] * 2, *[2.1, 0.1, 0.3, 0.01]] for epoch in range(4)]
    lines = [["epoch", "step", *columns], *rows]
    (tmp_path / "metrics.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    tab = view(write_page(tmp_path))
    assert "idle stayed random over the last 4 measurements" in tab.inner_text("#diagnosis")
    tab.set_viewport_size({"width": 390, "height": 844})
    for switch in boxes(tab, ".switch:visible"):
        assert switch["x"] + switch["width"] <= 390 - 12
    tab.get_by_text("effect", exact=True).first.click()
    assert tab.locator("#curves .curve").count() == 3
    assert "shuffled" in tab.inner_html("#curves")
    curve = tab.locator("#curves path[data-layer='2']").bounding_box()
    tab.mouse.move(curve["x"] + 1, curve["y"])
    assert tab.inner_text("#tip") == "idle\nepoch 0: effect 0.01"


def test_partial_runs_say_what_is_missing(view: Any, trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "curves"))
    shutil.rmtree(folder / "version_0" / "checkpoints")
    tab = view(write_page(folder))
    assert "No checkpoint (*.ckpt) yet, so no spectra" in tab.inner_text("#missing")
    tab.locator("tbody tr").first.click()
    assert "No spectrum: no checkpoint was found" in tab.inner_text("#detail")
    headings = tab.locator("#detail h3").all_inner_texts()
    assert headings == [f"{what} over training" for what in ("Alpha", "Rank share", "Ratio", "Learning rate")]
    assert tab.locator("#detail .curve").count() == 4


def test_weights_alone(view: Any, trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "weights"))
    (folder / "version_0" / "metrics.csv").unlink()
    tab = view(write_page(folder))
    assert "Nothing was logged yet" in tab.inner_text("#curves")
    tab.locator("tbody tr").nth(1).click()
    assert tab.locator("#spectrum .bins").count() == 1


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_and_can_be_read(view: Any, tmp_path: Path, scheme: str, width: int) -> None:
    tab = view(write_page(made_up_run(tmp_path, [f"block.{index}.attention.proj" for index in range(5)])))
    tab.set_viewport_size({"width": width, "height": 900})
    tab.emulate_media(color_scheme=scheme)
    tab.locator("tbody tr").nth(2).click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ink, card = rgb(tab.locator("h2").first, "color"), rgb(tab.locator(".card").first, "backgroundColor")
    assert (sum(ink) > sum(card)) == (scheme == "dark")
    for line in tab.locator("#curves .curve").all():
        assert max(abs(a - b) for a, b in zip(rgb(line, "stroke"), card, strict=True)) > 50


def test_the_map_has_names_and_ticks(view: Any, tmp_path: Path) -> None:
    """What long names have in common is left out of them, so that they can be told apart."""
    layers = [f"model.encoder.layers.{index}.self_attn.out_proj" for index in range(12)]
    tab = view(write_page(made_up_run(tmp_path, layers, epochs=6)))
    tab.get_by_text("ratio", exact=True).first.click()
    tab.get_by_text("map", exact=True).click()
    for width in (1400, 390):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.wait_for_function(f"document.querySelector('#curves svg').clientWidth < {width}")
        labels = tab.locator("#curves .row").all_text_contents()
        assert len(set(labels)) == 12
        ticks = tab.locator("#curves .column").all_text_contents()
        assert (ticks[0], ticks[-1]) == ("0", "5")
        canvas, place = (tab.locator(at).bounding_box() for at in ("#curves canvas", "#curves"))
        assert all(box["x"] >= place["x"] - 1 for box in boxes(tab, "#curves .row"))
        assert max(box["x"] + box["width"] for box in boxes(tab, "#curves .row")) < canvas["x"]
        assert tab.locator("#curves .ramp").inner_text().startswith("1/17")


def test_the_map_of_a_long_run(view: Any, tmp_path: Path) -> None:
    """It has more values than a function of JavaScript takes arguments."""
    tab = view(write_page(made_up_run(tmp_path, ["a", "b", "c"])))
    tab.get_by_text("map", exact=True).click()
    tab.evaluate("layers[0].ratio = Array(200000).fill(64)")  # The page of such a run takes long to draw.
    tab.get_by_text("ratio", exact=True).first.click()
    assert tab.locator("#curves .ramp").inner_text().startswith("1/64")


def boxes(tab: Any, what: str) -> list[dict[str, float]]:
    return [element.bounding_box() for element in tab.locator(what).all()]


def test_alpha_is_seen_on_a_phone(view: Any, tmp_path: Path) -> None:
    layers = [f"model.encoder.layers.{index}.self_attn.out_proj" for index in range(4)]
    run = replace(made_up_run(tmp_path, layers), weights_epoch=2, weights_step=20)
    tab = view(write_page(run))
    tab.set_viewport_size({"width": 390, "height": 844})
    (heading,) = boxes(tab, "th[data-key=farms]")
    assert 0 < heading["x"] < heading["x"] + heading["width"] < 390
    assert tab.evaluate("document.querySelector('.scroll').scrollLeft") == 0
    assert "alpha of epoch 2, curve to epoch 3" in tab.locator("tbody tr").nth(1).inner_text()


def test_heads_and_values_explain_themselves(view: Any, tmp_path: Path) -> None:
    """To a mouse, to the keyboard and to a finger."""
    tab = view(write_page(made_up_run(tmp_path, ["a", "b"])))
    tip = tab.locator("#tip")
    head = tab.locator("th[data-key=stable_rank] button")
    head.hover()
    assert "whole matrix" in tip.inner_text()
    tab.mouse.move(0, 0)
    assert tip.is_hidden()
    tab.locator("th[data-key=ks] button").focus()
    tab.keyboard.press("Tab")
    assert "whole matrix" in tip.inner_text()
    tab.keyboard.press("Escape")
    assert tip.is_hidden()
    tab.locator("tbody tr").nth(1).click()
    explained = tab.locator("th[data-key] button, #detail dl > div, #quantity label").all()
    assert len(explained) > 20
    for element in explained:
        assert len(element.get_attribute("aria-description")) > 20
    value = tab.locator("#detail dl > div").nth(2)
    tab.set_viewport_size({"width": 390, "height": 844})
    # The detail is drawn anew.
    tab.wait_for_function("document.querySelector('#spectrum svg').viewBox.baseVal.width < 390")
    value.scroll_into_view_if_needed()
    value.tap()
    assert "FARMS" in tip.inner_text()
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    tab.locator("#detail h2").tap()
    assert tip.is_hidden()


def test_words_of_the_page_are_those_of_the_documentation(trained: Path, tmp_path: Path) -> None:
    found = content(write_page(trained, tmp_path / "page.html"))
    assert found["words"]["error"] == METRICS["alpha_error"]
    assert set(found["verdicts"]) == {str(verdict) for verdict in Verdict}
    names = {field.name for field in fields(LayerRecord)} | set(DERIVED)
    assert set(OF_THE_NULL) <= set(METRICS) <= names
    assert all(words.endswith((".", "?")) for words in (*METRICS.values(), *VERDICTS.values()))


SPREAD = {
    "trained": LayerRecord(alpha=1.6, rank_99=70, **NULL),
    "low": LayerRecord(status="low rank: zeros in the tail"),
    "random": LayerRecord(alpha=2.1, rank_99=80, **NULL),
    "collapsed": LayerRecord(alpha=1.1, rank_99=1, tail_floor=1e-8, **NULL),
}
"""Layers of several verdicts; that of low rank has no alpha and so no mark in a chart."""


def run_of_verdicts(folder: Path) -> RunFolder:
    return RunFolder(folder, farms=Report(dict(SPREAD), {"esd": "farms"}))


def test_verdicts_are_marks_of_one_colour_everywhere(view: Any, tmp_path: Path) -> None:
    tab = view(write_page(run_of_verdicts(tmp_path)))
    assert tab.inner_text("#verdicts-heading") == "Layers against random weights"
    keys = {"trained (1)", "random (1)", "collapsed (1)", "low rank (1)", "random weights"}
    assert set(tab.locator("#verdict-key > span").all_inner_texts()) == keys
    for chart in ("#depths", "#plane"):
        assert tab.locator(f"{chart} .mark").count() == 3
    assert tab.locator("#depths .band").count() == 3
    for verdict in (Verdict.TRAINED, Verdict.RANDOM, Verdict.COLLAPSED):
        same = [
            tab.locator(f"{place} .v-{verdict}.mark") for place in ("#depths", "#plane", "tbody", "#verdict-key")
        ]
        assert {tuple(rgb(mark, "fill")) for mark in same} == {hex_rgb(MARKS[verdict][1])}
        assert len({mark.get_attribute("d") for mark in same}) == 1


def hex_rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def test_marks_lie_where_their_values_are(view: Any, tmp_path: Path) -> None:
    tab = view(write_page(run_of_verdicts(tmp_path)))
    plane = {box["name"]: box for box in marks(tab, "#plane")}
    assert plane["collapsed"]["x"] < plane["trained"]["x"] < plane["random"]["x"]
    assert plane["random"]["y"] < plane["trained"]["y"] < plane["collapsed"]["y"]
    # The effects are -0.99, -0.49 and +0.01, the rank shares 1 %, 70 % and 80 %.
    left, middle, right = (plane[name]["x"] for name in ("collapsed", "trained", "random"))
    assert (middle - left) / (right - left) == pytest.approx(0.5, abs=0.01)
    top, centre, bottom = (plane[name]["y"] for name in ("random", "trained", "collapsed"))
    assert (centre - top) / (bottom - top) == pytest.approx(10 / 79, abs=0.01)
    depth = {box["name"]: box for box in marks(tab, "#depths")}
    step = depth["collapsed"]["x"] - depth["random"]["x"]
    assert depth["random"]["x"] - depth["trained"]["x"] == pytest.approx(2 * step, abs=1)
    band = tab.locator("#depths .band").first.bounding_box()
    # From 1.99 to 2.19; an alpha of 1.6 lies below it, one of 2.1 inside.
    assert depth["trained"]["y"] > band["y"] + band["height"]
    assert band["y"] < depth["random"]["y"] < band["y"] + band["height"]


def marks(tab: Any, chart: str) -> list[dict[str, Any]]:
    """Middle of each mark of a chart, and the layer that it stands for."""
    found = []
    for mark in tab.locator(f"{chart} .mark").all():
        box = mark.bounding_box()
        name = [*SPREAD][int(mark.get_attribute("data-layer"))]
        found.append({"name": name, "x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2})
    return found


@pytest.mark.parametrize("chart", ["#depths", "#plane"])
def test_marks_tell_their_layer(view: Any, tmp_path: Path, chart: str) -> None:
    """To a mouse, to the keyboard and to a finger."""
    tab, tip = view(write_page(run_of_verdicts(tmp_path))), "#tip"
    places = {box["name"]: box for box in marks(tab, chart)}
    tab.mouse.move(places["trained"]["x"] + 3, places["trained"]["y"] - 3)
    lines = tab.inner_text(tip).split("\n")
    assert lines[0] == "trained"
    assert lines[1] == f"trained: {VERDICTS[Verdict.TRAINED]}"
    assert lines[2:] == ["alpha 1.600 \u00b1 0.020", "effect -0.490 \u00b1 0.022", "rank share 70 %"]
    assert tab.locator("#verdicts .near").count() == 2  # in both charts
    tab.mouse.move(0, 0)
    assert tab.locator(tip).is_hidden()
    assert tab.locator("#verdicts .near").count() == 0
    tab.locator(f"{chart} svg").focus()
    tab.keyboard.press("ArrowLeft")
    assert tab.inner_text(tip).startswith("trained" if chart == "#depths" else "collapsed")
    tab.keyboard.press("ArrowLeft")
    assert tab.inner_text(tip).startswith("collapsed" if chart == "#depths" else "random")
    tab.keyboard.press("Enter")
    assert tab.inner_text("#detail h2") == ("collapsed" if chart == "#depths" else "random")
    assert tab.locator("#verdicts .chosen").count() == 2
    tab.keyboard.press("Escape")
    assert tab.locator("#detail").is_hidden()
    tab.touchscreen.tap(places["random"]["x"], places["random"]["y"])
    assert tab.inner_text(tip).startswith("random\n")
    assert tab.inner_text("#detail h2") == "random"


def test_without_effects_there_is_no_plane(view: Any, tmp_path: Path) -> None:
    tab = view(write_page(made_up_run(tmp_path, ["a", "b", "c"])))
    assert tab.inner_text("#verdicts-heading") == "Layers by depth"
    assert tab.locator("#depths .mark").count() == 2
    assert tab.locator("#depths .band").count() == 0
    assert tab.locator("#plane").is_hidden()


def test_without_alphas_there_are_no_charts(view: Any, tmp_path: Path) -> None:
    tab = view(write_page(RunFolder(tmp_path, farms=Report({"low": SPREAD["low"]}, {"esd": "farms"}))))
    assert tab.locator("#verdicts").is_hidden()
    assert "low rank" in tab.inner_text("tbody")


def test_a_model_of_one_layer_has_its_charts(view: Any, tmp_path: Path) -> None:
    tab = view(write_page(RunFolder(tmp_path, farms=Report({"a": SPREAD["random"]}, {"esd": "farms"}))))
    assert tab.locator("#depths .mark").count() == tab.locator("#plane .mark").count() == 1
    assert "NaN" not in tab.inner_html("#verdicts")


def test_no_more_digits_than_are_known(view: Any, tmp_path: Path) -> None:
    run = made_up_run(tmp_path, ["a", "b", "c"])
    known = {
        "a": LayerRecord(alpha=2.03444, alpha_error=0.0312, null_mean=2.6, null_std=0.0418),
        "b": LayerRecord(alpha=2.03444, alpha_error=0.312, null_mean=2.03, null_std=0.1),
        "c": LayerRecord(alpha=2.03444),
    }
    full = Report({name: LayerRecord(alpha=2.0344) for name in known}, {"esd": "full"})
    tab = view(write_page(replace(run, farms=Report(known, {"esd": "farms"}), full=full)))
    rows = [row.inner_text().split("\t") for row in tab.locator("tbody tr").all()]
    assert rows[0][3:] == ["trained", "2.034", "0.031", "-0.566", "2.034", "0.000", "-14", "4.000"]
    assert rows[1][4:9] == ["2.03", "0.31", "0.00", "2.03", "0.00"]
    assert rows[2][4:6] == ["2.034", "\u2013"]


@pytest.fixture(scope="module")
def with_outliers(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A layer with one strong direction, a spike, and one with a huge entry, which is a trap in any order."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        net[0].weight += 1.0 * torch.outer(*torch.randn(2, 64)) / 8
        net[1].weight[3, 5] = 6.0
    farms, full = (analyze(net, esd=esd, window=32, histogram=True, null=True) for esd in ("farms", "full"))
    return RunFolder(tmp_path_factory.mktemp("outliers"), farms=farms, full=full)


def test_the_marks_of_a_spectrum_are_the_outliers_counted(with_outliers: RunFolder) -> None:
    assert with_outliers.full is not None
    for layer in content(write_page(with_outliers))["layers"]:
        record = with_outliers.full.layers[layer["name"]]
        assert record.outliers is not None
        marks = layer["esd"]["full"]
        assert marks["edge"] == pytest.approx(record.outliers.edge, rel=1e-4)
        assert marks["spikes"] == pytest.approx(sorted(set(record.outliers.spikes)), rel=1e-2)
        assert len(marks["spikes"]) == layer["num_spikes"] == record.num_spikes == 1
        assert layer["num_traps"] == pytest.approx(record.num_traps)
        assert bool(marks["traps"]) == (layer["name"] == "1")
        assert layer["esd"]["farms"]["spikes"] == layer["esd"]["farms"]["traps"] == []
        assert layer["esd"]["farms"]["edge"] > 0


def test_a_spectrum_shows_edge_spikes_and_traps(view: Any, with_outliers: RunFolder) -> None:
    tab = view(write_page(with_outliers))
    tab.locator("tbody tr").nth(1).click()
    assert tab.locator("#spectrum .edge").count() == 1
    assert "spikes" not in tab.inner_text("#spectrum .key")
    tab.get_by_text("whole matrix", exact=True).click()
    assert "spikes (1)" in tab.inner_text("#spectrum .key")
    assert "traps (1 a shuffle)" in tab.inner_text("#spectrum .key")
    edge, spike, trap, bars = (
        tab.locator(f"#spectrum .{name}").bounding_box() for name in ("edge", "spikes", "traps", "bins")
    )
    assert edge["x"] < spike["x"]
    assert edge["x"] < trap["x"]
    # Spike and trap, of the same large entry, lie below the bars and not on one another.
    assert bars["y"] + bars["height"] <= spike["y"] < spike["y"] + spike["height"] <= trap["y"]
    assert bars["x"] + bars["width"] >= spike["x"]
    tab.locator("#spectrum .k-edge").focus()
    tab.keyboard.press("Tab")
    assert "whole matrices" in tab.inner_text("#tip")


@pytest.mark.parametrize("width", [1000, 1300, 1600])
def test_the_table_needs_no_scrolling(view: Any, tmp_path: Path, width: int) -> None:
    """With and without a layer's own view next to it, which holds what the table then leaves out."""
    tab = view(write_page(made_up_run(tmp_path, [f"net.decoders.{index}.merge.conv1" for index in range(5)])))
    tab.set_viewport_size({"width": width, "height": 900})
    headings = tab.locator("th[data-key]:visible")
    for chosen in (False, True):
        if chosen:
            tab.locator("tbody tr").nth(2).click()
            detail, table = (tab.locator(place).bounding_box() for place in ("#detail", "#layers"))
            assert table["x"] + table["width"] < detail["x"] < detail["x"] + detail["width"] <= width
        scrolled, shown = tab.evaluate(
            "(({scrollWidth, clientWidth}) => [scrollWidth, clientWidth])(document.querySelector('.scroll'))"
        )
        assert scrolled <= shown
        assert {"alpha", "±", "ratio"} <= set(headings.all_inner_texts())
        assert chosen or {"bias", "KS", "st. rank", "status"} <= set(headings.all_inner_texts())


def test_the_table_with_verdicts_needs_no_scrolling(view: Any, tmp_path: Path) -> None:
    records = {f"encoder.layer.{depth}.attention.output.dense": one for depth, one in enumerate(SPREAD.values())}
    full = Report({name: replace(record, stable_rank=20.0) for name, record in records.items()}, {"esd": "full"})
    tab = view(write_page(RunFolder(tmp_path, farms=Report(records, {"esd": "farms"}), full=full)))
    for width in (390, 500, 700, 900, 1000, 1100, 1280, 1600):
        tab.set_viewport_size({"width": width, "height": 900})
        scroll = tab.locator(".scroll")
        assert scroll.evaluate("place => place.scrollWidth - place.clientWidth") == 0, width
        assert {"verdict", "alpha"} <= set(tab.locator("th[data-key]:visible").all_inner_texts())


def test_narrow_pages_scroll_to_the_detail(view: Any, tmp_path: Path) -> None:
    tab = view(write_page(made_up_run(tmp_path, [f"layer.{index}" for index in range(30)])))
    tab.set_viewport_size({"width": 700, "height": 700})
    tab.locator("tbody tr").nth(1).click()
    assert tab.locator("#detail").bounding_box()["y"] < 100


@pytest.mark.parametrize("epochs", [1, 2, 4, 300])
def test_few_epochs_are_whole_numbers(view: Any, tmp_path: Path, epochs: int) -> None:
    tab = view(write_page(made_up_run(tmp_path, ["a"], epochs)))
    labels = tab.locator("#curves text[text-anchor=middle]:not([transform])").all_text_contents()
    *ticks, title = labels
    assert title == "completed epochs"
    assert all(tick.isdigit() for tick in ticks)
    assert len(ticks) <= min(epochs, 16)


def rgb(element: Any, style: str) -> list[int]:
    text = element.evaluate("(element, style) => getComputedStyle(element)[style]", style)
    return [int(part) for part in re.findall(r"\d+", text)]


def test_five_hundred_layers(view: Any, tmp_path: Path) -> None:
    run = made_up_run(tmp_path, [f"layer.{index}" for index in range(500)], epochs=50)
    tab = view(write_page(run))
    assert tab.locator("#curves path.curve").count() == 500
    choose = "(() => {{ const t = performance.now(); choose(layers[{}]); return performance.now() - t; }})()"
    # The fastest of three: the machine may be busy.
    assert min(tab.evaluate(choose.format(index)) for index in (100, 200, 300)) < 2000
    assert tab.inner_text("#detail h2") == "layer.300"


def test_times_of_long_runs_are_shown_in_full(view: Any, tmp_path: Path) -> None:
    """One layer, measured at steps and epochs that differ in their last digit alone."""
    times = range(1_234_567, 1_234_570)
    curves = {"a": Curve(tuple(map(float, times)), tuple(times), (1.0, 1.02, 1.04))}
    page = write_page(RunFolder(tmp_path, History(curves, curves, layers=("a",))))
    assert content(page)["when"]["epoch"] == list(times)
    tab = view(page)
    tab.get_by_text("map", exact=True).click()
    tab.get_by_text("ratio", exact=True).first.click()
    for axis in ("steps", "epochs"):
        tab.get_by_text(axis, exact=True).click()
        assert tab.locator("#curves .column").all_text_contents() == list(map(str, times))
    canvas = tab.locator("#curves canvas").bounding_box()
    tab.mouse.move(canvas["x"] + canvas["width"] / 2, canvas["y"] + 5)
    assert tab.inner_text("#tip") == "a\nepoch 1234568: ratio 1.02"
    low, _, high, _ = tab.locator("#curves .ramp > *").all_inner_texts()
    assert (low, high) == ("1/1.05", "1.05")


def test_narrow_spectra_have_axes_with_numbers(view: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 64), nn.Linear(40, 41))
    farms, full = (analyze(net, esd=esd, histogram=True) for esd in ("farms", "full"))
    tab = view(write_page(RunFolder(tmp_path, farms=farms, full=full)))
    for row in tab.locator("tbody tr").all():
        row.click()
        for esd in ("FARMS windows", "whole matrix"):
            tab.get_by_text(esd, exact=True).click()
            for anchor, title in (("middle", "eigenvalue"), ("end", None)):
                labels = tab.locator(f"#spectrum text[text-anchor={anchor}]:not([transform])").all_text_contents()
                assert len([label for label in labels if label != title]) >= 2


def test_sentences_with_long_names_fit_a_phone(view: Any, tmp_path: Path) -> None:
    records = {"block_with_a_long_name_" * 3 + name: record for name, record in SPREAD.items()}
    tab = view(write_page(RunFolder(tmp_path, farms=Report(records, {"esd": "farms"}))))
    tab.set_viewport_size({"width": 390, "height": 800})
    assert tab.evaluate("(({scrollWidth, clientWidth}) => scrollWidth - clientWidth)(document.body)") == 0
    assert tab.locator("#diagnosis").evaluate("card => card.scrollWidth - card.clientWidth") == 0
