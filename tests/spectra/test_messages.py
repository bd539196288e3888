"""Errors of options and solvers that no other test of this room reaches."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from importlib import util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from farms_tb import SpectrumOptions, analyze
from farms_tb.options import RatioOptions
from farms_tb.spectra.solvers import _cupy

without_cupy = pytest.mark.skipif(util.find_spec("cupy") is not None, reason="CuPy is installed")


@without_cupy
def test_cupy_that_is_not_installed() -> None:
    with pytest.raises(ValueError, match=r"solver='cupy' needs cupy: pip install"):
        SpectrumOptions(solver="cupy")


def test_an_object_of_other_options() -> None:
    wrong: Any = RatioOptions(assign_func="tb_linear_map")
    with pytest.raises(TypeError, match=r"spectrum must be SpectrumOptions.*by name"):
        analyze(nn.Linear(9, 9), spectrum=wrong)


def test_cupy_short_of_memory_is_torchs_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement then solves fewer windows at a time. CuPy needs a GPU, so a stand-in raises its error."""

    def eigvalsh(_: Any) -> None:
        raise MemoryError("2 bytes too many")

    cuda = SimpleNamespace(
        ExternalStream=lambda stream, device: nullcontext(),
        Device=lambda device: nullcontext(),
        memory=SimpleNamespace(OutOfMemoryError=MemoryError),
    )
    cupy = SimpleNamespace(cuda=cuda, linalg=SimpleNamespace(eigvalsh=eigvalsh), from_dlpack=lambda array: array)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    with pytest.raises(torch.OutOfMemoryError, match="CuPy: 2 bytes too many"):
        _cupy(torch.eye(3)[None])
