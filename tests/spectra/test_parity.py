"""Every figure of the reference implementation's outputs (float32, CPU) in tests/data."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import farms_tb
from farms_tb.spectra.power_law import fit_power_law
from farms_tb.spectra.samples import ZERO_CUTOFF
from tests.reference import spectrum, stacks, windows
from tests.reference.compare import assert_same_figures, figures

DATA = Path(__file__).parents[1] / "data"
REFERENCE = json.loads((DATA / "official_farms.json").read_text())
RESULTS = REFERENCE["results"]


def load_weights():
    with np.load(DATA / "official_farms_weights.npz") as archive:
        return {case["name"]: archive[case["name"]] for case in REFERENCE["cases"]}


def build_model(weights):
    model = nn.Module()
    for name, weight in weights.items():
        out, into, *kernel = weight.shape
        layer = nn.Conv2d(into, out, tuple(kernel), bias=False) if kernel else nn.Linear(into, out, bias=False)
        layer.weight.data = torch.from_numpy(weight)
        model.add_module(name, layer)
    return model


def options_of(settings):
    """The reference's settings under our names."""
    options = {"esd": "full" if settings["sampling"] == "none" else "farms", "fit": settings["fit"]}
    renamed = {"Q": "aspect_ratio", "window": "window", "ops": "windows_per_dim", "step": "window_step"}
    renamed |= {"xmin_pos": "xmin_pos", "filter_zeros": "filter_zeros"}
    options |= {ours: settings[name] for name, ours in renamed.items() if settings.get(name) is not None}
    return options


def names_of(settings):
    return ",".join(f"{name}={value}" for name, value in settings.items())


def wanted_figures(layer):
    renamed = {"D": "ks_distance", "eigs_num": "num_eigenvalues", "stable_rank": "pooled_stable_rank"}
    return {renamed.get(name, name): value for name, value in layer.items()}


def slow_figures(weight, options):
    """The same layer by the slow implementation."""
    options = dict(options)
    fit, xmin_pos = options.pop("fit"), options.pop("xmin_pos", 2.0)
    cutoff = ZERO_CUTOFF if options.pop("filter_zeros", False) else 0.0
    if weight.ndim == 4:
        samples, scale = windows.samples(stacks.convolution(weight), "blocks", **options), 0.5
    else:
        samples, scale = windows.samples(stacks.linear(weight), "grid", **options), 1.0
    return spectrum.layer_metrics(samples, scale, fit, xmin_pos, cutoff)


def test_reference_is_complete():
    assert len(REFERENCE["cases"]) == 7
    assert all(len(result["layers"]) == 7 for result in RESULTS)
    assert len(REFERENCE["temperatures"]) == 5


@pytest.mark.parametrize("result", RESULTS, ids=[names_of(result["settings"]) for result in RESULTS])
def test_figures_agree_with_the_reference(result):
    report = farms_tb.analyze(build_model(load_weights()), **options_of(result["settings"]))
    assert_same_figures(
        {name: figures(record) for name, record in report.layers.items()},
        {name: wanted_figures(layer) for name, layer in result["layers"].items()},
        rtol=1e-4,
        ks_atol=1e-5,  # the reference subtracts in float32; the next test shows who is right
    )


@pytest.mark.parametrize("result", RESULTS[:6], ids=[names_of(result["settings"]) for result in RESULTS[:6]])
def test_figures_are_more_exact_than_the_reference(result):
    weights, options = load_weights(), options_of(result["settings"])
    # A search over thousands of eigenvalues takes the slow implementation minutes.
    names = [name for name in weights if options["fit"] == "median" or "conv" in name]
    report = farms_tb.analyze(build_model({name: weights[name] for name in names}), precision="float64", **options)
    expected = {name: slow_figures(weights[name], options) for name in names}
    assert_same_figures({name: figures(report.layers[name]) for name in names}, expected, rtol=1e-6)


def test_the_reference_is_off_where_its_ks_distance_differs_most():
    # Why KS distances have an absolute tolerance: this one is 1.3e-4 away, summed over thousands of float32s.
    assert RESULTS[3]["settings"] | {"fit": "goodness-of-fit", "sampling": "farms"} == RESULTS[3]["settings"]
    theirs = RESULTS[3]["layers"]["linear_130x400"]["D"]
    (sample,) = windows.grid(stacks.linear(load_weights()["linear_130x400"]))
    values = spectrum.eigenvalues(sample)
    ours = fit_power_law(torch.tensor([values], dtype=torch.float64), "goodness-of-fit")
    start = int(ours.tail_start)
    exact = spectrum.ks_distance(values, start, spectrum.hill(values, start))
    assert abs(theirs / exact - 1) > 1e-4
    assert float(ours.ks_distance) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("case", REFERENCE["temperatures"], ids=lambda case: case["assign"])
def test_learning_rates_agree_with_the_reference(case):
    options = {"assign_func": case["assign"], "lr_min_ratio": case["lr_min_ratio"]}
    if case["assign"] == "tb_sigmoid":
        # The reference's lr_slope is s above the mean, its lr_min_ratio s below.
        options = {"assign_func": "tb_sigmoid", "sigmoid_tau": case["exp_temp"]}
        options |= {"sigmoid_min": case["lr_min_ratio"], "sigmoid_max": case["lr_slope"]}
    else:
        options["lr_max_ratio"] = case["lr_max_ratio"]
    ratios = farms_tb.lr_ratios({str(i): alpha for i, alpha in enumerate(case["alphas"])}, **options)
    rates = {name: {"lr": case["lr"] * ratio} for name, ratio in ratios.items()}
    assert_same_figures(rates, {str(i): {"lr": lr} for i, lr in enumerate(case["lrs"])}, rtol=1e-6)
