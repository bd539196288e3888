"""Eigenvalues of windows: squared singular values, ascending.

The eigenvalues of the small Gram matrix (w x w for windows of h x w, w <= h) are the squared singular values.
Squaring costs accuracy at the small end: a Gram eigenvalue is off by some rounding errors of the largest one. So
there are four routes, each slower and more accurate than the one before:

* `"float32"`, the Gram matrix in single precision: eigenvalues to about 1e-7 of the largest one of their window;
* `"deflated"`, the same, without the largest directions, which are solved for themselves: to about 1e-7 of the
  largest eigenvalue that is left, which in a heavy tail is far less;
* `"float64"`, the Gram matrix in double precision: to about 1e-16 of the largest one;
* `"svd"`, the same, but the singular values themselves for windows with eigenvalues for which even that is too
  much, and where the solver of the Gram matrices does not converge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from threading import local
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from farms_tb.options import Solver
from farms_tb.spectra.solvers import symmetric_eigenvalues
from farms_tb.spectra.workers import Task, number_of_threads, work_on_threads
from farms_tb.warnings import warn_once

Route = Literal["float32", "deflated", "float64", "svd"]
ROUTES: tuple[Route, ...] = ("float32", "deflated", "float64", "svd")

ROUNDOFF: dict[Route, float] = {"float32": 2.0**-24, "deflated": 2.0**-24, "float64": 2.0**-53, "svd": 0.0}
"""Unit roundoff that the eigenvalues are off by, as a fraction of the `scale` of their window, times a few."""

FLOOR = {route: 32 * roundoff for route, roundoff in ROUNDOFF.items()}
"""What is below this fraction of a window's `scale` counts as 0.

