"""The windows of a layer: the submatrices of one aspect ratio (FARMS) whose eigenvalues are pooled.

Alpha of a whole matrix depends on the matrix's aspect ratio. FARMS measures windows of one fixed aspect ratio
Q = columns / rows instead:

- *blocks* (convolutions): every matrix of the stack is cut into non-overlapping row blocks; block b of all K
  matrices is one sample;
- *grid* (linear layers): overlapping windows of at most `window` rows on a grid of start positions, all in one
  sample.

`esd="full"` takes the whole matrices, all in one sample (TempBalance).

Everything here is a view of the weight. Overlapping windows exist in memory only while a chunk of them is solved.

Source: FARMS, Hu et al., ICML 2025, arXiv 2506.06280.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from farms_tb.options import SpectrumOptions
from farms_tb.weights.stacks import MatrixStack


@dataclass(frozen=True)
class Windows:
    """The windows of one layer.

    Attributes:
        view: `(*lead, h, w)`, a view of the weight: W = prod(lead) windows of h rows and w columns.
        samples: number of samples S that the windows form, 1 or the length of the first dimension. The windows, in
            the order of `lead`, are S runs of equal length, and the eigenvalues of a run are pooled.
    """

    view: Tensor
    samples: int

    @cached_property
    def number(self) -> int:
        """Number of windows W."""
        return math.prod(self.view.shape[:-2])

    @cached_property
    def size(self) -> int:
        """Number of eigenvalues of a window, min(h, w)."""
        return min(self.view.shape[-2:])


def windows_of(stack: MatrixStack, options: SpectrumOptions) -> Windows | None:
    """Return the windows of one layer; None where no window of the aspect ratio fits.

    Args:
        stack: the layer's matrices, `(K, R, C)` with R >= C.
        options: `esd`, `aspect_ratio` and the options of windows are used.

    Example:
        >>> import torch
        >>> windows_of(MatrixStack(torch.zeros(9, 64, 16)), SpectrumOptions()).view.shape
        torch.Size([4, 9, 16, 16])
    """
    if options.esd == "full":
        return Windows(stack.matrices, 1)
    if stack.sampling == "blocks":
        return _row_blocks(stack.matrices, options.aspect_ratio)
    return _grid(stack.matrices, options)


def first_windows(windows: Windows) -> Tensor:
    """Return the first window of each sample, `(S, h, w)`: a view."""
    first = windows.view[: windows.samples]
    while first.ndim > 3:
        first = first[:, 0]
    return first


def quarters_of(windows: Windows) -> Windows:
    """Cut the first window of each sample in four, which do not overlap: `(S, 2, 2, h // 2, w // 2)`, a view.

    An odd row or column at the end is left out.
    """
    quarters = first_windows(windows)
    height, width = windows.view.shape[-2:]
    for dim, length in ((1, height // 2), (2, width // 2)):
        quarters = quarters.unfold(dim, length, length).narrow(dim, 0, 2)
    return Windows(quarters, windows.samples)


def window_shape(rows: int, columns: int, window: int | None, aspect_ratio: float) -> tuple[int, int]:
    """Return (rows, columns) of the largest window that fits a matrix and keeps the aspect ratio.

    Args:
        rows: rows R of the matrix.
        columns: columns C of the matrix.
        window: wanted rows of the window; None for as many as fit.
        aspect_ratio: columns / rows of the window.

    Returns:
        (h, w) with w = floor(h * aspect_ratio), or h = floor(w / aspect_ratio) where the columns are the
        limit; (0, 0) where no window fits.
    """
    # A tolerance far below one matrix entry, so that 30 / 0.3 counts as 100 and not as 99.
    eps = 1e-9
    height = rows if window is None else min(window, rows)
    width = int(height * aspect_ratio + eps)
    if width > columns:
        width = columns
        height = int(columns / aspect_ratio + eps)
    return (height, width) if height and width else (0, 0)


def _row_blocks(matrices: Tensor, aspect_ratio: float) -> Windows | None:
    """Cut every matrix into B row blocks: `(B, K, h, w)`, block b of all K matrices being one sample."""
    rows, columns = matrices.shape[1:]
    # For Q < 1 the papers keep C rows and narrow the window, rather than let it grow taller.
    height, width = window_shape(min(rows, columns), columns, None, aspect_ratio)
    if height == 0:
        return None
    # `unfold` appends the dimension of the rows of a window: (K, B, w, h).
    view = matrices[:, :, :width].unfold(1, height, height).transpose(2, 3).transpose(0, 1)
    return Windows(view, view.shape[0])


def _grid(matrices: Tensor, options: SpectrumOptions) -> Windows | None:
    """Lay overlapping windows on a grid, all in one sample: `(K, positions, positions, h, w)`."""
    _, rows, columns = matrices.shape
    height, width = window_shape(rows, columns, options.window, options.aspect_ratio)
    if height == 0:
        return None
    view = matrices
    for dim, size in ((1, height), (2, width)):
        step, count = _positions(matrices.shape[dim], size, options)
        # `unfold` appends a dimension for the extent of the window: after both, the order is (K, i, j, h, w).
        view = view.unfold(dim, size, step).narrow(dim, 0, count)
    return Windows(view, 1)


def _positions(length: int, size: int, options: SpectrumOptions) -> tuple[int, int]:
    """Return the distance between start positions along one dimension, and their number.

    Args:
        length: extent of the matrix.
        size: extent of a window, at most `length`.
        options: a fixed distance `window_step` gives as many positions as fit. Otherwise there are
            `windows_per_dim` evenly spaced positions, or one for each start there is if these are fewer.
    """
    room = length - size
    if options.window_step is not None:
        return options.window_step, room // options.window_step + 1
    wanted = options.windows_per_dim
    step = max(1, room // (wanted - 1)) if wanted > 1 else max(1, room)
    return step, min(wanted, room // step + 1)
