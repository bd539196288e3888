"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

import farms_tb


def describe(device: str = "cpu", *packages: str) -> str:
    """Return processor, cores, memory and versions in one line each.

    Args:
        device: where the work is done; a GPU gets a line of its own.
        packages: whose versions matter here, in addition to torch's.
    """
    lines = [f"machine   {_processor()}, {len(os.sched_getaffinity(0))} cores, {_memory():.0f} GiB"]
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        lines.append(f"device    {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    lines.append(f"threads   torch uses {torch.get_num_threads()}")
    versions = [f"farms_tb {farms_tb.__version__}", f"torch {torch.__version__}"]
    versions += [f"{package} {version(package)}" for package in packages]
    lines.append(f"versions  {', '.join(versions)}, Python {platform.python_version()}")
    return "\n".join(lines)


def resident_bytes() -> int:
    """Return the memory that this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
