"""Pictures of what was logged and measured, for papers and for a first look; needs matplotlib (extra `plot`).

Over training, from `read_history(".../metrics.csv")`: `plot_alpha_curves`, `plot_ratio_curves`, `plot_ratio_map`.
Of one measurement, from `analyze(...)`: `plot_alpha_by_depth`, `plot_full_against_farms`, `plot_esd`, `plot_esds`;
with permutation nulls `plot_effect_plane`.
All that a run folder has: `save_all`.
Of several runs, from `farms_tb.viewing.several_runs.read_runs([...])`: `plot_mean_alpha`, `plot_alpha_by_layer`,
`plot_ratio_spread`, `plot_metrics`, `plot_runs_by_depth`, and all of them: `save_comparison`.
"""

from __future__ import annotations

from farms_tb.viewing.history import Curve, History
from farms_tb.viewing.metrics_csv import read_history
from farms_tb.viewing.plots.comparison import save_comparison
from farms_tb.viewing.plots.curves import plot_alpha_curves, plot_ratio_curves, plot_ratio_map
from farms_tb.viewing.plots.everything import not_drawn, save_all
from farms_tb.viewing.plots.layers import plot_alpha_by_depth, plot_full_against_farms
from farms_tb.viewing.plots.plane import plot_effect_plane
from farms_tb.viewing.plots.runs import (
    plot_alpha_by_layer,
    plot_mean_alpha,
    plot_metrics,
    plot_ratio_spread,
    plot_runs_by_depth,
)
from farms_tb.viewing.plots.spectra import plot_esd, plot_esds

__all__ = [
    "Curve",
    "History",
    "not_drawn",
    "plot_alpha_by_depth",
    "plot_alpha_by_layer",
    "plot_alpha_curves",
    "plot_effect_plane",
    "plot_esd",
    "plot_esds",
    "plot_full_against_farms",
    "plot_mean_alpha",
    "plot_metrics",
    "plot_ratio_curves",
    "plot_ratio_map",
    "plot_ratio_spread",
    "plot_runs_by_depth",
    "read_history",
    "save_all",
    "save_comparison",
]
