"""The stable rank that the table and the page show is the matrix's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from farms_tb import LayerRecord, analyze
from farms_tb.viewing.stable_rank import matrix_stable_rank


def test_of_one_matrix() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(384, 384), nn.Linear(256, 128))
    for name, record in analyze(net, esd="full").layers.items():
        values = torch.linalg.svdvals(net[int(name)].weight.detach().double())
        expected = float(values.square().sum() / values[0].square())
        assert matrix_stable_rank(record) == pytest.approx(expected, rel=1e-4)


def test_none_of_several_matrices_together() -> None:
    """Nine matrices of rank 8 have none above 8; their eigenvalues together have."""
    record = analyze(nn.Conv2d(8, 24, 3), esd="full").layers["weight"]
    assert record.stable_rank is not None
    assert record.stable_rank > 8
    assert matrix_stable_rank(record) is None


def test_none_without_a_measurement() -> None:
    assert matrix_stable_rank(None) is None
    assert matrix_stable_rank(LayerRecord()) is None
