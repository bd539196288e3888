"""Metrics of whole weight matrices, against NumPy and planted ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from farms_tb import LayerRecord, MatrixStack, analyze, layer_matrices
from farms_tb.options import SpectrumOptions
from farms_tb.spectra.permutation_null import weight_record
from farms_tb.spectra.whole_matrix import SPIKE_QUANTILE, TRAP_QUANTILE, find_outliers, outlier_edge


def layer_record(module: nn.Module, **options: Any) -> LayerRecord:
    (record,) = analyze(module, **options).layers.values()
    return record


def stack_record(matrices: Tensor, *, null: bool = False) -> LayerRecord:
    return weight_record(MatrixStack(matrices), SpectrumOptions(), null=null)


class TestEntries:
    @pytest.mark.parametrize("make", [lambda: nn.Linear(700, 300), lambda: nn.Conv2d(24, 40, 3)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_log_norm_is_that_of_all_matrices(self, make: Any, dtype: torch.dtype) -> None:
        layer = make().to(dtype)
        (stack,) = layer_matrices(layer)
        norm = float(layer.weight.detach().double().square().sum())
        assert layer_record(layer).log_norm == pytest.approx(math.log10(norm), abs=1e-5)
        # The eigenvalues of convolutions are those of the papers, which are halved.
        assert layer_record(layer, esd="full").norm == pytest.approx(stack.eigenvalue_scale * norm, rel=1e-4)

    @pytest.mark.parametrize("scale", [1e-30, 1e-14, 1.0, 1e14, 1e30])
    def test_dead_rows_and_columns(self, scale: float) -> None:
        weight = torch.rand(9, 60, 40) + 0.5
        weight[:, :7] *= 1e-4
        weight[:, :, :5] *= 1e-4
        weight[0, 8] *= 1e-6  # In one of the nine matrices alone.
        record = stack_record(weight * scale)
        assert (record.dead_rows, record.dead_columns) == (7, 5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("alive_below", [0, 1, 300, 500])
    def test_columns_of_a_single_large_matrix(self, alive_below: int, dtype: torch.dtype) -> None:
        """A look at the first rows is enough where no column is dead there, and must not decide otherwise."""
        weight = torch.randn(500, 60).to(dtype)
        weight[:alive_below, 3:6] *= 1e-4
        weight[9] = 0
        record = stack_record(weight[None])
        norms = weight.double().square().sum(dim=0).sqrt()
        assert record.dead_columns == int((norms < 1e-3 * norms.max()).sum()) == (3 if alive_below == 500 else 0)
        assert record.dead_rows == 1
        assert record.log_norm == pytest.approx(2 * math.log10(float(weight.double().norm())), abs=1e-5)

    def test_complex_weights(self) -> None:
        weight = torch.randn(4, 30, 20, dtype=torch.complex64)
        weight[:, 3] *= 1e-4
        record = stack_record(weight)
        assert (record.dead_rows, record.dead_columns) == (1, 0)
        assert record.log_norm == pytest.approx(math.log10(float(weight.abs().square().sum())), abs=1e-5)

    def test_a_layer_without_alpha_has_them_too(self) -> None:
        record = layer_record(nn.Linear(4, 4))
        assert record.alpha is None
        assert record.dead_rows == 0
        assert record.log_norm is not None

    def test_zeros_have_none(self) -> None:
        record = stack_record(torch.zeros(1, 20, 20))
        assert record.log_norm is record.dead_rows is record.num_spikes is None


class TestOutliers:
    @pytest.mark.parametrize(("quantile", "share"), [(TRAP_QUANTILE, 0.01), (SPIKE_QUANTILE, 0.001)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
    def test_random_matrices_have_as_few_as_the_quantile_says(
        self, quantile: dict[str, float], share: float, dtype: torch.dtype
    ) -> None:
        """Of 2,000 matrices; the law is that of infinite ones, small ones have fewer."""
        generator = torch.Generator().manual_seed(0)
        matrices = torch.randn(2000, 90, 40, dtype=dtype, generator=generator)
        found = find_outliers(MatrixStack(matrices), quantile)
        assert found is not None
        assert 0.1 * share * 2000 <= len(found.spikes) <= 2 * share * 2000

    @pytest.mark.parametrize("number", [1, 3, 10])
    def test_spikes_are_the_planted_directions(self, number: int) -> None:
        generator = np.random.default_rng(0)
        left = np.linalg.qr(generator.normal(size=(120, number)))[0]
        right = np.linalg.qr(generator.normal(size=(80, number)))[0]
        weight = generator.normal(size=(120, 80)) + 40 * left @ right.T
        assert stack_record(torch.from_numpy(weight)[None], null=True).num_spikes == number

    def test_are_counted_over_all_matrices(self) -> None:
        torch.manual_seed(0)
        matrices = torch.randn(5, 40, 30)
        matrices[:3] += 60 * torch.eye(40, 30) * (torch.arange(30) == 2)
        record = stack_record(matrices, null=True)
        assert record.num_spikes == 3
        assert record.num_traps is not None
        assert record.num_traps == pytest.approx(3, abs=0.5), "one entry makes each, in any order"

    def test_the_mean_of_the_entries_is_none(self) -> None:
        torch.manual_seed(0)
        record = stack_record(torch.rand(1, 100, 100) + 3, null=True)
        assert record.num_spikes == 0
        assert record.num_traps is not None
        assert record.num_traps < 0.3

    def test_directions_are_no_traps(self) -> None:
        torch.manual_seed(0)
        weight = torch.randn(100, 100) + 10 * torch.randn(100, 1) / 10 * torch.randn(100)
        record = stack_record(weight[None], null=True)
        assert record.num_spikes == 1
        assert record.num_traps is not None
        assert record.num_traps < 0.3

    def test_unknown_without_a_null_and_for_huge_matrices(self) -> None:
        assert stack_record(torch.randn(1, 30, 30)).num_spikes is None
        assert find_outliers(MatrixStack(torch.randn(1, 2050, 2050)), SPIKE_QUANTILE) is None
        assert stack_record(torch.randn(1, 30, 30)).outliers is None

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
    def test_eigenvalues_of_spikes_are_those_of_the_whole_matrices(self, scale: float) -> None:
        """Compared with singular values in double precision: a convolution, with spikes in two of its matrices."""
        torch.manual_seed(0)
        layer = nn.Conv2d(60, 40, (1, 3), bias=False)
        layer.weight.data = scale * (1 + torch.randn_like(layer.weight))
        layer.weight.data[..., :2] += scale * torch.randn(40, 1, 1, 1) * torch.randn(1, 60, 1, 1)
        (stack,) = layer_matrices(layer)
        weight = layer.weight.detach().double().numpy()[:, :, 0]
        weight = weight - weight.mean()
        edge = stack.eigenvalue_scale * weight.var() * outlier_edge(60, 40, SPIKE_QUANTILE["real"])
        eigenvalues = stack.eigenvalue_scale * np.linalg.svd(weight.transpose(2, 0, 1), compute_uv=False) ** 2
        found = layer_record(layer, null=True).outliers
        assert found is not None
        assert found.edge == pytest.approx(edge, rel=1e-4)
        assert found.spikes == pytest.approx(sorted(eigenvalues[eigenvalues > edge]), rel=1e-4)
        assert len(found.spikes) == 2

    def test_a_record_has_the_eigenvalues_that_it_counts(self) -> None:
        torch.manual_seed(0)
        matrices = torch.randn(5, 40, 30)
        matrices[:3] += 60 * torch.eye(40, 30) * (torch.arange(30) == 2)
        record = stack_record(matrices, null=True)
        assert record.outliers is not None
        assert record.outliers.traps is not None
        assert len(record.outliers.spikes) == record.num_spikes
        assert len(record.outliers.traps) / record.null_draws == pytest.approx(record.num_traps)
        # Each of the three large entries makes an eigenvalue of about its square, wherever it is put.
        assert np.median(record.outliers.traps) == pytest.approx(60**2, rel=0.1)

    @pytest.mark.parametrize("scale", [1e-170, 1e170])
    def test_are_counted_where_the_eigenvalues_are_out_of_range(self, scale: float) -> None:
        torch.manual_seed(0)
        weight = torch.randn(60, 50, dtype=torch.float64)
        weight += 60 * torch.eye(60, 50) * (torch.arange(50) == 2)
        record = stack_record(scale * weight[None], null=True)
        assert record.num_spikes == 1
        assert record.num_traps == pytest.approx(1, abs=0.2)
        assert record.outliers is None

    def test_tables_leave_the_eigenvalues_out(self) -> None:
        report = analyze(nn.Linear(40, 60), null=True)
        assert not {"outliers", "histogram"} & set(report.rows()[0])
