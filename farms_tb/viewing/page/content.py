"""What the page of a run shows, as plain values for JSON; the scripts draw them and names each by the same key.

Numbers are rounded to five digits, and None stands for what JSON has no number for. A measurement is told by its
time, completed epochs and optimizer steps, which are exact: all curves of a run share one list of times, and have
a value or None at each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from farms_tb.report import OK, LayerRecord, Report
from farms_tb.viewing.densities import (
    aspect_of_sample,
    esd_density,
    marchenko_pastur,
    spectrum_marks,
    tail_density,
)
from farms_tb.viewing.diagnosis import diagnose, diagnose_training
from farms_tb.viewing.history import Curve, History
from farms_tb.viewing.run_folder import RunFolder
from farms_tb.viewing.words import METRICS, VERDICTS
from farms_tb.weights.names import counted

__all__ = ["content_of"]

NOT_MEASURED = "not in the weights that were measured"

WORDS = {
    "index": "Position of the layer, from the input to the output.",
    "name": "Name of the layer in the model.",
    "verdict": "What the metrics say of the layer in a word.",
    "status": "Why a layer has no alpha, or why it means something else; empty for the others.",
    "shape": "The layer's weight as a stack of K matrices with R rows and C columns.",
    "kind": "Real weights, or complex ones of a spectral convolution.",
    "alpha": METRICS["alpha"],
    "farms": f"{METRICS['alpha']} Fitted on windows of one aspect ratio (FARMS).",
    "error": METRICS["alpha_error"],
    "full": "Alpha of the whole matrix, which depends on the matrix's shape.",
    "bias": "Alpha of the whole matrix minus that of FARMS windows: what the shape of the matrix adds.",
    "ratio": "Learning rate of the layer over the scheduler's learning rate.",
    "last_ratio": "Learning rate of the layer over the scheduler's learning rate, as last logged.",
    "lr": "Learning rate of the layer.",
    "effects": METRICS["effect"],
    "rank_shares": METRICS["rank_share"],
    "null_mean": "Mean alpha of the same weights in random order, the permutation null, ± its standard deviation.",
    "ks": METRICS["ks_distance"],
    "count": METRICS["num_eigenvalues"],
    "z": METRICS["z_score"],
    "edge": "Random weights of this size and variance have no larger eigenvalues.",
    "tail": "The power law that was fitted, from where it begins: on these axes a line of slope -alpha.",
    "law": "The Marchenko-Pastur law: the spectrum of random weights of this aspect ratio and mean eigenvalue.",
    "num_spikes": METRICS["num_spikes"],
    "num_traps": METRICS["num_traps"],
    **{name: METRICS[name] for name in ("effect", "rank_share", "stable_rank", "spectral_norm")},
}
"""What each heading and value of the page means, by its key in the values of a layer."""

_When = tuple[float, int]
"""Completed epochs and optimizer steps at a measurement."""


def content_of(run: RunFolder) -> dict[str, Any]:
    """Return all that the page shows: plain values, no NaN, no infinity, no number that JSON lacks."""
    when = _times(run.history)
    epochs = [None if math.isnan(epoch) else epoch for epoch, _ in when]
    of_weights = [] if run.farms is None else diagnose(run.farms)
    return {
        "title": run.title,
        "facts": _facts(run),
        "missing": list(run.missing),
        "diagnosis": [*diagnose_training(run.history, run.farms), *of_weights],
        "weights": run.weights,
        "esd": str(run.options.get("esd", "farms")),
        "by_step": run.history.by_step,
        "when": {"epoch": epochs, "step": [step for _, step in when]},
        "layers": [_layer(name, run, when) for name in run.layers],
        "laws": _laws(run),
        "words": WORDS,
        "verdicts": {str(verdict): words for verdict, words in VERDICTS.items()},
        "options": _options_in_words(run.options),
        "settings": run.settings,
    }


def _times(history: History) -> list[_When]:
    """Return when any layer was measured, in the order of steps; of one step those without an epoch first."""
    curves = (*history.alpha.values(), *history.ratio.values(), *history.lr.values())
    times = {point for curve in curves for point in _points(curve)}
    return sorted(times, key=lambda time: (time[1], -math.inf if math.isnan(time[0]) else time[0]))


def _points(curve: Curve) -> Iterator[_When]:
    """Yield when each value of a curve was measured."""
    return zip(curve.epochs, curve.steps, strict=True)


def _facts(run: RunFolder) -> list[str]:
    """Return what stands below the title: how many layers, which weights, the scores of the test."""
    facts = [counted(len(run.layers), "layer")]
    if run.weights:
        facts.append(f"spectra of {run.weights}")
    scores = run.summary.get("test")
    if isinstance(scores, Mapping):
        numbers = {name: value for name, value in scores.items() if isinstance(value, (int, float))}
        facts += [f"{name} {_score(value)}" for name, value in numbers.items()]
    return facts


def _score(value: float) -> str:
    """Return a score in four digits; JSON has integers that no float can hold."""
    try:
        return f"{float(value):.4g}"
    except OverflowError:
        return "beyond the range of floats"


def _layer(name: str, run: RunFolder, when: Sequence[_When]) -> dict[str, Any]:
    """Return all that the page shows of one layer, which was logged, measured or both."""
    farms = {} if run.farms is None else run.farms.layers
    full = {} if run.full is None else run.full.layers
    metrics = _metrics(farms.get(name, LayerRecord(status=NOT_MEASURED)), full.get(name, LayerRecord()))
    return {"name": name, **metrics, **_curves(name, run, when), "esd": _spectra(name, run)}


def _metrics(farms: LayerRecord, full: LayerRecord) -> dict[str, Any]:
    """Return the cells of one row of the table, and what the layer's own view shows.

    Args:
        farms: the layer's record by FARMS windows; one without values where it was not measured.
        full: the same of the whole matrix.
    """
    bias = None if farms.alpha is None or full.alpha is None else full.alpha - farms.alpha
    reasons = [record.status for record in (farms, full) if record.status != OK]
    return {
        "kind": farms.kind,
        "shape": list(farms.shape),
        "status": "; ".join(dict.fromkeys(reasons)) or OK,
        "farms": _number(farms.alpha),
        "error": _number(farms.alpha_error),
        "full": _number(full.alpha),
        "bias": _number(bias),
        "ks": _number(farms.ks_distance),
        "stable_rank": _number(full.stable_rank),
        "spectral_norm": _number(farms.spectral_norm),
        "count": farms.num_eigenvalues,
        "null_mean": _number(farms.null_mean),
        "null_std": _number(farms.null_std),
        "z": _number(farms.z_score),
        "effect": _number(farms.effect),
        "effect_error": _number(farms.effect_error),
        "rank_share": _number(farms.rank_share),
        "num_spikes": farms.num_spikes if full.num_spikes is None else full.num_spikes,
        "num_traps": _number(farms.num_traps if full.num_traps is None else full.num_traps),
        "verdict": str(farms.verdict or ""),
    }


def _curves(name: str, run: RunFolder, when: Sequence[_When]) -> dict[str, Any]:
    """Return a layer's curves at all times of the run, its last ratio, and a note on the time of its row."""
    history = run.history
    alpha = history.alpha.get(name)
    ratio = history.ratio.get(name)
    last_ratio = ratio.values[-1] if ratio is not None and ratio.values else None
    return {
        "alpha": _on_axis(alpha, when),
        "ratio": _on_axis(ratio, when),
        "lr": _on_axis(history.lr.get(name), when),
        "effects": _on_axis(history.effect.get(name), when),
        "rank_shares": _on_axis(history.rank_share.get(name), when),
        "last_ratio": _number(last_ratio),
        "note": "" if alpha is None else _other_time(alpha, run),
    }


