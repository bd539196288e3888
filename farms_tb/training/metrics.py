"""What is logged of a measurement: a row of metrics, histograms, a table and pictures.

Keys of a row: `farms/alpha/<layer>`, `farms/ratio/<layer>`, `farms/lr/<layer>`, `farms/rank_share/<layer>`,
`farms/alpha_mean`, `farms/alpha_std`, `farms/ratio_mean`, `epoch`; where layers are compared with their
permutation nulls (`verdicts=True`, the noise-aware map and that of shrunk effects) also `farms/z/<layer>`,
`farms/effect/<layer>` and `farms/share_<verdict>`; with the noise-aware map `farms/lambda`, with that of shrunk
effects `farms/tau` and `farms/mean_weight`.
Models of more than `MAX_LOGGED_LAYERS` layers log the aggregates only.

W&B and TensorBoard make a section of what stands before the first slash of a key, and sort the panels in it by
name. For these two the keys of a layer are therefore `farms_alpha/03_<layer>`: each metric has a section, W&B's
choice between the first and the last slash makes no difference, and the layer's depth, zero-padded, puts the
panels in order. ESDs are `farms_esd/03_<layer>`; the table and the pictures join the aggregates in the section
`farms`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from farms_tb.balancing.report_ratios import RatioSummary
from farms_tb.options import XAxis
from farms_tb.printable import printable
from farms_tb.report import EsdHistogram, Report
from farms_tb.verdicts import Verdict
from farms_tb.viewing.history import Curve, History
from farms_tb.warnings import warn_once

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYER_METRICS = ("alpha", "ratio", "lr", "z", "effect", "rank_share", "adapter_change")
"""What is logged of each layer, as far as it is known, besides a histogram, which W&B counts as three metrics."""
MAX_LOGGED_LAYERS = 9_000 // (len(LAYER_METRICS) + 3)
"""W&B's pages become slow beyond 10 000 metrics in a project; 1000 are left to the user's own."""

TABLE = "farms/report"
"""Key under which the table is logged."""
COLUMNS = (
    "layer",
    "shape",
    "alpha",
    "alpha_error",
    "ks_distance",
    "rank_share",
    "stable_rank",
    "ratio",
    "lr",
    "z",
    "effect",
    "verdict",
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
        """Return the row to log.

        Args:
            by_depth: number the layers in the keys, for W&B and TensorBoard.

        Returns:
            `epoch` and what `measurement_row` returns.
        """
        aggregates = self.aggregates() | dict(self.summary)
        row = measurement_row(self.report, self.ratios, self.lrs, aggregates, by_depth=by_depth)
        return {"epoch": self.epoch, **row}

    def aggregates(self) -> dict[str, float]:
        """Return what sums up the layers that are trained, see `alpha_summary` and `verdict_shares`."""
        return alpha_summary(self.report, self.trained) | verdict_shares(self.report, self.trained)


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

    It is not saved in checkpoints: after a resume the curves begin where the run was resumed.

    Attributes:
        x_axis: what W&B plots the curves against.
    """

    x_axis: XAxis
    _alphas: dict[str, list[tuple[float, int, float]]] = field(default_factory=dict)
    _ratios: dict[str, list[tuple[float, int, float]]] = field(default_factory=dict)
    _keys: dict[str, set[str]] = field(default_factory=dict)

    def add(self, measurement: Measurement) -> None:
        """Keep a measurement for the curves in the pictures.

        Args:
            measurement: the latest one; layers without an alpha have no point in this place of their curve.
        """
        when = (measurement.epoch, measurement.step)
        for name, alpha in measurement.report.alphas.items():
            if alpha is not None:
                self._alphas.setdefault(name, []).append((*when, alpha))
        for name, ratio in measurement.ratios.items():
            self._ratios.setdefault(name, []).append((*when, ratio))

    def media(self, measurement: Measurement) -> Media:
        """Return the table of a measurement, and the pictures of the run so far.

        Args:
            measurement: the latest one, which `add` has been given before.
        """
        layers = tuple(measurement.report.layers)
        history = History(alpha=_curves(self._alphas), ratio=_curves(self._ratios), layers=layers)
        return Media(table(measurement), pictures(measurement.report, history))

    def new_keys(self, run_id: str, keys: Iterable[str]) -> list[str]:
        """Return the keys that a W&B run has not had before, and note them.

        Args:
            run_id: id of the W&B run; a trainer may have several loggers.
            keys: keys that are about to be logged.
        """
        known = self._keys.setdefault(run_id, set())
        new = [key for key in keys if key not in known]
        known.update(new)
        return new


def warn_of_many_layers(number: int, model: object) -> None:
    """Warn, once for each model, where the number of its layers is too large to log each."""
    if number > MAX_LOGGED_LAYERS:
        warn_once(
            f"the model has {number} layers: with more than {MAX_LOGGED_LAYERS}, only what sums them up is logged "
            "(farms/alpha_mean, ...); the callback's report and ratios hold every layer",
            model,
        )


