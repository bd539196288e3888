"""Windows: which submatrices form which sample, and that they cost no memory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farms_tb.options import SpectrumOptions
from farms_tb.spectra.windows import window_shape, windows_of
from farms_tb.weights.stacks import MatrixStack
from tests.reference import windows as slow


def numbered(*shape):
    """Every entry another number, so that equal windows are the same window."""
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


def assert_same_windows(matrices, sampling, expected, **options):
    """Compare with the slow implementation's samples: the same windows, pooled in the same samples."""
    found = windows_of(MatrixStack(matrices, sampling=sampling), SpectrumOptions(**options))
    if not expected:
        assert found is None
        return
    assert found is not None
    height, width = found.view.shape[-2:]
    samples = found.view.reshape(found.samples, -1, height, width)
    assert found.samples == len(expected)
    for index, (sample, wanted) in enumerate(zip(samples, expected, strict=True)):
        ours = sorted(map(tuple, sample.flatten(1).tolist()))
        theirs = sorted(tuple(window.flatten().tolist()) for window in wanted)
        assert tuple(sample.shape[1:]) == wanted[0].shape, f"sample {index}"
        assert ours == theirs, f"sample {index}: {len(ours)} windows against {len(theirs)}"


shapes = st.tuples(st.integers(1, 3), st.integers(2, 40), st.integers(2, 40)).map(
    lambda s: (s[0], max(s[1:]), min(s[1:]))
)
ratios = st.sampled_from([0.1, 0.25, 0.29, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 10.0])


@given(shape=shapes, aspect_ratio=ratios)
def test_row_blocks_match_the_slow_implementation(shape, aspect_ratio):
    matrices = numbered(*shape)
    expected = slow.row_blocks(list(matrices.numpy()), aspect_ratio)
    assert_same_windows(matrices, "blocks", expected, aspect_ratio=aspect_ratio)


@given(
    shape=shapes,
    aspect_ratio=ratios,
    window=st.integers(2, 45),
    ops=st.integers(1, 12),
    step=st.none() | st.integers(1, 50),
)
def test_grid_matches_the_slow_implementation(shape, aspect_ratio, window, ops, step):
    matrices = numbered(*shape)
    expected = slow.grid(list(matrices.numpy()), aspect_ratio, window, ops, step)
    options = {"aspect_ratio": aspect_ratio, "window": window, "windows_per_dim": ops, "window_step": step}
    assert_same_windows(matrices, "grid", expected, **options)


@pytest.mark.parametrize("sampling", ["blocks", "grid"])
def test_full_takes_the_whole_of_every_matrix(sampling):
    matrices = numbered(3, 10, 4)
    assert_same_windows(matrices, sampling, slow.full(list(matrices.numpy())), esd="full")


@pytest.mark.parametrize(
    ("rows", "columns", "window", "aspect_ratio", "expected"),
    [
        pytest.param(512, 512, 100, 1.0, (100, 100), id="fits"),
        pytest.param(512, 60, 100, 1.0, (60, 60), id="columns are the limit"),
        pytest.param(60, 60, 100, 1.0, (60, 60), id="rows are the limit"),
        pytest.param(512, 512, 100, 2.0, (100, 200), id="wide"),
        pytest.param(512, 150, 100, 2.0, (75, 150), id="wide, shrunk, the ratio kept"),
        pytest.param(512, 512, 100, 0.5, (100, 50), id="tall"),
        pytest.param(512, 20, 100, 0.5, (40, 20), id="tall, shrunk, the ratio kept"),
        pytest.param(64, 64, None, 1.0, (64, 64), id="as tall as fits"),
        pytest.param(300, 100, 100, 0.29, (100, 29), id="100 * 0.29 is 29 in spite of rounding"),
        pytest.param(5, 3, 100, 4.0, (0, 0), id="not even one row fits"),
        pytest.param(3, 3, 100, 0.3, (0, 0), id="not even one column fits"),
    ],
)
def test_window_shape(rows, columns, window, aspect_ratio, expected):
    assert window_shape(rows, columns, window, aspect_ratio) == expected


@given(rows=st.integers(1, 600), columns=st.integers(1, 600), window=st.integers(2, 200), aspect_ratio=ratios)
def test_window_fits_and_keeps_the_ratio(rows, columns, window, aspect_ratio):
    height, width = window_shape(rows, columns, window, aspect_ratio)
    assert height <= min(rows, window)
    assert width <= columns
    if height:
        # Within the rounding of one entry of one of the sides.
        assert abs(width - height * aspect_ratio) < max(1, aspect_ratio) + 1e-6


def test_paper_mode_cuts_whole_blocks_and_leaves_the_rest():
    windows = windows_of(MatrixStack(numbered(9, 70, 16)), SpectrumOptions())
    assert windows.samples == 4
    assert windows.view.shape == (4, 9, 16, 16)
    assert windows.view.max() < 8 * 70 * 16 + 64 * 16


def test_windows_reach_from_edge_to_edge_of_a_linear_layer():
    view = windows_of(MatrixStack(numbered(1, 900, 500), sampling="grid"), SpectrumOptions()).view
    assert view.shape == (1, 9, 9, 100, 100)
    assert view.min() == 0
    assert view.max() == 900 * 500 - 1


@pytest.mark.parametrize("esd", ["farms", "full"])
@pytest.mark.parametrize("sampling", ["blocks", "grid"])
@pytest.mark.parametrize("aspect_ratio", [0.5, 1.0, 2.0])
def test_windows_are_views(sampling, esd, aspect_ratio):
    matrices = torch.randn(4, 200, 150)
    options = SpectrumOptions(esd=esd, window=20, windows_per_dim=50, aspect_ratio=aspect_ratio)
    view = windows_of(MatrixStack(matrices, sampling=sampling), options).view
    assert view.untyped_storage().data_ptr() == matrices.untyped_storage().data_ptr()


def test_numbered_matrices_tell_windows_apart():
    assert len(np.unique(numbered(2, 3, 4))) == 24
