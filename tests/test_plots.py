"""Reading metrics.csv and drawing it."""

from __future__ import annotations

import builtins
import csv
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from farms_tb.plots import Curve, History, plot_alpha_curves, plot_ratio_curves, read_history

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
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r'pip install "farms-tb\[plot\]"'):
        plot_alpha_curves(History(alpha={"a": Curve((0.0,), (0,), (2.0,))}))


def test_leaves_no_global_state(metrics: Path) -> None:
    from matplotlib import pyplot

    plot_alpha_curves(read_history(metrics))
    assert pyplot.get_fignums() == []
