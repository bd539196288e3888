"""Eigenvalues against singular values in float64, where it is easy and where it is hard."""

import threading

import pytest
import torch

from farms_tb import spectra
from farms_tb.spectra import window_eigenvalues
from farms_tb.windows import Windows

from .reference import spectrum


def pooled(matrices, samples=1, **options):
    return window_eigenvalues(Windows(matrices, samples), **options).flatten(1).sort(-1).values


def orthogonal(size, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(size, size, dtype=dtype)).Q


def with_singular_values(values, rows=None, dtype=torch.float64):
    """A matrix of these singular values and random singular vectors."""
    columns = len(values)
    left = orthogonal(rows or columns, dtype)[:, :columns]
    return left @ torch.diag(torch.as_tensor(values, dtype=torch.float64)).to(dtype) @ orthogonal(columns, dtype)


def assert_matches_svd(matrices, rtol):
    expected = torch.tensor([spectrum.eigenvalues(list(matrices.numpy()))], dtype=torch.float64)
    torch.testing.assert_close(pooled(matrices), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(4, 12, 12), (3, 30, 7), (3, 7, 30), (5, 1, 4), (1, 1, 1)])
def test_match_singular_values(shape, dtype):
    assert_matches_svd(torch.randn(shape, dtype=dtype), rtol=1e-6)


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
    matrix = with_singular_values(singular, rows, dtype)
    found = pooled(matrix[None])[0]
    # A singular value itself is only known to about 1e-16 of the largest.
    rtol = max(1e-5, 1e-14 * condition)
    torch.testing.assert_close(found, singular.square().flip(0), rtol=rtol, atol=0)


def test_one_ill_conditioned_window_among_others():
    singular = torch.logspace(0, -9, 12, dtype=torch.float64)
    matrices = torch.stack([torch.randn(12, 12, dtype=torch.float64), with_singular_values(singular)])
    assert_matches_svd(matrices, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("rank", [1, 5, 19])
def test_rank_deficient(rank, dtype):
    matrix = torch.randn(30, rank, dtype=dtype) @ torch.randn(rank, 20, dtype=dtype)
    found = pooled(matrix[None])[0]
    assert (found[: 20 - rank] == 0).all()
    assert (found[20 - rank :] > 0).all()


def test_zero_window():
    assert (pooled(torch.zeros(2, 5, 5)) == 0).all()


def test_never_negative_and_ascending():
    matrices = torch.randn(50, 8, 3) @ torch.randn(50, 3, 8)
    found = pooled(matrices, samples=10)
    assert found.shape == (10, 40)
    assert (found >= 0).all()
    assert (found.diff(dim=-1) >= 0).all()
    assert found.dtype == torch.float64


def test_samples_are_runs_of_windows():
    matrices = torch.randn(2, 3, 6, 6)
    found = pooled(matrices, samples=2)
    for sample, windows in zip(found, matrices, strict=True):
        torch.testing.assert_close(sample, pooled(windows)[0], rtol=0, atol=0)


@pytest.mark.parametrize("chunk_bytes", [1, 5_000, 20_000, 10**9])
def test_chunks_change_nothing(chunk_bytes):
    view = torch.randn(40, 30).unfold(0, 10, 3).unfold(1, 10, 4)
    whole = pooled(view, samples=view.shape[0])
    chunked = pooled(view, samples=view.shape[0], chunk_bytes=chunk_bytes)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-14)


def test_chunks_are_solved_one_at_a_time(monkeypatch):
    # 1000 overlapping windows must never be in memory together.
    sizes = []
    solve = spectra._eigenvalues
    monkeypatch.setattr(spectra, "_eigenvalues", lambda matrices: sizes.append(len(matrices)) or solve(matrices))
    view = torch.randn(1000 + 9, 10).unfold(0, 10, 1).mT
    per_window = 3 * 10 * 10 * 8
    pooled(view, chunk_bytes=100 * per_window)
    assert sum(sizes) == 1000
    assert max(sizes) <= 100


def test_weights_are_left_alone():
    matrices = torch.randn(2, 6, 4)
    before = matrices.clone()
    pooled(matrices)
    assert torch.equal(matrices, before)


@pytest.fixture
def four_threads():
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


