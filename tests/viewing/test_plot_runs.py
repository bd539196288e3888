"""Pictures that compare runs: what is drawn, of which layers, and what is said to be left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from farms_tb import Report, analyze
from farms_tb.viewing.plots import (
    Curve,
    History,
    plot_alpha_by_layer,
    plot_mean_alpha,
    plot_metrics,
    plot_ratio_spread,
    plot_runs_by_depth,
    save_comparison,
)
from farms_tb.viewing.plots.comparison import COMPARISONS, left_out
from farms_tb.viewing.plots.runs import MAX_RUNS
from farms_tb.viewing.run_folder import RunFolder

LAYERS = ("stem", "body", "head")


def curve(*values: float, every: int = 1) -> Curve:
    """Return a curve with one value an epoch of `10 * every` steps."""
    number = len(values)
    return Curve(tuple(float(i) for i in range(number)), tuple(10 * every * i for i in range(number)), values)


def a_run(layers: Sequence[str] = LAYERS, base: float = 2.0, **fields: Any) -> RunFolder:
    alpha = {name: curve(base, base + 0.1 * place) for place, name in enumerate(layers)}
    ratio = {name: curve(1.0, 0.5 + place) for place, name in enumerate(layers)}
    logged = {"val/loss": curve(0.5, 0.25), "val/acc": curve(0.5, 0.75)}
    history = History(alpha, ratio, layers=tuple(layers))
    return RunFolder(Path("unused"), **{"history": history, "logged": logged, **fields})


def legend(figure: Figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def panels(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.axison]


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 40), nn.Linear(40, 50)) for _ in range(2)]
    return [analyze(net, null=True) for net in nets]


def test_mean_alpha_is_that_of_the_common_layers() -> None:
    runs = {"a": a_run(), "b": a_run(("body", "head", "other"), base=3.0)}
    figure = plot_mean_alpha(runs)
    (axes,) = figure.axes
    first, second = axes.lines
    assert first.get_ydata().tolist() == pytest.approx([2.0, fmean([2.1, 2.2])])
    assert second.get_ydata().tolist() == pytest.approx([3.0, fmean([3.0, 3.1])])
    assert legend(figure) == ["a", "b"]
    assert first.get_color() != second.get_color()
    assert first.get_marker() != second.get_marker()


def test_without_common_layers_means_are_those_of_each_run() -> None:
    runs = {"a": a_run(("x", "y")), "b": a_run(("v", "w"), base=3.0)}
    first, second = plot_mean_alpha(runs).axes[0].lines
    assert first.get_ydata().tolist() == pytest.approx([2.0, 2.05])
    assert second.get_ydata().tolist() == pytest.approx([3.0, 3.05])


def test_ratio_spread_is_the_standard_deviation_between_layers() -> None:
    first, _ = plot_ratio_spread({"a": a_run(), "b": a_run()}).axes[0].lines
    assert first.get_ydata().tolist() == pytest.approx([0.0, pstdev([0.5, 1.5, 2.5])])


def test_each_common_layer_has_a_panel_on_one_scale() -> None:
    figure = plot_alpha_by_layer({"a": a_run(), "b": a_run(("head", "stem"), base=3.0)})
    assert panels(figure) == ["stem", "head"]
    stem, head = (axes for axes in figure.axes if axes.axison)
    assert [line.get_ydata().tolist() for line in head.lines] == [[2.0, pytest.approx(2.2)], [3.0, 3.0]]
    assert stem.get_ylim() == head.get_ylim()
    assert legend(figure) == ["a", "b"]


def test_of_many_layers_some_are_shown() -> None:
    names = [f"layer.{index}" for index in range(50)]
    figure = plot_alpha_by_layer({"a": a_run(names), "b": a_run(names)})
    shown = panels(figure)
    assert (len(shown), shown[0], shown[-1]) == (20, "layer.0", "layer.49")
    assert "20 of 50 layers" in figure.get_supylabel()


def test_metrics_are_drawn_against_steps() -> None:
    figure = plot_metrics({"a": a_run(), "b": a_run(logged={"val/acc": curve(0.1, 0.2, every=5)})})
    assert panels(figure) == ["val/acc"]
    axes = figure.axes[0]
    assert axes.get_xlabel() == "optimizer steps"
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 10], [0, 50]]


@pytest.mark.parametrize(
    ("values", "scale"), [((9.0, 0.01), "log"), ((9.0, 0.0), "linear"), ((9.0, 1.0), "linear")]
)
def test_metrics_over_decades_are_logarithmic(values: tuple[float, ...], scale: str) -> None:
    runs = {name: a_run(logged={"loss": curve(*values)}) for name in "ab"}
    assert plot_metrics(runs).axes[0].get_yscale() == scale


def test_runs_that_measure_within_epochs_are_drawn_over_steps() -> None:
    within = {"stem": Curve((0.0, 0.0), (0, 7), (2.0, 2.1))}
    runs = {"a": a_run(), "b": a_run(history=History(alpha=within))}
    axes = plot_mean_alpha(runs).axes[0]
    assert axes.get_xlabel() == "optimizer steps"
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 10], [0, 7]]


@pytest.mark.parametrize("quantity", ["alpha", "effect"])
def test_weights_by_depth_have_errors_and_do_not_hide_each_other(reports: list[Report], quantity: Any) -> None:
    runs = {name: a_run(farms=report) for name, report in zip("ab", reports, strict=True)}
    figure = plot_runs_by_depth(runs, quantity=quantity)
    axes = figure.axes[0]
    places = []
    for container, report in zip(axes.containers, reports, strict=True):
        drawn = container.lines[0].get_xydata()
        records = list(report.layers.values())
        assert drawn[:, 1].tolist() == [getattr(record, quantity) for record in records]
        (bars,) = container.lines[2]
        half = [(ends[1, 1] - ends[0, 1]) / 2 for ends in bars.get_segments()]
        assert half == pytest.approx([getattr(record, f"{quantity}_error") for record in records])
        places.append(drawn[:, 0].round().tolist())
    assert places == [[0, 1, 2]] * 2
    first, second = (container.lines[0].get_xdata() for container in axes.containers)
    assert (first < second).all()
    assert legend(figure) == ["a", "b"]


def test_every_picture_that_there_is_data_for(reports: list[Report], tmp_path: Path) -> None:
    measured = {name: a_run(farms=report) for name, report in zip("ab", reports, strict=True)}
    saved = save_comparison(measured, tmp_path / "p", suffix=".svg")
    assert saved == [tmp_path / "p" / f"{name}.svg" for name in COMPARISONS]
    assert left_out(measured) == []
    logged = {"a": a_run(), "b": a_run(), "c": a_run()}
    names = [path.stem for path in save_comparison(logged, tmp_path / "q")]
    assert names == ["alpha_mean", "alpha_by_layer", "lr_ratio_spread", "metrics"]
    files = {name: RunFolder(Path("unused"), farms=report) for name, report in zip("ab", reports, strict=True)}
    names = [path.stem for path in save_comparison(files, tmp_path / "r")]
    assert names == ["alpha_by_depth", "effect_by_depth"]
    only = save_comparison(measured, tmp_path / "s", pictures=["metrics"], title="two $runs$", suffix=".svg")
    assert [path.name for path in only] == ["metrics.svg"]
    assert "two $runs$</text>" in only[0].read_text()


def test_says_what_is_left_out(reports: list[Report]) -> None:
    runs = {
        "a": a_run(),
        "b": a_run(("stem", "body", "new"), logged={}),
        "c": RunFolder(Path("unused"), farms=reports[0]),
        "d": RunFolder(Path("unused"), farms=Report({"0": reports[0].layers["0"]})),
    }
    said = "\n".join(left_out(runs))
    assert "layers that only some of the runs have: head, new." in said
    assert "learning-rate ratios, and left out of pictures of these: c, d." in said
    assert "metrics.csv, and left out of pictures of these: b, c, d." in said
    assert "layers that only some of the runs have: 1, 2." in said
    assert "no layers in common" in "\n".join(left_out({"a": a_run(("x",)), "b": a_run(("y",))}))


def test_pictures_that_cannot_be_drawn(tmp_path: Path) -> None:
    """Known before anything is written."""
    apart = {"a": a_run(("x",)), "b": a_run(("y",))}
    many = {str(index): a_run() for index in range(MAX_RUNS + 1)}
    for runs, wanted, words in (
        (apart, {"pictures": ["alpha_by_layer"]}, "'alpha_by_layer'.*no layers in common"),
        (apart, {"pictures": ["alpha_mean", "effect_by_depth"]}, "'effect_by_depth'.*"),
        (apart, {"pictures": ["alpha"]}, "no picture 'alpha': there are alpha_mean"),
        (apart, {"suffix": ".bogus"}, "no format of pictures '.bogus'"),
        (many, {}, f"at most {MAX_RUNS} runs .* got {MAX_RUNS + 1}"),
    ):
        with pytest.raises(ValueError, match=words):
            save_comparison(runs, tmp_path / "new", **wanted)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
    for plot in (plot_mean_alpha, plot_ratio_spread, plot_alpha_by_layer, plot_metrics, plot_runs_by_depth):
        with pytest.raises(ValueError, match="draw"):
            plot({"a": RunFolder(Path("unused"))})


def test_as_many_runs_as_allowed_look_different() -> None:
    lines = plot_mean_alpha({str(index): a_run() for index in range(MAX_RUNS)}).axes[0].lines
    looks = {(str(line.get_color()), str(line.get_marker()), line.get_linestyle()) for line in lines}
    assert len(looks) == MAX_RUNS


HOSTILE_NAMES = ("$\\x$", "$x$", "_orig_mod.0", "a\x1b[2J\nb", "\ud800", "9" * 5000)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_any_name_can_be_drawn(reports: list[Report], tmp_path: Path, suffix: str) -> None:
    (record, *_) = reports[0].layers.values()
    logged = dict.fromkeys(HOSTILE_NAMES, curve(1.0, 0.5))
    report = Report(dict.fromkeys(HOSTILE_NAMES, record))
    runs = {name: a_run(HOSTILE_NAMES, farms=report, logged=logged) for name in HOSTILE_NAMES}
    saved = save_comparison(runs, tmp_path, suffix=suffix)
    assert len(saved) == len(COMPARISONS)
    if suffix == ".svg":
        assert "$x$</text>" in saved[0].read_text()
        assert "_orig_mod.0</text>" in saved[0].read_text()


def test_runs_and_layers_whose_names_end_alike_are_told_apart() -> None:
    rest = "optimizer.weight_decay=0.0001,model.width=64,data.beta=100,seed=1"
    layers = [f"decoder.layers.{index}.multihead_attention.output_projection" for index in range(3)]
    runs = {f"optimizer.lr={lr},{rest}": a_run(layers) for lr in (0.1, 0.01)}
    figure = plot_alpha_by_layer(runs)
    assert len(set(panels(figure))) == 3
    assert [label.split("…")[0] for label in legend(figure)] == ["optimizer.lr=0.1", "optimizer.lr=0.01"]
    assert legend(plot_mean_alpha(runs)) == legend(figure)


def test_one_measurement_is_drawn_at_its_epoch() -> None:
    first = {name: Curve((0.0,), (0,), (2.0,)) for name in LAYERS}
    runs = {name: a_run(history=History(first, first, layers=LAYERS)) for name in "ab"}
    for plot in (plot_mean_alpha, plot_alpha_by_layer):
        figure = plot(runs)
        figure.draw_without_rendering()
        axis = figure.axes[0].xaxis
        low, high = axis.get_view_interval()
        assert [tick.get_loc() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high] == [0]


def test_the_legend_shows_the_kinds_of_line() -> None:
    """A line in the legend is long enough for a whole dash on either side of its marker."""
    figure = plot_mean_alpha({str(index): a_run() for index in range(MAX_RUNS)})
    (found,) = figure.legends
    lines = found.get_lines()
    assert {line.get_linestyle() for line in lines} == {"-", "--", ":", "-."}
    dash_and_gap = 3.7 + 1.6  # of `--`, in widths of the line
    for line in lines:
        length = float(np.ptp(line.get_xdata()))  # in points
        assert (length - line.get_markersize()) / 2 > 1.5 * dash_and_gap * line.get_linewidth()
