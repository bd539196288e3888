"""Options: checked once, plain values, and the same as keyword arguments of every entry point."""

import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import get_type_hints

import numpy as np
import pytest
import torch

from farms_tb import FARMSTempBalance, TempBalance, analyze, analyze_checkpoint
from farms_tb.keywords import (
    BalancingKeywords,
    CallbackKeywords,
    LoggingKeywords,
    RatioKeywords,
    ScheduleKeywords,
    SpectrumKeywords,
)
from farms_tb.options import LoggingOptions, RatioOptions, ScheduleOptions, SpectrumOptions, as_plain
from tests.helpers import LIGHTNING_NOISE, Module, fit, make_net

CLASSES = (SpectrumOptions, RatioOptions, ScheduleOptions, LoggingOptions)


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
        ({"aspect_ratio": 10**400}, ValueError, "aspect_ratio must be finite, got 1000"),
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
            "one of 'tb_linear_map', 'tb_sqrt', .*, 'noise_aware', 'shrinkage', .*, got 'linear'",
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
        ({"unit": "group"}, ValueError, "unit must be one of 'layer', 'block', got 'group'"),
        ({"blocks": ["layer.*"]}, ValueError, "blocks and block_mean are for unit='block'"),
        ({"unit": "block", "assign_func": "noise_aware"}, ValueError, "use assign_func='shrinkage'"),
        (
            {"unit": "block", "block_mean": "weighted", "metric": "norm"},
            ValueError,
            "block_mean='weighted' needs standard errors",
        ),
        ({"target": "decay"}, ValueError, "target must be one of 'lr', 'weight_decay', 'both', got 'decay'"),
        ({"normalize": "sum"}, ValueError, "normalize must be one of 'mean', got 'sum'"),
        ({"exclude_heads": 1}, TypeError, "exclude_heads must be True or False, got 1"),
        ({"fixed": "embed"}, TypeError, "fixed must map patterns to ratios, .* got 'embed'"),
        ({"fixed": 5.0}, TypeError, r"fixed must map patterns to ratios, .* got 5\.0"),
        ({"fixed": ["embed"]}, TypeError, "fixed must map patterns to ratios"),
        ({"fixed": {1: 5.0}}, TypeError, "fixed must have patterns of names as keys, got 1"),
        ({"fixed": {"embed*": -1.0}}, ValueError, r"fixed\['embed\*'\] must be at least 0, got -1"),
        ({"fixed": {"embed*": "5"}}, TypeError, r"fixed\['embed\*'\] must be a number, got '5'"),
        ({"favor": "small"}, ValueError, "favor must be one of 'large_alpha', 'small_alpha', got 'small'"),
        (
            {"metric": "entropy", "assign_func": "shrinkage"},
            ValueError,
            "assign_func='shrinkage' compares alpha .* no other metric: got metric='entropy'",
        ),
        ({"metric": "entropy"}, ValueError, "metric='entropy'; pass assign_func='tb_linear_map'"),
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


def test_fixed_ratios_are_the_same_as_mapping_and_as_saved():
    options = RatioOptions(fixed={"embed*": np.float32(5.0), "lm_head": 2})
    assert options.fixed == (("embed*", 5.0), ("lm_head", 2.0))
    assert hash(options)
    saved = as_plain(options)["fixed"]
    assert saved == [["embed*", 5.0], ["lm_head", 2.0]]
    assert RatioOptions(fixed=saved) == options


