"""Eigenvalues of windows: squared singular values, ascending.

The eigenvalues of the small Gram matrix (w x w for windows of h x w, w <= h) are the squared singular values.
Squaring costs accuracy at the small end: a Gram eigenvalue is off by some rounding errors of the largest one. So
there are three routes, each slower and more accurate than the one before:

* `"float32"`, the Gram matrix in single precision: eigenvalues to about 1e-7 of the largest one of their window;
* `"float64"`, the Gram matrix in double precision: to about 1e-16 of the largest one;
* `"svd"`, the same, but the singular values themselves for windows with eigenvalues for which even that is too
  much, and where the solver of the Gram matrices does not converge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from farms_tb.options import Solver
from farms_tb.solvers import symmetric_eigenvalues
from farms_tb.threads import map_on_threads
from farms_tb.warning import warn_once

Route = Literal["float32", "float64", "svd"]
ROUTES: tuple[Route, ...] = ("float32", "float64", "svd")

ROUNDOFF: dict[Route, float] = {"float32": 2.0**-24, "float64": 2.0**-53, "svd": 0.0}
"""Unit roundoff that the eigenvalues are off by, as a fraction of the largest one of their window, times a few."""

FLOOR = {route: 32 * roundoff for route, roundoff in ROUNDOFF.items()}
"""What is below this fraction of a window's largest eigenvalue counts as 0.

Measured on matrices of lower rank, up to 16000 x 2000: zeros come out at up to 9 roundoffs of the largest one.
"""

# Cubed sizes of the windows of one chunk added up: a few milliseconds of work, so that threads finish together.
_CHUNK_WORK = 3 * 10**7
# At least as much is handed to a thread at a time.
_BUNDLE_WORK = 10**6

# Below this fraction of the largest eigenvalue the Gram matrix in double precision gives fewer than five digits.
_GRAM_LIMIT = 1e-10


class Wanted(NamedTuple):
    """Windows whose eigenvalues are wanted.

    Attributes:
        view: `(*lead, h, w)`, finite, real or complex. Windows may overlap: they are copied a chunk at a time.
        route: how accurate they have to be, see above. The squares of the entries must be within its range.
        picks: which windows, counted in order of `lead`, int64 on the CPU; None for all.
    """

    view: Tensor
    route: Route = "svd"
    picks: Tensor | None = None


class Eigenvalues(NamedTuple):
    """What was found for the windows of one `Wanted`.

    Attributes:
        values: `(n, min(h, w))` float64 on the CPU, ascending and not negative; NaN for windows on which no solver
            converged. What lies below the numerical rank of its window, in the precision of the route, is 0.
        directly: whether the singular values themselves were needed for some window.
    """

    values: Tensor
    directly: bool


@dataclass(frozen=True)
class _Chunk:
    """Windows of one layer that are solved at once.

    Attributes:
        layer: position of the layer among all.
        view: `(*lead, h, w)`, all windows of the layer.
        index: `(n,)` int64 on the CPU, which of them.
        route: how they are solved.
    """

    layer: int
    view: Tensor
    index: Tensor
    route: Route

    @property
    def device(self) -> torch.device:
        return self.view.device

    @property
    def dtype(self) -> torch.dtype:
        """Type that they are solved in."""
        if self.view.is_complex():
            return torch.complex64 if self.route == "float32" else torch.complex128
        return torch.float32 if self.route == "float32" else torch.float64

    @property
    def small(self) -> int:
        """Rows of the Gram matrices."""
        return min(self.view.shape[-2:])

    @property
    def work(self) -> int:
        return len(self.index) * self.small**3

    @property
    def size(self) -> int:
        """Bytes that solving it takes: the windows, their Gram matrices, and a solver's copy of these."""
        height, width = self.view.shape[-2:]
        return len(self.index) * (height * width + 2 * self.small**2) * self.dtype.itemsize

    def windows(self) -> Tensor:
        """Return a copy of the windows `(n, h, w)`, however much they overlap in the weight."""
        index = self.index.to(self.view.device)
        return self.view[torch.unravel_index(index, self.view.shape[:-2])].to(self.dtype)


class _Solved(NamedTuple):
    """`Eigenvalues` of a chunk, in the precision and on the device that they were solved in."""

    values: Tensor
    directly: bool


