"""What is logged of a measurement: a row of metrics, histograms, a table and pictures.

Keys of a row: `farms/alpha/<layer>`, `farms/ratio/<layer>`, `farms/lr/<layer>`, `farms/alpha_mean`,
`farms/alpha_std`, `farms/ratio_mean`, `epoch`; with the noise-aware map also `farms/z/<layer>` and `farms/lambda`.
Models of more than `MAX_LOGGED_LAYERS` layers log the aggregates only.

W&B and TensorBoard make a section of what stands before the first slash of a key, and sort the panels in it by
name. For these two the keys of a layer are therefore `farms_alpha/03_<layer>`: each metric has a section, W&B's
choice between the first and the last slash makes no difference, and the layer's depth, zero-padded, puts the
panels in order. ESDs are `farms_esd/03_<layer>`; the table and the pictures join the aggregates in the section
`farms`.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from farms_tb.balancing.ratio_maps import RatioSummary
from farms_tb.options import XAxis
from farms_tb.report import EsdHistogram, Report
from farms_tb.viewing.history import Curve, History
from farms_tb.warnings import warn_once

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LOGGED_LAYERS = 1000
"""W&B's pages become slow beyond 10 000 metrics in a project. A layer has at most seven: alpha, ratio, lr, z-score
and the three parts of a histogram. The remaining 3000 are left to the user's own metrics."""

TABLE = "farms/report"
COLUMNS = (
    "layer",
    "shape",
    "alpha",
    "alpha_error",
    "ks_distance",
    "stable_rank",
    "ratio",
    "lr",
    "z",
    "status",
)


@dataclass(frozen=True)
class Measurement:
    """One measurement of a model in training, and what followed from it.

    Attributes:
        report: the measurement.
        ratios: learning-rate ratio of each layer; empty where no step follows.
        lrs: learning rate of each layer; empty where no step follows.
        summary: metrics of the update as a whole, by the key they are logged under.
        epoch: completed epochs.
        step: the step under which the measurement is logged.
        trained: names of the layers that an optimizer trains; None for all.
        table: log table and pictures too.
    """

    report: Report
    ratios: Mapping[str, float]
    lrs: Mapping[str, float]
    summary: Mapping[str, float]
    epoch: float
    step: int
    trained: Container[str] | None = None
    table: bool = False

    def row(self, *, by_depth: bool = False) -> dict[str, float]:
        """Return the row to log; `by_depth` with the keys for W&B and TensorBoard."""
        aggregates = self.aggregates() | dict(self.summary)
        return {
            "epoch": self.epoch,
            **measurement_row(self.report, self.ratios, self.lrs, aggregates, by_depth=by_depth),
        }

    def aggregates(self) -> dict[str, float]:
        """Return mean and standard deviation of alpha over the layers that are trained, see `alpha_summary`."""
        return alpha_summary(self.report, self.trained)


@dataclass(frozen=True)
class Media:
    """Non-scalar artifacts of a measurement.

    Attributes:
        table: a row for each layer, with the values of `COLUMNS`; None where there is no value.
        pictures: by the key they are logged under; empty where matplotlib is not installed.
    """

    table: list[list[Any]]
    pictures: Mapping[str, Figure]


