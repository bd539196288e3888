"""FARMS alphas and layer-wise learning rates for PyTorch and Lightning.

- `analyze(model)`: how well each layer is trained, as a report.
- `analyze_checkpoint(path)`: the same of a file of weights, safe for files of others.
- `FARMSTempBalance()`: the Lightning callback that measures, balances and logs.
- `FARMSTrainerCallback()`: the same for Hugging Face's Trainer; needs the extra `transformers`.
- `TempBalance(model, optimizer)`: the same for a plain PyTorch loop.
- `lr_ratios(alphas)`: the maps from alphas to learning-rate ratios.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farms_tb.analysis import analyze
from farms_tb.balance import StepGroup, TempBalance
from farms_tb.checkpoint import analyze_checkpoint
from farms_tb.matrices import MatrixStack, NoSpectrumError, layer_matrices
from farms_tb.report import EsdHistogram, LayerRecord, Report
from farms_tb.temperature import lr_ratios

if TYPE_CHECKING:
    from farms_tb.callback import FARMSTempBalance
    from farms_tb.huggingface import FARMSTrainerCallback as FARMSTrainerCallback

__version__ = "0.1.0"

# Not FARMSTrainerCallback: `from farms_tb import *` works without transformers.
__all__ = [
    "EsdHistogram",
    "FARMSTempBalance",
    "LayerRecord",
    "MatrixStack",
    "NoSpectrumError",
    "Report",
    "StepGroup",
    "TempBalance",
    "analyze",
    "analyze_checkpoint",
    "layer_matrices",
    "lr_ratios",
]


def __getattr__(name: str) -> Any:
    """Import a callback, and its trainer's package with it, only for those who use it."""
    if name == "FARMSTempBalance":
        from farms_tb.callback import FARMSTempBalance

        return FARMSTempBalance
    if name == "FARMSTrainerCallback":
        from farms_tb.huggingface import FARMSTrainerCallback

        return FARMSTrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
