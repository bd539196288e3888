"""The eigenvalues of windows: their squared singular values, ascending.

For a window of h rows and w columns, w <= h, they are the eigenvalues of the Gram matrix W^T W (w x w), in single
or double precision, or the squares of the singular values themselves (see `farms_tb.spectra.precision`).

The windows of all layers are solved together, in chunks. On the CPU the chunks are shared among threads, one chunk
on one thread; on a GPU a chunk is one batch. A chunk is all that is ever copied out of a weight, so the memory
that solving takes is bounded by `memory_mb`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from farms_tb.options import Solver
from farms_tb.spectra.precision import ROUNDOFF, ZERO, Array, WindowPrecision
from farms_tb.spectra.solvers import SOLVERS, fastest_solver
from farms_tb.spectra.windows import Windows
from farms_tb.spectra.workers import map_on_threads
from farms_tb.warnings import warn_once

CHUNK_WORK = 16 * 10**7
"""Work of a chunk (see `Chunk.window_work`) on the CPU: milliseconds, so that threads finish at about one time."""

SVD_WORK = 4
"""A singular value decomposition takes about this many times as long as the eigenvalues of the Gram matrix."""


@dataclass
class EigenvalueTable:
    """The eigenvalues of the W windows of one layer, filled in as they are solved.

    Attributes:
        windows: the windows.
        scale: what their eigenvalues are multiplied by.
        values: `(W, w)`, ascending for each window, 0 or more; NaN at first, and where no solver converged.
        solver: what solved for those that were filled in last: `"cpu"`, `"torch"` or `"cupy"`.
    """

    windows: Windows
    scale: float
    values: Array
    solver: str = ""


@dataclass(frozen=True)
class Chunk:
    """Windows of one layer that are solved at once.

    Attributes:
        table: where their eigenvalues are written.
        index: `(n,)` int64 on the CPU, which windows of the table, from 0 to W - 1; ascending.
        precision: how they are solved.
    """

    table: EigenvalueTable
    index: Tensor
    precision: WindowPrecision

    @property
    def view(self) -> Tensor:
        """All windows of the layer, `(*lead, h, w)`, a view of the weight."""
        return self.table.windows.view

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type that the windows are solved in."""
        real = torch.float32 if self.precision == "float32" else torch.float64
        return real.to_complex() if self.view.is_complex() else real

    @cached_property
    def window_work(self) -> int:
        """Time that a window takes, up to a factor: O(w^3), and relatively more for small ones."""
        size = self.table.windows.size
        return size**2 * (size + 512) * (SVD_WORK if self.precision == "svd" else 1)

    @cached_property
    def window_bytes(self) -> int:
        """Memory that a window takes: a copy of it, its Gram matrix and the solver's copy of this."""
        entries = self.view.shape[-2:].numel() + 2 * self.table.windows.size**2
        return entries * self.dtype.itemsize

    def split(self, number: int) -> list[Chunk]:
        """Return chunks of at most so many windows, at least one each."""
        return [replace(self, index=index) for index in torch.split(self.index, max(1, number))]

    def take(self) -> Tensor:
        """Copy the windows out of the weight, in the type that they are solved in.

        Returns:
            `(n, h, w)` on the device of the weight. It may share memory with the weight: read it only.
        """
        lead = self.view.shape[:-2]
        start, number = int(self.index[0]), len(self.index)
        consecutive = int(self.index[-1]) - start + 1 == number
        if consecutive and math.prod(lead[:-1]) == 1:
            # The windows lie behind each other in the last dimension of `lead`: a slice takes a fifth of the time
            # of a gather for 64 windows of 64 x 64.
            taken = self.view.flatten(0, -3)[start : start + number]
        else:
            places = torch.unravel_index(self.index, lead)
            taken = self.view[tuple(place.to(self.view.device) for place in places)]
        # Matrix products are slow on windows of which neither rows nor columns lie together in memory, as in the
        # weight of a convolution: with this copy, those of 512 x 512 take three quarters of the time.
        taken = taken.to(self.dtype, memory_format=torch.contiguous_format)
        return taken if 1 in taken.stride()[-2:] else taken.contiguous()

    def write(self, values: Tensor, solver: str) -> None:
        """Write the eigenvalues `(n, w)` into the table, and what solved for them. This waits for their device."""
        self.table.values[self.index.numpy()] = self.table.scale * values.double().cpu().numpy()
        self.table.solver = solver


def solve_chunks(chunks: Sequence[Chunk], memory: int, threads: int, solver: Solver = "auto") -> None:
    """Solve for the eigenvalues of windows of several layers, and write them into the layers' tables.

    Args:
        chunks: the windows, of any number for each chunk: they are split to fit the memory and the threads.
        memory: bytes that windows solved at the same time may take; a window that needs more is solved alone.
        threads: number of threads on the CPU.
        solver: what solves on a GPU, see `farms_tb.spectra.solvers`.
    """
    _solve_on_cpu([chunk for chunk in chunks if chunk.view.is_cpu], memory, threads)
    _solve_on_gpus([chunk for chunk in chunks if not chunk.view.is_cpu], memory, threads, solver)


