"""Eigenvalues of windows against singular values in float64, where it is easy and where it is hard."""

from itertools import product

import numpy as np
import pytest
import torch

from farms_tb.spectra import eigenvalues
from farms_tb.spectra.eigenvalues import Chunk, EigenvalueTable, solve_chunks
from farms_tb.spectra.precision import PRECISIONS, ROUNDOFF
from farms_tb.spectra.windows import Windows
from tests.reference import spectrum

SINGLE = ROUNDOFF["float32"]


def whole(view, precision="svd", index=None):
    """Windows of a view as one chunk; all of them, unless an index says which."""
    windows = Windows(view, 1)
    table = EigenvalueTable(windows, 1.0, np.full((windows.number, windows.size), np.nan))
    return Chunk(table, torch.arange(len(table.values)) if index is None else index, precision)


def solve(chunks, memory=2**29, threads=1, solver="auto"):
    """The eigenvalues `(W, w)` of the layer of each chunk; NaN for windows that are in no chunk."""
    solve_chunks(chunks, memory, threads, solver)
    return [torch.from_numpy(chunk.table.values) for chunk in chunks]


def solved(view, precision="svd", memory=2**29, threads=1):
    return solve([whole(view, precision)], memory, threads)[0]


def pooled(matrices, precision="svd"):
    return solved(matrices, precision).flatten().sort().values


def orthogonal(size, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(size, size, dtype=dtype)).Q


def with_singular_values(values, rows=None, dtype=torch.float64):
    """A matrix of these singular values and random singular vectors."""
    columns = len(values)
    left = orthogonal(rows or columns, dtype)[:, :columns]
    return left @ torch.diag(torch.as_tensor(values, dtype=torch.float64)).to(dtype) @ orthogonal(columns, dtype)


