"""The error bound by which a precision is chosen: it must hold on any processor and for any BLAS kernel.

`make test-kernels` runs these tests under several kernels of one machine.
"""

import numpy as np
import pytest
import torch

from farms_tb.options import SpectrumOptions
from farms_tb.spectra.precision import (
    ALPHA_TOLERANCE,
    FAR_BELOW,
    FLOAT32,
    FLOAT64,
    OF_LARGEST,
    PRECISIONS,
    ROUNDOFF,
    SVD,
    ZERO,
    first_level,
    imprecise_windows,
)
from farms_tb.spectra.windows import Windows
from tests.spectra.test_eigenvalues import orthogonal, solved

MARGIN = 0.5
"""Share of the bound that errors may take here: the rest is for kernels that no test has seen."""


def planted(law, number=2):
    return torch.stack(
        [orthogonal(len(law)) @ torch.diag(law.double()) @ orthogonal(len(law)) for _ in range(number)]
    ).float()


def spikes(size, number, factor):
    law = torch.linspace(0.5, 1, size, dtype=torch.float64)
    law[:number] = factor
    return planted(law)


def banded(size):
    diagonals = [torch.diag(torch.randn(size - abs(offset)), offset) for offset in range(-2, 3)]
    return sum(diagonals)[None]


MATRICES = {
    "random": lambda size: torch.randn(4, size, size),
    "complex": lambda size: torch.randn(4, size, size, dtype=torch.complex64),
    "positive": lambda size: torch.rand(4, size, size),
    "shifted": lambda size: torch.randn(4, size, size) + 0.1,
    "tall": lambda size: torch.randn(2, 12 * size, size),
    "wide": lambda size: torch.randn(4, size, 2 * size),
    "integers": lambda size: torch.randint(-3, 4, (4, size, size)).float(),
    "banded": banded,
    "slope 0.1": lambda size: planted(torch.arange(1, size + 1) ** -0.1),
    "slope 0.5": lambda size: planted(torch.arange(1, size + 1) ** -0.5),
    "slope 1": lambda size: planted(torch.arange(1, size + 1) ** -1.0),
    "flat 0.001": lambda size: planted(1 + 1e-3 * torch.rand(size, dtype=torch.float64)),
    "flat 0.1": lambda size: planted(1 + 0.1 * torch.rand(size, dtype=torch.float64)),
    "eight spikes": lambda size: spikes(size, 8, 30.0),
    "spikes in a quarter": lambda size: spikes(size, size // 4, 8.0),
    "rows": lambda size: torch.randn(4, size, size) * (torch.arange(size) + 1.0).pow(-0.7)[:, None],
}


def median_fit(values):
    """Alpha, where the tail starts, and the largest eigenvalue of each window."""
    start = values.shape[-1] // 2
    tail = values[:, start:]
    return 1 + tail.shape[-1] / (tail / tail[:, :1]).log().sum(-1), values[:, start], values[:, -1]


@pytest.mark.parametrize("size", [16, 64, 200])
@pytest.mark.parametrize("name", MATRICES)
def test_the_error_of_alpha_is_within_its_bound(name, size):
    matrices = MATRICES[name](size)
    alpha, xmin, largest = median_fit(solved(matrices))
    found, *_ = median_fit(solved(matrices, "float32"))
    bound = ROUNDOFF["float32"] * (FAR_BELOW * largest / xmin + OF_LARGEST) * (alpha - 1) ** 2
    error = ((found - alpha).abs() / bound)[xmin > 1e-5 * largest]
    assert not len(error) or error.max() < MARGIN


@pytest.mark.parametrize("rank", [1, 10, 100])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_zeros_come_out_below_their_threshold(rank, precision):
    factors = torch.randint(-2, 3, (3, 500, rank)), torch.randint(-2, 3, (3, rank, 200))
    matrices = (factors[0] @ factors[1]).float()  # integers, so that the rank is exact
    found, exact = solved(matrices, precision), solved(matrices.double())
    assert (found[:, : 200 - rank] == 0).all()
    nonzero = exact > 2 * ZERO * ROUNDOFF[precision] * exact[:, -1:]
    assert (found[nonzero] > 0).all()


def imprecise(largest, lowest, alpha, level, **options):
    values = np.linspace(lowest, largest, 20)[None]
    levels = np.array([level], dtype=np.int8)
    found = imprecise_windows(values, levels, np.array([lowest]), np.array([alpha]), SpectrumOptions(**options))
    return bool(found[0])


def test_what_counts_as_imprecise():
    assert not imprecise(1.0, 0.1, 2.1, FLOAT32)
    assert imprecise(1.0, 1e-4, 2.1, FLOAT32)
    assert imprecise(1.0, 0.9, 500.0, FLOAT32), "a flat tail magnifies errors"
    assert not imprecise(1.0, 1e-8, 2.1, FLOAT64)
    assert imprecise(1.0, 1e-12, 2.1, FLOAT64)
    assert imprecise(1.0, 0.0, 2.1, FLOAT64)
    assert imprecise(1.0, 0.1, np.nan, FLOAT64), "no alpha is no proof of precision"
    assert not imprecise(1.0, 0.0, np.nan, SVD), "nothing is more accurate"
    assert imprecise(1.0, 1e-12, 2.1, FLOAT64, fit="goodness-of-fit")


@pytest.mark.parametrize(
    ("options", "dtype", "size", "largest", "expected"),
    [
        ({}, torch.float32, 64, 1.0, "float32"),
        ({}, torch.float32, 63, 1.0, "float64"),  # no faster in single precision
        ({}, torch.complex64, 20, 1.0, "float32"),
        ({}, torch.bfloat16, 64, 1.0, "float32"),
        ({}, torch.float64, 64, 1.0, "float64"),
        ({}, torch.float32, 64, 1e-20, "float64"),  # whose square is no normal number
        ({"precision": "float64"}, torch.float32, 64, 1.0, "float64"),
        ({"fit": "xmin_peak"}, torch.float32, 64, 1.0, "float64"),
        ({"filter_zeros": True}, torch.float32, 64, 1.0, "float64"),
        ({"relative_cutoff": 1e-3}, torch.float32, 64, 1.0, "float64"),
    ],
)
def test_first_precision(options, dtype, size, largest, expected):
    windows = Windows(torch.zeros(4, size, size, dtype=dtype), 1)
    assert PRECISIONS[first_level(windows, largest, SpectrumOptions(**options))] == expected


def test_the_tolerance_keeps_the_promise():
    # docs/guarantees.md: alpha within 1e-4.
    assert ALPHA_TOLERANCE <= 0.5e-4
