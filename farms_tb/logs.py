"""Write a measurement to a trainer's loggers: one row each, and the ESDs where asked for.

Keys: `farms/alpha/<layer>`, `farms/ratio/<layer>`, `farms/lr/<layer>`, `farms/alpha_mean`, `farms/alpha_std`,
`farms/ratio_mean`, `epoch`; with the noise-aware map also `farms/z/<layer>` and `farms/lambda`. ESDs under
`farms_esd/<layer>`. Of a model of more than `MAX_LOGGED_LAYERS` layers the aggregates alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from farms_tb.report import EsdHistogram, Report
from farms_tb.warning import warn_once

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

MAX_LOGGED_LAYERS = 1900
"""Five keys each are fewer than the 10 000 metrics of a project beyond which W&B's pages become slow."""


def warn_of_many_layers(number: int, model: object) -> None:
    """Say, once for each model, that its layers are too many to log."""
    if number > MAX_LOGGED_LAYERS:
        warn_once(
            f"the model has {number} layers: of more than {MAX_LOGGED_LAYERS}, farms/alpha_mean and "
            "farms/alpha_std alone are logged; the callback's report and ratios hold every layer",
            model,
            stacklevel=3,
        )


def alpha_summary(report: Report) -> dict[str, float]:
    """Return mean and standard deviation of alpha over the real layers, or over all where none is real.

    Alphas of complex spectral weights are on another scale, so the two kinds are not mixed. Empty where no layer
    has an alpha.
    """
    for kinds in (("real",), ("real", "spectral")):
        alphas = [r.alpha for r in report.layers.values() if r.alpha is not None and r.kind in kinds]
        if alphas:
            mean = math.fsum(alphas) / len(alphas)
            variance = math.fsum((alpha - mean) ** 2 for alpha in alphas) / len(alphas)
            return {"farms/alpha_mean": mean, "farms/alpha_std": math.sqrt(variance)}
    return {}


def measurement_row(
    report: Report, ratios: Mapping[str, float], lrs: Mapping[str, float], summary: Mapping[str, float]
) -> dict[str, float]:
    """Return one measurement as a row of figures: the aggregates, and each layer's alpha, ratio, lr and z-score.

    Of more than `MAX_LOGGED_LAYERS` layers, the aggregates alone.
    """
    row = {**alpha_summary(report), **summary}
    if len(report.layers) > MAX_LOGGED_LAYERS:
        return row
    for name, record in report.layers.items():
        figures = {
            "alpha": record.alpha,
            "ratio": ratios.get(name),
            "lr": lrs.get(name),
            "z": record.z_score,
        }
        if record.kind:
            row.update({f"farms/{key}/{name}": value for key, value in figures.items() if value is not None})
    return row


def esd_histograms(report: Report) -> dict[str, EsdHistogram]:
    """Return the ESDs that were counted, by the name they are logged under; none of too many layers."""
    if len(report.layers) > MAX_LOGGED_LAYERS:
        return {}
    histograms = {name: record.histogram for name, record in report.layers.items()}
    return {f"farms_esd/{name}": h for name, h in histograms.items() if h is not None}


def log_measurement(
    trainer: Trainer,
    report: Report,
    ratios: Mapping[str, float],
    lrs: Mapping[str, float],
    summary: Mapping[str, float],
    x_axis: str,
) -> None:
    """Log one measurement with every logger of the Lightning trainer; to be called on rank zero.

    Args:
        trainer: its loggers, epoch and step are used.
        report: the measurement.
        ratios: learning-rate ratio of each layer.
        lrs: learning rate of each layer.
        summary: figures of the update as a whole.
        x_axis: the logged metric that W&B plots the curves against.
    """
    row = {"epoch": trainer.current_epoch, **measurement_row(report, ratios, lrs, summary)}
    histograms = esd_histograms(report)
    # The step that LearningRateMonitor uses: it counts batches that stepped, as the user's own curves do.
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        _log(logger, row, histograms, step, x_axis)


def _log(
    logger: Any, row: dict[str, float], histograms: Mapping[str, EsdHistogram], step: int, x_axis: str
) -> None:
    # By name: those of the package pytorch_lightning are classes of their own.
    kinds = {cls.__name__ for cls in type(logger).__mro__}
    if "WandbLogger" in kinds:
        for pattern in ("farms/*", "farms_esd/*"):
            logger.experiment.define_metric(pattern, step_metric=x_axis)
        logger.log_metrics({**row, **wandb_histograms(histograms)}, step=step)
        return
    logger.log_metrics(row, step=step)
    if "TensorBoardLogger" in kinds:
        for name, histogram in histograms.items():
            tensorboard_histogram(logger.experiment, name, histogram, step)


def wandb_histograms(histograms: Mapping[str, EsdHistogram]) -> dict[str, Any]:
    """Return the ESDs as W&B has them."""
    if not histograms:
        return {}
    import wandb

    return {
        name: wandb.Histogram(np_histogram=(np.asarray(h.counts), _edges(h))) for name, h in histograms.items()
    }


def _edges(histogram: EsdHistogram) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)


def tensorboard_histogram(writer: Any, name: str, histogram: EsdHistogram, step: int) -> None:
    """Write one ESD with a `SummaryWriter`."""
    edges, counts = _edges(histogram), np.asarray(histogram.counts)
    centres = (edges[1:] + edges[:-1]) / 2
    writer.add_histogram_raw(
        name,
        min=histogram.low,
        max=histogram.high,
        num=int(counts.sum()),
        sum=float(counts @ centres),
        sum_squares=float(counts @ centres**2),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
