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
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from farms_tb.report import EsdHistogram
from farms_tb.training.metrics import COLUMNS, TABLE, Measurement, Media, RunLog, esd_histograms

_SHOW_MEDIA = {"WandbLogger", "TensorBoardLogger", "MLFlowLogger"}


def log_measurement(
    loggers: Iterable[Any], measurement: Measurement, run_log: RunLog, *, table: bool = False
) -> None:
    """Log one measurement with Lightning loggers of any kind; to be called on rank zero.

    Args:
        loggers: those of the trainer.
        measurement: what to log.
        run_log: what the run remembers.
        table: also log table and pictures, with those that can show them.
    """
    # By name: those of the package pytorch_lightning are classes of their own.
    kinds = [(logger, {cls.__name__ for cls in type(logger).__mro__}) for logger in loggers]
    table = table and any(found & _SHOW_MEDIA for _, found in kinds)
    media = run_log.media(measurement) if table else None
    for logger, found in kinds:
        if "WandbLogger" in found:
            values = wandb_values(measurement, media)
            step_metric = "trainer/global_step" if run_log.x_axis == "step" else f"{_prefix(logger)}epoch"
            define_wandb_axes(logger.experiment, values, run_log, step_metric, _prefix(logger))
            logger.log_metrics(values, step=measurement.step)
        elif "TensorBoardLogger" in found:
            logger.log_metrics(measurement.row(by_depth=True), step=measurement.step)
            tensorboard_media(logger.experiment, measurement, media, _prefix(logger))
        else:
            logger.log_metrics(measurement.row(), step=measurement.step)
            if "MLFlowLogger" in found and media is not None:
                _mlflow_media(logger, measurement, media)


def _prefix(logger: Any) -> str:
    """Return what the logger puts before each key."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""


def define_wandb_axes(run: Any, keys: Iterable[str], run_log: RunLog, step_metric: str, prefix: str = "") -> None:
    """Say, once for each key of a W&B run, what it is plotted against.

    Key by key: Lightning and Hugging Face define an axis of their own for the pattern `*`, and which of two
    patterns W&B goes by is left to chance. The run's summary holds the last value of each key, as always in W&B,
    and the smallest mean alpha beside the last.

    Args:
        run: the `wandb.Run`.
        keys: what is about to be logged.
        run_log: what the run remembers.
        step_metric: full name of the logged metric that is the x axis.
        prefix: what stands before each key.
    """
    for key in run_log.new_keys(run.id, keys):
        if key != "epoch":
            summary = "min,last" if key == "farms/alpha_mean" else None
            run.define_metric(prefix + key, step_metric=step_metric, summary=summary)


def wandb_values(measurement: Measurement, media: Media | None) -> dict[str, Any]:
    """Return all that W&B gets of a measurement."""
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
    """Write ESDs, table and pictures with a `SummaryWriter`, under keys with `prefix`."""
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


def _mlflow_media(logger: Any, measurement: Measurement, media: Media) -> None:
    """Store table and pictures in a folder of their own: artifacts have no step."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *media.table])
    files: Mapping[str, Any] = {f"{TABLE}.csv": text.getvalue()} | {
        f"{name}.png": figure for name, figure in media.pictures.items()
    }
    for name, content in files.items():
        store = logger.experiment.log_text if isinstance(content, str) else logger.experiment.log_figure
        store(logger.run_id, content, name.replace("farms/", f"farms/step_{measurement.step}/"))