Measured on matrices of lower rank, up to 16000 x 2000: zeros come out at up to 9 roundoffs of the largest one.
"""

# How many directions are looked at for whether they can be taken out, and how often they are multiplied by the
# Gram matrix before. With more of both more would stand alone, at a higher cost: these take a sixth of
# the time that 512 x 512 takes without.
_DIRECTIONS, _ITERATIONS = 16, 4
# For w x w Gram matrices a direction stands alone up to this angle / w^(1/4): its square is then the relative
# error that rounding makes at most of the largest eigenvalue, 6 / sqrt(w) roundoffs.
_SMALL_ANGLE = (6 * 2.0**-24) ** 0.5

# Work on the windows of one chunk (`_Chunk.work`): some milliseconds, so that threads finish together.
_CHUNK_WORK = 16 * 10**7
# A singular value decomposition takes this many times as long as the eigenvalues of the Gram matrix.
_SVD_WORK = 4
# Chunks of less are solved together, and at least as much is handed to a thread at a time.
_BUNDLE_WORK = 2 * 10**7
# How much there has to be for each further thread: a millisecond, as starting one takes time, too.
_THREAD_WORK = 25 * 10**6

# Below this fraction of the largest eigenvalue the Gram matrix in double precision gives fewer than five digits.
_GRAM_LIMIT = 1e-10

LARGE_WINDOW = 2**15
"""Entries from which windows are copied one by one, into memory that is used again: fresh memory costs more."""


class Wanted(NamedTuple):
    """Windows whose eigenvalues are wanted.

    Attributes:
        view: `(*lead, h, w)`, finite, real or complex. Windows may overlap: they are copied a chunk at a time.
        route: how accurate they have to be, see above. The squares of the entries must be within its range.
        picks: which windows, counted in order of `lead`, int64 on the CPU; None for all.
        choose: where the first of all windows goes ahead by `route`: takes what was found for it, and returns the
            route of the others. If that is more accurate, the first window takes it, too.
    """

    view: Tensor
    route: Route = "svd"
    picks: Tensor | None = None
    choose: Callable[[Eigenvalues], Route] | None = None


class Eigenvalues(NamedTuple):
    """What was found for the windows of one `Wanted`.

    Attributes:
        values: `(n, min(h, w))` float64 on the CPU, ascending and not negative; NaN for windows on which no solver
            converged. What lies below the numerical rank of its window, in the precision of the route, is 0.
        scale: `(n,)` float64 on the CPU, what rounding errors are relative to: the largest eigenvalue, or a bound
            of the largest one that was not taken out. Of deflated windows errors of an eigenvalue v are relative
            to sqrt(largest * v) if that is more, as the windows are rounded too.
        directly: whether the singular values themselves were needed for some window.
    """

    values: Tensor
    scale: Tensor
    directly: bool


class _Scratch(local):
    """Memory that a thread uses again and again: the kernel takes its time to hand out fresh memory.

    Args:
        most: bytes of one piece that is kept; larger ones are handed out anew.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return memory of this shape on the CPU, which holds until the name is taken again."""
        size = math.prod(shape)
        if size * dtype.itemsize > self._most:
            return torch.empty(size, dtype=dtype, device="cpu").view(shape)
        held = self._held.get((name, dtype))
        if held is None or len(held) < size:
            held = self._held[name, dtype] = torch.empty(size, dtype=dtype, device="cpu")
        return held[:size].view(shape)


@dataclass
class _Chunk:
    """Windows of one layer that are solved at once.

    Attributes:
        layer: position of the layer among all.
        place: position of the chunk among those of its layer.
        view: `(*lead, h, w)`, all windows of the layer.
        index: which of them; a range where they follow each other.
        route: how they are solved.
        ahead: whether it is a window that chooses the route of the others.
        dtype: type that they are solved in.
        small: rows of the Gram matrices.
        work: what solving takes, about in proportion to time: of small matrices solvers do less at a time.
        size: bytes that it takes: the windows, their Gram matrices, and a solver's copy of these.
    """

    layer: int
    place: int
    view: Tensor
    index: Sequence[int]
    route: Route
    ahead: bool = False
    dtype: torch.dtype = field(init=False)
    small: int = field(init=False)
    work: int = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        single = ROUNDOFF[self.route] == ROUNDOFF["float32"]
        if self.view.is_complex():
            self.dtype = torch.complex64 if single else torch.complex128
        else:
            self.dtype = torch.float32 if single else torch.float64
        number, (height, width) = len(self.index), self.view.shape[-2:]
        self.small = min(height, width)
        self.work = number * self.small**2 * (self.small + 512) * (_SVD_WORK if self.route == "svd" else 1)
        copies = 2 if self.route == "deflated" else 1
        self.size = number * (copies * height * width + 2 * self.small**2) * self.dtype.itemsize

    @property
    def device(self) -> torch.device:
        return self.view.device

    def windows(self, scratch: _Scratch) -> Tensor:
        """Return the windows `(n, h, w)`, to be read: copies, or themselves where they are fit for it."""
        lead, shape = self.view.shape[:-2], self.view.shape[-2:]
        one_by_one = len(self.index) == 1 or shape.numel() >= LARGE_WINDOW
        if self.view.device.type == "cpu" and one_by_one:
            chosen = [self.view[_places(index, lead)] for index in self.index]
            if len(chosen) == 1 and chosen[0].dtype == self.dtype and 1 in chosen[0].stride():
                return chosen[0][None]
            windows = scratch.take("windows", (len(chosen), *shape), self.dtype)
            for window, original in zip(windows, chosen, strict=True):
                window.copy_(original)
            return windows
        if isinstance(self.index, range) and lead.numel() in (len(self.index), lead[-1]):
            windows = self.view.flatten(0, -3)[self.index.start : self.index.stop]
        else:
            windows = self.view[_places(torch.tensor(self.index, device="cpu").to(self.view.device), lead)]
        windows = windows.to(self.dtype, memory_format=torch.contiguous_format)
        return windows if 1 in windows.stride()[-2:] else windows.contiguous()


Index = TypeVar("Index", int, Tensor)


def _places(index: Index, lead: Sequence[int]) -> tuple[Index, ...]:
    """Return where a window lies of which this is the number, in the dimensions of `lead`."""
    places = []
    for length in reversed(lead):
        places.append(index % length)
        index = index // length
    return tuple(reversed(places))


class _Solved(NamedTuple):
    """`Eigenvalues` of a chunk, in the precision and on the device that they were solved in."""

    values: Tensor
    scale: Tensor
    directly: bool


_Pair = tuple[_Chunk, _Solved]


def window_eigenvalues(
    wanted: Sequence[Wanted], memory: int = 2**29, solver: Solver = "auto"
) -> list[Eigenvalues]:
    """Return the eigenvalues of the windows of several layers, solved together.

    On the CPU they are shared among threads (`farms_tb.spectra.workers`). On a GPU windows of one size are solved
    in batches, whatever layers they are of, and the results come to the CPU at the end.

    Args:
        wanted: the windows of each layer.
        memory: bytes for all that is solved at the same time; a single window that takes more is solved alone.
        solver: what solves for the eigenvalues of Gram matrices on a GPU, see `farms_tb.spectra.solvers`.

    Example:
        >>> window_eigenvalues([Wanted(torch.diag(torch.tensor([3.0, 1.0]))[None])])[0].values
        tensor([[1., 9.]], dtype=torch.float64)
    """
    # A thread keeps up to six pieces: windows, turned windows and Gram matrices of two precisions.
    scratch = _Scratch(memory // (16 * number_of_threads()))
    if any(part.view.device.type == "cpu" for part in wanted):
        memory -= memory * 6 // 16

    def solve(batches: Sequence[list[_Chunk]]) -> tuple[list[_Pair], list[_Chunk]]:
        """Return what was found, and the chunks that follow from it."""
        pairs = [pair for batch in batches for pair in zip(batch, _solve(batch, scratch, solver), strict=True)]
        return _with_following(pairs, wanted, memory)

    def solve_task(batches: list[list[_Chunk]]) -> tuple[list[_Pair], list[Task[list[list[_Chunk]]]]]:
        pairs, following = solve(batches)
        return pairs, _tasks(following, memory)

    chunks = [chunk for layer, part in enumerate(wanted) for chunk in _first_chunks(layer, part, memory)]
    on_cpu = _tasks([chunk for chunk in chunks if chunk.device.type == "cpu"], memory)
    found = [pair for pairs in work_on_threads(solve_task, on_cpu, memory, _THREAD_WORK) for pair in pairs]
    elsewhere = [chunk for chunk in chunks if chunk.device.type != "cpu"]
    ahead, following = solve(list(_batches([chunk for chunk in elsewhere if chunk.ahead], memory)))
    others, _ = solve(list(_batches([chunk for chunk in elsewhere if not chunk.ahead] + following, memory)))
    return _collected(found + ahead + others, wanted)


def _with_following(pairs: list[_Pair], wanted: Sequence[Wanted], memory: int) -> tuple[list[_Pair], list[_Chunk]]:
    """Let the windows that went ahead choose the route of the others.

    Returns:
        What counts of what was found, and the chunks of the others.
    """
    ahead = [pair for pair in pairs if pair[0].ahead]
    kept = [pair for pair in pairs if not pair[0].ahead]
    following: list[_Chunk] = []
    there = to_cpu([tensor for _, part in ahead for tensor in (part.values, part.scale)])
    for (chunk, part), of_values, of_scale in zip(ahead, there[::2], there[1::2], strict=True):
        choose = wanted[chunk.layer].choose
        assert choose is not None
        route = choose(Eigenvalues(of_values, of_scale, part.directly))
        enough = ROUTES.index(route) <= ROUTES.index(chunk.route)
        if enough:
            kept.append((chunk, part))
        others = range(int(enough), math.prod(chunk.view.shape[:-2]))
        following += _chunks(chunk.layer, chunk.view, route, others, memory, int(enough))
    return kept, following


def _collected(pairs: Sequence[_Pair], wanted: Sequence[Wanted]) -> list[Eigenvalues]:
    """Put together what was found for each layer."""
    of_layers: list[list[_Pair]] = [[] for _ in wanted]
    for pair in pairs:
        of_layers[pair[0].layer].append(pair)
    in_order = [[part for _, part in sorted(found, key=lambda pair: pair[0].place)] for found in of_layers]
    none = torch.empty(0, device="cpu")
    there = to_cpu(
        [
            torch.cat([getattr(part, name).flatten() for part in found]) if found else none
            for found in in_order
            for name in ("values", "scale")
        ]
    )
    return [
        Eigenvalues(of_layer.view(-1, min(layer.view.shape[-2:])), scale, any(part.directly for part in found))
        for of_layer, scale, layer, found in zip(there[::2], there[1::2], wanted, in_order, strict=True)
    ]


def _tasks(chunks: Sequence[_Chunk], memory: int) -> list[Task[list[list[_Chunk]]]]:
    """Hand out work on the CPU: windows that go ahead, and batches, of which a thread takes several small ones.

    Switching from one to the other takes time.
    """
    tasks = []
    for batch in _batches([chunk for chunk in chunks if chunk.ahead], memory):
        whole = sum(chunk.work * math.prod(chunk.view.shape[:-2]) for chunk in batch)
        tasks.append(Task([batch], sum(chunk.size for chunk in batch), whole))
    bundle: list[list[_Chunk]] = []
    for batch in sorted(_batches([chunk for chunk in chunks if not chunk.ahead], memory), key=_work, reverse=True):
        bundle.append(batch)
        if sum(map(_work, bundle)) >= _BUNDLE_WORK:
            tasks.append(_task(bundle))
            bundle = []
    return [*tasks, _task(bundle)] if bundle else tasks


def _task(bundle: list[list[_Chunk]]) -> Task[list[list[_Chunk]]]:
    size = max(sum(chunk.size for chunk in batch) for batch in bundle)
    return Task(bundle, size, sum(map(_work, bundle)))


def _work(batch: Sequence[_Chunk]) -> int:
    return sum(chunk.work for chunk in batch)


def to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return them in float64 on the CPU, themselves if they are; each device is waited for once."""
    found = [tensor.double() if tensor.device.type == "cpu" else tensor for tensor in tensors]
    for device in {tensor.device for tensor in found} - {torch.device("cpu")}:
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        flat = torch.cat([tensors[place].double().flatten() for place in places]).cpu()
        parts = torch.split(flat, [tensors[place].numel() for place in places])
        for place, part in zip(places, parts, strict=True):
            found[place] = part.view(tensors[place].shape)
    return found


