"""Pair the layers of two models, and say how their alphas differ.

Layers are paired by name. Where a name is in one model alone, the prefixes are taken off that a wrapper puts
before the names of all layers, so that a Lightning checkpoint and the model it was made of can be compared.
"""

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
        name: its name, without the prefixes of wrappers where the two models' names differ in them. No other pair
            has it.
        a: its record in the first model; None where it is not there.
        b: its record in the second model; None where it is not there.
        name_in_a: its name in the first model, with all prefixes; empty where it is not there.
        name_in_b: the same in the second model.
    """

    name: str
    a: LayerRecord | None
    b: LayerRecord | None
    name_in_a: str = ""
    name_in_b: str = ""

    @property
    def in_both(self) -> bool:
        """Whether both models have the layer."""
        return self.a is not None and self.b is not None


def paired(a: Mapping[str, LayerRecord], b: Mapping[str, LayerRecord]) -> list[Pair]:
    """Pair the layers of two models by name, then those whose names differ in prefixes of wrappers alone.

    Returns:
        The layers of A in their order, then those that are in B alone.
    """
    bare_a = _bare_names(name for name in a if name not in b)
    bare_b = _bare_names(name for name in b if name not in a)
    partner = {}
    for bare in bare_a.keys() & bare_b.keys():
        in_a, in_b = bare_a[bare], bare_b[bare]
        is_another_layer = bare not in (in_a, in_b) and (bare in a or bare in b)
        partner[in_a] = (in_a if is_another_layer else bare, in_b)
    pairs = []
    taken = set()
    for name, record in a.items():
        shown, name_in_b = partner.get(name, (name, name))
        pairs.append(Pair(shown, record, b.get(name_in_b), name, name_in_b if name_in_b in b else ""))
        taken.add(name_in_b)
    in_b_alone = [name for name in b if name not in taken]
    return pairs + [Pair(name, None, b[name], name_in_b=name) for name in in_b_alone]


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
    while name.startswith(_WRAPPERS):
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
    return name


def changes(pairs: Iterable[Pair]) -> list[Row]:
    """Return a row for each layer, the largest change first, those without one last.

    The change is alpha_b - alpha_a, its standard error sqrt(error_a^2 + error_b^2): the two are measured
    independently.
    """
    rows = [_row(pair) for pair in pairs]
    # Any size is more than the -1 of a row without a change.
    return sorted(rows, key=lambda row: -1.0 if row["change"] is None else abs(row["change"]), reverse=True)


def _row(pair: Pair) -> Row:
    """Return what `compare` shows of one layer; None where a model has no such layer, or no alpha for it."""
    a, b = pair.a or LayerRecord(), pair.b or LayerRecord()
    change = error = None
    if a.alpha is not None and b.alpha is not None:
        change = b.alpha - a.alpha
    if a.alpha_error is not None and b.alpha_error is not None:
        error = math.hypot(a.alpha_error, b.alpha_error)
    shapes = ["x".join(map(str, record.shape)) for record in (a, b) if record.shape]
    return {
        "layer": pair.name,
        "shape": " / ".join(dict.fromkeys(shapes)),
        "alpha_a": a.alpha,
        "alpha_b": b.alpha,
        "alpha_error_a": a.alpha_error,
        "alpha_error_b": b.alpha_error,
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
