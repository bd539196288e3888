"""The densities that spectra are drawn with, against samples and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from farms_tb import EsdHistogram, LayerRecord, Report, analyze
from farms_tb.viewing.densities import (
    aspect_of_sample,
    esd_density,
    marchenko_pastur,
    spectrum_marks,
    tail_density,
)


def histogram_of(values: np.ndarray, bins: int = 64) -> EsdHistogram:
    logs = np.log10(values)
    counts, _ = np.histogram(logs, bins, (logs.min(), logs.max()))
    return EsdHistogram(tuple(counts.tolist()), float(logs.min()), float(logs.max()))


def area(x: np.ndarray, y: np.ndarray) -> float:
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum())


@pytest.mark.parametrize(("number", "bins"), [(10_000, 64), (200, 32), (60, 8), (3, 8)])
def test_histogram_is_a_density(number: int, bins: int) -> None:
    values = np.random.default_rng(0).pareto(2, number) + 0.1
    edges, density = esd_density(histogram_of(values))
    assert len(density) == bins
    assert (density * np.diff(edges)).sum() == pytest.approx(1)
    assert (edges[0], edges[-1]) == pytest.approx((values.min(), values.max()))


def test_equal_eigenvalues_have_a_density() -> None:
    edges, density = esd_density(EsdHistogram((7, *[0] * 63), 0.5, 0.5))
    assert (density * np.diff(edges)).sum() == pytest.approx(1)


@pytest.mark.parametrize("aspect", [1 / 16, 0.5, 0.9])
def test_marchenko_pastur_is_a_density_with_that_mean(aspect: float) -> None:
    x, y = marchenko_pastur(3.0, aspect)
    assert area(x, y) == pytest.approx(1, abs=5e-3)
    assert area(x, x * y) == pytest.approx(3, abs=2e-2)


@pytest.mark.parametrize("shape", [(300, 300), (150, 600), (600, 150)])
def test_marchenko_pastur_is_the_spectrum_of_random_matrices(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64) * 0.3
    values = torch.linalg.svdvals(matrix).square().flip(0).numpy()
    x, y = marchenko_pastur(values.mean(), min(shape) / max(shape))
    cumulated = np.concatenate([[0], ((y[1:] + y[:-1]) / 2 * np.diff(x)).cumsum()])
    cumulated += 1 - cumulated[-1]  # square: the points begin above 0, where the density has no bound
    share = np.arange(1, len(values) + 1) / len(values)
    assert np.abs(np.interp(values, x, cumulated) - share).max() < 0.02


def test_lowest_cuts_the_law() -> None:
    assert marchenko_pastur(1.0, 1.0, 0.01).x[0] == pytest.approx(0.01)
    assert marchenko_pastur(1.0, 0.25, 0.01).x[0] == pytest.approx(0.25)  # the law begins there


def test_tail_goes_through_a_pareto_sample() -> None:
    alpha, start = 2.5, 0.4
    values = start * (1 - np.random.default_rng(0).random(100_000)) ** (-1 / (alpha - 1))
    body = np.random.default_rng(1).uniform(0.01, start, 100_000)
    record = LayerRecord(alpha=alpha, xmin=start, histogram=histogram_of(np.concatenate([body, values])))
    tail = tail_density(record)
    assert tail is not None
    assert tail.x[0] == start
    # The density of half of a Pareto law, in closed form.
    np.testing.assert_allclose(tail.y, 0.5 * (alpha - 1) / start * (tail.x / start) ** -alpha, rtol=0.03)


@pytest.mark.parametrize(
    "missing", [{"alpha": None}, {"xmin": None}, {"histogram": None}, {"xmin": 0.0}, {"xmin": 99.0}]
)
def test_no_tail_without_a_fit(missing: dict[str, None]) -> None:
    whole = {"alpha": 2.0, "xmin": 0.5, "histogram": EsdHistogram((1, 1), -1.0, 1.0)}
    assert tail_density(LayerRecord(**whole)) is not None  # type: ignore[arg-type]
    assert tail_density(LayerRecord(**{**whole, **missing})) is None  # type: ignore[arg-type]


def test_aspect_of_what_was_measured() -> None:
    net = nn.Sequential(nn.Linear(60, 240))
    for options, aspect in (({"esd": "full"}, 0.25), ({}, 1.0), ({"aspect_ratio": 2.0}, 0.5)):
        report: Report = analyze(net, **options)
        assert aspect_of_sample(report.layers["0"], report) == aspect


def test_random_layers_follow_the_law_as_measured() -> None:
    """The record's mean eigenvalue and the layer's shape give the law that its own histogram follows."""
    net = nn.Sequential(nn.Conv2d(32, 128, 3), nn.Linear(300, 900))
    for layer in net:
        nn.init.normal_(layer.weight)
    for esd in ("farms", "full"):
        report = analyze(net, esd=esd, histogram=True)
        for record in report.layers.values():
            assert record.histogram is not None
            edges, density = esd_density(record.histogram)
            law = marchenko_pastur(record.norm_stable_rank or 0, aspect_of_sample(record, report))
            inside = (edges[:-1] > max(law.x[0], law.x[-1] / 30)) & (edges[1:] < law.x[-1])
            middle = np.sqrt(edges[1:] * edges[:-1])[inside]
            ratio = density[inside] / np.interp(middle, *law)
            assert np.median(ratio) == pytest.approx(1, abs=0.1)


def with_planted_spikes() -> nn.Sequential:
    """Return a linear layer and a convolution, with two directions and one large entry of their own in each."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(90, 120), nn.Conv2d(40, 60, 3))
    with torch.no_grad():
        for layer in net:
            torch.nn.init.normal_(layer.weight)
            across = layer.weight.shape[2:]
            for _ in range(2):
                layer.weight += torch.randn(len(layer.weight), *[1] * (layer.weight.ndim - 1)) * torch.randn(
                    1, layer.weight.shape[1], *[1] * len(across)
                )
            layer.weight.view(-1)[7] = 60.0
    return net


def test_marks_are_the_outliers_that_the_record_counts() -> None:
    report = analyze(with_planted_spikes(), esd="full", null=True, histogram=True)
    for record in report.layers.values():
        marks = spectrum_marks(record, report)
        assert marks is not None
        assert marks.traps is not None
        assert record.num_spikes is not None
        assert len(marks.spikes) == record.num_spikes >= 3
        assert len(marks.traps) / record.null_draws == pytest.approx(record.num_traps)
        assert marks.edge < marks.spikes[0]
        # On the axis of the spectrum that they are drawn on, which the mean of the entries moves a little.
        assert record.histogram is not None
        assert marks.spikes[-1] == pytest.approx(10**record.histogram.high, rel=0.02)


def test_without_whole_matrices_the_edge_is_that_of_the_law() -> None:
    net = with_planted_spikes()
    for options in ({"esd": "full"}, {"esd": "farms", "null": True}):
        report = analyze(net, **options)
        for record in report.layers.values():
            marks = spectrum_marks(record, report)
            law = marchenko_pastur(record.norm_stable_rank or 0, aspect_of_sample(record, report))
            assert marks is not None
            assert marks.edge == pytest.approx(law.x[-1])
            assert (marks.spikes, marks.traps) == ((), None)


def test_a_layer_without_eigenvalues_has_no_marks() -> None:
    assert spectrum_marks(LayerRecord(status="all weights are zero"), Report({})) is None
