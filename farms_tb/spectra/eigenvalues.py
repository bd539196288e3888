"""The eigenvalues of windows: their squared singular values, ascending.

For a window of h rows and w columns, w <= h, they are the eigenvalues of the Gram matrix W^T W (w x w), in single
or double precision, or the squares of the singular values themselves (see `farms_tb.spectra.precision`).

The windows of all layers are solved together, in chunks. On the CPU the chunks are shared among threads, one chunk
on one thread; on a GPU chunks of the same size are solved as one batch. A chunk is all that is ever copied out of
a weight, so the memory that solving takes is bounded by `memory_mb`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from farms_tb.options import Solver
from farms_tb.spectra.precision import ROUNDOFF, ZERO, Array, Precision
from farms_tb.spectra.solvers import symmetric_eigenvalues
from farms_tb.spectra.windows import Windows
from farms_tb.spectra.workers import map_on_threads
from farms_tb.warnings import warn_once

CHUNK_WORK = 16 * 10**7
"""Work (`Chunk.work`) of a chunk on the CPU: some milliseconds, so that threads finish at about the same time."""

TASK_WORK = 2 * 10**7
"""Least work of a task: handing a task to a thread costs as much as solving a few small windows."""

SVD_WORK = 4
"""A singular value decomposition takes about this many times as long as the eigenvalues of the Gram matrix."""


@dataclass(frozen=True)
class Chunk:
    """Windows of one layer that are solved at once.

    Attributes:
        layer: position of the layer in the list of all layers.
        windows: all W windows of the layer.
        index: `(n,)` int64 on the CPU, which of them, from 0 to W - 1; ascending.
        precision: how they are solved.
    """

    layer: int
    windows: Windows
    index: Tensor
    precision: Precision

    @property
    def device(self) -> torch.device:
        """Where the weight is, and where the chunk is solved."""
        return self.windows.view.device

    @property
    def dtype(self) -> torch.dtype:
        """Type that the windows are solved in."""
        if self.windows.view.is_complex():
            return torch.complex64 if self.precision == "float32" else torch.complex128
        return torch.float32 if self.precision == "float32" else torch.float64

    @cached_property
    def work(self) -> int:
        """Time that solving takes, up to a factor: O(w^3), and relatively more for small matrices."""
        size = self.windows.size
        return len(self.index) * size**2 * (size + 512) * (SVD_WORK if self.precision == "svd" else 1)

    @cached_property
    def bytes(self) -> int:
        """Memory that solving takes: the windows, their Gram matrices and the solver's copy of these."""
        entries = self.windows.view.shape[-2:].numel() + 2 * self.windows.size**2
        return len(self.index) * entries * self.dtype.itemsize

    def take(self) -> Tensor:
        """Copy the windows out of the weight, in the type that they are solved in.

        Returns:
            `(n, h, w)` on the device of the weight. It may share memory with the weight: read it only.
        """
        view, lead = self.windows.view, self.windows.view.shape[:-2]
        start, number = int(self.index[0]), len(self.index)
        consecutive = int(self.index[-1]) - start + 1 == number
        if consecutive and math.prod(lead[:-1]) == 1:
            # A slice instead of a gather: the windows lie behind each other in the last dimension of `lead`.
            taken = view.flatten(0, -3)[start : start + number]
        else:
            places = torch.unravel_index(self.index, lead)
            taken = view[tuple(place.to(view.device) for place in places)]
        # Matrix products are slow on windows of which neither rows nor columns lie together in memory, as in the
        # weight of a convolution.
        taken = taken.to(self.dtype, memory_format=torch.contiguous_format)
        return taken if 1 in taken.stride()[-2:] else taken.contiguous()


@dataclass(frozen=True)
class Solved:
    """The eigenvalues of a chunk.

    Attributes:
        chunk: the chunk.
        values: `(n, w)` float64, ascending, 0 or more; NaN for windows on which no solver converged.
        solver: what solved for them: `"cpu"`, `"torch"` or `"cupy"`.
    """

    chunk: Chunk
    values: Array
    solver: str


