"""Options: checked once, with messages that name the argument, what was expected and what came."""

import math
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from farms_tb.options import (
    RatioOptions,
    SpectrumOptions,
    as_plain,
    collect_options,
)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"esd": "farm"}, ValueError, "esd must be one of 'farms', 'full', got 'farm'"),
        (
            {"fit": "Median"},
            ValueError,
            "fit must be one of 'median', 'goodness-of-fit', 'xmin_peak', got 'Median'",
        ),
        ({"fit": None}, ValueError, "fit must be one of .*, got None"),
        ({"aspect_ratio": 0}, ValueError, "aspect_ratio must be above 0, got 0"),
        ({"aspect_ratio": -1.0}, ValueError, r"aspect_ratio must be above 0, got -1\.0"),
        ({"aspect_ratio": math.nan}, ValueError, "aspect_ratio must be finite, got nan"),
        ({"aspect_ratio": math.inf}, ValueError, "aspect_ratio must be finite, got inf"),
        ({"aspect_ratio": "1"}, TypeError, "aspect_ratio must be a number, got '1' of type str"),
        ({"aspect_ratio": True}, TypeError, "aspect_ratio must be a number, got True of type bool"),
        ({"window": 1}, ValueError, "window must be at least 2, got 1"),
        ({"window": 100.0}, TypeError, r"window must be an integer, got 100\.0 of type float"),
        ({"window": True}, TypeError, "window must be an integer, got True of type bool"),
        ({"windows_per_dim": 0}, ValueError, "windows_per_dim must be at least 1, got 0"),
        ({"window_step": 0}, ValueError, "window_step must be at least 1, got 0"),
        ({"window_step": "5"}, TypeError, "window_step must be an integer, got '5' of type str"),
        ({"xmin_pos": 1}, ValueError, "xmin_pos must be above 1, got 1"),
        ({"filter_zeros": 1}, TypeError, "filter_zeros must be True or False, got 1 of type int"),
        ({"relative_cutoff": -0.1}, ValueError, r"relative_cutoff must be at least 0, got -0\.1"),
        ({"relative_cutoff": 1.0}, ValueError, r"relative_cutoff must be below 1, got 1\.0"),
        ({"min_eigenvalues": 1}, ValueError, "min_eigenvalues must be at least 2, got 1"),
    ],
)
def test_spectral_options(options, error, message):
    with pytest.raises(error, match=message):
        SpectrumOptions(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"assign_func": "linear"},
            ValueError,
            "one of 'tb_linear_map', 'tb_sqrt', 'tb_log2', 'tb_step', 'tb_sigmoid', 'noise_aware', got 'linear'",
        ),
        ({"lr_min_ratio": -0.1}, ValueError, r"lr_min_ratio must be at least 0, got -0\.1"),
        ({"lr_max_ratio": 0}, ValueError, "lr_max_ratio must be above 0, got 0"),
        (
            {"lr_min_ratio": 1.6},
            ValueError,
            r"must not exceed lr_max_ratio, got lr_min_ratio=1\.6 and lr_max_ratio=1\.5",
        ),
        ({"lr_min_ratio": math.nan}, ValueError, "lr_min_ratio must be finite, got nan"),
        ({"lr_max_ratio": math.inf}, ValueError, "lr_max_ratio must be finite, got inf"),
        ({"lr_max_ratio": None}, TypeError, "lr_max_ratio must be a number, got None of type NoneType"),
        ({"sigmoid_min": -1}, ValueError, "sigmoid_min must be at least 0, got -1"),
        ({"sigmoid_max": -1}, ValueError, "sigmoid_max must be at least 0, got -1"),
        ({"sigmoid_min": 101}, ValueError, "sigmoid_min must be at most 100, got 101"),
        ({"sigmoid_max": 1e9}, ValueError, r"sigmoid_max must be at most 100, got 1000000000\.0"),
        ({"sigmoid_tau": 0}, ValueError, "sigmoid_tau must be above 0, got 0"),
    ],
)
def test_temperature_options(options, error, message):
    with pytest.raises(error, match=message):
        RatioOptions(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "beta"}, ValueError, "metric must be one of 'alpha', .*, 'entropy', got 'beta'"),
        ({"exclude_first": 1}, TypeError, "exclude_first must be True or False, got 1 of type int"),
        ({"exclude_last": None}, TypeError, "exclude_last must be True or False, got None"),
        ({"norms": "feed"}, ValueError, "norms must be one of 'follow', 'base', got 'feed'"),
        ({"exclude": "conv1"}, TypeError, "exclude must be a sequence of strings, got 'conv1'"),
        ({"exclude": (1,)}, TypeError, r"exclude must be a sequence of strings, got \(1,\)"),
        ({"balance": "real"}, TypeError, "balance must be a sequence of strings, got 'real'"),
        ({"balance": ("complex",)}, ValueError, "balance must be one of 'real', 'spectral', got 'complex'"),
        (
            {"metric": "alpha_hat", "assign_func": "tb_log2"},
            ValueError,
            "assign_func='tb_log2' is defined for metric='alpha', .*, got metric='alpha_hat'; use 'tb_linear_map'",
        ),
    ],
)
def test_balance_options(options, error, message):
    with pytest.raises(error, match=message):
        RatioOptions(**options)


@pytest.mark.parametrize("number", [2, 2.0])
def test_integers_pass_for_numbers(number):
    assert SpectrumOptions(aspect_ratio=number, xmin_pos=number).aspect_ratio == 2


def test_equal_bounds_are_allowed():
    assert RatioOptions(lr_min_ratio=1.0, lr_max_ratio=1.0).lr_min_ratio == 1.0


def test_lists_become_tuples():
    options = RatioOptions(exclude=["conv*"], balance=["real", "spectral"])
    assert (options.exclude, options.balance) == (("conv*",), ("real", "spectral"))
    assert hash(options)


def test_options_cannot_be_changed_unchecked():
    with pytest.raises(FrozenInstanceError):
        SpectrumOptions().fit = "typo"


def flat_defaults():
    return as_plain(SpectrumOptions(), RatioOptions())


def test_collected_from_one_mapping():
    spectral, balance = collect_options(flat_defaults() | {"window": 50, "assign_func": "tb_step", "log": True})
    assert spectral == SpectrumOptions(window=50)
    assert balance == RatioOptions("tb_step")


def test_every_option_survives_the_plain_form():
    plain = flat_defaults()
    assert collect_options(plain) == (SpectrumOptions(), RatioOptions())
    names = {field.name for cls in (SpectrumOptions, RatioOptions) for field in fields(cls)}
    assert set(plain) == names


def test_plain_form_loads_with_weights_only(tmp_path):
    torch.save(flat_defaults(), tmp_path / "options.pt")
    assert torch.load(tmp_path / "options.pt", weights_only=True) == flat_defaults()
