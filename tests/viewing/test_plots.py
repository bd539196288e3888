"""Reading metrics.csv, and every picture."""

from __future__ import annotations

import csv
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

import matplotlib
from matplotlib.axis import Axis
from matplotlib.container import ErrorbarContainer

from farms_tb import LayerRecord, Report, analyze
from farms_tb.viewing.densities import esd_density
from farms_tb.viewing.plots import (
    Curve,
    History,
    plot_alpha_by_depth,
    plot_alpha_curves,
    plot_esd,
    plot_esds,
    plot_full_against_farms,
    plot_ratio_curves,
    plot_ratio_map,
    read_history,
    save_all,
)
from farms_tb.viewing.run_folder import RunFolder

LAYERS = ("stem", "block.2", "block.10", "head")


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as CSVLogger does: columns sorted by name, empty cells for what a row lacks."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=sorted(set().union(*rows)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def _measurement(epoch: float, step: int, value: float) -> dict[str, Any]:
    row: dict[str, Any] = {"epoch": epoch, "step": step, "farms/alpha_mean": value}
    for layer in LAYERS:
        row |= {f"farms/alpha/{layer}": value, f"farms/ratio/{layer}": 1.0, f"farms/lr/{layer}": 0.1}
    return row


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    rows = [
        _measurement(0, 0, 2.0),
        {"epoch": 0, "step": 4, "train/loss": 0.5},
        {**_measurement(1, 5, 1.5), "farms/alpha/head": ""},
        {"epoch": 1, "step": 9, "val/nrmse": 0.1},
        {f"farms/alpha/{layer}": 1.25 for layer in LAYERS} | {"epoch": 2, "step": 10},
    ]
    return _write(tmp_path / "metrics.csv", rows)


def test_reads_the_callbacks_rows_alone(metrics: Path) -> None:
    history = read_history(metrics)
    assert history.alpha["stem"] == Curve((0.0, 1.0, 2.0), (0, 5, 10), (2.0, 1.5, 1.25))
    assert history.alpha["head"] == Curve((0.0, 2.0), (0, 10), (2.0, 1.25))
    assert history.ratio["stem"].values == (1.0, 1.0)
    assert history.lr["stem"].values == (0.1, 0.1)


def test_layers_come_in_the_order_given_or_by_name(metrics: Path) -> None:
    assert tuple(read_history(metrics, LAYERS).alpha) == LAYERS
    assert tuple(read_history(metrics).alpha) == ("block.2", "block.10", "head", "stem")
    assert read_history(metrics, ["stem"]).layers == ("stem", "block.2", "block.10", "head")


def test_a_repeated_measurement_counts_once(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.csv", [_measurement(0, 0, 2.0), _measurement(1, 5, 1.5), _measurement(1, 5, 1.75)])
    assert read_history(path).alpha["stem"].values == (2.0, 1.75)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_history(tmp_path / "none.csv")


@pytest.mark.parametrize(("plot", "label"), [(plot_alpha_curves, "alpha"), (plot_ratio_curves, "learning rate")])
def test_curves_have_labels_and_a_legend_by_depth(metrics: Path, tmp_path: Path, plot: Any, label: str) -> None:
    figure = plot(read_history(metrics, LAYERS), tmp_path / "plot.png", title="a run")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "completed epochs"
    assert label in axes.get_ylabel()
    assert axes.get_title(loc="left") == "a run"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(LAYERS)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_layer_has_one_colour_in_both_plots() -> None:
    curve = Curve((0.0, 1.0), (0, 5), (2.0, 1.5))
    history = History({"b": curve}, {"a": curve, "b": curve}, layers=("a", "b"))
    alpha, ratio = (plot(history).axes[0] for plot in (plot_alpha_curves, plot_ratio_curves))
    colours = {line.get_label(): line.get_color() for line in ratio.lines}
    assert alpha.lines[0].get_color() == colours["b"] != colours["a"]


def test_measured_within_epochs_is_drawn_over_steps(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.csv", [_measurement(0, step, 2.0) for step in (0, 5, 10)])
    assert plot_alpha_curves(read_history(path)).axes[0].get_xlabel() == "optimizer steps"


def test_many_layers_get_a_colour_bar(tmp_path: Path) -> None:
    names = [f"layer.{index}" for index in range(40)]
    history = History(alpha={name: Curve((0.0, 1.0), (0, 5), (2.0, 1.5)) for name in names}, layers=tuple(names))
    figure = plot_alpha_curves(history, tmp_path / "plot.png")
    axes, bar = figure.axes
    assert axes.get_legend() is None
    ticks = [text.get_text() for text in bar.get_yticklabels()]
    assert (ticks[0], ticks[-1], len(ticks)) == ("layer.0", "layer.39", 8)


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match=r"no farms/ measurement: train with FARMSTempBalance\(log=True\)"):
        plot_alpha_curves(History())


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "farms-tb\[plot\]"'):
        plot_alpha_curves(History(alpha={"a": Curve((0.0,), (0,), (2.0,))}))


def test_leaves_no_global_state(metrics: Path) -> None:
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    plot_alpha_curves(read_history(metrics))
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 24), nn.Conv2d(12, 48, 3), nn.Linear(20, 160), nn.Linear(1, 9))


