"""Every entry point takes the same options, by the same names, with the same defaults."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

import farms_tb
from farms_tb.options import RatioOptions, SpectrumOptions

SPECTRAL = {field.name: field.default for field in fields(SpectrumOptions)}
RATIOS = {field.name: field.default for field in fields(RatioOptions)}
MAP = dict(list(RATIOS.items())[:7])
WHEN_AND_WHAT_TO_LOG = {
    "every_n_epochs": 1,
    "every_n_steps": None,
    "max_overhead": None,
    "timings_file": None,
    "log": True,
    "histogram_every_n": None,
    "table_every_n": None,
    "x_axis": None,
}


def options_of(function: object) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {
        parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
    }


@pytest.mark.parametrize(
    ("entry_point", "options"),
    [
        (farms_tb.analyze, SPECTRAL | {"null": False, "histogram": False}),
        (farms_tb.lr_ratios, MAP),
        (farms_tb.TempBalance, SPECTRAL | RATIOS),
        (farms_tb.FARMSTempBalance, SPECTRAL | RATIOS | WHEN_AND_WHAT_TO_LOG | {"lag_steps": 0}),
        (farms_tb.FARMSTrainerCallback, SPECTRAL | RATIOS | WHEN_AND_WHAT_TO_LOG),
    ],
    ids=["analyze", "lr_ratios", "TempBalance", "FARMSTempBalance", "FARMSTrainerCallback"],
)
def test_options_agree(entry_point: object, options: dict[str, object]) -> None:
    assert options_of(entry_point) == options


@pytest.mark.parametrize(
    "entry_point", ["analyze", "lr_ratios", "TempBalance", "FARMSTempBalance", "FARMSTrainerCallback"]
)
def test_every_option_is_documented(entry_point: str) -> None:
    documented = inspect.getdoc(getattr(farms_tb, entry_point)) or ""
    for name in options_of(getattr(farms_tb, entry_point)):
        assert f"\n    {name}: " in documented, f"{entry_point} does not document {name}"


def test_public_names_exist() -> None:
    for name in farms_tb.__all__:
        assert getattr(farms_tb, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'FARMSTempBalanc'"):
        farms_tb.FARMSTempBalanc  # noqa: B018
