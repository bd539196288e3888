"""Where the spectral pass computes what, on a GPU that is none: see `tests/pretended_gpu.py`."""

import pytest
import torch

from farms_tb.options import SpectrumOptions
from farms_tb.spectra import eigenvalues as spectra
from farms_tb.spectra.measurement import measure_stacks
from farms_tb.weights.matrices import MatrixStack
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


def rows(wrap, options, histogram=False):
    stacks = [MatrixStack(wrap(matrices), sampling=sampling) for matrices, sampling in weights()]
    return torch.stack(measure_stacks(stacks, options, histogram))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "float64"},
        {"esd": "full"},
        {"filter_zeros": True, "relative_cutoff": 1e-6},
        {"fit": "goodness-of-fit"},
        {"memory_mb": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("histogram", [False, True])
def test_all_is_where_it_belongs(options, histogram):
    options = SpectrumOptions(**options, solver="torch")
    expected = rows(lambda matrices: matrices, options, histogram)
    with pretended_gpu():
        found = rows(OnGpu, options, histogram)
    # Outcome, alpha and KS distance; what solved for them differs.
    torch.testing.assert_close(found[:, :4], expected[:, :4], rtol=1e-4, atol=0, equal_nan=True)
    assert torch.equal(found[:, 12], expected[:, 12])


def test_results_leave_the_device_together():
    """Once the largest weights, once the windows that went ahead, once all eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    stacks = [
        MatrixStack(OnGpu(torch.randn(9, size, size, generator=generator))) for size in (40, 64, 100) for _ in "ab"
    ]
    with pretended_gpu() as copies:
        measure_stacks(stacks, SpectrumOptions(solver="torch"))
    assert len(copies) == 3
    assert copies[0] == (len(stacks),)


def test_without_memory_a_window_is_solved_on_the_cpu(monkeypatch):
    original = spectra._eigenvalues

    def full(batch, *rest):
        if batch[0].device.type == "cuda":
            raise torch.OutOfMemoryError("full")
        return original(batch, *rest)

    options = SpectrumOptions(solver="torch")
    expected = rows(lambda matrices: matrices, options)
    monkeypatch.setattr(spectra, "_eigenvalues", full)
    with pretended_gpu(), pytest.warns(UserWarning, match="too little free memory on cuda:0"):
        found = rows(OnGpu, options)
    torch.testing.assert_close(found[:, :4], expected[:, :4], rtol=1e-4, atol=0, equal_nan=True)


def test_tensors_of_two_devices_do_not_mix():
    one, other = OnGpu(torch.ones(3)), torch.ones(3)
    with pretended_gpu() as copies:
        assert torch.equal((one + 1).cpu(), other + 1)
        assert (one * 2).device.type == "cuda"
        with pytest.raises(RuntimeError, match="same device"):
            one + other
        assert float(one.sum()) == 3
    assert copies == [(3,), ()]
