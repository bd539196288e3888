"""Where the spectral pass computes what, on a GPU that is none: see `tests/pretended_gpu.py`."""

from itertools import groupby

import pytest
import torch

from farms_tb.options import SpectrumOptions
from farms_tb.spectra.measure import measure_stacks
from farms_tb.spectra.solvers import cache_folder
from farms_tb.weights.stacks import MatrixStack
from tests.pretended_gpu import OnGpu, pretended_gpu


def weights():
    """Layers of each kind, and of each route: random, heavy-tailed, of low rank, broken."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(shape, dtype=dtype, generator=generator)

    heavy = randn(9, 96, 96) * (torch.arange(96) + 1.0).pow(-3)
    broken = randn(1, 20, 20)
    broken[0, 3, 4] = torch.nan
    return [
        (randn(70, 60, 3, 3).flatten(2).permute(2, 0, 1), "blocks"),
        (randn(1, 300, 200), "grid"),
        (randn(1, 30, 40, dtype=torch.bfloat16), "grid"),
        (randn(288, 20, 20, dtype=torch.complex64), "blocks"),
        (heavy, "blocks"),
        (randn(1, 50, 10, dtype=torch.float64) @ randn(1, 10, 50, dtype=torch.float64), "grid"),
        (broken, "grid"),
        (torch.zeros(1, 20, 20), "grid"),
    ]


def records(wrap, options, histogram=False):
    stacks = [MatrixStack(wrap(matrices), sampling=sampling) for matrices, sampling in weights()]
    return measure_stacks(stacks, options, histogram=histogram)


def assert_same(found, expected):
    """What solved for them differs."""
    for one, other in zip(found, expected, strict=True):
        assert (one.status, one.num_eigenvalues) == (other.status, other.num_eigenvalues)
        assert one.alpha == (None if other.alpha is None else pytest.approx(other.alpha, rel=1e-4))
        assert (one.histogram is None) == (other.histogram is None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "float64"},
        {"esd": "full"},
        {"filter_zeros": True, "relative_cutoff": 1e-6},
        {"fit": "goodness-of-fit"},
        {"memory_mb": 1},
        {"solver": "cpu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("histogram", [False, True])
def test_all_is_where_it_belongs(options, histogram, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = SpectrumOptions(**{"solver": "torch", **options})
    expected = records(lambda matrices: matrices, options, histogram)
    with pretended_gpu():
        found = records(OnGpu, options, histogram)
    assert_same(found, expected)
    solvers = {record.solver.split()[0] for record in found if record.solver}
    assert solvers <= {options.solver, "torch"}
    assert not cache_folder().exists(), "the user's choice needs no trial"


def test_a_round_is_solved_before_its_results_are_read(monkeypatch):
    """Reading waits for the device: the largest weights, then the pilots, then all other eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    stacks = [
        MatrixStack(OnGpu(torch.randn(9, size, size, generator=generator))) for size in (40, 64, 100) for _ in "ab"
    ]
    solve = torch.linalg.eigvalsh
    with pretended_gpu() as events:
        monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrices: events.append("solve") or solve(matrices))
        measure_stacks(stacks, SpectrumOptions(solver="torch"))
    steps = ["solve" if event == "solve" else "read" for event in events]
    assert [step for step, _ in groupby(steps)] == ["read", "solve", "read", "solve", "read"]
    assert steps.count("solve") == 2 * len(stacks)


@pytest.mark.parametrize("limit", [0, 2])
def test_where_memory_is_short(limit, monkeypatch):
    """Windows are solved fewer at a time, and on the CPU where there is no memory for a single one."""
    options = SpectrumOptions(solver="torch")
    expected = records(lambda matrices: matrices, options)
    multiply = torch.bmm

    def short(left, right):
        if left.is_cuda and len(left) > limit:
            raise torch.OutOfMemoryError("full")
        return multiply(left, right)

    monkeypatch.setattr(torch, "bmm", short)
    with pretended_gpu(), pytest.warns(UserWarning, match="too little free memory on cuda:0") as warned:
        found = records(OnGpu, options)
    assert len(warned) == 1
    assert_same(found, expected)
    solvers = {record.solver.split()[0] for record in found if record.solver and "svd" not in record.solver}
    assert solvers == {"torch" if limit else "cpu"}


def test_tensors_of_two_devices_do_not_mix():
    one, other = OnGpu(torch.ones(3)), torch.ones(3)
    with pretended_gpu() as copies:
        assert torch.equal((one + 1).cpu(), other + 1)
        assert (one * 2).device.type == "cuda"
        with pytest.raises(RuntimeError, match="same device"):
            one + other
        assert float(one.sum()) == 3
    assert copies == [(3,), ()]
