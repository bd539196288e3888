"""What a measurement found: one record a layer, printed as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from farms_tb.missing import cannot_import
from farms_tb.options import Metric
from farms_tb.printable import printable
from farms_tb.verdicts import Verdict, verdict_of

if TYPE_CHECKING:
    import pandas as pd

OK = "ok"

COLLAPSED = 1e-6
"""The tail of a collapsed layer begins below this fraction of its largest eigenvalue.

Measured: in three runs of a UNet with too strong an L2 penalty, the layers of which fewer than 5 % of the
directions hold 99 % of the energy begin their tails below 5e-7, all others above 9e-6. No layer of the same UNet
trained with AdamW is below 5e-4, and none of all-MiniLM-L6-v2 below 5e-3.
"""

DERIVED = ("rank_share", "effect", "effect_error", "z_score", "z_error", "entropy_z_score")
"""Metrics of a record that follow from others, and are in the rows of a report, too."""


DRAWN = ("histogram", "outliers")
"""Fields of a record that pictures alone need: tables, files and checkpoints leave them out."""


@dataclass(frozen=True)
class EsdHistogram:
    """An empirical spectral density as counts over equal bins of log10 of the eigenvalues.

    Attributes:
        counts: eigenvalues in each bin; zeros among the eigenvalues are left out.
        low: log10 of the smallest positive eigenvalue, the left edge of the first bin.
        high: log10 of the largest eigenvalue, the right edge of the last bin.
    """

    counts: tuple[int, ...]
    low: float
    high: float


@dataclass(frozen=True)
class Outliers:
    """Eigenvalues of a layer's whole matrices beyond the edge of a random one, in units of `spectral_norm`.

    Attributes:
        edge: the eigenvalue above which one of the matrices is a spike.
        spikes: the spikes of all K matrices, ascending: `num_spikes` of them.
        traps: the outliers of all shuffles together, ascending: `num_traps` of them a shuffle; their edge is a
            little lower. None without a permutation null.
    """

    edge: float
    spikes: tuple[float, ...] = ()
    traps: tuple[float, ...] | None = None


@dataclass(frozen=True)
class LayerRecord:
    """The metrics of one layer. With several blocks, each is the mean over blocks, if it is one of eigenvalues.

    Attributes:
        alpha: power-law exponent of the tail of the ESD; None where there is none, and `status` says why.
        ks_distance: Kolmogorov-Smirnov distance between the tail and the fitted law, 0 the best.
        alpha_hat: alpha * log10(largest eigenvalue).
        spectral_norm: largest eigenvalue: the squared largest singular value of a window, or with `esd="full"` of
            the whole matrix; half of it for convolutions, as in the papers.
        norm: sum of the eigenvalues, likewise: the squared Frobenius norm of a sample of windows, or with
            `esd="full"` of the matrix.
        stable_rank: ||W||_F^2 / ||W||_2^2 of the whole weight matrix, the mean over the K matrices. None where it
            would have cost more than the measurement: it is known where the windows are whole matrices, as with
            `esd="full"`, and together with a permutation null.
        pooled_stable_rank: sum / largest eigenvalue of a sample, the papers' stable rank. A sample pools several
            matrices or windows, so that it may be far above the rank of any of them.
        norm_stable_rank: sum / number of eigenvalues before filtering, by the papers' name.
        entropy: Shannon entropy of the eigenvalues as shares of their sum, over its maximum log N: 1 for equal
            eigenvalues, towards 0 where one dominates.
        num_eigenvalues: eigenvalues in all samples together, after filtering; on the meta device the number that a
            measurement would solve for.
        status: `"ok"`, or the reason why there is no alpha, or why it means something else (`collapsed`).
        alpha_error: standard error of alpha, see `farms_tb.spectra.standard_error`.
        xmin: eigenvalue at which the tail begins; the geometric mean over blocks.
        tail_floor: xmin / largest eigenvalue, the geometric mean over blocks: how far down the tail reaches.
        rank_99: number of largest eigenvalues that hold 99 % of the sum, over all blocks; compare it with
            `num_eigenvalues`.
        null_mean: mean alpha of random layers of this shape, where asked for: the same entries, shuffled.
        null_std: standard deviation of their alphas.
        null_draws: number of shuffles that these two come from.
        null_entropy_mean: mean entropy of the same shuffled layers.
        null_entropy_std: standard deviation of their entropies.
        num_traps: mean number of eigenvalues of a shuffled layer that are outliers, summed over its K matrices;
            None without a permutation null. See `farms_tb.spectra.whole_matrix`.
        num_spikes: number of eigenvalues of the whole matrices that are outliers; None without a permutation null.
        log_norm: log10 of the squared Frobenius norm of the weight, all K matrices together.
        dead_rows: number of rows, of all K matrices together, whose norm is below 1e-3 of the largest row's. Rows
            are those of the stack, where R >= C: outputs of a layer with more outputs than inputs, else inputs.
        dead_columns: the same of columns, the other side.
        adapter_change: ||W' - W||_F / ||W||_F, by how much adapters such as LoRA change the weight W that they are
            added to; None for a layer without adapters.
        kind: `"real"` or `"spectral"` (complex) weights; empty where there is no stack.
        shape: (K, R, C) of the stack of matrices; empty where there is none.
        solver: what solved for the eigenvalues, `"cpu"`, `"torch"` or `"cupy"`, and in which precision: `float32`
            or `float64`, with `svd` where some window needed its singular values.
        histogram: the ESD of all samples together, where asked for.
        outliers: the eigenvalues that `num_spikes` and `num_traps` count.
    """

    alpha: float | None = None
    ks_distance: float | None = None
    alpha_hat: float | None = None
    spectral_norm: float | None = None
    norm: float | None = None
    stable_rank: float | None = None
    pooled_stable_rank: float | None = None
    norm_stable_rank: float | None = None
    entropy: float | None = None
    alpha_error: float | None = None
    xmin: float | None = None
    tail_floor: float | None = None
    rank_99: int | None = None
    null_mean: float | None = None
    null_std: float | None = None
    null_draws: int | None = None
    null_entropy_mean: float | None = None
    null_entropy_std: float | None = None
    num_traps: float | None = None
    num_spikes: int | None = None
    log_norm: float | None = None
    dead_rows: int | None = None
    dead_columns: int | None = None
    adapter_change: float | None = None
    num_eigenvalues: int = 0
    status: str = OK
    kind: str = ""
    shape: tuple[int, ...] = ()
    solver: str = ""
    histogram: EsdHistogram | None = field(default=None, repr=False)
    outliers: Outliers | None = field(default=None, repr=False)

    @property
    def rank_share(self) -> float | None:
        """Share of the eigenvalues that hold 99 % of their sum: near 1 where all directions count."""
        return self.rank_99 / self.num_eigenvalues if self.rank_99 and self.num_eigenvalues else None

    @property
    def collapsed(self) -> bool:
        """Whether the spectrum has collapsed: few directions hold the energy, and make alpha small."""
        return self.tail_floor is not None and self.tail_floor < COLLAPSED

    @property
    def null(self) -> tuple[float, float] | None:
        """`null_mean` and `null_std`; None where they were not asked for."""
        return None if self.null_mean is None or self.null_std is None else (self.null_mean, self.null_std)

    @property
    def effect(self) -> float | None:
        """Alpha minus that of the shuffled entries: how much has been learnt, negative for a heavier tail."""
        return None if self.alpha is None or self.null_mean is None else self.alpha - self.null_mean

    @property
    def effect_error(self) -> float | None:
        """Standard error of `effect`: that of alpha, and of the mean over n shuffles.

        It is sqrt(alpha_error^2 + null_std^2 / n).
        """
        if self.effect is None or self.alpha_error is None or self.null_std is None:
            return None
        return math.hypot(self.alpha_error, self.null_std / math.sqrt(self.null_draws or 1))

    @property
    def z_score(self) -> float | None:
        """Effect in standard deviations of the permutation null: is it noise? None without a null.

        It grows with the size of the layer, whatever was learnt: compare layers by `effect`.
        """
        return None if self.effect is None or not self.null_std else self.effect / self.null_std

    @property
    def z_error(self) -> float | None:
        """Standard error of `z_score`, sqrt(1 / n + z^2 / (2 (n - 1))) for n shuffles, of which z is made."""
        if self.z_score is None or self.null_draws is None or self.null_draws < 2:
            return None
        return math.sqrt(1 / self.null_draws + self.z_score**2 / (2 * (self.null_draws - 1)))

    @property
    def entropy_z_score(self) -> float | None:
        """Entropy minus that of the shuffled entries, in standard deviations; None without a null.

        It tells small layers from random ones where alpha, made of a few eigenvalues, does not.
        """
        if self.entropy is None or self.null_entropy_mean is None or not self.null_entropy_std:
            return None
        return (self.entropy - self.null_entropy_mean) / self.null_entropy_std

    @property
    def verdict(self) -> Verdict | None:
        """What the metrics say of the layer; None where only a permutation null could tell. See `verdict_of`."""
        return verdict_of(self)

    def metric(self, name: Metric) -> float | None:
        """Return a metric to map to learning-rate ratios, or None where the layer has no alpha.

        Args:
            name: `"stable_rank"` has the papers' meaning, as it always had: `pooled_stable_rank`.
        """
        value: float | None = getattr(self, "pooled_stable_rank" if name == "stable_rank" else name)
        return None if self.alpha is None else value

    def as_plain(self) -> dict[str, Any]:
        """Return the fields but those of `DRAWN` as numbers, strings and a list, for files and checkpoints."""
        # `dataclasses.asdict` takes thirty times as long, at every checkpoint.
        plain = {**vars(self), "shape": list(self.shape)}
        for drawn in DRAWN:
            del plain[drawn]
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> LayerRecord:
        """Return the record of which `plain` is `as_plain()`; fields that are missing are at their defaults."""
        return cls(**{**plain, "shape": tuple(plain["shape"])})


@dataclass(frozen=True)
class Report:
    """One measurement of a model.

    Attributes:
        layers: record of each layer by name, in order of registration.
        options: the options of the measurement as a flat dict.
    """

    layers: dict[str, LayerRecord]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def alphas(self) -> dict[str, float | None]:
        """Alpha of each layer by name; what `farms_tb.lr_ratios` takes."""
        return {name: record.alpha for name, record in self.layers.items()}

    @property
    def z_scores(self) -> dict[str, float | None]:
        """z-score of each layer by name; what `farms_tb.lr_ratios` takes for the noise-aware map."""
        return {name: record.z_score for name, record in self.layers.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dict of plain values a layer, for a table or a file."""
        rows = []
        for name, record in self.layers.items():
            row = {"layer": name, **record.as_plain()}
            row |= {metric: getattr(record, metric) for metric in DERIVED}
            row["verdict"] = None if record.verdict is None else str(record.verdict)
            row["shape"] = "x".join(map(str, record.shape))
            rows.append(row)
        return rows

    def to_dataframe(self) -> pd.DataFrame:
        """Return the report as a pandas `DataFrame`, one row a layer, indexed by layer.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(cannot_import("to_dataframe()", error, "pip install pandas")) from error
        return pd.DataFrame(self.rows()).set_index("layer")

    def __str__(self) -> str:
        """Return a table: a row a layer; `rank 99 %` is the share of directions that hold 99 % of the energy."""
        header = ("layer", "K x R x C", "alpha", "KS", "alpha_hat", "spec. norm", "rank 99 %", "N", "status")
        table: list[tuple[str, ...]] = [header]
        for name, r in self.layers.items():
            metrics = map(_short, (r.alpha, r.ks_distance, r.alpha_hat, r.spectral_norm))
            shape = " x ".join(map(str, r.shape)) or "-"
            share = "-" if r.rank_share is None else f"{r.rank_share:.0%}"
            count = str(r.num_eigenvalues or "-")
            table.append((printable(name), shape, *metrics, share, count, printable(r.status)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [_line(cells, widths) for cells in table]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join(lines)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    """Align names and reasons, which come first and last, to the left, and numbers to the right."""
    aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    aligned[0] = cells[0].ljust(widths[0])
    aligned[-1] = cells[-1]
    return "  ".join(aligned).rstrip()
