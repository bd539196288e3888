"""Spectra with the edge of random weights, spikes and traps: what is marked is what the record counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from farms_tb import Report, analyze
from farms_tb.viewing.densities import aspect_of_sample, esd_density, marchenko_pastur
from farms_tb.viewing.plots import plot_esd, plot_esds

EDGE = "edge of random weights"


@pytest.fixture(scope="module")
def net() -> nn.Sequential:
    """Two layers with two directions of their own, the first with a large entry as well; and a random one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(90, 120), nn.Linear(120, 60), nn.Linear(60, 90))
    with torch.no_grad():
        for layer in net:
            nn.init.normal_(layer.weight)
        for layer in net[:2]:
            for _ in range(2):
                layer.weight += torch.randn(layer.out_features, 1) * torch.randn(1, layer.in_features)
        net[0].weight[3, 5] = 60.0
    return net


@pytest.fixture(scope="module")
def full(net: nn.Sequential) -> Report:
    return analyze(net, esd="full", histogram=True, null=True)


def lines(axes: Axes) -> dict[str, Line2D]:
    """Return what has a label, without the numbers in it."""
    handles, labels = axes.get_legend_handles_labels()
    return {label.partition(" (")[0]: handle for handle, label in zip(handles, labels, strict=True)}


def test_each_spike_and_trap_is_marked_below_the_bars(full: Report) -> None:
    record = full.layers["0"]
    (axes,) = plot_esd(full, "0").axes
    found = lines(axes)
    assert record.histogram is not None
    assert record.outliers is not None
    assert record.outliers.traps is not None
    spikes, traps = found["spikes"], found["traps"]
    assert spikes.get_xdata().tolist() == list(record.outliers.spikes)
    assert len(spikes.get_xdata()) == record.num_spikes == 3
    assert len(traps.get_xdata()) == record.num_traps * record.null_draws
    bars = esd_density(record.histogram).y
    lowest_bar = bars[bars > 0].min()
    assert axes.get_ylim()[0] < max(traps.get_ydata()) < min(spikes.get_ydata()) < lowest_bar
    edges = found[EDGE].get_xdata()
    assert set(edges) == {record.outliers.edge}
    assert axes.get_xlim()[1] > max(record.outliers.spikes + record.outliers.traps)
    labels = axes.get_legend_handles_labels()[1]
    assert "spikes (3)" in labels
    assert "traps (1 a shuffle)" in labels


def test_a_random_layer_has_an_edge_alone(full: Report) -> None:
    record = full.layers["2"]
    assert record.num_spikes == 0
    (axes,) = plot_esd(full, "2").axes
    assert EDGE in lines(axes)
    assert "spikes" not in lines(axes)
    assert record.outliers is not None
    assert axes.get_xlim()[1] > record.outliers.edge, "it is shown, beyond all eigenvalues"


def test_on_windows_the_edge_is_the_end_of_the_law(net: nn.Sequential) -> None:
    report = analyze(net, histogram=True, null=True)
    record = report.layers["0"]
    found = lines(plot_esd(report, "0").axes[0])
    assert record.norm_stable_rank is not None
    law = marchenko_pastur(record.norm_stable_rank, aspect_of_sample(record, report))
    assert found[EDGE].get_xdata()[0] == pytest.approx(law.x[-1])
    assert not {"spikes", "traps"} & set(found)


def test_side_by_side_there_is_one_legend(full: Report) -> None:
    figure = plot_esds(full)
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [
        "eigenvalues",
        "random weights (Marchenko-Pastur)",
        "fitted tail",
        EDGE,
        "spikes",
        "traps",
    ]
    panels = [lines(axes) for axes in figure.axes if axes.axison]
    drawn = [len(panel["spikes"].get_xdata()) if "spikes" in panel else 0 for panel in panels]
    assert drawn == [record.num_spikes for record in full.layers.values()]
