"""FARMS alphas and layer-wise learning rates for PyTorch and Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farms_tb.analysis import analyze
from farms_tb.matrices import MatrixStack, NoSpectrumError, layer_matrices
from farms_tb.report import EsdHistogram, LayerRecord, Report
from farms_tb.temperature import lr_ratios

__all__ = [
    "EsdHistogram",
    "LayerRecord",
    "MatrixStack",
    "NoSpectrumError",
    "Report",
    "analyze",
    "layer_matrices",
    "lr_ratios",
]