@pytest.fixture(scope="module")
def farms(net: nn.Module) -> Report:
    return analyze(net, histogram=True, null=True)


@pytest.fixture(scope="module")
def full(net: nn.Module) -> Report:
    return analyze(net, esd="full", histogram=True)


def test_ratio_map_is_centred_at_1_and_logarithmic(tmp_path: Path) -> None:
    ratios = {"a": (0.5, 1.0), "b": (1.0, 1.5), "c": (0.0, 40.0)}
    curves = {name: Curve((0.0, 1.0), (0, 5), values) for name, values in ratios.items()}
    curves["late"] = Curve((1.0,), (5,), (2.0,))
    history = History(ratio=curves, layers=tuple(curves))
    axes, bar = plot_ratio_map(history, tmp_path / "map.png").axes
    (image,) = axes.images
    assert image.norm(1.0) == pytest.approx(0.5)
    assert image.norm(0.5) == pytest.approx(1 - image.norm(2.0))
    shown = image.get_array()
    assert shown[0].tolist() == [0.5, 1.0]
    assert shown[2].tolist() == pytest.approx([0.1, 10])  # the end of the scale, which a ratio of 0 needs
    assert shown.mask[3].tolist() == [True, False]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(curves)
    assert [text.get_text() for text in bar.get_yticklabels()] == ["0.1", "0.316", "1", "3.16", "10"]


def test_ratio_map_names_every_step_in_full() -> None:
    steps = (1_234_567, 1_234_568, 1_234_569)
    history = History(ratio={"a": Curve((0.0, 0.0, 0.0), steps, (1.0, 2.0, 1.0))}, layers=("a",))
    axes = plot_ratio_map(history).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == [str(step) for step in steps]


def test_ratio_map_of_ones_has_a_scale() -> None:
    history = History(ratio={"a": Curve((0.0, 1.0), (0, 5), (1.0, 1.0))}, layers=("a",))
    assert plot_ratio_map(history).axes[0].images[0].norm(1.0) == pytest.approx(0.5)


def test_alpha_by_depth_has_errors_and_the_null(farms: Report, tmp_path: Path) -> None:
    (axes,) = plot_alpha_by_depth(farms, tmp_path / "plot.png").axes
    measured = list(farms.layers.values())[:3]
    bars = [container for container in axes.containers if isinstance(container, ErrorbarContainer)]
    for index, (record, container) in enumerate(zip(measured, bars, strict=True)):
        assert record.alpha_error is not None
        assert container.lines[0].get_xydata().tolist() == [[index, record.alpha]]
        (segment,) = container.lines[2][0].get_segments()
        assert segment[:, 1] == pytest.approx(
            [record.alpha - record.alpha_error, record.alpha + record.alpha_error]
        )
    for record, patch in zip(measured, axes.patches, strict=True):
        assert patch.get_y() + patch.get_height() / 2 == pytest.approx(record.null_mean)
        assert patch.get_height() == pytest.approx(4 * record.null_std)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "2", "3"]


