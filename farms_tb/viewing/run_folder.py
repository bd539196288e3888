"""Read the folder that a training run leaves behind, finished or still being written.

A run folder holds, in itself or further down:

- `metrics.csv` of Lightning's CSVLogger, with the callback's `farms/` columns: the curves;
- checkpoints, `*.ckpt`: the spectra, which are measured from the newest one that can be read;
- `config.yaml` or `hparams.yaml`: the settings; `summary.json`: the scores, as the recipes write it.

What is not there, or only half written, is named in `RunFolder.missing`, and the rest is read all the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from farms_tb.analysis import analyze_checkpoint
from farms_tb.options import Esd, SpectrumOptions, as_plain
from farms_tb.report import Report
from farms_tb.spectra.measure import with_nulls
from farms_tb.viewing.history import Curve, History
from farms_tb.viewing.metrics_csv import METRICS_FILE, MetricsFile, read_history, read_metrics
from farms_tb.viewing.run_files import RunFiles, find_run
from farms_tb.viewing.saved_state import SavedState, newest_state, read_state

__all__ = ["Curve", "History", "RunFolder", "read_history", "read_run_folder"]

SETTINGS_FILES = ("config.yaml", "hparams.yaml")
SUMMARY_FILE = "summary.json"

_ESDS: tuple[Esd, Esd] = ("farms", "full")


@dataclass(frozen=True)
class RunFolder:
    """What a run has left behind so far.

    Attributes:
        path: the folder.
        history: the layers' curves; empty where nothing was logged.
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

    @property
    def title(self) -> str:
        """The name, or the last two parts of the path: the recipes' runs are called by experiment and time."""
        return self.name or "/".join(self.path.resolve().parts[-2:]).lstrip("/")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers, logged or measured, in order of depth."""
        measured = () if self.farms is None else tuple(self.farms.layers)
        return tuple(dict.fromkeys((*self.history.layers, *measured)))


@dataclass(frozen=True)
class _Measurement:
    """The weights of a run, measured by FARMS windows and as whole matrices, and the state saved with them."""

    farms: Report | None = None
    full: Report | None = None
    state: SavedState = field(default_factory=SavedState)
    weights: str = ""


def read_run_folder(
    folder: str | os.PathLike[str], *, farms: Report | None = None, full: Report | None = None, null: bool = False
) -> RunFolder:
    """Read what a run has left behind so far.

    Args:
        folder: the folder of one run, or one that holds it further down (`version_0`). Or a file of weights, as
            `analyze_checkpoint` takes it, of which there are no curves.
        farms: a measurement by FARMS windows that was made already, with histograms; with both, no checkpoint is
            measured.
        full: the same of whole matrices.
        null: also measure each layer's entries in random order, for the band of the permutation null and the
            z-scores. A run with the noise-aware map has measured them itself, and they are taken from its
            checkpoint.

    Returns:
        The run.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is no run folder: it holds neither curves nor a checkpoint; or it holds several
            runs, which the message lists; or the file is none of weights.
    """
    folder = Path(folder)
    if folder.is_file():
        return _read_weights(folder, null)
    files = find_run(folder)
    missing: list[str] = []
    if farms is None or full is None:
        measured = _measure_newest(files, null, missing)
    else:
        state = newest_state(files.checkpoints)
        measured = _Measurement(farms, full, state, "the weights at the end of training")
    if files.metrics is None and measured.farms is None:
        raise ValueError(_no_run(folder, missing))
    depth = measured.state.layers or (() if measured.farms is None else tuple(measured.farms.layers))
    metrics = _metrics(files, depth)
    settings = _settings(files, missing)
    summary = _summary(files, missing)
    found = RunFolder(
        path=folder,
        history=metrics.history,
        farms=_completed(measured.farms, measured.state, depth),
        full=_completed(measured.full, measured.state, depth),
        options=measured.state.options or ({} if measured.farms is None else measured.farms.options),
        weights=measured.weights,
        settings=settings,
        summary=summary,
        missing=(*missing, *metrics.problems),
    )
    if farms is None or full is None:
        found = replace(found, weights_epoch=measured.state.epoch, weights_step=measured.state.step)
    return found


def _read_weights(path: Path, null: bool) -> RunFolder:
    """Measure a file of weights, which need not come from a run."""
    farms, full = (_measure(path, SpectrumOptions(esd=esd), SavedState(), null) for esd in _ESDS)
    return RunFolder(path.parent, farms=farms, full=full, options=farms.options, weights=path.name, name=path.name)


def _measure_newest(files: RunFiles, null: bool, missing: list[str]) -> _Measurement:
    """Measure the newest checkpoint that can be read; what is wrong with newer ones is said in `missing`."""
    if not files.checkpoints:
        missing.append("No checkpoint (*.ckpt) yet, so no spectra and no full-matrix alphas.")
    for path in files.checkpoints:
        name = path.relative_to(files.folder)
        try:
            state = read_state(path)
            options = [SpectrumOptions(**{**state.spectrum_options, "esd": esd}) for esd in _ESDS]
            farms, full = (_measure(path, each, state, null) for each in options)
        except Exception as error:
            # A file that is being written fails in many ways, all of which mean: take the one before.
            reason = str(error).partition("\n")[0]
            missing.append(f"The checkpoint {name} can't be measured, so it is passed over: {reason}")
            continue
        if state.damaged:
            parts = ", ".join(state.damaged)
            missing.append(f"The callback's state in {name} is damaged, what is affected is left out: {parts}.")
        when = state.at()
        return _Measurement(farms, full, state, f"{name} ({when})" if when else str(name))
    return _Measurement()


def _measure(path: Path, options: SpectrumOptions, state: SavedState, null: bool) -> Report:
    """Measure a checkpoint, and shuffle only what the run has not shuffled itself."""
    shuffle = null and not state.nulls_by(as_plain(options))
    return analyze_checkpoint(path, **as_plain(options), histogram=True, null=shuffle)


def _no_run(folder: Path, missing: Sequence[str]) -> str:
    return (
        f"{folder} is no run folder: it holds neither a {METRICS_FILE} with farms/ columns nor a checkpoint "
        "(*.ckpt) that can be measured. Train with FARMSTempBalance() and Lightning's CSVLogger"
        + "".join(f"\n  {sentence}" for sentence in missing)
    )


def _metrics(files: RunFiles, depth: Sequence[str]) -> MetricsFile:
    if files.metrics is None:
        problem = f"No {METRICS_FILE} with farms/ columns, so no curves: log with Lightning's CSVLogger."
        return MetricsFile(History(), (problem,))
    return read_metrics(files.metrics, depth)


def _completed(report: Report | None, state: SavedState, depth: Sequence[str]) -> Report | None:
    """Add the run's own permutation nulls, and order the layers as the model registered them.

    A file of weights may hold them in another order.
    """
    if report is None:
        return None
    position = {name: index for index, name in enumerate(depth)}
    names = sorted(report.layers, key=lambda name: position.get(name, len(position)))
    ordered = Report({name: report.layers[name] for name in names}, report.options)
    return with_nulls(ordered, state.nulls_by(report.options))


def _settings(files: RunFiles, missing: list[str]) -> str:
    for place in dict.fromkeys((files.folder, files.root)):
        for name in SETTINGS_FILES:
            content = _read_own(place / name, files, missing)
            if content is not None:
                return content.decode("utf-8", "replace")
    return ""


def _summary(files: RunFiles, missing: list[str]) -> dict[str, Any]:
    content = _read_own(files.folder / SUMMARY_FILE, files, missing)
    if content is None:
        return {}
    try:
        summary = json.loads(content)
    except (ValueError, RecursionError):
        missing.append(f"{SUMMARY_FILE} is no JSON, or half written: it is left out.")
        return {}
    return summary if isinstance(summary, dict) else {}


def _read_own(path: Path, files: RunFiles, missing: list[str]) -> bytes | None:
    """Read a file of the run; None where there is none, or a link leads out of the folder.

    The page shows the content, and no link in somebody else's folder may bring a file of the reader's into it.
    """
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(files.folder.resolve()):
        missing.append(f"{path.name} is a link out of the folder: it is left out.")
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        missing.append(f"{path.name} can't be read, it is left out: {error.strerror}.")
        return None