def _batches(chunks: Sequence[_Chunk], memory: int) -> Iterator[list[_Chunk]]:
    """Gather the chunks that are solved at once.

    Windows of one device, type, route and size of Gram matrices are solved together: on a GPU as many as the
    memory allows, on the CPU few enough for threads to share them.
    """
    open_batches: dict[tuple[Any, ...], list[_Chunk]] = {}
    room: dict[tuple[Any, ...], int] = {}
    left: dict[tuple[Any, ...], float] = {}
    for chunk in chunks:
        key = (chunk.device, chunk.dtype, chunk.route, chunk.small)
        if key in room and (chunk.size > room[key] or chunk.work > left[key]):
            yield open_batches.pop(key)
            del room[key], left[key]
        open_batches.setdefault(key, []).append(chunk)
        room[key] = room.get(key, memory) - chunk.size
        most = _BUNDLE_WORK if chunk.device.type == "cpu" else math.inf
        left[key] = left.get(key, most) - chunk.work
    yield from open_batches.values()


def _first_chunks(layer: int, wanted: Wanted, memory: int) -> Iterator[_Chunk]:
    """Cut what is solved at first of a layer: all of it, or the window that goes ahead."""
    view, route, picks, choose = wanted
    if choose is None:
        index = range(math.prod(view.shape[:-2])) if picks is None else picks.tolist()
        yield from _chunks(layer, view, route, index, memory)
    else:
        yield _Chunk(layer, 0, view, range(1), route, ahead=True)


