"""Verdicts: each by a layer made for it, and the error rates over generated layers."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.verdicts import AIM, error_rate, generated, main, verdict
from farms_tb import LayerRecord, Verdict, analyze


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def planted(singular: Tensor) -> Tensor:
    """A square matrix of these singular values, between random bases."""
    left, right = (torch.linalg.qr(torch.randn(len(singular), len(singular))).Q for _ in "ab")
    return left * singular @ right


def record_of(weight: Tensor, **options: Any) -> LayerRecord:
    return analyze(linear(weight), null=True, **options).layers["weight"]


def power_law(size: int = 64) -> Tensor:
    return planted((torch.arange(size) + 1.0) ** -0.75)


def with_one_large_entry() -> Tensor:
    weight = torch.randn(64, 64)
    weight[3, 5] = 60
    return weight


def low_rank() -> Tensor:
    return torch.randn(64, 3) @ torch.randn(3, 64)


def collapsed() -> Tensor:
    singular = torch.logspace(-2, -6, 64)
    singular[0] = 1
    return planted(singular).double()


def two_levels() -> Tensor:
    """Sixteen large singular values and 48 small ones: a tail of two points is no power law."""
    return planted(torch.cat([torch.full((16,), 10.0), torch.full((48,), 1.0)]) + 0.01 * torch.rand(64))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: torch.randn(64, 64), Verdict.RANDOM),
        (lambda: nn.init.orthogonal_(torch.empty(64, 64)), Verdict.RANDOM),
        (lambda: nn.init.orthogonal_(torch.empty(512, 256)), Verdict.RANDOM),
        (power_law, Verdict.TRAINED),
        (lambda: power_law(300), Verdict.TRAINED),
        (collapsed, Verdict.COLLAPSED),
        (low_rank, Verdict.LOW_RANK),
        (with_one_large_entry, Verdict.OUTLIERS),
        (two_levels, Verdict.NO_POWER_LAW),
        (lambda: torch.zeros(64, 64), Verdict.NOT_MEASURED),
        (lambda: torch.randn(3, 3), Verdict.NOT_MEASURED),
    ],
)
def test_each_verdict(make: Any, expected: Verdict) -> None:
    torch.manual_seed(0)
    weight = make()
    record = record_of(weight)
    assert record.verdict is expected
    (row,) = analyze(linear(weight), null=True).rows()
    assert row["verdict"] == expected.value == str(expected)


def test_none_without_a_permutation_null() -> None:
    """Nothing tells a random layer from a trained one; what needs no null is told."""
    torch.manual_seed(0)
    assert analyze(linear(power_law())).layers["weight"].verdict is None
    assert analyze(linear(power_law())).rows()[0]["verdict"] is None
    assert analyze(linear(collapsed())).layers["weight"].verdict is Verdict.COLLAPSED
    assert analyze(linear(low_rank())).layers["weight"].verdict is Verdict.LOW_RANK


def test_a_direction_that_no_window_shows_makes_no_random_layer() -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    weight += (
        100
        * nn.functional.normalize(torch.randn(512, 1), dim=0)
        * nn.functional.normalize(torch.randn(512), dim=0)
    )
    record = record_of(weight)
    assert record.num_spikes == 1
    assert record.verdict is Verdict.TRAINED


def test_the_scale_of_the_weights_does_not_matter() -> None:
    torch.manual_seed(0)
    for weight in (torch.randn(40, 40), power_law(40)):
        assert {record_of(weight * scale).verdict for scale in (1e-12, 1.0, 1e12)} == {record_of(weight).verdict}


def test_errors_are_rare() -> None:
    """`python -m benchmarks.verdicts` has the rates over 2,000 layers of up to 1024 units."""
    found = [(layer, verdict(layer)) for layer in generated(80, largest=32)]
    assert error_rate(found, random=True) == 0
    assert error_rate(found, random=False) <= 1 / 40


def test_a_benchmark_without_both_kinds_of_layers_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["verdicts", "--layers", "1"])
    with pytest.raises(SystemExit):
        main()
    assert "--layers must be at least 2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [pytest.param(400, id="400"), pytest.param(2000, id="2000", marks=pytest.mark.nightly)]
)
def test_errors_are_rare_over_many_layers(number: int) -> None:
    found = [(layer, verdict(layer)) for layer in generated(number, largest=128, seed=1)]
    assert error_rate(found, random=True) <= AIM
    assert error_rate(found, random=False) <= AIM