def threads_of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_threads_change_nothing(four_threads, monkeypatch):
    monkeypatch.setattr(spectra, "_CHUNK_WORK", 3 * 20**3)
    matrices = torch.randn(50, 30, 20)
    shared = pooled(matrices, samples=5)
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (4, 4)
    torch.set_num_threads(1)
    assert torch.equal(pooled(matrices, samples=5), shared)


def test_an_error_in_a_thread_is_raised(four_threads, monkeypatch):
    def fail(_):
        raise RuntimeError("no convergence")

    monkeypatch.setattr(spectra, "_eigenvalues", fail)
    with pytest.raises(RuntimeError, match="no convergence"):
        pooled(torch.randn(50, 30, 20))
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (4, 4)


def break_solver(monkeypatch, name, hard):
    """Let a solver of torch fail for every batch that holds the matrix `hard`."""
    solve = getattr(torch.linalg, name)

    def solve_or_fail(batch):
        if batch.shape[1:] == hard.shape and (batch == hard).flatten(1).all(-1).any():
            raise torch.linalg.LinAlgError("no convergence")
        return solve(batch)

    monkeypatch.setattr(torch.linalg, name, solve_or_fail)


class TestSolverThatDoesNotConverge:
    """No matrix is known that defeats LAPACK: its functions are made to fail."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    @pytest.mark.parametrize("shape", [(6, 5, 5), (6, 9, 4)])
    def test_singular_values_are_solved_for_instead(self, shape, dtype, monkeypatch):
        matrices = torch.randn(shape, dtype=dtype)
        matrices[1, :, -1] = matrices[1, :, 0]  # of lower rank
        whole = pooled(matrices, samples=6)
        break_solver(monkeypatch, "eigvalsh", matrices[2].mH @ matrices[2])
        torch.testing.assert_close(pooled(matrices, samples=6), whole, rtol=1e-9, atol=0)

    def test_an_error_where_that_fails_too(self, four_threads, monkeypatch):
        matrices = torch.randn(6, 5, 5, dtype=torch.float64)
        break_solver(monkeypatch, "eigvalsh", matrices[2].mH @ matrices[2])
        break_solver(monkeypatch, "svdvals", matrices[2])
        with pytest.raises(torch.linalg.LinAlgError, match="no convergence"):
            pooled(matrices)


class TestTooLittleMemory:
    """No GPU is needed to see what follows its error."""

    @pytest.fixture
    def solved(self, monkeypatch):
        """Sizes of the chunks that were solved, where there is memory for two windows at once."""
        solved = []
        solve = spectra._eigenvalues

        def solve_two(matrices):
            if len(matrices) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            solved.append(len(matrices))
            return solve(matrices)

        monkeypatch.setattr(spectra, "_eigenvalues", solve_two)
        return solved

    def test_chunks_are_halved_until_they_fit(self, solved):
        view = torch.randn(17, 9).unfold(0, 7, 1).mT
        with pytest.warns(UserWarning, match="fewer at a time, and on the CPU") as warned:
            found = pooled(view, samples=11)
        assert len(warned) == 1
        assert sum(solved) == 11
        expected = torch.linalg.svdvals(view.double()).square().flip(-1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)

    def test_warned_of_once(self, solved):
        with pytest.warns(UserWarning, match="too little free memory on cpu"):
            pooled(torch.randn(9, 4, 4))
        pooled(torch.randn(9, 4, 4))

    @pytest.mark.parametrize("lead", [(5,), (2, 3)])
    def test_a_single_window_that_does_not_fit_is_solved_on_the_cpu(self, lead, monkeypatch):
        matrices = torch.randn(*lead, 6, 4)
        whole = pooled(matrices, samples=lead[0])
        sizes = []
        solve = spectra._eigenvalues

        def solve_one_at_the_second_attempt(matrices):
            sizes.append(len(matrices))
            if len(matrices) > 1 or sizes.count(1) % 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return solve(matrices)

        monkeypatch.setattr(spectra, "_eigenvalues", solve_one_at_the_second_attempt)
        with pytest.warns(UserWarning, match="on the CPU where there is none for a single one"):
            found = pooled(matrices, samples=lead[0])
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)