@pytest.mark.parametrize("precision", ["float64", "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(4, 12, 12), (3, 30, 7), (3, 7, 30), (5, 1, 4), (1, 1, 1)])
def test_match_singular_values(shape, dtype, precision):
    matrices = torch.randn(shape, dtype=dtype)
    expected = torch.tensor(spectrum.eigenvalues(list(matrices.numpy())), dtype=torch.float64)
    torch.testing.assert_close(pooled(matrices, precision), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_solved_in_double(dtype):
    matrices = torch.randn(2, 10, 10, dtype=dtype)
    torch.testing.assert_close(pooled(matrices), pooled(matrices.double()), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [20, 50])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8, 1e10, 1e13])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_ill_conditioned(condition, rows, dtype):
    # Squared, a condition number of 1e8 is 1e16: the Gram matrix alone would keep no digit of the small end.
    singular = torch.logspace(0, -torch.tensor(condition).log10().item(), 20, dtype=torch.float64)
    found = pooled(with_singular_values(singular, rows, dtype)[None])
    # A singular value itself is only known to about 1e-16 of the largest.
    rtol = max(1e-5, 1e-14 * condition)
    torch.testing.assert_close(found, singular.square().flip(0), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("rank", [1, 5, 19])
def test_rank_deficient(rank, dtype):
    matrix = torch.randn(30, rank, dtype=dtype) @ torch.randn(rank, 20, dtype=dtype)
    for precision in ("float64", "svd"):
        found = pooled(matrix[None], precision)
        assert (found[: 20 - rank] == 0).all()
        assert (found[20 - rank :] > 0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zero_windows(precision):
    assert (pooled(torch.zeros(2, 5, 5), precision) == 0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_never_negative_and_ascending(precision):
    found = solved(torch.randn(50, 8, 3) @ torch.randn(50, 3, 8), precision)
    assert found.shape == (50, 8)
    assert (found >= 0).all()
    assert (found.diff(dim=-1) >= 0).all()
    assert found.dtype == torch.float64


def test_some_of_the_windows():
    view = torch.randn(12, 9).unfold(0, 4, 2).unfold(1, 3, 3)
    index = torch.tensor([0, 7, 8, 14])
    (found,) = solve([whole(view, index=index)])
    assert torch.equal(found[index], solved(view)[index])
    assert found.isnan().any(-1).sum() == 15 - len(index)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("threads", [1, 3])
def test_layers_of_all_sizes_and_types_together(precision, threads):
    """What is promised is that no layer's eigenvalues depend on the others, bitwise: each is solved on its own."""
    dtypes = (torch.float32, torch.complex64, torch.bfloat16)
    layers = []
    for number, size, dtype in product((1, 30), (2, 9, 40), dtypes):
        weight = torch.randn(number, 5 + number, size, dtype=torch.complex64)
        layers.append(weight if dtype.is_complex else weight.real.to(dtype))
    chunks = [whole(layer, precision) for layer in layers]
    for layer, found in zip(layers, solve(chunks, threads=threads), strict=True):
        assert torch.equal(found, solved(layer, precision))


@pytest.mark.parametrize("memory", [1, 5_000, 20_000, 10**9])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_size_of_chunks_changes_roundings_only(memory, precision):
    """BLAS may round the product of one matrix otherwise than that of a batch, so nothing bitwise is promised."""
    view = torch.randn(40, 30).unfold(0, 10, 3).unfold(1, 10, 4)
    found, expected = solved(view, precision, memory), solved(view, precision)
    assert ((found - expected).abs() / expected[:, -1:]).max() <= 64 * max(ROUNDOFF[precision], 2.0**-53)


def test_memory_is_bounded_by_the_size_of_chunks(monkeypatch):
    view = torch.randn(1000 + 9, 10).unfold(0, 10, 1).mT
    taken = []
    take = Chunk.take
    monkeypatch.setattr(Chunk, "take", lambda chunk: taken.append(chunk) or take(chunk))
    for memory in (50_000, 500_000):
        taken.clear()
        assert not solved(view, memory=memory, threads=2).isnan().any()
        assert sum(len(chunk.index) for chunk in taken) == 1000
        assert max(len(chunk.index) * chunk.window_bytes for chunk in taken) <= memory / 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_left_alone(precision):
    matrices = torch.randn(2, 6, 4)
    before = matrices.clone()
    solved(matrices, precision)
    assert torch.equal(matrices, before)


def break_solver(monkeypatch, name, hard):
    """Let a solver of torch fail for each batch that holds the matrix `hard`: none is known to defeat LAPACK."""
    solve = getattr(torch.linalg, name)

    def solve_or_fail(batch):
        alike = batch.shape[1:] == hard.shape and batch.dtype == hard.dtype
        if alike and (batch == hard).flatten(1).all(-1).any():
            raise torch.linalg.LinAlgError("no convergence")
        return solve(batch)

    monkeypatch.setattr(torch.linalg, name, solve_or_fail)


class TestSinglePrecision:
    @pytest.mark.parametrize("precision", ["high", "medium"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
    def test_settings_of_matrix_products_do_not_matter(self, precision, dtype):
        matrices = torch.randn(9, 64, 64, dtype=dtype)
        before = solved(matrices, "float32")
        torch.set_float32_matmul_precision(precision)
        try:
            assert not eigenvalues.multiplies_in_full(torch.device("cpu"))
            found = solved(matrices, "float32")
        finally:
            torch.set_float32_matmul_precision("highest")
        assert eigenvalues.multiplies_in_full(torch.device("cpu"))
        assert ((found - before).abs() / before[:, -1:]).max() < 100 * SINGLE

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_new_settings_of_matrix_products_are_seen(self, device):
        backend = torch.backends.mkldnn if device == "cpu" else torch.backends.cuda
        if not hasattr(getattr(backend, "matmul", None), "fp32_precision"):
            pytest.skip("this torch has no such setting")
        before = backend.matmul.fp32_precision
        backend.matmul.fp32_precision = "tf32"
        try:
            assert not eigenvalues.multiplies_in_full(torch.device(device))
        finally:
            backend.matmul.fp32_precision = before
        assert eigenvalues.multiplies_in_full(torch.device(device))


class TestSolverThatDoesNotConverge:
    @pytest.mark.parametrize("precision", ["float32", "float64"])
    def test_is_marked_by_nan(self, precision, monkeypatch):
        matrices = torch.randn(6, 5, 5, dtype=torch.float32 if precision == "float32" else torch.float64)
        break_solver(monkeypatch, "eigvalsh", (matrices.mH @ matrices)[2])
        assert solved(matrices, precision).isnan().all()

    def test_a_hard_window_is_nan_alone(self, monkeypatch):
        matrices = torch.randn(6, 5, 5, dtype=torch.float64)
        break_solver(monkeypatch, "svdvals", matrices[2])
        chunks = [whole(matrices), whole(torch.randn(3, 5, 5))]
        hard, easy = solve(chunks)
        assert hard.isnan().all(-1).tolist() == [place == 2 for place in range(6)]
        assert not easy.isnan().any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnAGpu:
    @pytest.mark.parametrize("solver", ["auto", "torch", "cupy", "cpu"])
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_as_on_the_cpu(self, solver, precision):
        if solver == "cupy":
            pytest.importorskip("cupy")
        shapes = [(30, 64, 64), (3, 90, 64), (9, 512, 256), (50, 20, 20)]
        layers = [torch.randn(shape) for shape in shapes] + [torch.randn(4, 30, 20, dtype=torch.complex64)]
        chunks = [whole(layer.cuda(), precision) for layer in layers]
        for layer, found in zip(layers, solve(chunks, threads=2, solver=solver), strict=True):
            expected = solved(layer)
            error = (found - expected).abs() / expected[:, -1:]
            assert error.max() < (200 * SINGLE if precision == "float32" else 1e-13)

    def test_tf32_does_not_matter(self):
        matrices = torch.randn(9, 256, 256, device="cuda")
        torch.set_float32_matmul_precision("high")
        try:
            found = solved(matrices, "float32")
        finally:
            torch.set_float32_matmul_precision("highest")
        expected = solved(matrices.cpu())
        assert ((found - expected).abs() / expected[:, -1:]).max() < 200 * SINGLE