def test_options_cannot_be_changed_unchecked():
    with pytest.raises(FrozenInstanceError):
        SpectrumOptions().fit = "typo"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_n_epochs": 0}, ValueError, "every_n_epochs must be at least 1, got 0"),
        ({"every_n_steps": 1.5}, TypeError, "every_n_steps must be an integer"),
        ({"lag_steps": -1}, ValueError, "lag_steps must be at least 0, got -1"),
        ({"ramp_steps": -1}, ValueError, "ramp_steps must be at least 0, got -1"),
        ({"measurements_per_epoch": 0}, ValueError, "measurements_per_epoch must be at least 1, got 0"),
        ({"start": 1.5}, ValueError, r"start, a fraction of the run, must be at most 1, got 1\.5"),
        ({"start": "2"}, ValueError, "start must be a fraction, 'N epochs' or 'N steps', got '2'"),
        ({"until": None}, TypeError, "until must be a fraction, 'N epochs' or 'N steps', got None"),
        ({"start": 0.5, "until": 0.2}, ValueError, r"until must be later than start, got start=0\.5"),
        ({"start": "3 steps", "until": "3 steps"}, ValueError, "until must be later than start"),
        ({"every_n_steps": 2, "measurements_per_epoch": 2}, ValueError, "both say when to measure"),
        ({"log": "yes"}, TypeError, "log must be True or False"),
        ({"histogram_every_n": 0}, ValueError, "histogram_every_n must be at least 1, got 0"),
        ({"table_every_n": True}, TypeError, "table_every_n must be an integer"),
        ({"x_axis": "steps"}, ValueError, "x_axis must be one of 'epoch', 'step', got 'steps'"),
        ({"exclude": None}, TypeError, r"exclude must be .* got None; .*exclude=\(\)"),
        ({"balance": None}, TypeError, "balance must be .* got None"),
        ({"exclude": 3}, TypeError, "exclude must be .* got 3 of type int"),
        ({"exclude": {"net.1": 0.5}}, TypeError, "exclude must be .* of type dict"),
        ({"exclude": b"net"}, TypeError, "exclude must be a sequence of strings"),
        (
            {"spectrum": {"esd": "full"}},
            TypeError,
            r"spectrum must be SpectrumOptions\(...\), got .* of type dict",
        ),
        ({"schedule": LoggingOptions()}, TypeError, r"schedule must be ScheduleOptions\(...\)"),
    ],
)
def test_options_of_callbacks(options, error, message):
    with pytest.raises(error, match=message):
        FARMSTempBalance(**options)


@pytest.mark.parametrize("every", [{"every_n_epochs": 2, "every_n_steps": 5}])
def test_epochs_have_no_effect_with_steps(every):
    with pytest.warns(UserWarning, match="every_n_steps=5 replaces every_n_epochs=2") as caught:
        FARMSTempBalance(**every)
    assert caught[0].filename == __file__


def test_plain_form_loads_with_weights_only(tmp_path):
    plain = as_plain(*(cls() for cls in CLASSES))
    assert set(plain) == {field.name for cls in CLASSES for field in fields(cls)}
    torch.save(plain, tmp_path / "options.pt")
    assert torch.load(tmp_path / "options.pt", weights_only=True) == plain


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "options",
    [
        {"lr_min_ratio": np.float64(0.3), "lr_max_ratio": np.float32(1.25)},
        {"exclude": np.array(["net.2"]), "balance": [np.str_("real")]},
        {"exclude_first": np.bool_(True), "window": np.int64(50), "threads": np.int32(1)},
        {"assign_func": np.str_("tb_step"), "esd": Text("full"), "exclude": [Text("net.2")]},
        {"every_n_steps": np.int16(2), "lag_steps": np.uint8(1), "sigmoid_tau": np.longdouble(2)},
    ],
    ids=str,
)
@pytest.mark.filterwarnings(*(mark.args[0] for mark in LIGHTNING_NOISE))
def test_numpy_values_become_plain(options, tmp_path):
    callback = FARMSTempBalance(**options)
    trainer = fit(Module(), [callback], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "numpy.ckpt")
    torch.load(tmp_path / "numpy.ckpt", weights_only=True)
    values = callback.options.as_plain()
    values |= {"exclude": values["exclude"], "balance": values["balance"]}
    flat = [*values.values(), *values["exclude"], *values["balance"]]
    assert {type(value) for value in flat} <= {float, int, str, bool, list, type(None)}
    fit(Module(), [FARMSTempBalance(**options)], ckpt_path=tmp_path / "numpy.ckpt", max_epochs=2)


