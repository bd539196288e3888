"""One HTML page of a run, to look through and to hand on: it needs no network and no server.

The page draws with its own small script (`page.js`), from the figures that stand in it as JSON.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from farms_tb.atomic_write import write_text_atomically
from farms_tb.report import OK, LayerRecord, Report
from farms_tb.viewing.densities import aspect_of_sample, esd_density, marchenko_pastur, tail_density
from farms_tb.viewing.history import Curve
from farms_tb.viewing.run_folder import RunFolder, read_run_folder

__all__ = ["write_page"]

PAGE_FILE = "report.html"
NOT_MEASURED = "not in the weights that were measured"

_HERE = Path(__file__).parent
_Path = str | os.PathLike[str]
_When = tuple[float, int]


def write_page(run_folder: _Path | RunFolder, output: _Path | None = None) -> Path:
    """Write one self-contained HTML file of a run: curves, a table of the layers, their spectra, the settings.

    Args:
        run_folder: the folder of a run, finished or not, or what `read_run_folder` made of it.
        output: the file; None for `report.html` in the run folder. Its folder is made where it is not there.

    Returns:
        The file.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder is no run folder: it holds neither curves nor a checkpoint.
    """
    run = run_folder if isinstance(run_folder, RunFolder) else read_run_folder(run_folder)
    path = run.path / PAGE_FILE if output is None else Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, _render(run), errors="replace")
    return path


def _render(run: RunFolder) -> str:
    content = _content(run)
    # A `<` in the data could end the script element that holds it.
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (_HERE / "page.html").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(content["title"]),
        "css": (_HERE / "page.css").read_text(encoding="utf-8"),
        "js": (_HERE / "page.js").read_text(encoding="utf-8"),
        "data": data,  # last: nothing that stands in it is taken for a place to fill in
    }
    for name, text in parts.items():
        page = page.replace("{{" + name + "}}", text)
    return page


def _content(run: RunFolder) -> dict[str, Any]:
    """Return all that the page shows, as plain values."""
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
    facts = [f"{len(run.layers)} layers"]
    facts += [f"spectra of {run.weights}"] if run.weights else []
    scores = run.summary.get("test")
    if isinstance(scores, Mapping):
        facts += [f"{name} {value:.4g}" for name, value in scores.items() if isinstance(value, (int, float))]
    return facts


def _points(curve: Curve) -> Iterable[_When]:
    return zip(curve.epochs, curve.steps, strict=True)


def _layer(name: str, run: RunFolder, when: list[_When]) -> dict[str, Any]:
    """Return one layer's figures, curves and spectra."""
    history = run.history
    farms, full = (report.layers.get(name) if report is not None else None for report in (run.farms, run.full))
    status = [record.status for record in (farms, full) if record is not None and record.status != OK]
    record = farms or LayerRecord(status=NOT_MEASURED)
    curves = {
        quantity: _on_axis(getattr(history, quantity).get(name), when) for quantity in ("alpha", "ratio", "lr")
    }
    ratios = [ratio for ratio in curves["ratio"] if ratio is not None]
    bias = None if full is None or full.alpha is None or record.alpha is None else full.alpha - record.alpha
    return {
        "name": name,
        "kind": record.kind,
        "shape": list(record.shape),
        "status": "; ".join(dict.fromkeys(status)) or record.status,
        "farms": _number(record.alpha),
        "error": _number(record.alpha_error),
        "full": _number(None if full is None else full.alpha),
        "bias": _number(bias),
        "ks": _number(record.ks_distance),
        "stable_rank": _number(record.stable_rank),
        "spectral_norm": _number(record.spectral_norm),
        "count": record.num_eigenvalues,
        "null_mean": _number(record.null_mean),
        "null_std": _number(record.null_std),
        "z": _number(record.z_score),
        "last_ratio": ratios[-1] if ratios else None,
        **curves,
        "esd": {
            report.options["esd"]: _spectrum(report.layers[name], report)
            for report in (run.farms, run.full)
            if report is not None and name in report.layers and report.layers[name].histogram is not None
        },
    }


def _on_axis(curve: Curve | None, when: list[_When]) -> list[float | None]:
    """Return a curve's value at each measurement of the run, None where it has none."""
    if curve is None:
        return [None] * len(when)
    values = dict(zip(_points(curve), curve.values, strict=True))
    return [_number(values.get(point)) for point in when]


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
