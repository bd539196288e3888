"""Which windows are solved in which precision, and layers that are measured together."""

import dataclasses

import pytest
import torch
from torch import nn

from farms_tb import analyze
from farms_tb.options import SpectrumOptions
from farms_tb.spectra.measure import measure
from farms_tb.weights.layers import find_layers
from recipes.models.resnet import SmallImageResNet


@pytest.mark.parametrize(
    "options", [{}, {"filter_zeros": True}, {"esd": "full", "fit": "goodness-of-fit"}], ids=str
)
def test_a_layer_alone_has_the_record_that_it_has_among_others(options):
    torch.manual_seed(0)
    layers, options = find_layers(SmallImageResNet(width=8)), SpectrumOptions(**options)
    together = measure(layers, options, histogram=True).layers
    for layer in layers:
        assert measure([layer], options, histogram=True).layers[layer.name] == together[layer.name]


def heavy(channels, slope):
    """A convolution whose tail is as heavy as that of a trained one."""
    conv = nn.Conv2d(channels, channels, 3)
    with torch.no_grad():
        conv.weight *= (torch.arange(channels) + 1.0).pow(-slope)[:, None, None]
    return conv


def low_rank(size, rank):
    linear = nn.Linear(size, size).double()
    with torch.no_grad():
        linear.weight.copy_(torch.randn(size, rank) @ torch.randn(rank, size))
    return linear


def test_the_precision_follows_the_spectrum():
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "small": nn.Conv2d(40, 40, 3),
            "random": nn.Conv2d(200, 200, 3),
            "one window": nn.Linear(100, 100),
            "heavy": heavy(200, 1.2),
            "low rank": low_rank(30, 10),
        }
    )
    found = analyze(net).layers
    assert {name: record.solver for name, record in found.items()} == {
        "small": "cpu float64",
        "random": "cpu float32",
        "one window": "cpu float32",
        "heavy": "cpu float64",
        "low rank": "cpu float64 svd",
    }
    exact = analyze(net, precision="float64").layers
    for name, record in found.items():
        assert record.alpha == pytest.approx(exact[name].alpha, rel=5e-5)
        assert record.alpha_error == pytest.approx(exact[name].alpha_error, rel=1e-3)


def test_a_window_unlike_the_pilot_is_solved_again():
    """The pilot is the first window: it says nothing of a later one with a far larger eigenvalue."""
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 128, 3)
    with torch.no_grad():
        conv.weight[:, :, 2, 2] += 10 * torch.outer(torch.ones(128), torch.ones(128))
    (found,), (exact,) = (analyze(conv, precision=p).layers.values() for p in ("auto", "float64"))
    assert found.solver == "cpu float32"
    assert found.alpha == pytest.approx(exact.alpha, rel=5e-5)


def test_the_precision_is_that_of_most_windows():
    torch.manual_seed(0)
    linear = nn.Linear(500, 500)
    with torch.no_grad():
        linear.weight[100:] += 1.0  # the first windows, by which the others begin, know nothing of this eigenvalue
    (record,) = analyze(linear).layers.values()
    assert record.solver == "cpu float64"


def test_a_histogram_changes_nothing_else():
    torch.manual_seed(0)
    net = nn.Conv2d(96, 96, 3)
    (plain,), (counted,) = (analyze(net, histogram=wanted).layers.values() for wanted in (False, True))
    assert plain.solver == "cpu float32"
    assert dataclasses.replace(counted, histogram=None) == plain
    assert sum(counted.histogram.counts) == counted.num_eigenvalues
