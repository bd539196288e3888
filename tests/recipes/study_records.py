"""Results of studies that nobody ran."""

from __future__ import annotations

from typing import Any

from recipes.study.records import Record


def final_run(arm: str, seed: int, error: float, **facts: Any) -> Record:
    """A final run whose every score is `error`, unless facts say something else."""
    scores = dict.fromkeys(("val", "test", "best_val", "best_test", "lowest_test"), error)
    plain: dict[str, Any] = {
        "experiment": "cell",
        "phase": "final",
        "lr": 0.1,
        "status": "ok",
        "metric": "nrmse",
        "val_samples": 10,
        "test_samples": 20,
        "blind_error": 1.0,
        "parameters": 7,
        "epochs": 5,
        "steps": 9,
        "seconds": 3.0,
        "train_seconds": 2.0,
        "callback_seconds": 0.1,
        "device": "cpu",
        "config": "0" * 12,
        "best_epoch": 3.0,
        "mean_ratio": 1.0,
        "ratio_sd": 0.0,
    }
    return Record(**{**plain, **scores, "arm": arm, "seed": seed, **facts})
