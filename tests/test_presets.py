"""Presets: the published settings, what overrides them, and what is said of them."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
from torch import nn

from farms_tb import (
    FARMSTempBalance,
    FARMSTrainerCallback,
    LoggingOptions,
    RatioOptions,
    ScheduleOptions,
    SpectrumOptions,
    TempBalance,
    analyze,
)
from farms_tb.options import AssignFunc, as_plain
from farms_tb.presets import PRESETS, Preset
from tests.helpers import LIGHTNING_NOISE, Module, fit, make_net


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(80, 64)
        blocks = [nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64)}) for _ in range(3)]
        self.layers = nn.ModuleList(blocks)
        self.lm_head = nn.Linear(64, 80, bias=False)


def balance(preset: Preset, model: nn.Module, **options: Any) -> TempBalance:
    return TempBalance(model, torch.optim.AdamW(model.parameters(), lr=0.1), preset=preset, **options)


def test_every_name_has_its_options_and_they_are_valid() -> None:
    assert set(PRESETS) == set(get_args(Preset))
    for name in get_args(Preset):
        FARMSTempBalance(preset=name)


@pytest.mark.parametrize("name", get_args(Preset))
def test_every_preset_names_its_map(name: Preset) -> None:
    """A published method stays what it is when a default of this package changes."""
    assert PRESETS[name].options["assign_func"] in get_args(AssignFunc)


def test_lr_ratios_of_llr_by_hand() -> None:
    """lr_i = lr (1 + (s - 1) (alpha_i - min) / (max - min)), whole matrices; embedding and head at s."""
    balancer = balance("llr", LanguageModel())
    alphas = {n: a for n, a in balancer.report.alphas.items() if n.startswith("layers") and a is not None}
    low, high = min(alphas.values()), max(alphas.values())
    expected = {name: 1 + 4 * (alpha - low) / (high - low) for name, alpha in alphas.items()}
    assert {name: balancer.ratios[name] for name in alphas} == pytest.approx(expected)
    assert balancer.parameter_ratios()["embed_tokens.weight"] == balancer.ratios["lm_head"] == 5
    assert balancer.report.options["esd"] == "full"


def test_weight_decays_of_alphadecay_by_hand() -> None:
    """wd_i = wd (2/3 + (5 - 2/3) (alpha_i - min) / (max - min)), first and last module out; lr untouched."""
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    balancer = TempBalance(model, optimizer, preset="alphadecay")
    inner = ["layers.0.down", "layers.1.up", "layers.1.down", "layers.2.up", "layers.2.down"]
    alphas = {name: balancer.report.alphas[name] or math.nan for name in inner}
    low, high = min(alphas.values()), max(alphas.values())
    decays = {}
    for group in balancer.param_groups(optimizer):
        assert group.lr == 0.1
        decays.update(dict.fromkeys(group.layers, group.weight_decay))
    for name, alpha in alphas.items():
        assert decays[name] == pytest.approx(0.3 * (2 / 3 + (5 - 2 / 3) * (alpha - low) / (high - low)))
    assert decays["layers.0.up"] == decays["lm_head"] == pytest.approx(0.3)


def test_model_balancing_by_hand() -> None:
    """Ratio: 10^(sigmoid(10 (mean alpha of the block - mean over blocks)) - 1/2)."""
    balancer = balance("model_balancing", LanguageModel())
    alphas = balancer.report.alphas
    means = [(alphas[f"layers.{i}.up"] + alphas[f"layers.{i}.down"]) / 2 for i in range(3)]  # type: ignore[operator]
    middle = sum(means) / 3
    for index, mean in enumerate(means):
        expected = 10 ** (1 / (1 + math.exp(-10 * (mean - middle))) - 0.5)
        assert balancer.ratios[f"layers.{index}.up"] == pytest.approx(expected)
    assert balancer.ratios["lm_head"] == 1
    assert balancer.report.options["xmin_pos"] == 1.5


def test_an_option_by_name_overrides() -> None:
    callback = FARMSTempBalance(preset="llr", lr_max_ratio=3.0, until=1, fixed={"net.0": 2.0})
    assert callback.options.ratios.lr_max_ratio == 3
    assert callback.options.schedule.until == 1
    assert callback.options.ratios.fixed == (("net.0", 2.0),)
    assert callback.options.schedule.ramp_steps == 50
    assert callback.options.spectrum.esd == "full"


CALLBACKS = (FARMSTempBalance, FARMSTrainerCallback)


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize(
    ("preset", "given", "epochs", "steps", "per_epoch"),
    [
        ("model_balancing", {"every_n_steps": 100}, 1, 100, None),
        ("model_balancing", {"every_n_epochs": 2}, 2, None, None),
        ("llr", {"measurements_per_epoch": 5}, 1, None, 5),
        ("alphadecay", {"measurements_per_epoch": 3}, 1, None, 3),
        ("llr", {"every_n_epochs": 1}, 1, None, None),
        ("llr", {"every_n_steps": None}, 1, None, None),
        ("model_balancing", {"every_n_steps": None}, 1, None, 10),
    ],
)
def test_when_to_measure_replaces_all_that_the_preset_says_of_it(
    callback: Any, preset: Preset, given: dict[str, Any], epochs: int, steps: int | None, per_epoch: int | None
) -> None:
    schedule = callback(preset=preset, **given).options.schedule
    assert schedule.every_n_epochs == epochs
    assert schedule.every_n_steps == steps
    assert schedule.measurements_per_epoch == per_epoch
    assert schedule.until == callback(preset=preset).options.schedule.until


@pytest.mark.parametrize(
    ("preset", "given", "message"),
    [
        ("llr", {"lr_max_ratio": 0.9}, r"preset='llr' sets lr_min_ratio=1\.0: give lr_min_ratio, too"),
        ("llr", {"start": 0.5}, r"preset='llr' sets until=0\.2: give until, too"),
        ("model_balancing", {"assign_func": "noise_aware"}, "sets unit='block': give unit, too"),
    ],
)
def test_what_contradicts_the_preset_is_told_from_what_was_given(
    preset: Preset, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FARMSTempBalance(preset=preset, **given)


@pytest.mark.parametrize("all_options", [False, True])
@pytest.mark.parametrize("preset", ["llr", "alphadecay"])
def test_blocks_have_norms_of_their_own_ratio_whatever_the_preset_says(preset: Preset, all_options: bool) -> None:
    everything = as_plain(SpectrumOptions(), RatioOptions(), ScheduleOptions(), LoggingOptions())
    given = {**(everything if all_options else {}), "unit": "block"}
    ratios = FARMSTempBalance(preset=preset, **given).options.ratios
    assert (ratios.unit, ratios.norms) == ("block", "follow")
    assert ratios.assign_func == PRESETS[preset].options["assign_func"]


def test_a_contradiction_of_the_users_own_is_not_the_presets() -> None:
    with pytest.raises(ValueError, match="both say when to measure") as caught:
        FARMSTempBalance(preset="llr", every_n_steps=2, measurements_per_epoch=2)
    assert "preset" not in str(caught.value)


def test_all_options_at_once_as_command_lines_pass_them() -> None:
    """LightningCLI and Hydra pass every option: those at their defaults leave the preset alone."""
    classes = SpectrumOptions, RatioOptions, ScheduleOptions, LoggingOptions
    everything = as_plain(*(cls() for cls in classes))
    assert (
        FARMSTempBalance(preset="alphadecay", **everything).options
        == FARMSTempBalance(preset="alphadecay").options
    )
    callback = FARMSTempBalance(preset="alphadecay", **{**everything, "lr_max_ratio": 3.0})
    assert callback.options.ratios.lr_max_ratio == 3
    assert callback.options.ratios.target == "weight_decay"
    assert callback.options.schedule.every_n_steps == 500
    callback = FARMSTempBalance(preset="alphadecay", **{**everything, "measurements_per_epoch": 3})
    assert callback.options.schedule.every_n_steps is None


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of 'farms', .* got 'lrr'"):
        FARMSTempBalance(preset="lrr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="preset='llr' and ratios= both choose options"):
        FARMSTempBalance(preset="llr", ratios=RatioOptions())


def test_options_of_logging_go_with_every_preset() -> None:
    callback = FARMSTempBalance(preset="llr", logging=LoggingOptions(verdicts=True))
    assert callback.options.logging.verdicts
    assert callback.options.ratios.lr_max_ratio == 5
    assert not any(
        field.name in published.options for field in fields(LoggingOptions) for published in PRESETS.values()
    )


def test_settings_say_what_is_active_and_who_says_so() -> None:
    text = FARMSTempBalance(preset="llr", lr_max_ratio=3.0, window=50).settings()
    assert "2605.22297" in text
    assert "lr_max_ratio = 3.0 (yours, the preset has 5.0)" in text
    assert "until = 0.2 (preset)" in text
    assert "window = 50 (yours)" in text
    assert "fixed = (('embed*', 5.0), ('lm_head', 5.0)) (preset)" in text
    assert "sigmoid_tau" not in text
    balancer = balance("tempbalance", make_net())
    assert "2312.00359" in balancer.settings()
    assert "preset: none" in FARMSTempBalance().settings()


def test_measuring_takes_what_a_preset_says_of_measurements() -> None:
    net = make_net()
    expected = analyze(net, esd="full", fit="median", xmin_pos=1.5, min_eigenvalues=50).layers
    assert analyze(net, preset="model_balancing").layers == expected
    assert analyze(net, preset="model_balancing", min_eigenvalues=5).layers != expected
    with pytest.raises(ValueError, match="preset must be one of"):
        analyze(net, preset="lrr")  # type: ignore[arg-type]


class TestInTraining:
    pytestmark = LIGHTNING_NOISE

    def test_monitor_trains_as_without_a_callback(self) -> None:
        watched, plain = Module(), Module()
        callback = FARMSTempBalance(preset="monitor")
        fit(watched, [callback])
        fit(plain, [])
        assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), plain.parameters(), strict=True))
        assert callback.report is not None
        assert all(record.null is None for record in callback.report.layers.values())
