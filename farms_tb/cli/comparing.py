"""The layers of two models side by side."""

from __future__ import annotations

import math

from farms_tb.cli.measuring import Measured
from farms_tb.cli.tables import Row
from farms_tb.report import OK


def changes(a: Measured, b: Measured) -> list[Row]:
    """Return a row for each layer of either model, the largest change first, those without one last."""
    rows = []
    for name in dict.fromkeys((*a.records, *b.records)):
        records = a.records.get(name), b.records.get(name)
        alphas = [record and record.alpha for record in records]
        errors = [record and record.alpha_error for record in records]
        change = None if None in alphas else alphas[1] - alphas[0]  # type: ignore[operator]
        error = None if None in errors else math.hypot(*errors)  # type: ignore[arg-type]
        shapes = dict.fromkeys("x".join(map(str, record.shape)) for record in records if record is not None)
        only = ["only in B"] if records[0] is None else ["only in A"] if records[1] is None else []
        reasons = [f"{own}: {r.status}" for own, r in zip("AB", records, strict=True) if r and r.status != OK]
        rows.append(
            {
                "layer": name,
                "shape": " / ".join(filter(None, shapes)),
                **{f"alpha_{key}": alpha for key, alpha in zip("ab", alphas, strict=True)},
                **{f"alpha_error_{key}": value for key, value in zip("ab", errors, strict=True)},
                "change": change,
                "change_error": error,
                "change_in_errors": change / error if change is not None and error else None,
                "status": "; ".join([*only, *reasons]) or OK,
            }
        )
    return sorted(rows, key=lambda row: -1.0 if row["change"] is None else abs(row["change"]), reverse=True)