def _chunks(
    layer: int, view: Tensor, route: Route, index: Sequence[int], memory: int, first: int = 0
) -> Iterator[_Chunk]:
    """Cut windows of a layer into chunks, the places of which begin with this one."""
    if not index:
        return
    whole = _Chunk(layer, first, view, index, route)
    number = memory * len(index) // whole.size
    if whole.device.type == "cpu":
        number = min(number, _CHUNK_WORK * len(index) // whole.work)
    number = max(1, number)
    for place, start in enumerate(range(0, len(index), number), start=first):
        yield replace(whole, place=place, index=index[start : start + number])


def _solve(batch: Sequence[_Chunk], scratch: _Scratch, solver: Solver = "auto") -> list[_Solved]:
    """Solve chunks of one device, type, route and size of Gram matrices; where memory is short in several goes."""
    try:
        return _eigenvalues(batch, scratch, solver)
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
        return _solve(batch[:middle], scratch, solver) + _solve(batch[middle:], scratch, solver)
    (chunk,) = batch
    device, number = chunk.view.device, len(chunk.index)
    if number > 1:
        halves = [
            _solve([replace(chunk, index=half)], scratch, solver)[0]
            for half in (chunk.index[: number // 2], chunk.index[number // 2 :])
        ]
        values, scales = (torch.cat([getattr(half, name) for half in halves]) for name in ("values", "scale"))
        return [_Solved(values, scales, any(half.directly for half in halves))]
    window = chunk.view[_places(chunk.index[0], chunk.view.shape[:-2])]
    here = replace(chunk, view=window[None].cpu(), index=range(1))
    (solved,) = _eigenvalues([here], scratch, solver)
    return [_Solved(solved.values.to(device), solved.scale.to(device), solved.directly)]


def _eigenvalues(batch: Sequence[_Chunk], scratch: _Scratch, solver: Solver) -> list[_Solved]:
    """Return the eigenvalues of each chunk's windows, in the precision and on the device of the solver."""
    route = batch[0].route
    try:
        # Autocast would multiply in half precision.
        with torch.autocast(batch[0].view.device.type, enabled=False):
            # Memory that is used again serves one chunk at a time.
            own = scratch if len(batch) == 1 and batch[0].view.device.type == "cpu" else None
            grams = [_gram(_arranged(chunk, scratch), own) for chunk in batch]
            deflated = [_deflate(gram) for gram in grams] if route == "deflated" else []
        values = symmetric_eigenvalues(torch.cat(grams) if len(batch) > 1 else grams[0], solver)
    except LinAlgError:
        if len(batch) > 1:
            return [_eigenvalues([chunk], scratch, solver)[0] for chunk in batch]
        windows = batch[0].windows(scratch)
        if route == "svd":
            values = _from_svd(windows)
            return [_Solved(values, values[:, -1], True)]
        nothing = windows[0].real.new_full((len(windows), batch[0].small), torch.nan)
        return [_Solved(nothing, nothing[:, -1], False)]
    parts = list(torch.split(values, [len(chunk.index) for chunk in batch]))
    if route == "svd":
        return [_checked(part.clamp_min(0), chunk, scratch) for part, chunk in zip(parts, batch, strict=True)]
    scales = [bound for _, bound in deflated] or [part[:, -1] for part in parts]
    if deflated:
        parts = [_with_taken(part, taken) for part, (taken, _) in zip(parts, deflated, strict=True)]
    # Not smaller, which NaN is not either.
    return [
        _Solved(part.where(~(part < FLOOR[route] * scale[:, None]), 0), scale, False)
        for part, scale in zip(parts, scales, strict=True)
    ]


def _arranged(chunk: _Chunk, scratch: _Scratch) -> Tensor:
    """Return the chunk's windows, turned where they are to be deflated."""
    windows = chunk.windows(scratch)
    return _turned(windows, scratch) if chunk.route == "deflated" else windows


def _turned(windows: Tensor, scratch: _Scratch) -> Tensor:
    """Turn each window so that its Gram matrix begins with its largest directions; no singular value changes.

    A few iterations from a random subspace find the directions, and the reflectors of their QR decomposition turn
    the window. Turning the Gram matrix would not do: it is rounded already, relative to the largest eigenvalue.

    Source: Halko, Martinsson and Tropp, SIAM Review 2011.
    """
    if windows.shape[-2] < windows.shape[-1]:
        windows = windows.mH
    found = _random_directions(windows.shape[-1], windows.dtype).to(windows.device)
    for _ in range(_ITERATIONS - 1):
        found = torch.linalg.qr(windows.mH @ (windows @ found)).Q
    reflectors, factors = torch.geqrf(windows.mH @ (windows @ found))
    reflectors = reflectors.tril(-1)
    reflectors.diagonal(dim1=-2, dim2=-1).fill_(1)
    # Their product is 1 - V T V^H. A column of zeros has a factor of 0, so T is not computed by its inverse.
    overlap = factors[..., None] * (reflectors.mH @ reflectors).triu(1)
    middle = torch.linalg.solve_triangular(overlap, torch.diag_embed(factors), upper=True, unitriangular=True)
    out = scratch.take("turned", windows.shape, windows.dtype) if windows.device.type == "cpu" else None
    return torch.baddbmm(windows, windows @ reflectors, middle @ reflectors.mH, alpha=-1, out=out)


@lru_cache
def _random_directions(size: int, dtype: torch.dtype) -> Tensor:
    """Return random columns, the same ones each time."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(size, min(_DIRECTIONS, size), dtype=dtype, generator=generator, device="cpu")


def _deflate(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Take out of the Gram matrices `(n, w, w)` of turned windows, in place, those directions that stand alone.

    The leading block is diagonalised in double precision. A direction of eigenvalue v stands alone if it is above
    all that follow the block and its coupling c to that is so small that (c / v)^2 is a rounding error: then v is
    an eigenvalue, and what follows loses c c^H / v. Its place is taken by a direction without coupling, of an
    eigenvalue at least as large as all that is left, so that nothing much larger is rounded with the rest.

    Returns:
        `(n, k)` the eigenvalues taken out, 0 where a direction stays; and `(n,)` a bound of the largest that is
        left, its matrix's Frobenius norm.
    """
    size = grams.shape[-1]
    number = min(_DIRECTIONS, size)
    block, rest = grams[:, :number, :number], grams[:, number:, number:]
    leading, basis = torch.linalg.eigh(block.to(torch.complex128 if grams.is_complex() else torch.float64))
    leading = leading.clamp_min(0).to(grams.real.dtype)
    coupling = basis.to(grams.dtype).mH @ grams[:, :number, number:]
    grams[:, :number] = 0
    grams[:, number:, :number] = 0
    norm_of_rest = torch.linalg.vector_norm(grams.flatten(1), dim=-1)
    lengths = torch.linalg.vector_norm(coupling, dim=-1)
    # Not larger, which 0 / 0 is not either.
    alone = (lengths / leading <= _SMALL_ANGLE / size**0.25) & (leading > norm_of_rest[:, None])
    taken = coupling * alone[..., None]
    rest.baddbmm_((taken / leading.where(alone, 1)[..., None]).mH, taken, alpha=-1)
    # Solvers read the lower triangle.
    grams[:, number:, :number] = (coupling - taken).mH
    staying = torch.where(alone, 0, leading.square() + 2 * lengths.square()).sum(-1)
    bound = (norm_of_rest.square() + staying).sqrt()
    block.diagonal(dim1=-2, dim2=-1).copy_(bound[:, None].where(alone, leading))
    return leading * alone, bound


def _with_taken(values: Tensor, taken: Tensor) -> Tensor:
    """Put `(n, k)` eigenvalues that were taken out back into `(n, w)`, for those that took their places."""
    size = values.shape[-1]
    left = size - (taken > 0).sum(-1, keepdim=True)
    low = values.where(torch.arange(size, device=values.device) < left, -torch.inf)
    # As many of them are no values as there are directions.
    return torch.cat([low, taken.where(taken > 0, -torch.inf)], -1).sort(-1).values[:, -size:]


def _gram(matrices: Tensor, scratch: _Scratch | None = None) -> Tensor:
    """Return the smaller Gram matrix of each `(h, w)` matrix, in the precision of the matrices."""
    dtype = matrices.dtype
    if dtype in (torch.float32, torch.complex64) and not multiplies_in_full(matrices.device):
        matrices = matrices.to(torch.complex128 if matrices.is_complex() else torch.float64)
    if matrices.shape[-2] < matrices.shape[-1]:
        matrices = matrices.mH
    size = matrices.shape[-1]
    out = scratch.take("gram", (len(matrices), size, size), matrices.dtype) if scratch is not None else None
    return torch.bmm(matrices.mH, matrices, out=out).to(dtype)


def multiplies_in_full(device: torch.device) -> bool:
    """Tell whether products of float32 matrices are computed in float32: users may allow TF32 or bfloat16."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    # Since torch 2.9 a setting of each backend, besides which the older one may not be asked for.
    setting = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if setting is not None:
        return setting in ("ieee", "none")
    return torch.get_float32_matmul_precision() == "highest"


def _checked(values: Tensor, chunk: _Chunk, scratch: _Scratch) -> _Solved:
    """Compute the singular values of those windows whose Gram matrix tells too little, or was not solved."""
    largest = values[:, -1:]
    good = ((values >= _GRAM_LIMIT * largest) | (largest == 0)).all(-1)
    if good.all():
        return _Solved(values, values[:, -1], False)
    values[~good] = _from_svd(chunk.windows(scratch)[~good])
    return _Solved(values, values[:, -1], True)


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