def test_kinds_have_markers_of_their_own() -> None:
    records = {name: LayerRecord(alpha=2.0, kind=kind) for name, kind in (("a", "real"), ("b", "spectral"))}
    (legend,) = plot_alpha_by_depth(Report(records)).legends
    assert [text.get_text() for text in legend.get_texts()] == ["real weights", "complex spectral weights"]


def test_full_against_farms_is_coloured_by_aspect_ratio(farms: Report, full: Report, tmp_path: Path) -> None:
    axes, _ = plot_full_against_farms(farms, full, tmp_path / "plot.png").axes
    (dots,) = axes.collections
    names = ["0", "1", "2"]
    expected = [[farms.layers[name].alpha, full.layers[name].alpha] for name in names]
    np.testing.assert_allclose(dots.get_offsets(), expected)
    assert dots.get_array().tolist() == [1, 4, 8]


def test_esd_has_histogram_tail_and_law(farms: Report, tmp_path: Path) -> None:
    (axes,) = plot_esd(farms, "1", tmp_path / "plot.png").axes
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_title(loc="left")) == ("log", "log", "1")
    labels = axes.get_legend_handles_labels()[1]
    record = farms.layers["1"]
    assert labels == [
        "eigenvalues",
        "random weights (Marchenko-Pastur)",
        f"fitted tail, alpha {record.alpha:.2f}",
        "edge of random weights",
    ]
    assert record.histogram is not None
    edges, density = esd_density(record.histogram)
    drawn = axes.patches[0].get_data()
    np.testing.assert_allclose(drawn.edges, edges)
    np.testing.assert_allclose(drawn.values, density)
    tail = axes.lines[1]
    slope = np.diff(np.log(tail.get_ydata())) / np.diff(np.log(tail.get_xdata()))
    assert slope == pytest.approx(-record.alpha)


def test_esds_side_by_side(farms: Report) -> None:
    figure = plot_esds(farms)
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.axison] == ["0", "1", "2"]
    assert len(plot_esds(farms, layers=["1"]).axes) == 1
    many = Report({f"layer.{i}": farms.layers["1"] for i in range(100)}, farms.options)
    titles = [axes.get_title(loc="left") for axes in plot_esds(many).axes]
    assert (len(titles), titles[0], titles[-1]) == (20, "layer.0", "layer.99")


def test_reports_without_what_is_drawn(net: nn.Module, farms: Report) -> None:
    empty = Report({"a": LayerRecord(status="all weights are zero")})
    with pytest.raises(ValueError, match="the report holds no alpha"):
        plot_alpha_by_depth(empty)
    with pytest.raises(ValueError, match="no layer has both a FARMS and a full-matrix alpha"):
        plot_full_against_farms(farms, empty)
    with pytest.raises(ValueError, match=r"no histogram: measure with analyze\(..., histogram=True\)"):
        plot_esds(analyze(net))
    for plot in (lambda: plot_esd(farms, "9"), lambda: plot_esds(farms, layers=["0", "9"])):
        with pytest.raises(ValueError, match="no layer '9' with a histogram; those with one are 0, 1, 2"):
            plot()


def test_everything_that_is_there(farms: Report, full: Report, metrics: Path, tmp_path: Path) -> None:
    history = read_history(metrics)
    curves = ["alpha", "lr_ratio", "lr_ratio_map"]
    layers = ["alpha_by_depth", "effect_plane", "full_against_farms", "esd"]
    for run, names in (
        (RunFolder(tmp_path, history, farms, full), curves + layers),
        (RunFolder(tmp_path, history), curves),
        (RunFolder(tmp_path, farms=farms, full=full), layers),
    ):
        saved = save_all(run, suffix=".svg")
        assert saved == [tmp_path / "figures" / f"{name}.svg" for name in names]
        assert all(path.stat().st_size for path in saved)


