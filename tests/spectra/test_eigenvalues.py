"""Eigenvalues against singular values in float64, where it is easy and where it is hard."""

from itertools import product

import pytest
import torch

from farms_tb.spectra import eigenvalues as spectra
from farms_tb.spectra.eigenvalues import ROUNDOFF, ROUTES, Wanted, window_eigenvalues
from tests.reference import spectrum

SINGLE_ROUNDOFF = ROUNDOFF["float32"]


def solved(view, route="svd", **options):
    """Eigenvalues of all windows, `(n, min(h, w))`."""
    ((values, *_),) = window_eigenvalues([Wanted(view, route)], **options)
    return values


def pooled(matrices):
    return solved(matrices).flatten()[None].sort(-1).values


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
    found = solved(torch.randn(50, 8, 3) @ torch.randn(50, 3, 8))
    assert found.shape == (50, 8)
    assert (found >= 0).all()
    assert (found.diff(dim=-1) >= 0).all()
    assert found.dtype == torch.float64


def test_picks():
    view = torch.randn(12, 9).unfold(0, 4, 2).unfold(1, 3, 3)
    whole = solved(view)
    assert whole.shape == (15, 3)
    picks = torch.tensor([14, 0, 7, 7])
    found, none = window_eigenvalues([Wanted(view, picks=picks), Wanted(view, picks=picks[:0])])
    assert torch.equal(found.values, whole[picks])
    assert none.values.shape == (0, 3)


@pytest.mark.parametrize("choice", ROUTES)
@pytest.mark.parametrize("route", ROUTES)
def test_a_window_that_goes_ahead(route, choice):
    view = torch.randn(3, 7, 20, 20)
    seen = []

    def choose(pilot):
        seen.append(pilot)
        return choice

    chosen, other = window_eigenvalues([Wanted(view, route, choose=choose), Wanted(view[0], choice)])
    ((pilot, scale, _),) = seen
    assert torch.equal(pilot, solved(view[:1, :1], route))
    assert scale.shape == (1,)
    assert torch.equal(chosen.values[1:], solved(view, choice)[1:])
    # The more accurate of the two is kept.
    best = max(route, choice, key=ROUTES.index)
    assert torch.equal(chosen.values[:1], solved(view[:1, :1], best))
    assert torch.equal(other.values, solved(view[0], choice))


def test_small_windows_go_ahead_together(monkeypatch):
    """They share a task, and each chooses for its own layer."""
    layers = [torch.randn(number, 20, 20, dtype=torch.complex64) for number in (5, 3, 9, 4)]
    alone = [solved(layer, route) for layer, route in zip(layers, ROUTES, strict=True)]
    ahead = []
    original = spectra._solve
    monkeypatch.setattr(
        spectra,
        "_solve",
        lambda batch, *rest: ahead.append([c.layer for c in batch if c.ahead]) or original(batch, *rest),
    )
    wanted = [Wanted(layer, "float32", choose=lambda _, r=r: r) for layer, r in zip(layers, ROUTES, strict=True)]
    for expected, found in zip(alone, window_eigenvalues(wanted), strict=True):
        assert torch.equal(found.values, expected)
    assert [layers for layers in ahead if layers] == [[0, 1, 2, 3]]


@pytest.mark.parametrize("route", ROUTES)
def test_layers_of_all_sizes_and_types_together(route):
    dtypes = (torch.float32, torch.complex64, torch.bfloat16)
    layers = []
    for number, size, dtype in product((1, 30), (2, 9, 40), dtypes):
        weight = torch.randn(number, 5 + number, size, dtype=torch.complex64)
        layers.append(weight if dtype.is_complex else weight.real.to(dtype))
    together = window_eigenvalues([Wanted(layer, route) for layer in layers])
    for layer, found in zip(layers, together, strict=True):
        assert torch.equal(found.values, solved(layer, route))


@pytest.mark.parametrize("memory", [1, 5_000, 20_000, 10**9])
@pytest.mark.parametrize("route", ROUTES)
def test_chunks_change_nothing(memory, route):
    view = torch.randn(40, 30).unfold(0, 10, 3).unfold(1, 10, 4)
    assert torch.equal(solved(view, route, memory=memory), solved(view, route))