def _solve_on_cpu(chunks: Sequence[Chunk], memory: int, threads: int) -> None:
    share = memory // threads
    sizes = [min(share // chunk.window_bytes, CHUNK_WORK // chunk.window_work) for chunk in chunks]
    parts = [part for chunk, size in zip(chunks, sizes, strict=True) for part in chunk.split(size)]
    # The longest first: a long one that is begun last would keep the other threads waiting.
    parts.sort(key=lambda part: -part.window_work * len(part.index))

    def solve(part: Chunk) -> None:
        # Here torch calls LAPACK, which solves one matrix after the other: there is no choice of solvers.
        part.write(_eigenvalues(part.take(), part.precision, "torch"), "cpu")

    large = [part for part in parts if part.window_bytes > share]
    map_on_threads(solve, [part for part in parts if part.window_bytes <= share], threads)
    # A window that takes more than a thread's share of the memory is solved while no other one is.
    for part in large:
        solve(part)


def _solve_on_gpus(chunks: Sequence[Chunk], memory: int, threads: int, solver: Solver) -> None:
    found: list[tuple[Chunk, Tensor, str]] = []
    for chunk in chunks:
        name: str = "torch" if chunk.precision == "svd" else solver
        if name == "auto":
            name = fastest_solver(chunk.view.device, chunk.dtype, chunk.table.windows.size, threads)
        for part in chunk.split(memory // chunk.window_bytes):
            found += _solve_or_split(part, name, threads)
    # Written only now: that waits for the device, which can be given the work of all parts before.
    for part, values, name in found:
        part.write(values, name)


def _solve_or_split(chunk: Chunk, solver: str, threads: int) -> list[tuple[Chunk, Tensor, str]]:
    """Solve a chunk on its GPU; where memory is short, fewer windows at a time, and a single one on the CPU.

    Returns:
        Parts of the chunk, the eigenvalues `(n, w)` of each, on any device, and what solved for them.
    """
    try:
        return [(chunk, _eigenvalues(chunk.take(), chunk.precision, solver, threads), solver)]
    except torch.OutOfMemoryError:
        # Tried again below, as the error holds on to all that was computed for as long as it is handled.
        warn_once(
            f"too little free memory on {chunk.view.device} for the windows that are solved at once: they are "
            "solved fewer at a time, and on the CPU where there is none for a single one; it takes longer. A "
            "smaller memory_mb avoids it",
            solve_chunks,
        )
    number = len(chunk.index)
    if number > 1:
        halves = chunk.split((number + 1) // 2)
        return [solved for half in halves for solved in _solve_or_split(half, solver, threads)]
    place = torch.unravel_index(chunk.index[0], chunk.view.shape[:-2])
    window = chunk.view[tuple(map(int, place))][None].cpu().to(chunk.dtype)
    return [(chunk, _eigenvalues(window, chunk.precision, "torch"), "cpu")]


def _eigenvalues(windows: Tensor, precision: WindowPrecision, solver: str, threads: int = 1) -> Tensor:
    """Return the eigenvalues `(n, w)` of windows `(n, h, w)`, on their device."""
    if precision == "svd":
        return squared_singular_values(windows)
    grams = gram_matrices(windows)
    try:
        values = SOLVERS[solver](grams, threads)
    except LinAlgError:
        # NaN is imprecise in any case: the singular values will be asked for.
        return grams.real.new_full(grams.shape[:2], torch.nan)
    zero_below = ZERO * ROUNDOFF[precision] * values[:, -1:]
    return torch.where(values < zero_below, 0, values)


def gram_matrices(windows: Tensor) -> Tensor:
    """Return the smaller Gram matrix `(n, w, w)` of each window `(n, h, w)`, in the precision of the windows."""
    if windows.shape[-2] < windows.shape[-1]:
        windows = windows.mH
    dtype = windows.dtype
    if not multiplies_in_full(windows.device):
        windows = windows.to(torch.promote_types(dtype, torch.float64))
    return torch.bmm(windows.mH, windows).to(dtype)


def multiplies_in_full(device: torch.device) -> bool:
    """Return whether products of float32 matrices are computed in float32: users may allow TF32 or bfloat16."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    # Since torch 2.9 each backend has a setting, and reading the older common one may raise.
    setting = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if setting is not None:
        return setting in ("ieee", "none")
    return torch.get_float32_matmul_precision() == "highest"


def squared_singular_values(windows: Tensor) -> Tensor:
    """Return `(n, w)` ascending, 0 below the numerical rank; NaN where no solver converges."""
    try:
        singular = torch.linalg.svdvals(windows)
    except LinAlgError:
        if len(windows) > 1:
            return torch.cat([squared_singular_values(window) for window in torch.split(windows, 1)])
        return windows.real.new_full((1, min(windows.shape[-2:])), torch.nan)
    singular = singular.flip(-1)
    rank_limit = max(windows.shape[-2:]) * torch.finfo(singular.dtype).eps * singular[:, -1:]
    return torch.where(singular > rank_limit, singular, 0).square()