def solve_chunks(chunks: Sequence[Chunk], memory: int, threads: int, solver: Solver) -> list[Solved]:
    """Solve for the eigenvalues of windows of several layers.

    Args:
        chunks: the windows, of any number for each chunk: they are cut to fit the memory and the threads.
        memory: bytes that all windows which are solved at the same time may take; a single window that needs more
            is solved alone.
        threads: number of threads on the CPU.
        solver: what solves on a GPU, see `farms_tb.spectra.solvers`.

    Returns:
        One or more results for each chunk, in any order.
    """
    on_cpu = [chunk for chunk in chunks if chunk.device.type == "cpu"]
    elsewhere = [chunk for chunk in chunks if chunk.device.type != "cpu"]
    return [*_solve_on_cpu(on_cpu, memory, threads), *_solve_on_gpus(elsewhere, memory, threads, solver)]


def _solve_on_cpu(chunks: Sequence[Chunk], memory: int, threads: int) -> list[Solved]:
    share = memory // threads
    cut = [part for chunk in chunks for part in _cut(chunk, share, CHUNK_WORK)]
    cut.sort(key=lambda chunk: -chunk.work)
    large = [chunk for chunk in cut if chunk.bytes > share]
    small = [chunk for chunk in cut if chunk.bytes <= share]

    def solve(task: Sequence[Chunk]) -> list[Solved]:
        return [_solve_one_on_cpu(chunk) for chunk in task]

    found = map_on_threads(solve, list(_tasks(small)), threads)
    # A window that takes more than a thread's share of the memory is solved while no other one is.
    return [solved for task in found for solved in task] + solve(large)