# As keyword arguments


@pytest.mark.parametrize(
    ("keywords", "classes"),
    [
        (SpectrumKeywords, CLASSES[:1]),
        (RatioKeywords, CLASSES[1:2]),
        (ScheduleKeywords, CLASSES[2:3]),
        (LoggingKeywords, CLASSES[3:]),
        (BalancingKeywords, CLASSES[:2]),
        (CallbackKeywords, CLASSES),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_mypy_reads_are_the_fields_of_the_dataclasses(keywords, classes):
    expected = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    assert get_type_hints(keywords) == expected


def test_objects_and_keywords_together():
    spectrum = SpectrumOptions(esd="full", window=50)
    callback = FARMSTempBalance(
        spectrum=spectrum, schedule=ScheduleOptions(every_n_steps=9), window=40, lr_max_ratio=1.2, log=False
    )
    assert callback.options.spectrum == SpectrumOptions(esd="full", window=40)
    assert callback.options.ratios == RatioOptions(lr_max_ratio=1.2)
    assert callback.options.schedule == ScheduleOptions(every_n_steps=9)
    assert callback.options.logging == LoggingOptions(log=False)
    net = make_net()
    assert analyze(net, spectrum=spectrum, window=40) == analyze(net, esd="full", window=40)
    balancer = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), ratios=RatioOptions("tb_step"))
    assert balancer.state_dict()["options"]["assign_func"] == "tb_step"


def test_objects_for_a_file(tmp_path):
    net = make_net()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    report = analyze_checkpoint(tmp_path / "net.pt", spectrum=SpectrumOptions(window=10))
    assert report.options["window"] == 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FARMSTempBalance(lr_min=0.5), "FARMSTempBalance .*'lr_min'; .*'lr_min_ratio'.*RatioOptions"),
        (lambda: FARMSTempBalance(every_n_step=5), "'every_n_steps'.*ScheduleOptions"),
        (lambda: FARMSTempBalance(logs=False), "'log'.*LoggingOptions"),
        (lambda: analyze(make_net(), windows=3), "analyze .*'windows'.*'window'.*SpectrumOptions"),
        (lambda: analyze(make_net(), nul=True), "did you mean 'null'"),
        (lambda: analyze(make_net(), assign_func="tb_step"), "analyze has no option 'assign_func'"),
        (lambda: analyze(make_net(), max_overhead=0.1), "analyze has no option 'max_overhead'"),
        (lambda: analyze_checkpoint("a.pt", essd="full"), "analyze_checkpoint .*'esd'"),
        (lambda: TempBalance(make_net(), None, every_n_steps=1), "TempBalance has no option 'every_n_steps'"),
        (lambda: FARMSTempBalance(zzzzzz=1), "'zzzzzz'. .*help"),
    ],
)
def test_unknown_options_name_the_nearest(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("removed", [{"max_overhead": 0.02}, {"timings_file": "farms_timings.csv"}])
def test_options_of_earlier_versions(removed):
    with pytest.warns(UserWarning, match=f"no longer has the option {next(iter(removed))}.*every_n_epochs"):
        callback = FARMSTempBalance(every_n_epochs=2, **removed)
    assert callback.options.schedule == ScheduleOptions(every_n_epochs=2)


def test_unused_options_of_earlier_versions_say_nothing():
    FARMSTempBalance(max_overhead=None, timings_file=None)


@pytest.mark.parametrize("sequence", [list, tuple])
def test_defaults_that_lightningcli_passes_do_not_contradict_an_object(sequence):
    """Together with the defaults alone, `block_mean` would be refused: it is for blocks."""
    passed = {field.name: field.default for field in fields(RatioOptions)}
    passed |= {"block_mean": "weighted", "balance": sequence(["real"]), "fixed": {}}
    given = RatioOptions(unit="block", balance=["spectral"], fixed={"head": 2.0})
    callback = FARMSTempBalance(ratios=given, **passed)
    assert callback.options.ratios == replace(given, block_mean="weighted")
