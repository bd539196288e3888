"""The stable rank that a record, the table and the page show is the matrix's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farms_tb import analyze


def stable_rank(*matrices: Tensor) -> float:
    """The mean over matrices of their own."""
    values = [torch.linalg.svdvals(matrix.detach().double()).square() for matrix in matrices]
    return sum(float(value.sum() / value[0]) for value in values) / len(values)


def expected(layer: Any) -> float:
    weight = layer.weight if layer.weight.ndim == 2 else layer.weight.flatten(2).permute(2, 0, 1)
    return stable_rank(*weight) if weight.ndim == 3 else stable_rank(weight)


@pytest.mark.parametrize("options", [{"esd": "full"}, {"null": True}, {"esd": "full", "null": True}])
def test_of_every_layer(options: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(384, 384), nn.Linear(256, 128), nn.Conv2d(8, 24, 3), nn.Conv2d(16, 16, 3))
    for name, record in analyze(net, **options).layers.items():
        assert record.stable_rank == pytest.approx(expected(net[int(name)]), rel=1e-4)


def test_of_windows_that_are_whole_matrices() -> None:
    """Nothing further is solved, so they have one at no cost; of parts of matrices there is none."""
    net = nn.Sequential(nn.Linear(60, 60), nn.Conv2d(16, 16, 3), nn.Linear(256, 128), nn.Conv2d(8, 24, 3))
    layers = analyze(net).layers
    for name in "01":
        assert layers[name].stable_rank == pytest.approx(expected(net[int(name)]), rel=1e-4)
    for name in "23":
        assert layers[name].stable_rank is None


def test_pooled_matrices_have_a_name_of_their_own() -> None:
    """Nine matrices of rank 8 have none above 8; their eigenvalues together have."""
    record = analyze(nn.Conv2d(8, 24, 3), esd="full").layers["weight"]
    assert record.pooled_stable_rank is not None
    assert record.stable_rank is not None
    assert record.pooled_stable_rank > 8 > record.stable_rank


def test_the_papers_metric_keeps_its_name() -> None:
    record = analyze(nn.Conv2d(8, 24, 3), esd="full").layers["weight"]
    assert record.metric("stable_rank") == record.metric("pooled_stable_rank") == record.pooled_stable_rank