def test_some_pictures_alone(farms: Report, full: Report, metrics: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path, read_history(metrics), farms, full)

    def saved(**wanted: Any) -> list[str]:
        return [path.name for path in save_all(run, tmp_path / "p", suffix=".svg", **wanted)]

    assert saved(pictures=["esd", "alpha"]) == ["esd.svg", "alpha.svg"]
    assert saved(pictures=[], layers=["2", "0"]) == ["esd_2.svg", "esd_0.svg"]
    assert saved(pictures=["alpha"], layers=["1"]) == ["alpha.svg", "esd_1.svg"]
    assert "fitted tail, alpha" in (tmp_path / "p" / "esd_1.svg").read_text()
    slashes = RunFolder(tmp_path, farms=Report({"a/b": farms.layers["1"]}, farms.options), full=full)
    assert [path.name for path in save_all(slashes, pictures=[], layers=["a/b"])] == ["esd_a_b.png"]


def test_pictures_that_cannot_be_drawn(farms: Report, full: Report, metrics: Path, tmp_path: Path) -> None:
    """Known before anything is written."""
    run = RunFolder(tmp_path, read_history(metrics), farms, full)
    curves = RunFolder(tmp_path, read_history(metrics), missing=("No checkpoint yet.",))
    for folder, wanted, words in (
        (run, {"suffix": ".bogus"}, "no format of pictures '.bogus': matplotlib writes .*pdf, .*png, .*svg"),
        (run, {"pictures": ["alpha", "esds"]}, "no picture 'esds': there are alpha, lr_ratio, .*, esd"),
        (run, {"layers": ["0", "9"]}, "no layer '9' with a histogram; those with one are 0, 1, 2"),
        (curves, {"pictures": ["alpha", "esd"]}, "has no data for the picture 'esd'. No checkpoint yet."),
        (curves, {"layers": ["0"]}, "has no data for the picture 'esd'. No checkpoint yet."),
    ):
        with pytest.raises(ValueError, match=words):
            save_all(folder, tmp_path / "new", **wanted)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


HOSTILE_NAMES = ("a", "$\\x$", "$x$", "_orig_mod.0", "a\x1b[2J\nb", "\ud800", "9" * 5000, "100%", "$")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_any_name_can_be_drawn(farms: Report, full: Report, tmp_path: Path, suffix: str) -> None:
    curve = Curve((0.0, 1.0), (0, 5), (2.0, 1.5))
    curves = dict.fromkeys(HOSTILE_NAMES, curve)
    records = [report.layers["1"] for report in (farms, full)]
    reports = [
        Report(dict.fromkeys(HOSTILE_NAMES, record), report.options)
        for record, report in zip(records, (farms, full), strict=True)
    ]
    run = RunFolder(tmp_path / "lr $\\x$", History(curves, curves, {}, HOSTILE_NAMES), *reports)
    layers = HOSTILE_NAMES if suffix == ".svg" else ()
    saved = save_all(run, tmp_path / "p", suffix=suffix, layers=layers)
    assert len(set(saved)) == 7 + len(layers)
    assert sorted(path.name for path in saved) == sorted(path.name for path in (tmp_path / "p").iterdir())


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    names = ("_orig_mod.0", "$x$", "$\\x$", "back\\slash", "{a}_^", "a$b", "$$")
    curves = dict.fromkeys(names, Curve((0.0, 1.0), (0, 5), (2.0, 1.5)))
    figure = plot_alpha_curves(History(curves, layers=names), tmp_path / "plot.svg")
    assert len(figure.axes[0].get_legend().get_texts()) == len(names)
    shown = (tmp_path / "plot.svg").read_text()
    assert [name for name in names if f"{name}</text>" not in shown] == []


