"""Which windows are solved by which route, and samples that are fitted together."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from farms_tb import analyze
from farms_tb.options import SpectrumOptions
from farms_tb.spectra import samples
from farms_tb.spectra.measure import measure
from farms_tb.spectra.power_law import fit_power_law
from farms_tb.weights.layers import find_layers, read_stacks
from farms_tb.weights.matrices import MatrixStack
from recipes.models.resnet import SmallImageResNet


def job_of(scale=1.0, size=70):
    stack = MatrixStack(torch.randn(9, size, size), eigenvalue_scale=scale)
    (job,) = samples.make_jobs([stack], SpectrumOptions())
    return job


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"xmin_pos": 1.3},
        {"xmin_pos": 4.0},
        {"filter_zeros": True},
        {"relative_cutoff": 1e-3},
        {"filter_zeros": True, "relative_cutoff": 1e-2, "xmin_pos": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.6839839319154413])
@pytest.mark.parametrize("decades", [0.1, 3, 9])
def test_the_plain_fit_of_one_window_is_that_of_a_sample(options, scale, decades):
    options, job = SpectrumOptions(**options), job_of(scale)
    for size in (5, 6, 40):
        values = (10 ** (-decades * torch.rand(size, dtype=torch.float64))).sort().values
        first = samples.first_counted(values[None], torch.tensor([job.factor]), options)
        fits = fit_power_law(values[None] * scale, "median", options.xmin_pos, first)
        alpha, xmin = samples._plain_fit(values.tolist(), job, options)
        assert alpha == pytest.approx(float(fits.alpha), rel=1e-12, nan_ok=True)
        assert xmin == float(values[fits.tail_start])


def test_the_plain_fit_where_there_is_none():
    options = SpectrumOptions()
    for values in ([0.0, 0.0, 0.0, 0.0, 1.0, 2.0], [1.0] * 6, [math.nan] * 6):
        assert math.isnan(samples._plain_fit(values, job_of(), options)[0])
    # The largest is at the cutoff but for rounding: all would be below it.
    near = samples._plain_fit([1e-9] * 5 + [1.4620226489817992e-05], job_of(0.6839839319154413), SpectrumOptions())
    cut = SpectrumOptions(filter_zeros=True)
    for value in (1.4620226489817992e-05, 1.462e-05, 1e-6):
        samples._plain_fit([1e-9] * 5 + [value], job_of(0.6839839319154413), cut)
    assert near[1] == 1e-9


@pytest.mark.parametrize("shape", [(200, 200, 3, 3), (200, 170, 2), (170, 200, 3, 3), (256, 256, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_packed_matrices_are_the_same(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    for matrices in (weight.flatten(2).permute(2, 0, 1), weight.flatten(2).permute(2, 1, 0)):
        packed = samples._packed(matrices)
        assert torch.equal(packed, matrices)
        assert 1 in packed.stride()[1:]
        assert packed.shape[0] == 1 or packed.data_ptr() != matrices.data_ptr()


def test_nothing_is_packed_beyond_the_memory():
    # Its copy would be more than half of a megabyte.
    stack = MatrixStack(torch.randn(400, 400, 3, 3).flatten(2).permute(2, 0, 1))
    for memory, packed in ((1, False), (64, True)):
        (job,) = samples.make_jobs([stack], SpectrumOptions(memory_mb=memory))
        assert (job.stack.matrices.stride(2) == 1) is packed


@pytest.mark.parametrize(
    "options", [{}, {"filter_zeros": True}, {"esd": "full", "fit": "goodness-of-fit"}], ids=str
)
def test_a_layer_alone_has_the_record_that_it_has_among_others(options):
    torch.manual_seed(0)
    layers, options = find_layers(SmallImageResNet(width=8)), SpectrumOptions(**options)
    together = measure(layers, options, histogram=True).layers
    for layer in layers:
        assert measure([layer], options, histogram=True).layers[layer.name] == together[layer.name]


@pytest.mark.parametrize(
    "options",
    [{}, {"filter_zeros": True, "relative_cutoff": 1e-4}, {"fit": "xmin_peak", "relative_cutoff": 1e-3}],
    ids=str,
)
def test_no_record_depends_on_what_shares_its_table(options, monkeypatch):
    """Whatever is before a sample's eigenvalues to fill a table up: nothing, or thousands of zeros."""
    torch.manual_seed(0)
    layers = find_layers(
        nn.ModuleList(
            [
                *(nn.Conv2d(32, 32, 3), nn.Conv2d(24, 70, 3), nn.Linear(300, 120), nn.Linear(11, 7)),
                *(nn.Conv2d(40, 10, 1), pruned(nn.Linear(64, 64)), heavy(100, 1.5), tiny(nn.Linear(20, 30))),
            ]
        )
    )
    reports = []
    for most, number in ((0, 8), (10**9, 1)):
        monkeypatch.setattr(samples, "_PADDING", most)
        jobs = samples.make_jobs([read_stacks(one.module)[0] for one in layers], SpectrumOptions(**options))
        assert len(samples._groups(jobs)) == number
        reports.append(measure(layers, SpectrumOptions(**options), histogram=True))
    assert reports[0].layers == reports[1].layers
    assert {record.status for record in reports[0].layers.values()} >= {"ok"}


def test_tables():
    first, second = torch.ones(2, 1), torch.full((1, 3), 2.0)
    assert samples.table([first, second]).tolist() == [[0, 0, 1], [0, 0, 1], [2, 2, 2]]
    assert samples.repeated([1.5, 2.5], torch.tensor([0, 2])).tolist() == [2.5, 2.5]


def pruned(layer):
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    return layer


def tiny(layer):
    """Weights so small that eigenvalues are below what `filter_zeros` drops."""
    with torch.no_grad():
        layer.weight *= 1e-3
    return layer


def heavy(channels, slope):
    """A convolution whose tail is as heavy as that of a trained one."""
    conv = nn.Conv2d(channels, channels, 3)
    with torch.no_grad():
        conv.weight *= (torch.arange(channels) + 1.0).pow(-slope)[:, None, None]
    return conv


def test_the_route_follows_the_spectrum():
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "small": nn.Conv2d(40, 40, 3),
            "random": nn.Conv2d(200, 200, 3),
            "heavy": heavy(200, 1.2),
            "heavier": heavy(200, 2.5),
            "middle": heavy(100, 1.5),
        }
    )
    routes = {name: record.solver for name, record in analyze(net).layers.items()}
    assert routes == {
        "small": "cpu float64",
        "random": "cpu float32",
        "heavy": "cpu float32 deflated",
        "heavier": "cpu float64",
        "middle": "cpu float64",
    }
    exact = analyze(net, precision="float64").layers
    for name, record in analyze(net).layers.items():
        assert record.alpha == pytest.approx(exact[name].alpha, rel=5e-5)
        assert record.alpha_error == pytest.approx(exact[name].alpha_error, rel=1e-3)
        assert dataclasses.replace(exact[name], solver="").status == "ok"
