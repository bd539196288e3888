"""Eigenvalues of windows: squared singular values, ascending.

The eigenvalues of the small Gram matrix (w x w for windows of h x w, w <= h) are the squared singular values.
Squaring costs accuracy at the small end: a Gram eigenvalue is off by about 1e-16 of the largest one. Where a
window holds eigenvalues for which that is too much, its singular values are computed directly. So they are where
the solver of the Gram matrices does not converge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from farms_tb.warning import warn_once
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

    Raises:
        torch.linalg.LinAlgError: no solver converged on some window.

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
        index = torch.unravel_index(chunk, lead)
        try:
            # Indexing copies the windows of one chunk and no more, however much they overlap.
            return _eigenvalues(view[index].to(dtype))
        except torch.OutOfMemoryError:
            # Tried again below, as the error holds on to all that was computed for as long as it is handled.
            warn_once(
                f"too little free memory on {view.device} for the windows that are solved at once: they are "
                "solved fewer at a time, and on the CPU where there is none for a single one; it takes longer",
                window_eigenvalues,
            )
        if len(chunk) > 1:
            return torch.cat([solve(half) for half in chunk.tensor_split(2)])
        window = view[tuple(map(int, index))]
        return _eigenvalues(window[None].cpu().to(dtype)).to(view.device)

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
    try:
        return _from_gram(matrices)
    except LinAlgError:
        return _from_svd(matrices)


def _from_gram(matrices: Tensor) -> Tensor:
    rows, columns = matrices.shape[-2:]
    gram = matrices.mH @ matrices if rows >= columns else matrices @ matrices.mH
    values: Tensor = torch.linalg.eigvalsh(gram).clamp_min(0)
    largest = values[:, -1:]
    squared_too_far = ((values < _GRAM_LIMIT * largest) & (largest > 0)).any(-1)
    if squared_too_far.any():
        values[squared_too_far] = _from_svd(matrices[squared_too_far])
    return values


def _from_svd(matrices: Tensor) -> Tensor:
    try:
        singular = torch.linalg.svdvals(matrices)
    except LinAlgError:
        # LAPACK goes another way than a GPU's solvers; on the CPU torch has but one.
        if matrices.device.type == "cpu":
            raise
        singular = torch.linalg.svdvals(matrices.cpu()).to(matrices.device)
    singular = singular.flip(-1)
    rank_limit = max(matrices.shape[-2:]) * torch.finfo(singular.dtype).eps * singular[:, -1:]
    return torch.where(singular > rank_limit, singular, 0).square()
