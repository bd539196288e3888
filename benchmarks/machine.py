"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import farms_tb


def describe() -> str:
    """Return processor, cores, memory and versions in one line each."""
    return "\n".join(
        (
            f"machine   {_processor()}, {len(os.sched_getaffinity(0))} cores, {_memory():.0f} GiB",
            f"threads   torch uses {torch.get_num_threads()}",
            f"versions  farms_tb {farms_tb.__version__}, torch {torch.__version__}, "
            f"Python {platform.python_version()}",
        )
    )


def resident_bytes() -> int:
    """Return the memory that this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