def window_eigenvalues(
    wanted: Sequence[Wanted], memory: int = 2**29, solver: Solver = "auto"
) -> list[Eigenvalues]:
    """Return the eigenvalues of the windows of several layers, solved together.

    On the CPU they are shared among as many threads as torch may use. On a GPU windows of one size are solved in
    batches, whatever layers they are of, and the results come to the CPU at the end.

    Args:
        wanted: the windows of each layer.
        memory: bytes for all that is solved at the same time; a single window that takes more is solved alone.
        solver: what solves for the eigenvalues of Gram matrices on a GPU, see `farms_tb.solvers`.

    Example:
        >>> window_eigenvalues([Wanted(torch.diag(torch.tensor([3.0, 1.0]))[None])])[0].values
        tensor([[1., 9.]], dtype=torch.float64)
    """
    batches = list(_batches(wanted, memory))
    on_cpu = [batch for batch in batches if batch[0].device.type == "cpu"]
    # The costliest first, so that threads finish together. Chunks of a layer stay in order: all but the last one
    # cost the same.
    on_cpu.sort(key=_work, reverse=True)
    bundles = list(_bundles(on_cpu))
    sizes = [max(_size(batch) for batch in bundle) for bundle in bundles]
    solved = map_on_threads(lambda bundle: [_solve(batch) for batch in bundle], bundles, sizes, memory)
    parts_of = list(zip(on_cpu, [parts for bundle in solved for parts in bundle], strict=True))
    parts_of += [(batch, _solve(batch, solver)) for batch in batches if batch[0].device.type != "cpu"]
    found: list[list[_Solved]] = [[] for _ in wanted]
    for batch, parts in parts_of:
        for chunk, part in zip(batch, parts, strict=True):
            found[chunk.layer].append(part)
    none = torch.empty(0)
    values = to_cpu([torch.cat([part.values for part in parts]) if parts else none for parts in found])
    return [
        Eigenvalues(part.reshape(-1, min(layer.view.shape[-2:])), any(chunk.directly for chunk in parts))
        for part, layer, parts in zip(values, wanted, found, strict=True)
    ]


def _work(batch: Sequence[_Chunk]) -> int:
    return sum(chunk.work for chunk in batch)


def _size(batch: Sequence[_Chunk]) -> int:
    return sum(chunk.size for chunk in batch)


def _bundles(batches: Sequence[list[_Chunk]]) -> Iterator[list[list[_Chunk]]]:
    """Gather small batches, in order, which one thread solves one after the other, as switching takes time."""
    bundle: list[list[_Chunk]] = []
    work = 0
    for batch in batches:
        bundle.append(batch)
        work += _work(batch)
        if work >= _BUNDLE_WORK:
            yield bundle
            bundle, work = [], 0
    if bundle:
        yield bundle