def _other_time(curve: Curve, run: RunFolder) -> str:
    """Return a note where the weights that were measured are of another time than the end of the curve.

    Steps decide where they are known: an epoch that a checkpoint interrupts counts as complete in the checkpoint,
    and not in the curve. There is no note where both are of one time, or the time of the weights is not known.
    """
    epoch, step = curve.epochs[-1], curve.steps[-1]
    if run.weights_step == step:
        return ""
    epoch_differs = run.weights_epoch not in (None, epoch) and not math.isnan(epoch)
    if epoch_differs:
        return f"alpha of epoch {run.weights_epoch}, curve to epoch {epoch:g}"
    if run.weights_step is not None:
        return f"alpha of step {run.weights_step}, curve to step {step}"
    return ""


def _on_axis(curve: Curve | None, when: Sequence[_When]) -> list[float | None]:
    """Return a curve's value at each measurement of the run, None where it has none."""
    if curve is None:
        return [None] * len(when)
    values = dict(zip(_points(curve), curve.values, strict=True))
    return [_number(values.get(point)) for point in when]


def _spectra(name: str, run: RunFolder) -> dict[str, Any]:
    """Return what a layer's spectra are drawn from, by kind of measurement."""
    spectra = {}
    for report in _reports(run):
        record = report.layers.get(name)
        if record is not None and record.histogram is not None:
            spectra[report.options["esd"]] = _spectrum(record, report)
    return spectra