@dataclass
class RunLog:
    """What a run of training remembers for its logs: the curves so far, and what W&B was told.

    Attributes:
        x_axis: what W&B plots the curves against.
    """

    x_axis: XAxis
    _alphas: dict[str, list[tuple[float, int, float]]] = field(default_factory=dict)
    _ratios: dict[str, list[tuple[float, int, float]]] = field(default_factory=dict)
    _keys: dict[str, set[str]] = field(default_factory=dict)

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement for the curves in the pictures."""
        when = (measurement.epoch, measurement.step)
        for points, values in (
            (self._alphas, measurement.report.alphas),
            (self._ratios, measurement.ratios),
        ):
            for name, value in values.items():
                if value is not None:
                    points.setdefault(name, []).append((*when, value))

    def media(self, measurement: Measurement) -> Media:
        """Return the table of a measurement, and the pictures of the run so far."""
        layers = tuple(measurement.report.layers)
        history = History(alpha=_curves(self._alphas), ratio=_curves(self._ratios), layers=layers)
        return Media(table(measurement), pictures(measurement.report, history))

    def new_keys(self, run_id: str, keys: Iterable[str]) -> list[str]:
        """Return the keys that a W&B run has not had before."""
        known = self._keys.setdefault(run_id, set())
        new = [key for key in keys if key not in known]
        known.update(new)
        return new


def choose_x_axis(x_axis: XAxis | None, every_n_steps: int | None) -> XAxis:
    """Return what to plot curves against: None means the unit in which measurements are spaced."""
    if x_axis is None:
        return "epoch" if every_n_steps is None else "step"
    return x_axis


def warn_of_many_layers(number: int, model: object) -> None:
    """Say, once for each model, that its layers are too many to log."""
    if number > MAX_LOGGED_LAYERS:
        warn_once(
            f"the model has {number} layers: with more than {MAX_LOGGED_LAYERS}, only farms/alpha_mean and "
            "farms/alpha_std are logged; the callback's report and ratios hold every layer",
            model,
        )


def summary_row(summary: RatioSummary) -> dict[str, float]:
    """Return the keys and values to log of what an update did as a whole.

    Args:
        summary: `LayerBalancer.summary`: `mean_ratio`, the mean ratio of the balanced layers or None, and
            `noise_lambda`, the noise-aware map's lambda of each kind of layer.

    Returns:
        `farms/ratio_mean`; `farms/lambda` of real weights, the only kind in most models, and
        `farms/lambda_<kind>` of others.
    """
    row = {} if summary.mean_ratio is None else {"farms/ratio_mean": summary.mean_ratio}
    for kind, value in summary.noise_lambda.items():
        row["farms/lambda" if kind == "real" else f"farms/lambda_{kind}"] = value
    return row


def alpha_summary(report: Report, trained: Container[str] | None = None) -> dict[str, float]:
    """Return mean and standard deviation of alpha over the real layers that are trained.

    Alphas of complex spectral weights are on another scale, so the two kinds are not mixed: where no real layer is
    left the spectral ones are taken. Where none of the trained layers has an alpha, all layers are taken.

    Args:
        report: the measurement.
        trained: names of the layers that an optimizer trains; None for all. A frozen teacher inside the model, or
            the frozen weights below adapters, would hide what training does.

    Returns:
        `farms/alpha_mean` and `farms/alpha_std`; empty where no layer has an alpha.
    """
    known = {name: record for name, record in report.layers.items() if record.alpha is not None}
    records = [record for name, record in known.items() if trained is None or name in trained]
    records = records or list(known.values())
    real = [record for record in records if record.kind == "real"]
    alphas = [record.alpha for record in real or records if record.alpha is not None]
    if not alphas:
        return {}
    mean = math.fsum(alphas) / len(alphas)
    variance = math.fsum((alpha - mean) ** 2 for alpha in alphas) / len(alphas)
    return {"farms/alpha_mean": mean, "farms/alpha_std": math.sqrt(variance)}


def measurement_row(
    report: Report,
    ratios: Mapping[str, float],
    lrs: Mapping[str, float],
    summary: Mapping[str, float],
    *,
    by_depth: bool = False,
) -> dict[str, float]:
    """Return one measurement as a row of metrics: the aggregates, and each layer's alpha, ratio, lr and z-score.

    Args:
        report: the measurement.
        ratios: learning-rate ratio of each layer.
        lrs: learning rate of each layer.
        summary: aggregates by key; mean and standard deviation of alpha over all layers where it lacks them.
        by_depth: number the layers, as for W&B and TensorBoard.

    Returns:
        The row; the aggregates only where the model has more than `MAX_LOGGED_LAYERS` layers.
    """
    row = {**alpha_summary(report), **summary}
    if len(report.layers) > MAX_LOGGED_LAYERS:
        return row
    shown = depth_names(report) if by_depth else {name: name for name in report.layers}
    prefix = "farms_" if by_depth else "farms/"
    for name, record in report.layers.items():
        if not record.kind:
            continue
        metrics = {"alpha": record.alpha, "ratio": ratios.get(name), "lr": lrs.get(name), "z": record.z_score}
        row.update({f"{prefix}{k}/{shown[name]}": v for k, v in metrics.items() if v is not None})
    return row


def depth_names(report: Report) -> dict[str, str]:
    """Return the layers' names after their depth, so that sorted by name they are in order: `03_layer1.0.conv1`.

    The first layer of the report has number 0, and the numbers have as many digits as the last, at least two.
    """
    digits = max(2, len(str(len(report.layers) - 1)))
    return {name: f"{depth:0{digits}d}_{name}" for depth, name in enumerate(report.layers)}


def esd_histograms(report: Report) -> dict[str, EsdHistogram]:
    """Return the ESDs that were counted, by the key they are logged under; none where layers are too many."""
    if len(report.layers) > MAX_LOGGED_LAYERS:
        return {}
    histograms = {shown: report.layers[name].histogram for name, shown in depth_names(report).items()}
    return {f"farms_esd/{shown}": h for shown, h in histograms.items() if h is not None}


def table(measurement: Measurement) -> list[list[Any]]:
    """Return the values of `COLUMNS` for each layer."""
    return [
        [
            name,
            "x".join(map(str, r.shape)),
            r.alpha,
            r.alpha_error,
            r.ks_distance,
            r.stable_rank,
            measurement.ratios.get(name),
            measurement.lrs.get(name),
            r.z_score,
            r.status,
        ]
        for name, r in measurement.report.layers.items()
    ]


def pictures(report: Report, history: History) -> dict[str, Figure]:
    """Draw what there is data for, by the keys the pictures are logged under; nothing without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return {}
    from farms_tb.viewing.plots import plot_alpha_by_depth, plot_alpha_curves, plot_ratio_map

    drawn = {}
    if history.alpha:
        drawn["farms/alpha_curves"] = plot_alpha_curves(history)
    if history.ratio:
        drawn["farms/ratio_map"] = plot_ratio_map(history)
    if any(alpha is not None for alpha in report.alphas.values()):
        drawn["farms/alpha_by_depth"] = plot_alpha_by_depth(report)
    return drawn


def _curves(points: Mapping[str, list[tuple[float, int, float]]]) -> dict[str, Curve]:
    return {name: Curve(*zip(*found, strict=True)) for name, found in points.items()}