def test_windows_are_copied_a_few_at_a_time(monkeypatch):
    # 1000 overlapping windows must never be in memory together.
    sizes = []
    gram = spectra._gram
    monkeypatch.setattr(
        spectra, "_gram", lambda matrices, *rest: sizes.append(len(matrices)) or gram(matrices, *rest)
    )
    view = torch.randn(1000 + 9, 10).unfold(0, 10, 1).mT
    per_window = 3 * 10 * 10 * 8
    solved(view, memory=100 * per_window)
    assert sum(sizes) == 1000
    assert max(sizes) <= 100


@pytest.mark.parametrize("route", ROUTES)
def test_weights_are_left_alone(route):
    matrices = torch.randn(2, 6, 4)
    before = matrices.clone()
    solved(matrices, route)
    assert torch.equal(matrices, before)


def break_solver(monkeypatch, name, hard):
    """Let a solver of torch fail for every batch that holds the matrix `hard`."""
    solve = getattr(torch.linalg, name)

    def solve_or_fail(batch):
        if (
            batch.shape[1:] == hard.shape
            and batch.dtype == hard.dtype
            and (batch == hard).flatten(1).all(-1).any()
        ):
            raise torch.linalg.LinAlgError("no convergence")
        return solve(batch)

    monkeypatch.setattr(torch.linalg, name, solve_or_fail)


