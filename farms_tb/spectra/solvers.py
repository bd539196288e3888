"""What solves for the eigenvalues of a batch of symmetric matrices.

On the CPU LAPACK does, matrix by matrix. On a GPU it depends on versions and sizes which way is fast, by two
orders of magnitude: torch goes through a batch of larger matrices one by one up to some version, CuPy has
cuSOLVER's batched solver, and for few or small matrices the CPU can be faster than either. So random matrices of
each size are solved by every solver there is, once, and the fastest is kept, in memory and in a file: the next run
of the same software on the same device makes the same choice and computes the same. Processes that try at the same
time take the choice of the first that writes it down.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from farms_tb.atomic_write import write_text_atomically
from farms_tb.spectra.workers import map_on_threads

# Matrices of a trial, bytes that they take at most, and how often it is made, after a first time that counts for
# nothing unless it takes seconds.
_TRIAL_MATRICES, _TRIAL_BYTES, _TRIALS = 32, 2**27, 3
_LONG_TRIAL = 1.0
# Matrices that a thread of the CPU takes at a time: a few milliseconds of work.
_CPU_WORK = 3 * 10**7


def fastest_solver(device: torch.device, dtype: torch.dtype, size: int, threads: int) -> str:
    """Return the name of the solver that is the fastest for matrices of this device, type and size.

    Sizes up to the next power of two share a choice: a model may have a hundred sizes. The threads are those on
    which the CPU would solve for the device.
    """
    return _choice(device, dtype, 1 << max(4, (size - 1).bit_length()), threads)


@cache
def _choice(device: torch.device, dtype: torch.dtype, size: int, threads: int) -> str:
    """Return the solver that a file names, or else the fastest one in a trial, and keep it in the file."""
    file = _file(device, dtype, size, threads)
    return _read(file) or _keep(_fastest(device, dtype, size, threads), file)


def cache_folder() -> Path:
    """Return the folder that choices are kept in, each in a file of its own: `$XDG_CACHE_HOME/farms_tb/solvers`.

    Raises:
        RuntimeError: that is not set, and the user has no home.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "farms_tb" / "solvers"


def _file(device: torch.device, dtype: torch.dtype, size: int, threads: int) -> Path | None:
    """Return the file of a choice, whose name says all that the choice depends on; None where there is no home."""
    with_cupy = "none"
    with suppress(Exception):  # one that is installed for another CUDA raises anything
        with_cupy = import_module("cupy").__version__
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = f"torch {torch.__version__}, cupy {with_cupy}"
    name = f"{kind}, {versions}, {str(dtype).removeprefix('torch.')}, {size}, {threads} threads"
    try:
        return cache_folder() / f"{re.sub(r'[^a-zA-Z0-9.+-]+', '_', name)}.txt"
    except RuntimeError:
        return None


def _fastest(device: torch.device, dtype: torch.dtype, size: int, threads: int) -> str:
    """Try each solver on random matrices; those that fail are out."""
    generator = torch.Generator("cpu").manual_seed(0)
    number = max(1, min(_TRIAL_MATRICES, _TRIAL_BYTES // (size * size * dtype.itemsize)))
    half = torch.randn(number, size, size, dtype=dtype, generator=generator, device="cpu").to(device)
    matrices = half @ half.mH
    times = {"torch": math.inf}
    for name, solve in SOLVERS.items():
        with suppress(Exception):
            seconds = [_seconds(solve, matrices, threads)]
            if seconds[0] < _LONG_TRIAL:
                seconds = [_seconds(solve, matrices, threads) for _ in range(_TRIALS)]
            times[name] = statistics.median(seconds)
    return min(times, key=lambda name: times[name])


def _seconds(solve: Callable[[Tensor, int], Tensor], matrices: Tensor, threads: int) -> float:
    start = time.perf_counter()
    solve(matrices, threads).sum().item()  # waits for the device
    return time.perf_counter() - start


def _read(file: Path | None) -> str | None:
    """Return the solver that was chosen before; None where no file says it."""
    name = ""
    if file is not None:
        with suppress(OSError, ValueError):
            name = file.read_text().strip()
    return name if name in SOLVERS else None


def _keep(name: str, file: Path | None) -> str:
    """Keep a choice, and return it; or that of another process, which was quicker to keep its own.

    Where no file can be written the choice is kept for this process alone.
    """
    if file is None:
        return name
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with file.open("x") as opened:  # fails where the file is there
                opened.write(name)
        except FileExistsError:
            other = _read(file)
            if other is not None:
                return other
            write_text_atomically(file, name)
    return name


def _torch(matrices: Tensor, threads: int = 1) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(matrices)
    return values


def _cupy(matrices: Tensor, threads: int = 1) -> Tensor:
    cupy: Any = import_module("cupy")
    device = matrices.device
    # On torch's own stream, so that the two wait for each other.
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device.index)
    with cupy.cuda.Device(device.index), stream:
        try:
            return from_dlpack(cupy.linalg.eigvalsh(cupy.from_dlpack(matrices.contiguous())))
        except cupy.cuda.memory.OutOfMemoryError as error:
            # As torch says it, so that fewer are solved at a time.
            raise torch.OutOfMemoryError(f"CuPy: {error}") from error


def _cpu(matrices: Tensor, threads: int = 1) -> Tensor:
    host = matrices.cpu()
    parts = torch.split(host, max(1, _CPU_WORK // host.shape[-1] ** 3))
    return torch.cat(map_on_threads(_torch, parts, threads)).to(matrices.device)


SOLVERS: dict[str, Callable[[Tensor, int], Tensor]] = {"torch": _torch, "cupy": _cupy, "cpu": _cpu}
"""Each takes `(n, w, w)` symmetric or Hermitian matrices, of which it reads the lower triangle, and the number of
threads on which the CPU solves for a GPU. It returns the eigenvalues: `(n, w)` of the real type of the same
precision, ascending, on the device of the matrices; or raises `torch.linalg.LinAlgError`."""