def summary_row(summary: RatioSummary) -> dict[str, float]:
    """Return the keys and values to log of what an update did as a whole.

    Args:
        summary: `LayerBalancer.summary`: `mean_ratio`, the mean ratio of the balanced layers or None, and
            `noise_lambda`, `tau` and `mean_weight` of each kind of layer.

    Returns:
        `farms/ratio_mean`; with the noise-aware map `farms/lambda`, with that of shrunk effects `farms/tau` and
        `farms/mean_weight`: of real weights, the only kind in most models. Keys of other kinds end in their name,
        `farms/lambda_spectral`.
    """
    row = {}
    if summary.mean_ratio is not None:
        row["farms/ratio_mean"] = summary.mean_ratio
    of_kinds = {"lambda": summary.noise_lambda, "tau": summary.tau, "mean_weight": summary.mean_weight}
    for name, by_kind in of_kinds.items():
        for kind, value in by_kind.items():
            key = f"farms/{name}" if kind == "real" else f"farms/{name}_{kind}"
            row[key] = value
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
        `farms/alpha_mean` and `farms/alpha_std` (of the population, divided by the number of layers); empty where
        no layer has an alpha.
    """
    alphas = _alphas_to_summarize(report, trained)
    if not alphas:
        return {}
    return {"farms/alpha_mean": fmean(alphas), "farms/alpha_std": pstdev(alphas)}


def verdict_shares(report: Report, trained: Container[str] | None = None) -> dict[str, float]:
    """Return the share of each verdict among the layers that are trained and were compared with random ones.

    Args:
        report: the measurement.
        trained: names of the layers that an optimizer trains; None for all.

    Returns:
        `farms/share_random`, `farms/share_trained`, `farms/share_collapsed` and so on, which add up to 1; empty
        where no layer was compared with its permutation null.
    """
    names = [name for name in report.layers if trained is None or name in trained]
    verdicts = [report.layers[name].verdict for name in names if report.layers[name].z_score is not None]
    if not verdicts:
        return {}
    return {
        f"farms/share_{verdict.value.replace(' ', '_')}": verdicts.count(verdict) / len(verdicts)
        for verdict in (Verdict.RANDOM, Verdict.TRAINED, Verdict.COLLAPSED, Verdict.NO_POWER_LAW)
    }


def _alphas_to_summarize(report: Report, trained: Container[str] | None) -> list[float]:
    """Return the alphas of the layers that a summary is about, see `alpha_summary`."""
    measured = {name: alpha for name, alpha in report.alphas.items() if alpha is not None}
    chosen = [name for name in measured if trained is None or name in trained] or list(measured)
    real = [name for name in chosen if report.layers[name].kind == "real"]
    return [measured[name] for name in real or chosen]


def measurement_row(
    report: Report,
    ratios: Mapping[str, float],
    lrs: Mapping[str, float],
    summary: Mapping[str, float],
    *,
    by_depth: bool = False,
) -> dict[str, float]:
    """Return one measurement as a row of metrics: the aggregates, and the metrics of each layer.

    Args:
        report: the measurement.
        ratios: learning-rate ratio of each layer.
        lrs: learning rate of each layer.
        summary: aggregates by key.
        by_depth: number the layers, as for W&B and TensorBoard.

    Returns:
        The row; the aggregates only where the model has more than `MAX_LOGGED_LAYERS` layers.
    """
    row = dict(summary)
    if len(report.layers) > MAX_LOGGED_LAYERS:
        return row
    prefix = "farms_" if by_depth else "farms/"
    for name, depth_name in depth_names(report).items():
        record = report.layers[name]
        if not record.kind:
            continue
        shown = depth_name if by_depth else name
        values = (
            *(record.alpha, ratios.get(name), lrs.get(name)),
            *(record.z_score, record.effect, record.rank_share, record.adapter_change),
        )
        for metric, value in zip(LAYER_METRICS, values, strict=True):
            if value is not None:
                row[f"{prefix}{metric}/{shown}"] = value
    return row


def depth_names(report: Report) -> dict[str, str]:
    """Return the layers' names after their depth, so that sorted by name they are in order: `03_layer1.0.conv1`.

    The first layer of the report has number 0, and the numbers have as many digits as the last, at least two.
    Characters that cannot be shown, of which W&B's client cannot send some, are escaped.
    """
    digits = max(2, len(str(len(report.layers) - 1)))
    return {name: f"{depth:0{digits}d}_{printable(name)}" for depth, name in enumerate(report.layers)}


def esd_histograms(report: Report) -> dict[str, EsdHistogram]:
    """Return the ESDs that were counted, by the key they are logged under.

    Returns:
        Histograms of log10 of the eigenvalues; empty where the measurement counted none, and where the model has
        more than `MAX_LOGGED_LAYERS` layers.
    """
    if len(report.layers) > MAX_LOGGED_LAYERS:
        return {}
    histograms = {}
    for name, shown in depth_names(report).items():
        histogram = report.layers[name].histogram
        if histogram is not None:
            histograms[f"farms_esd/{shown}"] = histogram
    return histograms


def table(measurement: Measurement) -> list[list[Any]]:
    """Return the values of `COLUMNS` for each layer, None where there is no value; the shape as `64x3x3`."""
    rows = []
    for row in measurement.report.rows():
        name = row["layer"]
        row |= {"ratio": measurement.ratios.get(name), "lr": measurement.lrs.get(name), "z": row["z_score"]}
        rows.append([row[column] for column in COLUMNS])
    return rows


def pictures(report: Report, history: History) -> dict[str, Figure]:
    """Draw what there is data for.

    Returns:
        Figures by the keys they are logged under; empty where matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError):  # as a broken installation may raise
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
    """Return each layer's points (epoch, step, value) as a curve."""
    return {name: Curve(*zip(*found, strict=True)) for name, found in points.items()}
