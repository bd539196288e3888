"""Hand a measurement to each kind of logger, in the form in which it shows it best.

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
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from farms_tb.options import LoggingOptions
from farms_tb.report import EsdHistogram
from farms_tb.training.metrics import COLUMNS, TABLE, Measurement, Media, RunLog, esd_histograms
from farms_tb.warnings import warn_once

SHOWS_HISTOGRAMS = {"WandbLogger", "TensorBoardLogger", "WandbCallback", "TensorBoardCallback"}
"""Classes of Lightning's loggers and Hugging Face's reporters that show a histogram of the ESD."""
SHOWS_MEDIA = {*SHOWS_HISTOGRAMS, "MLFlowLogger"}
"""Classes that show the table and the pictures."""


def class_names(logger: object) -> set[str]:
    """Return the names of a logger's class and of its bases.

    Loggers are told by name because those of the package pytorch_lightning are classes of their own, and because
    none of their packages has to be installed.
    """
    return {cls.__name__ for cls in type(logger).__mro__}


def warn_of_unseen_media(options: LoggingOptions, loggers: Iterable[object], about: object) -> None:
    """Say, once, that no logger of this run shows what the options ask for.

    Args:
        options: what to log.
        loggers: the trainer's loggers or reporters.
        about: the run.
    """
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


def log_measurement(loggers: Iterable[Any], measurement: Measurement, run_log: RunLog) -> None:
    """Log one measurement with Lightning loggers of any kind; to be called on rank zero.

    Args:
        loggers: the trainer's loggers.
        measurement: what to log.
        run_log: what the run remembers.
    """
    kinds = [(logger, class_names(logger)) for logger in loggers]
    wanted = measurement.table and any(names & SHOWS_MEDIA for _, names in kinds)
    media = run_log.media(measurement) if wanted else None
    for logger, names in kinds:
        if "WandbLogger" in names:
            _log_to_wandb(logger, measurement, media, run_log)
        elif "TensorBoardLogger" in names:
            logger.log_metrics(measurement.row(by_depth=True), step=measurement.step)
            tensorboard_media(logger.experiment, measurement, media, _prefix(logger))
        elif "MLFlowLogger" in names:
            row = {_mlflow_key(key): value for key, value in measurement.row().items()}
            logger.log_metrics(row, step=measurement.step)
            _mlflow_media(logger, measurement, media)
        else:
            logger.log_metrics(measurement.row(), step=measurement.step)


def _log_to_wandb(logger: Any, measurement: Measurement, media: Media | None, run_log: RunLog) -> None:
    values = wandb_values(measurement, media)
    step_metric = "trainer/global_step" if run_log.x_axis == "step" else f"{_prefix(logger)}epoch"
    define_wandb_axes(logger.experiment, values, run_log, step_metric, _prefix(logger))
    logger.log_metrics(values, step=measurement.step)


def _prefix(logger: Any) -> str:
    """Return the prefix that the logger adds to each key."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""


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
        if key != "epoch" and "*" not in prefix + key:
            summary = "min,last" if key == "farms/alpha_mean" else None
            run.define_metric(prefix + key, step_metric=step_metric, summary=summary)


def wandb_values(measurement: Measurement, media: Media | None) -> dict[str, Any]:
    """Return the row, the histograms, the table and the pictures of a measurement, as W&B takes them."""
    values: dict[str, Any] = dict(measurement.row(by_depth=True))
    histograms = esd_histograms(measurement.report)
    if histograms or media is not None:
        import wandb

        for name, h in histograms.items():
            values[name] = wandb.Histogram(np_histogram=(np.asarray(h.counts), _edges(h)))
        if media is not None:
            values[TABLE] = wandb.Table(columns=list(COLUMNS), data=media.table)
            values |= {name: wandb.Image(_as_image(figure)) for name, figure in media.pictures.items()}
    return values


def _as_image(figure: Any) -> Any:
    """Render a figure without pyplot, which W&B would ask for a display."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


def _edges(histogram: EsdHistogram) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)


def tensorboard_media(writer: Any, measurement: Measurement, media: Media | None, prefix: str = "") -> None:
    """Write ESDs, table and pictures with a `SummaryWriter`; `prefix` is added to each key."""
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
    if media is not None:
        writer.add_text(prefix + TABLE, _as_markdown(media.table), measurement.step)
        for name, figure in media.pictures.items():
            writer.add_figure(prefix + name, figure, measurement.step)


def _as_markdown(table: list[list[Any]]) -> str:
    rows = [COLUMNS, ["---"] * len(COLUMNS), *([_short(value) for value in row] for row in table)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", r"\|")


def _mlflow_key(key: str) -> str:
    """Return a key that MLflow accepts: it refuses paths that are not normal, such as `a//b` of a layer `/b`."""
    return posixpath.normpath(key)


def _mlflow_media(logger: Any, measurement: Measurement, media: Media | None) -> None:
    """Store table and pictures in one folder for each step: artifacts have no step."""
    if media is None:
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *media.table])
    files: Mapping[str, Any] = {f"{TABLE}.csv": text.getvalue()} | {
        f"{name}.png": figure for name, figure in media.pictures.items()
    }
    for name, content in files.items():
        store = logger.experiment.log_text if isinstance(content, str) else logger.experiment.log_figure
        store(logger.run_id, content, name.replace("farms/", f"farms/step_{measurement.step}/"))