def to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return float64 copies on the CPU; each device is waited for once."""
    copies = list(tensors)
    for device in {tensor.device for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        flat = torch.cat([tensors[place].double().flatten() for place in places]).cpu()
        parts = torch.split(flat, [tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            copies[place] = part.view(tensors[place].shape)
    return copies


def _batches(wanted: Sequence[Wanted], memory: int) -> Iterator[list[_Chunk]]:
    """Cut the layers' windows into chunks, and gather those that are solved at once.

    On the CPU each chunk is solved alone. On a GPU windows of one type, route and size of Gram matrices are solved
    together, as many as the memory allows.
    """
    open_batches: dict[tuple[Any, ...], list[_Chunk]] = {}
    room: dict[tuple[Any, ...], int] = {}
    for layer, part in enumerate(wanted):
        for chunk in _chunks(layer, part, memory):
            if chunk.device.type == "cpu":
                yield [chunk]
                continue
            key = (chunk.device, chunk.dtype, chunk.route, chunk.small)
            if key in room and chunk.size > room[key]:
                yield open_batches.pop(key)
                del room[key]
            open_batches.setdefault(key, []).append(chunk)
            room[key] = room.get(key, memory) - chunk.size
    yield from open_batches.values()


def _chunks(layer: int, wanted: Wanted, memory: int) -> Iterator[_Chunk]:
    view, route, picks = wanted
    whole = _Chunk(layer, view, torch.arange(math.prod(view.shape[:-2])) if picks is None else picks, route)
    if not len(whole.index):
        return
    number = memory * len(whole.index) // whole.size
    if whole.device.type == "cpu":
        number = min(number, _CHUNK_WORK // whole.small**3)
    for part in torch.split(whole.index, max(1, number)):
        yield replace(whole, index=part)


def _solve(batch: Sequence[_Chunk], solver: Solver = "auto") -> list[_Solved]:
    """Solve chunks of one device, type, route and size of Gram matrices; where memory is short in several goes."""
    try:
        return _eigenvalues(batch, [chunk.windows() for chunk in batch], solver)
    except torch.OutOfMemoryError:
        # Tried again below, as the error holds on to all that was computed for as long as it is handled.
        warn_once(
            f"too little free memory on {batch[0].device} for the windows that are solved at once: they are "
            "solved fewer at a time, and on the CPU where there is none for a single one; it takes longer. A "
            "smaller memory_mb avoids it",
            window_eigenvalues,
        )
    if len(batch) > 1:
        middle = len(batch) // 2
        return _solve(batch[:middle], solver) + _solve(batch[middle:], solver)
    (chunk,) = batch
    if len(chunk.index) > 1:
        halves = [_solve([replace(chunk, index=half)], solver)[0] for half in chunk.index.tensor_split(2)]
        return [_Solved(torch.cat([h.values for h in halves]), any(h.directly for h in halves))]
    window = chunk.view[tuple(map(int, torch.unravel_index(chunk.index, chunk.view.shape[:-2])))]
    (solved,) = _eigenvalues(batch, [window[None].cpu().to(chunk.dtype)], solver)
    return [_Solved(solved.values.to(chunk.view.device), solved.directly)]


def _eigenvalues(batch: Sequence[_Chunk], windows: Sequence[Tensor], solver: Solver) -> list[_Solved]:
    """Return the eigenvalues of each chunk's windows `(n, h, w)`, in the precision and on the device of these."""
    route = batch[0].route
    try:
        values = symmetric_eigenvalues(torch.cat([_gram(matrices) for matrices in windows]), solver)
    except LinAlgError:
        if len(batch) > 1:
            each = zip(batch, windows, strict=True)
            return [_eigenvalues([chunk], [matrices], solver)[0] for chunk, matrices in each]
        nothing = windows[0].real.new_full((len(windows[0]), batch[0].small), torch.nan)
        return [_Solved(_from_svd(windows[0]), True) if route == "svd" else _Solved(nothing, False)]
    parts = torch.split(values, [len(matrices) for matrices in windows])
    if route == "svd":
        return [_checked(part.clamp_min(0), matrices) for part, matrices in zip(parts, windows, strict=True)]
    # Not smaller, which NaN is not either.
    return [_Solved(part.where(~(part < FLOOR[route] * part[:, -1:]), 0), False) for part in parts]


def _gram(matrices: Tensor) -> Tensor:
    """Return the smaller Gram matrix of each `(h, w)` matrix, in the precision of the matrices."""
    dtype = matrices.dtype
    if dtype in (torch.float32, torch.complex64) and not _multiplies_in_full(matrices.device):
        matrices = matrices.to(torch.complex128 if matrices.is_complex() else torch.float64)
    rows, columns = matrices.shape[-2:]
    # Autocast would multiply in half precision.
    with torch.autocast(matrices.device.type, enabled=False):
        gram = matrices.mH @ matrices if rows >= columns else matrices @ matrices.mH
    return gram.to(dtype)


def _multiplies_in_full(device: torch.device) -> bool:
    """Tell whether products of float32 matrices are computed in float32: users may allow TF32 or bfloat16."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    # Since torch 2.9 a setting of each backend, besides which the older one may not be asked for.
    setting = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if setting is not None:
        return setting in ("ieee", "none")
    return torch.get_float32_matmul_precision() == "highest"


def _checked(values: Tensor, matrices: Tensor) -> _Solved:
    """Compute the singular values of those matrices whose Gram matrix tells too little, or was not solved."""
    largest = values[:, -1:]
    good = ((values >= _GRAM_LIMIT * largest) | (largest == 0)).all(-1)
    if good.all():
        return _Solved(values, False)
    values[~good] = _from_svd(matrices[~good])
    return _Solved(values, True)


def _from_svd(matrices: Tensor) -> Tensor:
    """Return the squared singular values, NaN where no solver converges."""
    try:
        singular = torch.linalg.svdvals(matrices)
    except LinAlgError:
        # LAPACK goes another way than a GPU's solvers; on the CPU torch has but one.
        if matrices.device.type == "cpu":
            return matrices.real.new_full((len(matrices), min(matrices.shape[-2:])), torch.nan)
        return _from_svd(matrices.cpu()).to(matrices.device)
    singular = singular.flip(-1)
    rank_limit = max(matrices.shape[-2:]) * torch.finfo(singular.dtype).eps * singular[:, -1:]
    return torch.where(singular > rank_limit, singular, 0).square()