class TestSinglePrecision:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64])
    @pytest.mark.parametrize("shape", [(20, 12, 12), (5, 300, 70), (3, 70, 300), (2, 400, 400)])
    def test_errors_are_some_roundoffs_of_the_largest(self, shape, dtype):
        matrices = torch.randn(shape, dtype=dtype)
        exact = solved(matrices)
        found = solved(matrices, route="float32")
        error = (found - exact).abs() / exact[:, -1:]
        assert error.max() < 100 * SINGLE_ROUNDOFF
        # LAPACK makes more errors of the largest ones than of the others.
        error = error[:, : exact.shape[1] // 2][found[:, : exact.shape[1] // 2] > 0]
        assert error.max() < 20 * SINGLE_ROUNDOFF
        assert error.max() > 0, "solved in double precision"

    @pytest.mark.parametrize("rank", [1, 10, 100])
    def test_zeros_are_exact(self, rank):
        matrices = torch.randn(3, 500, rank) @ torch.randn(3, rank, 200)
        found = solved(matrices, route="float32")
        assert (found[:, : 200 - rank] == 0).all()
        assert (found[:, 200 - rank :] > 0).all()
        assert (solved(torch.zeros(2, 5, 5), route="float32") == 0).all()

    @pytest.mark.parametrize("precision", ["high", "medium"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
    def test_settings_of_matrix_products_do_not_matter(self, precision, dtype):
        matrices = torch.randn(9, 64, 64, dtype=dtype)
        before = solved(matrices, route="float32")
        torch.set_float32_matmul_precision(precision)
        try:
            assert not spectra.multiplies_in_full(torch.device("cpu"))
            found = solved(matrices, route="float32")
        finally:
            torch.set_float32_matmul_precision("highest")
        assert spectra.multiplies_in_full(torch.device("cpu"))
        assert ((found - before).abs() / before[:, -1:]).max() < 100 * SINGLE_ROUNDOFF

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_new_settings_of_matrix_products_are_seen(self, device):
        backend = torch.backends.mkldnn if device == "cpu" else torch.backends.cuda
        if not hasattr(getattr(backend, "matmul", None), "fp32_precision"):
            pytest.skip("this torch has no such setting")
        before = backend.matmul.fp32_precision
        backend.matmul.fp32_precision = "tf32"
        try:
            assert not spectra.multiplies_in_full(torch.device(device))
        finally:
            backend.matmul.fp32_precision = before
        assert spectra.multiplies_in_full(torch.device(device))

    def test_autocast_does_not_matter(self):
        matrices = torch.randn(9, 64, 64)
        with torch.autocast("cpu", torch.bfloat16):
            found = solved(matrices, route="float32")
        assert torch.equal(found, solved(matrices, route="float32"))


def spectra_with_large_values():
    """Singular values far above the others: distinct, equal, more than are looked at, close to the rest."""
    rest = torch.linspace(0.5, 1, 64, dtype=torch.float64)
    above = {
        "one": [3e3],
        "distinct": [30, 100, 300, 1e3, 3e3],
        "equal": [1e3] * 4,
        "nearly_equal": [1000, 1000.1, 1000.2, 1000.3],
        "sixteen": [1e3 + i for i in range(16)],
        "thirty": [1e3] * 30,
        "steps": [2.0**i for i in range(12)],
    }
    return {name: torch.cat([rest, torch.tensor(values, dtype=torch.float64)]) for name, values in above.items()}


class TestDeflation:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    @pytest.mark.parametrize("rows", [0, 150])
    @pytest.mark.parametrize("name", spectra_with_large_values())
    def test_small_eigenvalues_beside_large_ones(self, name, rows, dtype):
        singular = spectra_with_large_values()[name]
        matrices = torch.stack(
            [with_singular_values(singular, len(singular) + rows, dtype=dtype) for _ in range(3)]
        ).to(torch.complex64 if dtype.is_complex else torch.float32)
        exact = solved(matrices)
        for view in (matrices, matrices.mT):
            (deflated,) = window_eigenvalues([Wanted(view, "deflated")])
            errors = [(found - exact).abs() / exact for found in (deflated.values, solved(view, "float32"))]
            worst, before = (float(error.max()) for error in errors)
            if name == "thirty":
                assert (deflated.scale > 1e6).all()  # which says that it did not help
            else:
                assert worst < 2e-4 < before
                assert (deflated.scale < 1e3 if name != "steps" else deflated.scale < 1e5).all()

    def test_errors_are_some_roundoffs_of_the_scale(self):
        for slope in (1.0, 2.0, 3.0):
            law = torch.arange(1, 201, dtype=torch.float64) ** -slope
            matrices = torch.stack([with_singular_values(law) for _ in range(3)]).float()
            exact = solved(matrices)
            (found,) = window_eigenvalues([Wanted(matrices, "deflated")])
            rounding = torch.maximum(found.scale[:, None], (exact[:, -1:] * exact).sqrt())
            errors = (found.values - exact).abs() / (6 / 200**0.5 * rounding + 64 * exact)
            assert 0 < errors[found.values > 0].max() < SINGLE_ROUNDOFF
            assert (exact[found.values == 0] < 1e-5 * float(found.scale.max())).all()
            assert (found.scale < exact[:, -1]).all()

    @pytest.mark.parametrize("rank", [0, 1, 10, 16, 17, 100])
    def test_lower_rank(self, rank):
        matrices = torch.randn(3, 300, rank) @ torch.randn(3, rank, 120)
        found, exact = solved(matrices, "deflated"), solved(matrices.double())
        assert (found[:, : 120 - rank] <= 1e-12 * found[:, -1:]).all()
        torch.testing.assert_close(found[:, 120 - rank :], exact[:, 120 - rank :], rtol=1e-4, atol=0)

    def test_smaller_than_the_number_of_directions(self):
        matrices = torch.randn(4, 9, 5)
        torch.testing.assert_close(solved(matrices, "deflated"), solved(matrices), rtol=1e-5, atol=0)


class TestSolverThatDoesNotConverge:
    """No matrix is known that defeats LAPACK: its functions are made to fail."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
    @pytest.mark.parametrize("shape", [(6, 5, 5), (6, 9, 4)])
    def test_singular_values_are_solved_for_instead(self, shape, dtype, monkeypatch):
        matrices = torch.randn(shape, dtype=dtype)
        matrices[1, :, -1] = matrices[1, :, 0]  # of lower rank
        whole = solved(matrices)
        break_solver(monkeypatch, "eigvalsh", (matrices.mH @ matrices)[2])
        torch.testing.assert_close(solved(matrices), whole, rtol=1e-9, atol=0)

    def test_nan_where_that_fails_too(self, monkeypatch):
        matrices = torch.randn(6, 5, 5, dtype=torch.float64)
        break_solver(monkeypatch, "eigvalsh", (matrices.mH @ matrices)[2])
        break_solver(monkeypatch, "svdvals", matrices[2])
        hard, easy = window_eigenvalues([Wanted(matrices), Wanted(torch.randn(3, 5, 5))])
        assert hard.values.isnan().all()
        assert not easy.values.isnan().any()

    def test_nan_in_single_precision(self, monkeypatch):
        matrices = torch.randn(6, 5, 5)
        break_solver(monkeypatch, "eigvalsh", (matrices.mH @ matrices)[2])
        assert solved(matrices, route="float32").isnan().all()

    def test_a_solver_that_returns_nan(self, monkeypatch):
        # As cuSOLVER does through CuPy.
        matrices = torch.randn(6, 5, 5, dtype=torch.float64)
        whole = solved(matrices)
        hard = (matrices.mH @ matrices)[2]
        solve = torch.linalg.eigvalsh

        def solve_or_nan(batch):
            return solve(batch).where(~(batch == hard).all(-1).all(-1)[:, None], torch.nan)

        monkeypatch.setattr(torch.linalg, "eigvalsh", solve_or_nan)
        torch.testing.assert_close(solved(matrices), whole, rtol=1e-9, atol=0)


class TestTooLittleMemory:
    """No GPU is needed to see what follows its error."""

    @pytest.fixture
    def sizes(self, monkeypatch):
        """Sizes of the chunks that were solved, where there is memory for two windows at once."""
        sizes = []
        gram = spectra._gram

        def gram_of_two(matrices, *rest):
            if len(matrices) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            sizes.append(len(matrices))
            return gram(matrices, *rest)

        monkeypatch.setattr(spectra, "_gram", gram_of_two)
        return sizes

    def test_chunks_are_halved_until_they_fit(self, sizes):
        view = torch.randn(17, 9).unfold(0, 7, 1).mT
        with pytest.warns(UserWarning, match="fewer at a time, and on the CPU") as warned:
            found = solved(view)
        assert len(warned) == 1
        assert sum(sizes) == 11
        expected = torch.linalg.svdvals(view.double()).square().flip(-1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)

    def test_warned_of_once(self, sizes):
        with pytest.warns(UserWarning, match="too little free memory on cpu"):
            solved(torch.randn(9, 4, 4))
        solved(torch.randn(9, 4, 4))

    @pytest.mark.parametrize("lead", [(5,), (2, 3)])
    def test_a_single_window_that_does_not_fit_is_solved_on_the_cpu(self, lead, monkeypatch):
        matrices = torch.randn(*lead, 6, 4)
        whole = solved(matrices)
        sizes = []
        gram = spectra._gram

        def gram_at_the_second_attempt(matrices, *rest):
            sizes.append(len(matrices))
            if len(matrices) > 1 or sizes.count(1) % 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return gram(matrices, *rest)

        monkeypatch.setattr(spectra, "_gram", gram_at_the_second_attempt)
        with pytest.warns(UserWarning, match="on the CPU where there is none for a single one"):
            found = solved(matrices)
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Let chunks pass for a GPU's where they are put together, and be solved on the CPU."""

    class Elsewhere(spectra._Chunk):
        device = property(lambda _: torch.device("cuda"))

    monkeypatch.setattr(spectra, "_Chunk", Elsewhere)


def batches_of(wanted, memory):
    chunks = [chunk for layer, part in enumerate(wanted) for chunk in spectra._first_chunks(layer, part, memory)]
    return list(spectra._batches(chunks, memory))


@pytest.mark.usefixtures("as_on_a_gpu")
class TestBatches:
    """How a GPU's work is put together."""

    @pytest.fixture
    def layers(self):
        return [torch.randn(7, 12, 12), torch.randn(5, 30, 12), torch.randn(6, 9, 9), torch.randn(3, 12, 40)]

    def test_one_for_each_size_and_precision(self, layers):
        wanted = [Wanted(layer, route) for layer in layers for route in ("svd", "float32")]
        batches = batches_of(wanted, 2**20)
        assert [[chunk.layer for chunk in batch] for batch in batches] == [[0, 2, 6], [1, 3, 7], [4], [5]]

    def test_windows_that_go_ahead(self, layers):
        routes = ["float32", "svd", "float64", "float32"]
        together = window_eigenvalues(
            [Wanted(layer, "float32", choose=lambda _, r=r: r) for layer, r in zip(layers, routes, strict=True)]
        )
        for layer, route, found in zip(layers, routes, together, strict=True):
            assert torch.equal(found.values, solved(layer, route))

    @pytest.mark.parametrize("memory", [1, 10_000, 30_000])
    def test_no_larger_than_the_memory(self, layers, memory):
        batches = batches_of([Wanted(layer) for layer in layers], memory)
        assert sum(len(chunk.index) for batch in batches for chunk in batch) == 21
        for batch in batches:
            assert sum(chunk.size for chunk in batch) <= memory or sum(len(chunk.index) for chunk in batch) == 1

    @pytest.mark.parametrize("memory", [1, 10_000, 2**20])
    def test_change_nothing(self, layers, memory):
        together = window_eigenvalues([Wanted(layer) for layer in layers], memory)
        for layer, (values, *_) in zip(layers, together, strict=True):
            expected = torch.linalg.svdvals(layer.double()).square().flip(-1)
            torch.testing.assert_close(values, expected, rtol=1e-9, atol=0)

    def test_windows_stay_in_order_where_a_layer_is_in_several_batches(self):
        # The second batch is more work than the first, which holds taller windows.
        layers = [torch.randn(30, 200, 12), torch.randn(55, 12, 12)]
        memory = 20 * 8 * (200 * 12 + 2 * 12 * 12)
        batches = batches_of([Wanted(layer) for layer in layers], memory)
        assert [len(batch[0].index) for batch in batches][:2] == [20, 10]
        assert [chunk.layer for chunk in batches[1]] == [0, 1]
        for layer, (values, *_) in zip(
            layers, window_eigenvalues([Wanted(x) for x in layers], memory), strict=True
        ):
            expected = torch.linalg.svdvals(layer.double()).square().flip(-1)
            torch.testing.assert_close(values, expected, rtol=1e-9, atol=0)

    def test_a_hard_matrix_spoils_its_own_layer_alone(self, layers, monkeypatch):
        layers = [layer.double() for layer in layers]
        break_solver(monkeypatch, "eigvalsh", (layers[1].mH @ layers[1])[2])
        break_solver(monkeypatch, "svdvals", layers[1][2])
        found = window_eigenvalues([Wanted(layer) for layer in layers])
        assert [bool(values.isnan().any()) for values, *_ in found] == [False, True, False, False]

    def test_too_little_memory_for_a_batch(self, layers, monkeypatch):
        whole = window_eigenvalues([Wanted(layer) for layer in layers])
        solve = spectra.symmetric_eigenvalues

        def solve_four(matrices, solver):
            if len(matrices) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return solve(matrices, solver)

        monkeypatch.setattr(spectra, "symmetric_eigenvalues", solve_four)
        with pytest.warns(UserWarning, match="too little free memory"):
            found = window_eigenvalues([Wanted(layer) for layer in layers])
        for one, other in zip(found, whole, strict=True):
            torch.testing.assert_close(one.values, other.values, rtol=1e-9, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestOnAGpu:
    @pytest.mark.parametrize("solver", ["auto", "torch", "cupy", "cpu"])
    @pytest.mark.parametrize("route", ROUTES)
    def test_as_on_the_cpu(self, solver, route):
        if solver == "cupy":
            pytest.importorskip("cupy")
        layers = [
            torch.randn(30, 64, 64),
            torch.randn(3, 90, 64),
            torch.randn(9, 512, 256),
            torch.randn(50, 20, 20),
        ]
        layers.append(torch.randn(4, 30, 20, dtype=torch.complex64))
        found = window_eigenvalues([Wanted(layer.cuda(), route) for layer in layers], solver=solver)
        for layer, (values, *_) in zip(layers, found, strict=True):
            expected = solved(layer)
            assert values.device.type == "cpu"
            error = (values - expected).abs() / expected[:, -1:]
            assert error.max() < (200 * SINGLE_ROUNDOFF if route == "float32" else 1e-13)

    def test_tf32_does_not_matter(self):
        matrices = torch.randn(9, 256, 256, device="cuda")
        torch.set_float32_matmul_precision("high")
        try:
            found = solved(matrices, route="float32")
        finally:
            torch.set_float32_matmul_precision("highest")
        expected = solved(matrices)
        assert ((found - expected).abs() / expected[:, -1:]).max() < 200 * SINGLE_ROUNDOFF
