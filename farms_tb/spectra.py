"""Eigenvalues of windows: squared singular values, ascending.

The eigenvalues of the small Gram matrix (w x w for windows of h x w, w <= h) are the squared singular values.
Squaring costs accuracy at the small end: a Gram eigenvalue is off by about 1e-16 of the largest one. Where a
window holds eigenvalues for which that is too much, its singular values are computed directly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from farms_tb.windows import Windows

CHUNK_BYTES = 2**28
"""Memory that a chunk of windows may take while it is solved."""

# Cubed sizes of the windows of one chunk added up: a few milliseconds of work, so that threads finish together.
_CHUNK_WORK = 3 * 10**7

# Below this fraction of the largest eigenvalue the Gram matrix gives fewer than about five digits.
_GRAM_LIMIT = 1e-10


def window_eigenvalues(windows: Windows, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Return the eigenvalues of each window.

    Args:
        windows: `samples` runs of n windows of h x w, finite, real or complex.
        chunk_bytes: memory, in bytes, for the windows that are solved at once; at least one window is.

    Returns:
        `(samples, n, min(h, w))`, float64, ascending and not negative. What lies below the numerical rank of
        its window is exactly 0.

    Example:
        >>> window_eigenvalues(Windows(torch.diag(torch.tensor([3.0, 1.0]))[None], samples=1))
        tensor([[[1., 9.]]], dtype=torch.float64)
    """
    view = windows.view
    lead, (height, width) = view.shape[:-2], view.shape[-2:]
    small = min(height, width)
    dtype = torch.complex128 if view.is_complex() else torch.float64
    per_window = (height * width + 2 * small * small) * dtype.itemsize
    chunk_size = chunk_bytes // per_window
    if view.device.type == "cpu":
        chunk_size = min(chunk_size, _CHUNK_WORK // small**3)
    chunks = torch.split(torch.arange(math.prod(lead), device=view.device), max(1, chunk_size))

    def solve(chunk: Tensor) -> Tensor:
        # Indexing copies the windows of one chunk and no more, however much they overlap.
        return _eigenvalues(view[torch.unravel_index(chunk, lead)].to(dtype))

    values = _map(solve, chunks, view.device, chunk_bytes // (max(1, chunk_size) * per_window))
    return torch.cat(values).reshape(windows.samples, -1, small)


def _map(
    solve: Callable[[Tensor], Tensor], chunks: Sequence[Tensor], device: torch.device, most: int
) -> list[Tensor]:
    """Solve chunks, on the CPU on as many threads as torch may use, but on no more than `most` at a time.

    LAPACK's own threads gain nothing at these sizes and round differently: each chunk is solved by one thread, so
    that results don't depend on their number. Where torch is held to one, as in loader workers, so is this.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return [solve(chunk) for chunk in chunks]
    workers = max(1, min(threads, len(chunks), most))
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(solve, chunks))
    finally:
        # A thread that sets its number sets it for every thread started later, too.
        torch.set_num_threads(threads)


def _eigenvalues(matrices: Tensor) -> Tensor:
    """Return the squared singular values `(n, min(h, w))` of `(n, h, w)` matrices, ascending."""
    rows, columns = matrices.shape[-2:]
    gram = matrices.mH @ matrices if rows >= columns else matrices @ matrices.mH
    values: Tensor = torch.linalg.eigvalsh(gram).clamp_min(0)
    largest = values[:, -1:]
    squared_too_far = ((values < _GRAM_LIMIT * largest) & (largest > 0)).any(-1)
    if squared_too_far.any():
        singular = torch.linalg.svdvals(matrices[squared_too_far]).flip(-1)
        rank_limit = max(rows, columns) * torch.finfo(singular.dtype).eps * singular[:, -1:]
        values[squared_too_far] = torch.where(singular > rank_limit, singular, 0).square()
    return values