def test_titles_are_shown_as_they_are(farms: Report, full: Report, metrics: Path, tmp_path: Path) -> None:
    title = "lr $\\x$ of __init__\x1b[2J"
    history = read_history(metrics)
    draw: dict[str, Callable[..., object]] = {
        "alpha": partial(plot_alpha_curves, history),
        "ratio": partial(plot_ratio_curves, history),
        "map": partial(plot_ratio_map, history),
        "depth": partial(plot_alpha_by_depth, farms),
        "both": partial(plot_full_against_farms, farms, full),
        "esd": partial(plot_esd, farms, "1"),
        "esds": partial(plot_esds, farms),
    }
    for name, plot in draw.items():
        path = tmp_path / f"{name}.svg"
        plot(path, title=title)
        assert "lr $\\x$ of __init__\\x1b[2J</text>" in path.read_text(), name
    assert plot_alpha_curves(history, title="two\nlines").axes[0].get_title(loc="left") == "two\nlines"


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_letters_that_the_font_lacks(farms: Report, full: Report, tmp_path: Path, suffix: str) -> None:
    """Chinese names are drawn, as boxes, without a warning: warnings are errors here."""
    names = ("\u5c42.0", "\u5c42.1")
    curves = dict.fromkeys(names, Curve((0.0, 1.0), (0, 5), (2.0, 1.5)))
    reports = [Report(dict.fromkeys(names, report.layers["1"]), report.options) for report in (farms, full)]
    run = RunFolder(tmp_path / "\u8fd0\u884c", History(curves, curves, {}, names), *reports)
    assert len(save_all(run, tmp_path / "p", suffix=suffix, layers=names)) == 7 + 2


