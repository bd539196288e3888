"""FARMS alphas and layer-wise learning rates for PyTorch and Lightning.

- `analyze(model)`: how well each layer is trained, as a report.
- `analyze_checkpoint(path)`: the same of a file of weights, safe for files of others.
- `FARMSTempBalance()`: the Lightning callback that measures, balances and logs.
- `FARMSTrainerCallback()`: the same for Hugging Face's Trainer; needs the extra `transformers`.
- `TempBalance(model, optimizer)`: the same for a plain PyTorch loop.
- `farms_tb.sparsity`: how much of each layer to prune, and pruning.
- `lr_ratios(alphas)`: the maps from alphas to learning-rate ratios.
- `SpectrumOptions`, `RatioOptions`, `ScheduleOptions`, `LoggingOptions`: what all of these can be asked for.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from farms_tb._moved import MovedModules
from farms_tb.analysis import analyze, analyze_checkpoint
from farms_tb.balancing.loop import TempBalance
from farms_tb.balancing.ratio_maps import lr_ratios
from farms_tb.balancing.step_groups import StepGroup
from farms_tb.options import LoggingOptions, RatioOptions, ScheduleOptions, SpectrumOptions
from farms_tb.report import EsdHistogram, LayerRecord, Report
from farms_tb.verdicts import Verdict
from farms_tb.weights.matrices import layer_matrices
from farms_tb.weights.stacks import MatrixStack, NoSpectrumError

if TYPE_CHECKING:
    from farms_tb.training.huggingface import FARMSTrainerCallback as FARMSTrainerCallback
    from farms_tb.training.lightning import FARMSTempBalance

__version__ = "0.2.0"

sys.meta_path.insert(0, MovedModules())

# Not FARMSTrainerCallback: `from farms_tb import *` works without transformers.
__all__ = [
    "EsdHistogram",
    "FARMSTempBalance",
    "LayerRecord",
    "LoggingOptions",
    "MatrixStack",
    "NoSpectrumError",
    "RatioOptions",
    "Report",
    "ScheduleOptions",
    "SpectrumOptions",
    "StepGroup",
    "TempBalance",
    "Verdict",
    "analyze",
    "analyze_checkpoint",
    "layer_matrices",
    "lr_ratios",
]


def __getattr__(name: str) -> Any:
    """Import a callback, with its trainer's package, or the package for pruning, only for those who use it."""
    if name == "sparsity":
        return importlib.import_module("farms_tb.sparsity")
    if name == "FARMSTempBalance":
        from farms_tb.training.lightning import FARMSTempBalance

        return FARMSTempBalance
    if name == "FARMSTrainerCallback":
        from farms_tb.training.huggingface import FARMSTrainerCallback

        return FARMSTrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
