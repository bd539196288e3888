"""Hand a measurement to each kind of logger, in the form in which it shows it best.

The columns of the table say what each logger gets of a measurement. Loggers are recognized by the names of their
classes, and their packages are imported only where one is in use.

| logger | row | ESDs | table | pictures |
|---|---|---|---|---|
| W&B | numbered by depth, against epoch or step | histograms | `wandb.Table` | images |
| TensorBoard | numbered by depth | histograms | text | images |
| MLflow | plain | - | artifact, CSV | artifacts, PNG |
| CSV and any other | plain | - | - | - |
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import numpy as np

from farms_tb.options import LoggingOptions
from farms_tb.report import EsdHistogram
from farms_tb.training.metrics import COLUMNS, TABLE, Measurement, Media, RunLog, esd_histograms
from farms_tb.warnings import warn_once

SHOWS_HISTOGRAMS = {"WandbLogger", "TensorBoardLogger", "WandbCallback", "TensorBoardCallback"}
"""Classes of Lightning's loggers and Hugging Face's reporters that show a histogram of the ESD."""
SHOWS_MEDIA = {*SHOWS_HISTOGRAMS, "MLFlowLogger"}
"""Classes that show the table and the pictures."""


_T = TypeVar("_T")


def class_names(logger: object) -> set[str]:
    """Return the names of a logger's class and of its bases.

    Loggers are told by name because those of the package pytorch_lightning are classes of their own, and because
    none of their packages has to be installed.
    """
    return {cls.__name__ for cls in type(logger).__mro__}


def warn_of_unseen_media(options: LoggingOptions, loggers: Iterable[object], about: object) -> None:
    """Warn, once a run, that none of its loggers or reporters shows what the options ask for."""
    names = set[str]().union(*(class_names(logger) for logger in loggers))
    if options.histogram_every_n is not None and not names & SHOWS_HISTOGRAMS:
        warn_once(
            "histogram_every_n is set, and no logger takes histograms: the ESDs are in the callback's report "
            "only. Add a W&B or TensorBoard logger",
            about,
        )
    if options.table_every_n is not None and not names & SHOWS_MEDIA:
        warn_once(
            "table_every_n is set, and no logger takes tables and pictures: they are not made. Add a W&B, "
            "TensorBoard or MLflow logger",
            about,
        )


def media_to_show(sinks: Iterable[object], measurement: Measurement, run_log: RunLog) -> Media | None:
    """Make the table and the pictures of a measurement; None where no logger or reporter shows them."""
    if not measurement.table or not any(class_names(sink) & SHOWS_MEDIA for sink in sinks):
        return None
    return run_log.media(measurement)


def log_measurement(loggers: Iterable[Any], measurement: Measurement, run_log: RunLog) -> None:
    """Log one measurement with Lightning loggers of any kind; to be called on rank zero."""
    loggers = list(loggers)
    media = media_to_show(loggers, measurement, run_log)
    for logger in loggers:
        names = class_names(logger)
        if "WandbLogger" in names:
            with_media_if_written(logger, media, partial(_log_to_wandb, logger, measurement, run_log))
        elif "TensorBoardLogger" in names:
            logger.log_metrics(measurement.row(by_depth=True), step=measurement.step)
            tensorboard_media(logger.experiment, measurement, media, _prefix(logger))
        elif "MLFlowLogger" in names:
            # MLflow refuses keys that are no normal paths, such as `a//b` of a layer `/b`.
            row = {posixpath.normpath(key): value for key, value in measurement.row().items()}
            logger.log_metrics(row, step=measurement.step)
            with_media_if_written(logger, media, partial(_mlflow_media, logger, measurement))
        else:
            logger.log_metrics(measurement.row(), step=measurement.step)


def with_media_if_written(logger: object, media: Media | None, log: Callable[[Media | None], _T]) -> _T:
    """Log with table and pictures, or without where they cannot be written: that must not end a training."""
    try:
        return log(media)
    except OSError as error:
        if media is None:
            raise
        warn_once(
            f"table and pictures are left out, they could not be written ({error.strerror or error})", logger
        )
    return log(None)


def _log_to_wandb(logger: Any, measurement: Measurement, run_log: RunLog, media: Media | None) -> None:
    """Log with Lightning's WandbLogger, against the axis that the options ask for."""
    values = wandb_values(measurement, media)
    step_metric = f"{_prefix(logger)}epoch"
    if run_log.x_axis == "step":
        step_metric = "trainer/global_step"
    define_wandb_axes(logger.experiment, values, run_log, step_metric, _prefix(logger))
    logger.log_metrics(values, step=measurement.step)


