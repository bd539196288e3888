"""What the page of a run shows, as plain values for JSON; `page.js` draws them and names each by the same key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from farms_tb.report import OK, LayerRecord, Report
from farms_tb.viewing.densities import aspect_of_sample, esd_density, marchenko_pastur, tail_density
from farms_tb.viewing.history import Curve
from farms_tb.viewing.run_folder import RunFolder
from farms_tb.viewing.stable_rank import matrix_stable_rank

__all__ = ["content_of"]

NOT_MEASURED = "not in the weights that were measured"

_When = tuple[float, int]
"""Completed epochs and optimizer steps at a measurement."""


def content_of(run: RunFolder) -> dict[str, Any]:
    """Return all that the page shows, as plain values: no NaN, no infinity, no number that JSON lacks."""
    history = run.history
    curves = (*history.alpha.values(), *history.ratio.values(), *history.lr.values())
    when = sorted({point for curve in curves for point in _points(curve)}, key=lambda point: (point[1], point[0]))
    return {
        "title": run.title,
        "facts": _facts(run),
        "missing": list(run.missing),
        "weights": run.weights,
        "esd": str(run.options.get("esd", "farms")),
        "by_step": history.by_step,
        "when": {"epoch": _numbers(epoch for epoch, _ in when), "step": [step for _, step in when]},
        "layers": [_layer(name, run, when) for name in run.layers],
        "laws": _laws(run),
        "options": _plain(run.options),
        "settings": run.settings,
    }


def _facts(run: RunFolder) -> list[str]:
    """Return what stands below the title: how many layers, which weights, the scores of the test."""
    facts = [f"{len(run.layers)} layers"]
    if run.weights:
        facts.append(f"spectra of {run.weights}")
    scores = run.summary.get("test")
    if isinstance(scores, Mapping):
        facts += [f"{name} {_score(value)}" for name, value in scores.items() if isinstance(value, (int, float))]
    return facts


def _score(value: float) -> str:
    try:
        return f"{float(value):.4g}"
    except OverflowError:
        return "beyond the range of floats"


def _points(curve: Curve) -> Iterable[_When]:
    return zip(curve.epochs, curve.steps, strict=True)


def _layer(name: str, run: RunFolder, when: list[_When]) -> dict[str, Any]:
    """Return one layer's metrics, curves and spectra."""
    farms, full = _records(name, run)
    return {"name": name, **_metrics(farms, full), **_curves(name, run, when), "esd": _spectra(name, run)}


def _records(name: str, run: RunFolder) -> tuple[LayerRecord, LayerRecord]:
    """Return a layer's records by FARMS windows and as a whole matrix; empty ones where it was not measured."""
    farms = None if run.farms is None else run.farms.layers.get(name)
    full = None if run.full is None else run.full.layers.get(name)
    return farms or LayerRecord(status=NOT_MEASURED), full or LayerRecord()


def _metrics(farms: LayerRecord, full: LayerRecord) -> dict[str, Any]:
    reasons = [record.status for record in (farms, full) if record.status != OK]
    bias = None if farms.alpha is None or full.alpha is None else full.alpha - farms.alpha
    return {
        "kind": farms.kind,
        "shape": list(farms.shape),
        "status": "; ".join(dict.fromkeys(reasons)) or OK,
        "farms": _number(farms.alpha),
        "error": _number(farms.alpha_error),
        "full": _number(full.alpha),
        "bias": _number(bias),
        "ks": _number(farms.ks_distance),
        "stable_rank": _number(matrix_stable_rank(full)),
        "spectral_norm": _number(farms.spectral_norm),
        "count": farms.num_eigenvalues,
        "null_mean": _number(farms.null_mean),
        "null_std": _number(farms.null_std),
        "z": _number(farms.z_score),
    }


def _curves(name: str, run: RunFolder, when: list[_When]) -> dict[str, Any]:
    history = run.history
    found = {"alpha": history.alpha.get(name), "ratio": history.ratio.get(name), "lr": history.lr.get(name)}
    curves = {quantity: _on_axis(curve, when) for quantity, curve in found.items()}
    ratios = [ratio for ratio in curves["ratio"] if ratio is not None]
    return {
        **curves,
        "last_ratio": ratios[-1] if ratios else None,
        "note": _other_time(found["alpha"], run),
    }


def _other_time(curve: Curve | None, run: RunFolder) -> str:
    """Return a note where the weights that were measured are of another time than the end of the curve."""
    if curve is None or (run.weights_step is None and run.weights_epoch is None):
        return ""
    epoch, step = curve.epochs[-1], curve.steps[-1]
    same_epoch = run.weights_epoch in (None, epoch) or math.isnan(epoch)
    same_step = run.weights_step in (None, step)
    if run.weights_step is not None and same_step:
        return ""  # an epoch that a checkpoint interrupts counts as complete there, and not in the curve
    if not same_epoch:
        return f"alpha of epoch {run.weights_epoch}, curve to epoch {epoch:g}"
    return "" if same_step else f"alpha of step {run.weights_step}, curve to step {step}"


def _on_axis(curve: Curve | None, when: list[_When]) -> list[float | None]:
    """Return a curve's value at each measurement of the run, None where it has none."""
    if curve is None:
        return [None] * len(when)
    values = dict(zip(_points(curve), curve.values, strict=True))
    return [_number(values.get(point)) for point in when]


def _spectra(name: str, run: RunFolder) -> dict[str, Any]:
    """Return what a layer's spectra are drawn from, by kind of measurement."""
    reports = [report for report in (run.farms, run.full) if report is not None and name in report.layers]
    return {
        report.options["esd"]: _spectrum(report.layers[name], report)
        for report in reports
        if report.layers[name].histogram is not None
    }


def _spectrum(record: LayerRecord, report: Report) -> dict[str, Any]:
    """Return what one spectrum is drawn from; the Marchenko-Pastur law stands elsewhere, once for many layers."""
    assert record.histogram is not None  # spectra of others are not drawn
    edges, density = esd_density(record.histogram)
    tail = tail_density(record)
    return {
        "edges": [math.log10(edges[0]), math.log10(edges[-1])],
        "density": _numbers(density),
        "tail": None if tail is None else [_numbers(point) for point in zip(*tail, strict=True)],
        "mean": _number(record.norm_stable_rank),
        "aspect": f"{aspect_of_sample(record, report):.4f}",
    }


def _laws(run: RunFolder) -> dict[str, Any]:
    """Return the Marchenko-Pastur law of mean 1 for each aspect ratio in use."""
    aspects = {
        f"{aspect_of_sample(record, report):.4f}"
        for report in (run.farms, run.full)
        if report is not None
        for record in report.layers.values()
        if record.histogram is not None
    }
    laws = {aspect: marchenko_pastur(1.0, float(aspect)) for aspect in aspects}
    return {aspect: {"x": _numbers(law.x), "y": _numbers(law.y)} for aspect, law in laws.items()}


def _plain(options: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        for name, value in options.items()
        if value is not None
    }


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [_number(float(value)) for value in values]


def _number(value: float | None) -> float | None:
    """Return a number to five digits, which is more than can be seen; None for what JSON has no number for."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
