"""What each metric and each verdict means, in one sentence for people.

The page shows these sentences on its headings and values, and the documentation has them as a table. They say what
a number tells; how it is computed stands with the code that computes it.
"""

from __future__ import annotations

from farms_tb.verdicts import Verdict

__all__ = ["METRICS", "OF_THE_NULL", "VERDICTS"]

METRICS: dict[str, str] = {
    "alpha": (
        "Power-law exponent of the tail of the ESD. A smaller alpha means a heavier tail: more structure in the "
        "weights, or a collapse, which the verdict tells."
    ),
    "alpha_error": "Standard error of alpha: how far alpha would move if the weights were drawn again.",
    "effect": (
        "Alpha minus the mean alpha of the same weights in random order: how much was learnt. Negative for a "
        "heavier tail, 0 for a random layer."
    ),
    "effect_error": "Standard error of the effect: that of alpha, and that of the mean over the shuffles.",
    "z_score": (
        "Effect over the standard deviation of the shuffled alphas: is it noise? It grows with the layer's size, "
        "whatever was learnt."
    ),
    "z_error": "Standard error of the z-score, which comes from a few shuffles.",
    "entropy_z_score": "The same as the z-score for the entropy of the ESD, which tells small layers better.",
    "null_mean": "Mean alpha of the same weights in random order, the permutation null.",
    "null_std": "Standard deviation of alpha over the shuffles of the permutation null.",
    "ks_distance": "Kolmogorov-Smirnov distance between the tail and the fitted power law: 0 is the best.",
    "rank_99": "Number of directions that hold 99 % of the energy, the sum of the eigenvalues.",
    "rank_share": (
        "Share of the directions that hold 99 % of the energy: near 1 where all directions count, near 0 for a "
        "collapsed layer."
    ),
    "dead_rows": (
        "Rows, the longer side of the weight, with a norm below 1e-3 of the largest row's: dead outputs of a "
        "layer with more outputs than inputs, else unused inputs."
    ),
    "dead_columns": ("Columns, the shorter side of the weight, with a norm below 1e-3 of the largest column's."),
    "log_norm": "Log10 of the squared Frobenius norm of the weight.",
    "alpha_hat": "Alpha times log10 of the largest eigenvalue: WeightWatcher's weighted alpha.",
    "stable_rank": (
        "Squared Frobenius norm over squared largest singular value of the whole matrix, mean over the K "
        "matrices: small where few directions dominate. Also known where windows are whole matrices."
    ),
    "pooled_stable_rank": "The papers' stable rank, of pooled windows: not the rank of any matrix.",
    "spectral_norm": "Largest eigenvalue: the squared largest singular value of what was measured.",
    "num_eigenvalues": "Number of eigenvalues that alpha is fitted on.",
    "num_spikes": "Eigenvalues of the whole matrices above the edge of random ones, at 99.9 %.",
    "num_traps": "Such outliers of the shuffled entries, at 99 %, mean over the shuffles: large single entries.",
}
"""By the name of the metric in a `LayerRecord` and in the columns of files."""

OF_THE_NULL = (
    "effect",
    "effect_error",
    "z_score",
    "z_error",
    "entropy_z_score",
    "null_mean",
    "null_std",
    "stable_rank",
    "num_spikes",
    "num_traps",
)
"""Metrics that need a permutation null, or come with one."""

VERDICTS: dict[Verdict, str] = {
    Verdict.TRAINED: "Its ESD tells it from the same weights in random order: something was learnt.",
    Verdict.RANDOM: "Nothing tells it from random weights. Is it used, and does it get gradients?",
    Verdict.COLLAPSED: "Few directions hold its energy, and alpha is small for that reason alone.",
    Verdict.LOW_RANK: "Zeros or rounding errors make up the tail, so it has no alpha.",
    Verdict.OUTLIERS: "Some entries are so large that one alone makes an outlier, also in random order.",
    Verdict.NO_POWER_LAW: "The tail is far from the fitted power law: its alpha means nothing.",
    Verdict.NOT_MEASURED: "It has too few eigenvalues, or none; the status says why.",
}
"""What a verdict says of a layer; the rules behind them are those of `farms_tb.verdicts`."""