def _prefix(logger: Any) -> str:
    """Return the prefix that the logger adds to each key."""
    if not logger._prefix:
        return ""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}"


def define_wandb_axes(run: Any, keys: Iterable[str], run_log: RunLog, step_metric: str, prefix: str = "") -> None:
    """Tell a W&B run, once for each key, what the key is plotted against.

    Each key is defined by itself: Lightning and Hugging Face define an axis of their own for the pattern `*`, and
    which of two matching patterns W&B uses is undefined. A key with `*` in it, from a layer's name, cannot be
    defined: W&B refuses it, or takes a trailing `*` for a pattern. Such a key is logged as it is and keeps the
    trainer's axis. The run's summary holds the last value of each key, as always in W&B, and the smallest mean
    alpha as well as the last.

    Args:
        run: the `wandb.Run`.
        keys: keys that are about to be logged.
        run_log: what the run remembers.
        step_metric: full name of the logged metric that is the x axis.
        prefix: prefix of each key.
    """
    for key in run_log.new_keys(run.id, keys):
        full_key = prefix + key
        if key == "epoch" or "*" in full_key:
            continue
        summary = "min,last" if key == "farms/alpha_mean" else None
        run.define_metric(full_key, step_metric=step_metric, summary=summary)


def wandb_values(measurement: Measurement, media: Media | None) -> dict[str, Any]:
    """Return the row, the histograms, the table and the pictures of a measurement, as W&B takes them.

    Args:
        measurement: what to log.
        media: table and pictures; None for neither.

    Returns:
        Numbers, `wandb.Histogram`, `wandb.Table` and `wandb.Image` by key.
    """
    import wandb

    values: dict[str, Any] = dict(measurement.row(by_depth=True))
    for name, histogram in esd_histograms(measurement.report).items():
        counts = np.asarray(histogram.counts)
        values[name] = wandb.Histogram(np_histogram=(counts, _edges(histogram)))
    if media is None:
        return values
    values[TABLE] = wandb.Table(columns=list(COLUMNS), data=media.table)
    for name, figure in media.pictures.items():
        values[name] = wandb.Image(_as_image(figure))
    return values


def _as_image(figure: Any) -> Any:
    """Render a figure without pyplot, which W&B would ask for a display."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


def _edges(histogram: EsdHistogram) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the edges of the bins, one more than there are counts."""
    return np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)


def tensorboard_media(writer: Any, measurement: Measurement, media: Media | None, prefix: str = "") -> None:
    """Write ESDs, table and pictures to TensorBoard.

    Counts are written as they are: `SummaryWriter.add_histogram` would need the eigenvalues themselves.

    Args:
        writer: a `SummaryWriter`.
        measurement: what to log, under its step.
        media: table and pictures; None for neither.
        prefix: prefix of each key.
    """
    for name, histogram in esd_histograms(measurement.report).items():
        edges, counts = _edges(histogram), np.asarray(histogram.counts)
        centres = (edges[1:] + edges[:-1]) / 2
        writer.add_histogram_raw(
            prefix + name,
            min=histogram.low,
            max=histogram.high,
            num=int(counts.sum()),
            sum=float(counts @ centres),
            sum_squares=float(counts @ centres**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=measurement.step,
        )
    if media is None:
        return
    writer.add_text(prefix + TABLE, _as_markdown(media.table), measurement.step)
    for name, figure in media.pictures.items():
        writer.add_figure(prefix + name, figure, measurement.step)


def _as_markdown(table: list[list[Any]]) -> str:
    """Return a table of `COLUMNS` as Markdown, which TensorBoard renders."""
    lines = [_markdown_row(COLUMNS), _markdown_row(["---"] * len(COLUMNS))]
    lines += [_markdown_row(row) for row in table]
    return "\n".join(lines)


def _markdown_row(values: Iterable[Any]) -> str:
    cells = " | ".join(_short(value) for value in values)
    return f"| {cells} |"


def _short(value: Any) -> str:
    """Return a value as text that fits a cell: four digits, and bars, which would end the cell, escaped."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", r"\|")


def _mlflow_media(logger: Any, measurement: Measurement, media: Media | None) -> None:
    """Store table and pictures as artifacts, in one folder for each step: artifacts have no step."""
    if media is None:
        return
    folder = f"farms/step_{measurement.step}/"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *media.table])
    client, run_id = logger.experiment, logger.run_id
    client.log_text(run_id, text.getvalue(), f"{TABLE}.csv".replace("farms/", folder))
    for name, figure in media.pictures.items():
        client.log_figure(run_id, figure, f"{name}.png".replace("farms/", folder))
