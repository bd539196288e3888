"""The layers of real trained models, with what is known of them: needs `make real`."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.rows import Row
from farms_tb import analyze_checkpoint
from recipes.real import minilm_folder, smollm2_folder

__all__ = ["KNOWN", "MODELS", "layers_of"]

MODELS = {"all-MiniLM-L6-v2": minilm_folder, "SmolLM2-135M-Instruct": smollm2_folder}

KNOWN = {
    "all-MiniLM-L6-v2": "an encoder in float32; `pooler.dense` is never used",
    "SmolLM2-135M-Instruct": "a language model, its weights published with 4 bits each",
}


def layers_of(model: str, folder: Path) -> list[Row]:
    """Measure a model, with windows and whole, and return a row for each layer."""
    farms = analyze_checkpoint(folder, null=True)
    whole = analyze_checkpoint(folder, esd="full").alphas
    return [
        {
            "model": model,
            "layer": name,
            "rows": record.shape[1],
            "columns": record.shape[2],
            "alpha": record.alpha,
            "alpha_error": _number(record.alpha_error),
            "null": _number(record.null_mean),
            "effect": _number(record.effect),
            "z": _number(record.z_score),
            "traps": _number(record.num_traps),
            "rank_share": _number(record.rank_share),
            "whole_alpha": _number(whole[name]),
            "verdict": str(record.verdict),
        }
        for name, record in farms.layers.items()
        if record.alpha is not None
    ]


def _number(value: float | None) -> float:
    """Return NaN in place of None, which leaves a cell of the CSV file empty."""
    return math.nan if value is None else value
