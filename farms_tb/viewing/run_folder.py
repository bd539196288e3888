"""Read the folder that a training run leaves behind, finished or still being written.

A run folder holds, in itself or further down:

- `metrics.csv` of Lightning's CSVLogger, with the callback's `farms/` columns: the curves;
- checkpoints, `*.ckpt`: the spectra, which are measured from the newest one that can be read;
- `config.yaml` or `hparams.yaml`: the settings; `summary.json`: the scores, as the recipes write it.

What is not there, or only half written, is named in `RunFolder.missing`, and the rest is read all the same.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from farms_tb.analysis import analyze_checkpoint
from farms_tb.options import Esd, SpectrumOptions, as_plain
from farms_tb.report import Report
from farms_tb.spectra.measure import with_nulls
from farms_tb.weights.files import read_torch_file

__all__ = ["Curve", "History", "RunFolder", "depth_order", "metrics_file", "read_history", "read_run_folder"]

METRICS_FILE = "metrics.csv"
SETTINGS_FILES = ("config.yaml", "hparams.yaml")
SUMMARY_FILE = "summary.json"

_ESDS: tuple[Esd, Esd] = ("farms", "full")
_KEY = re.compile(r"farms/(?P<quantity>alpha|ratio|lr)/(?P<layer>.+)")
_Path = str | os.PathLike[str]


class Curve(NamedTuple):
    """One layer's measurements in the order of training.

    Attributes:
        epochs: completed epochs at each measurement, 0 for the initial weights.
        steps: optimizer steps at each measurement.
        values: what was measured.
    """

    epochs: tuple[float, ...]
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class History:
    """Every layer's curves, by layer name in order of depth.

    Attributes:
        alpha: power-law exponents.
        ratio: learning-rate ratios.
        lr: learning rates in force.
        layers: all names, in order of depth.
    """

    alpha: Mapping[str, Curve] = field(default_factory=dict)
    ratio: Mapping[str, Curve] = field(default_factory=dict)
    lr: Mapping[str, Curve] = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    @property
    def by_step(self) -> bool:
        """Whether one epoch holds several measurements, so that only steps can tell them apart."""
        curves = (*self.alpha.values(), *self.ratio.values(), *self.lr.values())
        return any(len(set(curve.epochs)) < len(curve.epochs) for curve in curves)


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

    @property
    def title(self) -> str:
        """The name, or the last two parts of the path: the recipes' runs are called by experiment and time."""
        return self.name or "/".join(self.path.resolve().parts[-2:]).lstrip("/")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers, logged or measured, in order of depth."""
        measured = () if self.farms is None else tuple(self.farms.layers)
        return tuple(dict.fromkeys((*self.history.layers, *measured)))


def read_run_folder(
    folder: _Path, *, farms: Report | None = None, full: Report | None = None, null: bool = False
) -> RunFolder:
    """Read what a run has left behind so far.

    Args:
        folder: the run folder. With several `metrics.csv` in it (`version_0`, `version_1`), the newest is read. Or
            a file of weights, as `analyze_checkpoint` takes it, of which there are no curves.
        farms: a measurement by FARMS windows that was made already, with histograms; with both, no checkpoint is
            measured.
        full: the same of whole matrices.
        null: also measure each layer's entries in random order, for the null band and the z-scores. A run with the
            noise-aware map has measured them itself, and they are taken from its checkpoint.

    Returns:
        The run.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is no run folder: it holds neither curves nor a checkpoint; or the file is none of
            weights.
    """
    folder = Path(folder)
    if folder.is_file():
        farms, full = (_measure(folder, SpectrumOptions(esd=esd), {}, null) for esd in _ESDS)
        return RunFolder(
            folder.parent,
            farms=farms,
            full=full,
            options=farms.options,
            weights=folder.name,
            name=folder.name,
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    missing: list[str] = []
    metrics = metrics_file(folder)
    root = folder if metrics is None else metrics.parent
    state: dict[str, Any] = {}
    weights = "the weights at the end of training"
    if farms is None or full is None:
        farms, full, state, weights = _measure_newest(folder, root, null, missing)
    else:
        state = _state_of_newest(root)
    farms, full = (r and with_nulls(r, _nulls_of(state, r.options)) for r in (farms, full))
    if metrics is None and farms is None:
        raise ValueError(
            f"{folder} is no run folder: it holds neither a {METRICS_FILE} with farms/ columns nor a checkpoint "
            "(*.ckpt) that can be measured. Train with FARMSTempBalance() and Lightning's CSVLogger"
            + "".join(f"\n  {sentence}" for sentence in missing)
        )
    depth = list(state.get("ratios", {})) or ([] if farms is None else list(farms.layers))
    if metrics is None:
        missing.append(f"No {METRICS_FILE} with farms/ columns, so no curves: log with Lightning's CSVLogger.")
        history = History()
    else:
        history = read_history(metrics, depth)
        if _cut_short(metrics):
            missing.append(
                f"{METRICS_FILE} ends in half a line, which is left out: the run seems to be writing it."
            )
    return RunFolder(
        path=folder,
        history=history,
        farms=_in_order(farms, depth),
        full=_in_order(full, depth),
        options=state.get("options") or ({} if farms is None else farms.options),
        weights=weights if farms is not None else "",
        settings=_settings(folder, root),
        summary=_summary(folder, missing),
        missing=tuple(missing),
    )


def read_history(metrics_csv: _Path, layers: Sequence[str] | None = None) -> History:
    """Read the callback's rows out of a `metrics.csv`; other rows, columns and empty cells are passed over.

    Args:
        metrics_csv: the file. A last line without its end, as a run that is still writing leaves it, is left out.
        layers: names of the layers in order of depth, say `list(callback.report.layers)`. The file's columns
            are sorted by name; without this argument layers are ordered by name too, with numbers in names
            counting as numbers.

    Returns:
        The curves. A measurement that a resumed run repeated counts once, the later row of equal epoch and step.

    Raises:
        FileNotFoundError: there is no such file.
    """
    points: dict[str, dict[str, dict[tuple[float, int], float]]] = {"alpha": {}, "ratio": {}, "lr": {}}
    for row in csv.DictReader(_whole_lines(Path(metrics_csv))):
        for key, cell in row.items():
            match = _KEY.fullmatch(key or "")
            if match and cell not in ("", None):
                when = (float(row.get("epoch") or "nan"), int(float(row.get("step") or 0)))
                points[match["quantity"]].setdefault(match["layer"], {})[when] = float(cell)
    names = _by_depth(set().union(*points.values()), layers or ())
    curves = {quantity: {n: _curve(found[n]) for n in names if n in found} for quantity, found in points.items()}
    return History(**curves, layers=names)


def _whole_lines(path: Path) -> Iterator[str]:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        yield from (line for line in file if line.endswith("\n"))


def _cut_short(path: Path) -> bool:
    return not path.read_bytes().endswith(b"\n")


def _by_depth(names: Iterable[str], layers: Sequence[str]) -> tuple[str, ...]:
    """Order `names` as in `layers`; those that are not in it come last, by name."""
    depth = {name: position for position, name in enumerate(layers)}
    return tuple(sorted(names, key=lambda name: (depth.get(name, len(depth)), _natural(name))))


def _curve(points: Mapping[tuple[float, int], float]) -> Curve:
    ordered = sorted(points.items(), key=lambda item: item[0][1])
    return Curve(
        epochs=tuple(epoch for (epoch, _), _ in ordered),
        steps=tuple(step for (_, step), _ in ordered),
        values=tuple(value for _, value in ordered),
    )


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which `layer.10` comes after `layer.9`."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted((path for path in paths if path.is_file()), key=lambda path: path.stat().st_mtime, reverse=True)


def metrics_file(folder: Path) -> Path | None:
    """Return the newest `metrics.csv` in a folder that holds columns of the callback, or None."""
    for path in _newest_first(folder.rglob(METRICS_FILE)):
        header = next(_whole_lines(path), "")
        if any(key.startswith("farms/") for key in next(csv.reader([header]), [])):
            return path
    return None


def depth_order(folder: Path) -> list[str]:
    """Return the layers in order of depth as the newest checkpoint of a run lists them; empty without one."""
    return list(_state_of_newest(folder).get("ratios", {}))


def _measure_newest(
    folder: Path, root: Path, null: bool, missing: list[str]
) -> tuple[Report | None, Report | None, dict[str, Any], str]:
    """Measure the newest checkpoint that can be read, those of the run of the metrics before those of others.

    Returns:
        Its measurement by FARMS and of whole matrices, the callback's state in it, and its name in words.
    """
    found = _newest_first(root.rglob("*.ckpt")) or _newest_first(folder.rglob("*.ckpt"))
    if not found:
        missing.append("No checkpoint (*.ckpt) yet, so no spectra and no full-matrix alphas.")
    for path in found:
        name = path.relative_to(folder)
        try:
            state, epoch, step = _callback_state(path)
            chosen = _spectral(state["options"])
            farms, full = (_measure(path, SpectrumOptions(**{**chosen, "esd": esd}), state, null) for esd in _ESDS)
        except Exception as error:
            # A file that is being written fails in many ways, all of which mean: take the one before.
            reason = str(error).partition("\n")[0]
            missing.append(f"The checkpoint {name} can't be measured, so it is passed over: {reason}")
            continue
        when = ", ".join(
            f"{key} {value}" for key, value in (("epoch", epoch), ("step", step)) if value is not None
        )
        return farms, full, state, f"{name}" + (f" ({when})" if when else "")
    return None, None, {}, ""


def _callback_state(path: Path) -> tuple[dict[str, Any], int | None, int | None]:
    """Return the callback's state in a checkpoint with at least `options` and `ratios`, its epoch and its step."""
    loaded = read_torch_file(path)
    if not isinstance(loaded, dict):
        return {"options": {}, "ratios": {}}, None, None
    state = loaded.get("callbacks", {}).get("FARMSTempBalance", {}).get("balancer", {})
    epoch = loaded.get("epoch")
    return (
        {"options": {}, "ratios": {}, **state},
        None if epoch is None else epoch + 1,
        loaded.get("global_step"),
    )