def test_a_full_disk_leaves_no_half_picture(metrics: Path, tmp_path: Path) -> None:
    """In a process whose files may not grow beyond 5 kB."""
    code = f"""
import resource
from functools import partial
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
from farms_tb.viewing.page import write_page
from farms_tb.viewing.plots import save_all
draw = [partial(save_all, {str(tmp_path)!r}, suffix=suffix) for suffix in (".svg", ".pdf", ".png")]
for write in (*draw, partial(write_page, {str(tmp_path)!r})):
    try:
        write()
    except OSError as error:
        print("refused", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("refused") == 4, done
    assert list(metrics.parent.glob("figures/*")) == []
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.csv"]


def test_save_all_reads_a_folder(metrics: Path, tmp_path: Path) -> None:
    saved = save_all(metrics.parent, tmp_path / "some" / "where", title="a run")
    assert [path.name for path in saved] == ["alpha.png", "lr_ratio.png", "lr_ratio_map.png"]


def test_text_in_vector_pictures_stays_text(metrics: Path, tmp_path: Path) -> None:
    plot_alpha_curves(read_history(metrics), tmp_path / "plot.svg")
    assert ">block.10</text>" in (tmp_path / "plot.svg").read_text()


def test_pngs_are_fit_for_print(metrics: Path, tmp_path: Path) -> None:
    figure = plot_alpha_curves(read_history(metrics), tmp_path / "plot.png")
    header = (tmp_path / "plot.png").read_bytes()[16:24]
    width, _ = struct.unpack(">II", header)
    assert width > 280 * figure.get_size_inches()[0]


ALIKE = (
    *(f"decoder.layers.{index}.multihead_cross_attention.output_projection" for index in (9, 10, 11)),
    "vision_tower." * 5 + "decoder.layers.10.multihead_cross_attention.output_projection",
)
"""Names whose last 32 letters are the same, and of two the last 60."""


def test_layers_whose_names_end_alike_are_told_apart(farms: Report) -> None:
    curve = Curve((0.0, 1.0), (0, 5), (2.0, 1.5))
    history = History(dict.fromkeys(ALIKE, curve), dict.fromkeys(ALIKE, curve), layers=ALIKE)
    report = Report(dict.fromkeys(ALIKE, farms.layers["1"]), farms.options)
    panels = [axes.get_title(loc="left") for axes in plot_esds(report).axes if axes.axison]
    legend = [text.get_text() for text in plot_alpha_curves(history).axes[0].get_legend().get_texts()]
    rows = [text.get_text() for text in plot_ratio_map(history).axes[0].get_yticklabels()]
    places = [text.get_text() for text in plot_alpha_by_depth(report).axes[0].get_xticklabels()]
    for labels in (panels, legend, rows, places):
        assert len(set(labels)) == len(ALIKE)
    many = [f"layers.{index}.{'x' * 80}" for index in range(40)]
    bar = plot_alpha_curves(History(dict.fromkeys(many, curve), layers=tuple(many))).axes[1]
    assert len({text.get_text() for text in bar.get_yticklabels()}) == 8


def ratio_history(times: Sequence[float], *ratios: float, steps: Sequence[int] | None = None) -> History:
    """The ratios of some layers, the same at all times."""
    curves = {
        f"layer.{index}": Curve(tuple(times), tuple(steps or range(len(times))), (ratio,) * len(times))
        for index, ratio in enumerate(ratios)
    }
    return History(ratio=curves, layers=tuple(curves))


@pytest.mark.parametrize("largest", [1.0, 1.03, 1.08, 1.2, 2.0, 9.9])
def test_ratio_map_labels_its_colours_with_their_ratios(largest: float) -> None:
    bar = plot_ratio_map(ratio_history([0.0, 1.0], 1.0, largest)).axes[1]
    labels = [text.get_text() for text in bar.get_yticklabels()]
    assert len(set(labels)) == len(labels)
    assert [float(label) for label in labels] == pytest.approx(bar.get_yticks().tolist(), rel=5e-3)


@pytest.mark.parametrize("layers", [1, 4, 60])
def test_ratio_map_is_as_high_as_its_labels(layers: int) -> None:
    figure = plot_ratio_map(ratio_history([0.0, 1.0], *[1.0] * layers))
    figure.draw_without_rendering()
    axes, bar = figure.axes
    assert bar.yaxis.label.get_window_extent().height <= 1.05 * axes.get_window_extent().height


@pytest.mark.parametrize("name", ["a", "model.layers.0.self_attention.attention.output_projection.dense"])
@pytest.mark.parametrize("first", [0, 999, 10_000_000])
def test_times_of_the_ratio_map_do_not_overlap(name: str, first: int) -> None:
    steps = tuple(range(first, first + 40))
    history = History(ratio={name: Curve((0.0,) * 40, steps, (1.0,) * 40)}, layers=(name,))
    figure = plot_ratio_map(history)
    figure.draw_without_rendering()
    labels = figure.axes[0].get_xticklabels()
    assert len(labels) == 12
    turned = labels[0].get_rotation() != 0
    size = labels[0].get_window_extent()
    # Turned by 45 degrees, labels need the room of their lines alone.
    room = size.height / 2 if turned else size.width
    places = [label.get_position()[0] for label in labels]
    shown = figure.axes[0].transData.transform([(place, 0) for place in places])[:, 0]
    needed = labels[0].get_fontsize() * figure.dpi / 72 * 1.3 if turned else room
    assert np.diff(shown).min() > needed


def shown_labels(axis: Axis) -> list[str]:
    """Labels of the ticks that lie within the axis."""
    low, high = axis.get_view_interval()
    return [tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


@pytest.mark.parametrize("plot", [plot_alpha_curves, plot_ratio_curves])
def test_one_measurement_is_drawn_at_its_epoch(plot: Any) -> None:
    first = {"a": Curve((0.0,), (0,), (2.0,))}
    axes = plot(History(first, first, layers=("a",))).axes[0]
    axes.figure.draw_without_rendering()
    assert shown_labels(axes.xaxis) == ["0"]


@pytest.mark.parametrize("esd", ["farms", "full"])
def test_axes_of_narrow_spectra_have_numbers(esd: Any) -> None:
    torch.manual_seed(0)
    report = analyze(nn.Sequential(nn.Linear(3, 64), nn.Linear(40, 41)), esd=esd, histogram=True)
    figure = plot_esds(report)
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            assert len(shown_labels(axis)) >= 2


def test_long_titles_are_no_wider_than_the_picture(farms: Report, tmp_path: Path) -> None:
    """Folders of Hydra's sweeps, whose names are the titles, hold all that was overridden."""
    title = "multirun/" + ",".join(f"model.option_{index}={index / 8}" for index in range(8))
    for plot in (partial(plot_esd, farms, "1"), partial(plot_esds, farms), partial(plot_alpha_by_depth, farms)):
        figure = plot(title=title)
        figure.draw_without_rendering()
        text = figure.get_suptitle() or figure.axes[0].get_title(loc="left")
        assert text.replace("\n", "") == title
        picture = figure.get_tightbbox()
        assert picture is not None
        assert picture.width <= figure.get_size_inches()[0] + 0.3
