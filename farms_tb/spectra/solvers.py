"""What solves for the eigenvalues of a batch of symmetric matrices.

On the CPU LAPACK does, matrix by matrix. On a GPU it depends on versions and sizes which way is fast, by two
orders of magnitude: torch goes through a batch of larger matrices one by one up to some version, CuPy has
cuSOLVER's batched solver, and for few or small matrices the CPU can be faster than either. So random matrices of
each size are solved by every solver there is, once, and the fastest is kept, in memory and in a file: the next run
of the same software on the same device makes the same choice and computes the same.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
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


def fastest_solver(device: torch.device, dtype: torch.dtype, size: int) -> str:
    """Return the name of the solver that is the fastest for matrices of this device, type and size.

    Sizes up to the next power of two share a choice: a model may have a hundred sizes.
    """
    return _choice(device, dtype, 1 << max(4, (size - 1).bit_length()))


@cache
def _choice(device: torch.device, dtype: torch.dtype, size: int) -> str:
    """Return the solver that the file names, or else the fastest one in a trial, and keep it in the file."""
    key = _key(device, dtype, size)
    name: str | None = _read().get(key)
    if name not in SOLVERS:
        name = _fastest(device, dtype, size)
        _write({**_read(), key: name})
    return name


def cache_file() -> Path:
    """Return the file that choices are kept in: `$XDG_CACHE_HOME/farms_tb/solvers.json`.

    Raises:
        RuntimeError: that is not set, and the user has no home.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "farms_tb" / "solvers.json"


def _key(device: torch.device, dtype: torch.dtype, size: int) -> str:
    with_cupy = import_module("cupy").__version__ if find_spec("cupy") else "none"
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{kind}, torch {torch.__version__}, cupy {with_cupy}, {str(dtype).removeprefix('torch.')}, {size}"


def _fastest(device: torch.device, dtype: torch.dtype, size: int) -> str:
    """Try each solver on random matrices; those that fail are out."""
    generator = torch.Generator("cpu").manual_seed(0)
    number = max(1, min(_TRIAL_MATRICES, _TRIAL_BYTES // (size * size * dtype.itemsize)))
    half = torch.randn(number, size, size, dtype=dtype, generator=generator, device="cpu").to(device)
    matrices = half @ half.mH
    times = {"torch": math.inf}
    for name, solve in SOLVERS.items():
        with suppress(Exception):
            seconds = [_seconds(solve, matrices)]
            if seconds[0] < _LONG_TRIAL:
                seconds = [_seconds(solve, matrices) for _ in range(_TRIALS)]
            times[name] = statistics.median(seconds)
    return min(times, key=lambda name: times[name])


def _seconds(solve: Callable[[Tensor, int], Tensor], matrices: Tensor) -> float:
    start = time.perf_counter()
    solve(matrices, torch.get_num_threads()).sum().item()  # waits for the device
    return time.perf_counter() - start


def _read() -> dict[str, Any]:
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError, RuntimeError):  # there may be no home
        return {}
    return found if isinstance(found, dict) else {}


def _write(choices: dict[str, Any]) -> None:
    """Keep the choices; where no file can be written they are kept for this process alone."""
    with suppress(OSError, RuntimeError):
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(cache_file(), json.dumps(choices, indent=1))


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