def _reports(run: RunFolder) -> list[Report]:
    """Return the measurements that there are, by FARMS windows and of whole matrices."""
    return [report for report in (run.farms, run.full) if report is not None]


def _spectrum(record: LayerRecord, report: Report) -> dict[str, Any]:
    """Return what one spectrum is drawn from.

    The Marchenko-Pastur law stands elsewhere, once for all layers of one aspect ratio, for a mean eigenvalue of 1;
    the page scales it by `mean`.
    """
    assert record.histogram is not None  # spectra of others are not drawn
    edges, density = esd_density(record.histogram)
    tail = tail_density(record)
    return {
        "edges": [math.log10(edges[0]), math.log10(edges[-1])],
        "density": _numbers(density),
        "tail": None if tail is None else [_numbers(point) for point in zip(*tail, strict=True)],
        "mean": _number(record.norm_stable_rank),
        "aspect": _aspect(record, report),
        **_marks(record, report),
    }


def _marks(record: LayerRecord, report: Report) -> dict[str, Any]:
    """Return the edge of random weights, and the spikes and traps beyond it; empty where there is no edge.

    Eigenvalues that no eye could tell apart are one: a layer has hundreds, and its shuffles have as many each.
    """
    marks = spectrum_marks(record, report)
    if marks is None:
        return {}
    found = {"spikes": marks.spikes, "traps": marks.traps or ()}
    distinct = {name: list(dict.fromkeys(float(f"{value:.3g}") for value in found[name])) for name in found}
    return {"edge": _number(marks.edge), **distinct}


def _aspect(record: LayerRecord, report: Report) -> str:
    """Return the aspect ratio of a spectrum's matrices, as the key under which the page finds its law."""
    return f"{aspect_of_sample(record, report):.4f}"


def _laws(run: RunFolder) -> dict[str, Any]:
    """Return the Marchenko-Pastur law of mean 1 for each aspect ratio in use."""
    aspects = dict.fromkeys(
        _aspect(record, report)
        for report in _reports(run)
        for record in report.layers.values()
        if record.histogram is not None
    )
    laws = {aspect: marchenko_pastur(1.0, float(aspect)) for aspect in aspects}
    return {aspect: {"x": _numbers(law.x), "y": _numbers(law.y)} for aspect, law in laws.items()}


def _options_in_words(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the callback's options as text, those that are None left out."""
    return {
        name: ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        for name, value in options.items()
        if value is not None
    }


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Return numbers as `_number` does."""
    return [_number(float(value)) for value in values]


def _number(value: float | None) -> float | None:
    """Return a number to five digits, which is more than can be seen; None for what JSON has no number for."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")
