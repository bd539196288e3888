"""Read the folder that a training run leaves behind, finished or still being written.

A run folder holds, in itself or further down:

- `metrics.csv` of Lightning's CSVLogger, with the callback's `farms/` columns: the curves;
- checkpoints, `*.ckpt`: the spectra, which are measured from the newest one that can be read;
- `config.yaml` or `hparams.yaml`: the settings; `summary.json`: the scores, as the recipes write it.

What is not there, or only half written, is named in `RunFolder.missing`, and the rest is read all the same. The
page and the pictures of a run are made from the `RunFolder` that `read_run_folder` returns.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farms_tb.analysis import analyze_checkpoint
from farms_tb.options import SpectrumOptions, as_plain
from farms_tb.report import Report
from farms_tb.spectra.permutation_null import with_nulls
from farms_tb.viewing.history import Curve, History
from farms_tb.viewing.metrics_csv import METRICS_FILE, MetricsFile, read_history, read_metrics
from farms_tb.viewing.names import in_order
from farms_tb.viewing.run_files import RunFiles, find_run
from farms_tb.viewing.run_settings import read_settings, read_summary
from farms_tb.viewing.saved_state import SavedState, newest_state, read_state

__all__ = ["Curve", "History", "RunFolder", "as_run_folder", "read_history", "read_run_folder"]


@dataclass(frozen=True)
class RunFolder:
    """What a run has left behind so far.

    Attributes:
        path: the folder.
        history: the layers' curves; empty where nothing was logged.
        logged: what else was logged, losses and scores, by the names of their columns.
        farms: measurement of the weights by FARMS windows, with spectra; None where there are no weights.
        full: measurement of the same weights as whole matrices.
        options: the callback's options; empty where they are not known.
        weights: what was measured, in words: the checkpoint, its epoch and step.
        weights_epoch: completed epochs of the weights that were measured; None where it is not known.
        weights_step: their optimizer steps; None where it is not known.
        settings: text of `config.yaml` or `hparams.yaml`; empty where there is neither.
        summary: content of `summary.json`.
        missing: a sentence for each thing that is not there, or not whole.
        name: what to call it; empty for the path.
    """

    path: Path
    history: History = field(default_factory=History)
    farms: Report | None = None
    full: Report | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""
    settings: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    name: str = ""
    weights_epoch: int | None = None
    weights_step: int | None = None
    logged: Mapping[str, Curve] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The name, or the last two parts of the path: the recipes' runs are called by experiment and time."""
        return self.name or "/".join(self.path.resolve().parts[-2:]).lstrip("/")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers, logged or measured, in order of depth."""
        names = [*self.history.layers]
        if self.farms is not None:
            names += self.farms.layers
        return tuple(dict.fromkeys(names))


def as_run_folder(run: str | os.PathLike[str] | RunFolder) -> RunFolder:
    """Return a run that was read already as it is, and read one that is given by its folder.

    Args:
        run: the folder of a run, a file of weights, or what `read_run_folder` made of it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no run, or several.
    """
    if isinstance(run, RunFolder):
        return run
    return read_run_folder(run)


def read_run_folder(
    folder: str | os.PathLike[str],
    *,
    farms: Report | None = None,
    full: Report | None = None,
    null: bool = False,
    key: str | None = None,
) -> RunFolder:
    """Read what a run has left behind so far.

    Args:
        folder: the folder of one run, or one that holds it further down (`version_0`). Or a file of weights, as
            `analyze_checkpoint` takes it, of which there are no curves.
        farms: a measurement by FARMS windows that was made already, with histograms. It takes `full` as well, and
            no checkpoint is measured then.
        full: the same of whole matrices.
        null: also measure each layer's entries in random order, for the band of the permutation null and the
            z-scores. A run whose map compares layers with random ones, as the default does, has measured them
            itself, and they are taken from its checkpoint.
        key: where the weights lie in a file or a checkpoint that holds several things, as `analyze_checkpoint`
            takes it (`"ema"`); None to find them.

    Returns:
        The run.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is no run folder: it holds neither curves nor a checkpoint; or it holds several
            runs, which the message lists; or the file is none of weights. Or one of `farms` and `full` is given
            without the other, or for a file of weights.
    """
    folder = Path(folder)
    if (farms is None) != (full is None):
        given, lacking = ("farms", "full") if full is None else ("full", "farms")
        raise ValueError(
            f"{given}= without {lacking}=: pass both measurements of the run, or neither to measure its checkpoint"
        )
    if folder.is_file():
        if farms is not None:
            raise ValueError(f"{folder} is a file of weights: farms= and full= are for the folder of a run")
        return _read_weights(folder, null, key)
    files = find_run(folder)
    problems: list[str] = []
    measured_before = farms is not None
    if measured_before:
        state, weights = newest_state(files.checkpoints), "the weights at the end of training"
    else:
        farms, full, state, weights = _measure_newest(files, null, key, problems)
    if files.metrics is None and farms is None:
        raise ValueError(_no_run(folder, problems))
    layers, options = state.layers, state.options
    if farms is not None:
        layers, options = layers or tuple(farms.layers), options or farms.options
    settings, summary = read_settings(files, problems), read_summary(files, problems)
    metrics = _metrics(files, layers)
    return RunFolder(
        path=folder,
        history=metrics.history,
        farms=_completed(farms, state, layers),
        full=_completed(full, state, layers),
        options=options,
        weights=weights,
        settings=settings,
        summary=summary,
        missing=(*problems, *metrics.problems),
        # A checkpoint may be of another time than reports that were made already.
        weights_epoch=None if measured_before else state.epoch,
        weights_step=None if measured_before else state.step,
        logged=metrics.logged,
    )


def _read_weights(path: Path, null: bool, key: str | None) -> RunFolder:
    """Measure a file of weights, which need not come from a run, with the default options."""
    farms, full = _measure_both(path, SavedState(), null, key)
    return RunFolder(path.parent, farms=farms, full=full, options=farms.options, weights=path.name, name=path.name)


def _measure_newest(
    files: RunFiles, null: bool, key: str | None, problems: list[str]
) -> tuple[Report | None, Report | None, SavedState, str]:
    """Measure the last checkpoint that can be read; see `read_run_folder` for `null` and `key`.

    Returns:
        The measurements by FARMS windows and of whole matrices, the callback's state in the checkpoint, and what
        was measured, in words; without weights no measurements, an empty state and no words. `problems` gets a
        sentence for what is missing, and for what is wrong with newer checkpoints.
    """
    if not files.checkpoints:
        problems.append("No checkpoint (*.ckpt) yet, so no spectra and no full-matrix alphas.")
    for path in files.checkpoints:
        name = str(path.relative_to(files.folder))
        try:
            state = read_state(path)
            farms, full = _measure_both(path, state, null, key)
        except Exception as error:
            # A file that is being written fails in many ways, all of which mean: take the one before.
            reason = str(error).partition("\n")[0]
            problems.append(f"The checkpoint {name} can't be measured, so it is passed over: {reason}")
            continue
        if state.damaged:
            parts = ", ".join(state.damaged)
            problems.append(f"The callback's state in {name} is damaged, what is affected is left out: {parts}.")
        when = state.at()
        return farms, full, state, f"{name} ({when})" if when else name
    return None, None, SavedState(), ""


def _measure_both(path: Path, state: SavedState, null: bool, key: str | None) -> list[Report]:
    """Measure a checkpoint by FARMS windows and as whole matrices, with the options that its state holds.

    Permutation nulls that the run measured by these options are not measured again.
    """
    reports = []
    for esd in ("farms", "full"):
        options = as_plain(SpectrumOptions(**{**state.spectrum_options, "esd": esd}))
        shuffle = null and not state.nulls_by(options)
        reports.append(analyze_checkpoint(path, **options, histogram=True, null=shuffle, key=key))
    return reports


def _no_run(folder: Path, problems: Sequence[str]) -> str:
    """Return why a folder is no run folder, with what is wrong with its checkpoints."""
    reason = (
        f"{folder} is no run folder: it holds neither a {METRICS_FILE} with farms/ columns nor a checkpoint "
        "(*.ckpt) that can be measured. Train with FARMSTempBalance() and Lightning's CSVLogger"
    )
    return "\n  ".join([reason, *problems])


def _metrics(files: RunFiles, layers: Sequence[str]) -> MetricsFile:
    """Read the curves of the layers, in order of depth; none where nothing was logged."""
    if files.metrics is None:
        problem = f"No {METRICS_FILE} with farms/ columns, so no curves: log with Lightning's CSVLogger."
        return MetricsFile(History(), (problem,))
    return read_metrics(files.metrics, layers)


def _completed(report: Report | None, state: SavedState, layers: Sequence[str]) -> Report | None:
    """Add the run's own permutation nulls, and order the layers as the model registered them.

    A file of weights may hold them in another order.
    """
    if report is None:
        return None
    names = in_order(report.layers, layers)
    ordered = Report({name: report.layers[name] for name in names}, report.options)
    return with_nulls(ordered, state.nulls_by(report.options))
