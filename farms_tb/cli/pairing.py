"""Pair the layers of two models, and say how their alphas differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from farms_tb.cli.tables import Row
from farms_tb.report import OK, LayerRecord

__all__ = ["Pair", "changes", "paired", "without_wrappers"]

_WRAPPERS = ("module.", "model.", "_orig_mod.")
"""What DataParallel and DDP, Lightning modules and `torch.compile` put before the names of a model's layers."""


class Pair(NamedTuple):
    """A layer in two models.

    Attributes:
        name: its name, without the prefixes of wrappers where the two models' names differ in them.
        a: its record in the first model; None where it is not there.
        b: its record in the second model; None where it is not there.
    """

    name: str
    a: LayerRecord | None
    b: LayerRecord | None


def paired(a: Mapping[str, LayerRecord], b: Mapping[str, LayerRecord]) -> list[Pair]:
    """Pair the layers of two models by name, then those whose names differ in prefixes of wrappers alone.

    Args:
        a: record of each layer of the first model.
        b: record of each layer of the second model.

    Returns:
        The layers of A in their order, then those that are in B alone.
    """
    bare_a = _bare_names(name for name in a if name not in b)
    bare_b = _bare_names(name for name in b if name not in a)
    partner = {bare_a[bare]: (bare, bare_b[bare]) for bare in bare_a if bare in bare_b}
    pairs = []
    for name, record in a.items():
        shown, other = partner.get(name, (name, name))
        pairs.append(Pair(shown, record, b.get(other)))
    known = {*a, *(other for _, other in partner.values())}
    return pairs + [Pair(name, None, record) for name, record in b.items() if name not in known]


def _bare_names(names: Iterable[str]) -> dict[str, str]:
    """Return names by what is left of them without prefixes of wrappers; ambiguous ones are left out."""
    bare = {name: without_wrappers(name) for name in names}
    count = Counter(bare.values())
    return {short: name for name, short in bare.items() if count[short] == 1}


def without_wrappers(name: str) -> str:
    """Return a layer's name without the prefixes of wrappers, in whatever order they stand.

    Example:
        >>> without_wrappers("model._orig_mod.conv1")
        'conv1'
    """
    while prefix := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), ""):
        name = name.removeprefix(prefix)
    return name


def changes(pairs: Iterable[Pair]) -> list[Row]:
    """Return a row for each layer, the largest change first, those without one last.

    The change is alpha_b - alpha_a, its standard error sqrt(error_a^2 + error_b^2): the two are measured
    independently.
    """
    rows = [_row(pair) for pair in pairs]
    return sorted(rows, key=lambda row: -1.0 if row["change"] is None else abs(row["change"]), reverse=True)


def _row(pair: Pair) -> Row:
    name, a, b = pair
    alpha_a, alpha_b = (record.alpha if record else None for record in (a, b))
    error_a, error_b = (record.alpha_error if record else None for record in (a, b))
    change = None if alpha_a is None or alpha_b is None else alpha_b - alpha_a
    error = None if error_a is None or error_b is None else math.hypot(error_a, error_b)
    shapes = ["x".join(map(str, record.shape)) for record in (a, b) if record and record.shape]
    return {
        "layer": name,
        "shape": " / ".join(dict.fromkeys(shapes)),
        "alpha_a": alpha_a,
        "alpha_b": alpha_b,
        "alpha_error_a": error_a,
        "alpha_error_b": error_b,
        "change": change,
        "change_error": error,
        "change_in_errors": change / error if change is not None and error else None,
        "status": "; ".join(_reasons(pair)) or OK,
    }


def _reasons(pair: Pair) -> Iterator[str]:
    """Yield why a layer has no change of alpha."""
    if pair.a is None:
        yield "only in B"
    if pair.b is None:
        yield "only in A"
    for model, record in (("A", pair.a), ("B", pair.b)):
        if record is not None and record.status != OK:
            yield f"{model}: {record.status}"