def _measure(path: Path, options: SpectrumOptions, state: Mapping[str, Any], null: bool) -> Report:
    """Measure a checkpoint, and shuffle only what the run has not shuffled itself."""
    shuffle = null and not _nulls_of(state, as_plain(options))
    return analyze_checkpoint(path, **as_plain(options), histogram=True, null=shuffle)


def _nulls_of(state: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation of each layer's null as the run measured it, where by these options."""
    if not state or options != as_plain(SpectrumOptions(**_spectral(state["options"]))):
        return {}
    nulls = {
        name: (record.get("null_mean"), record.get("null_std")) for name, record in state.get("report", {}).items()
    }
    return {name: null for name, null in nulls.items() if None not in null}


def _spectral(options: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: options[field.name] for field in fields(SpectrumOptions) if field.name in options}


def _state_of_newest(folder: Path) -> dict[str, Any]:
    """Return the callback's state in the newest checkpoint that can be read; empty where there is none."""
    for path in _newest_first(folder.rglob("*.ckpt")):
        try:
            return _callback_state(path)[0]
        except Exception:  # of a file that is being written, or of something else's
            continue
    return {}


def _in_order(report: Report | None, depth: Sequence[str]) -> Report | None:
    """Order the layers as the model registered them: a file of weights may hold them otherwise."""
    if report is None:
        return None
    position = {name: index for index, name in enumerate(depth)}
    names = sorted(report.layers, key=lambda name: position.get(name, len(position)))
    return Report({name: report.layers[name] for name in names}, report.options)


def _settings(folder: Path, root: Path) -> str:
    for place in dict.fromkeys((folder, root)):
        for name in SETTINGS_FILES:
            if (place / name).is_file():
                return (place / name).read_text(encoding="utf-8", errors="replace")
    return ""


def _summary(folder: Path, missing: list[str]) -> dict[str, Any]:
    path = folder / SUMMARY_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        missing.append(f"{SUMMARY_FILE} is no JSON, or half written: it is left out.")
        return {}
    return content if isinstance(content, dict) else {}