def _tasks(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Gather chunks until they are worth a thread's while."""
    task: list[Chunk] = []
    work = 0
    for chunk in chunks:
        task.append(chunk)
        work += chunk.work
        if work >= TASK_WORK:
            yield task
            task, work = [], 0
    if task:
        yield task


def _solve_one_on_cpu(chunk: Chunk) -> Solved:
    values, solver = _eigenvalues([chunk.take()], chunk.precision, 1, "auto")
    return Solved(chunk, values.double().numpy(), solver)


def _solve_on_gpus(chunks: Sequence[Chunk], memory: int, threads: int, solver: Solver) -> list[Solved]:
    """Solve windows of one device, type and size in batches, and copy all results to the CPU at the end."""
    cut = [part for chunk in chunks for part in _cut(chunk, memory, None)]
    batches = [(batch, _solve_batch(batch, threads, solver)) for batch in _batches(cut, memory)]
    found = []
    for device in {batch[0].device for batch, _ in batches}:
        own = [(batch, values, name) for batch, (values, name) in batches if batch[0].device == device]
        flat = torch.cat([values.double().flatten() for _, values, _ in own]).cpu()
        parts = torch.split(flat, [values.numel() for _, values, _ in own])
        for (batch, values, name), part in zip(own, parts, strict=True):
            by_chunk = torch.split(part.view(values.shape), [len(chunk.index) for chunk in batch])
            found += [Solved(chunk, part.numpy(), name) for chunk, part in zip(batch, by_chunk, strict=True)]
    return found


def _batches(chunks: Sequence[Chunk], memory: int) -> Iterator[list[Chunk]]:
    """Group the chunks that are solved as one batch, as many as the memory allows."""
    groups: dict[Any, list[Chunk]] = {}
    taken: Counter[Any] = Counter()
    for chunk in chunks:
        key = (chunk.device, chunk.dtype, chunk.precision, chunk.windows.size)
        if key in groups and taken[key] + chunk.bytes > memory:
            yield groups.pop(key)
            taken[key] = 0
        groups.setdefault(key, []).append(chunk)
        taken[key] += chunk.bytes
    yield from groups.values()


def _cut(chunk: Chunk, memory: int, work: int | None) -> Iterator[Chunk]:
    """Cut a chunk into smaller ones, each within so much memory and work where a single window is."""
    number = memory * len(chunk.index) // chunk.bytes
    if work is not None:
        number = min(number, work * len(chunk.index) // chunk.work)
    if number >= len(chunk.index):
        yield chunk
        return
    for index in torch.split(chunk.index, max(1, number)):
        yield replace(chunk, index=index)


def _solve_batch(batch: Sequence[Chunk], threads: int, solver: Solver) -> tuple[Tensor, str]:
    """Solve chunks of one size as one batch; where memory is short, fewer at a time, and at last on the CPU."""
    try:
        return _eigenvalues([chunk.take() for chunk in batch], batch[0].precision, threads, solver)
    except torch.OutOfMemoryError:
        # Tried again below, as the error holds on to all that was computed for as long as it is handled.
        warn_once(
            f"too little free memory on {batch[0].device} for the windows that are solved at once: they are "
            "solved fewer at a time, and on the CPU where there is none for a single one; it takes longer. A "
            "smaller memory_mb avoids it",
            solve_chunks,
        )
    number = sum(len(chunk.index) for chunk in batch)
    if number == 1:
        (chunk,) = batch
        place = tuple(map(int, torch.unravel_index(chunk.index[0], chunk.windows.view.shape[:-2])))
        window = chunk.windows.view[place][None].cpu().to(chunk.dtype)
        values, _ = _eigenvalues([window], chunk.precision, 1, "auto")
        return values.to(chunk.device), "cpu"
    halves = [[replace(chunk, index=half)] for chunk in batch for half in chunk.index.chunk(2)]
    solved = [_solve_batch(half, threads, solver) for half in halves]
    return torch.cat([values for values, _ in solved]), solved[0][1]


def _eigenvalues(
    windows: Sequence[Tensor], precision: Precision, threads: int, solver: Solver
) -> tuple[Tensor, str]:
    """Return the eigenvalues `(n, w)` of all windows, on their device, and what solved for them.

    Args:
        windows: `(m, h, w)` each, of one type and one min(h, w).
        precision: how they are solved.
        threads: number of threads, where the CPU solves for a GPU.
        solver: what solves on a GPU.
    """
    name = "cpu" if windows[0].is_cpu else "torch"
    if precision == "svd":
        return torch.cat([squared_singular_values(part) for part in windows]), name
    grams = torch.cat([_gram(part) for part in windows]) if len(windows) > 1 else _gram(windows[0])
    try:
        if grams.is_cpu:
            # LAPACK solves one matrix after the other: there is no choice of solvers.
            values = torch.linalg.eigvalsh(grams)
        else:
            values, name = symmetric_eigenvalues(grams, threads, solver)
    except LinAlgError:
        # NaN is imprecise in any case: the singular values will be asked for.
        return grams.real.new_full(grams.shape[:2], torch.nan), name
    zero_below = ZERO * ROUNDOFF[precision] * values[:, -1:]
    return torch.where(values < zero_below, 0, values), name


def _gram(windows: Tensor) -> Tensor:
    """Return the smaller Gram matrix `(n, w, w)` of each window `(n, h, w)`, in the precision of the windows."""
    if windows.shape[-2] < windows.shape[-1]:
        windows = windows.mH
    dtype = windows.dtype
    if dtype in (torch.float32, torch.complex64) and not multiplies_in_full(windows.device):
        windows = windows.to(torch.complex128 if dtype.is_complex else torch.float64)
    # Autocast would multiply in half precision.
    with torch.autocast(windows.device.type, enabled=False):
        return torch.bmm(windows.mH, windows).to(dtype)


def multiplies_in_full(device: torch.device) -> bool:
    """Tell whether products of float32 matrices are computed in float32: users may allow TF32 or bfloat16."""
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
        if not windows.is_cpu:
            # LAPACK uses other algorithms than a GPU's solvers.
            return squared_singular_values(windows.cpu()).to(windows.device)
        if len(windows) > 1:
            return torch.cat([squared_singular_values(window) for window in torch.split(windows, 1)])
        return windows.real.new_full((1, min(windows.shape[-2:])), torch.nan)
    singular = singular.flip(-1)
    rank_limit = max(windows.shape[-2:]) * torch.finfo(singular.dtype).eps * singular[:, -1:]
    return torch.where(singular > rank_limit, singular, 0).square()
