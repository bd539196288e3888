"""A plan: which share of each layer's entries becomes zero.

`farms_tb.sparsity.allocate` makes plans, `farms_tb.sparsity.prune` carries them out. A plan is plain data: it is
saved as JSON, compared with other plans, and checked against a model before anything is pruned.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from io import StringIO
from os import PathLike
from pathlib import Path
from typing import Any

from farms_tb.atomic_write import write_text_atomically
from farms_tb.options import check_choice, check_integer, check_number, make_plain, plain_value
from farms_tb.sparsity.options import Granularity
from farms_tb.weights.names import counted

FORMAT = "farms_tb sparsity plan"
VERSION = 1
"""Of the JSON; a reader refuses newer ones."""


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a plan.

    Attributes:
        size: entries of its weight.
        sparsity: share of them that becomes zero, from 0 to 1. Plans made with `compat` may have larger ones,
            which no method prunes.
        block: name of the block that it is in, `"model.layers.3"`; empty where there is none.
        alpha: its power-law exponent; None where it has none or none was needed.
        alpha_error: standard error of alpha.
        shape: shape of its stack of matrices, (K, R, C), as in a `LayerRecord`; empty where it is not known.

    Raises:
        TypeError: a field has another type.
        ValueError: a size is not positive, `sparsity` negative, or a number not finite.
    """

    size: int
    sparsity: float
    block: str = ""
    alpha: float | None = None
    alpha_error: float | None = None
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        make_plain(self)
        check_integer("size", self.size, 1)
        check_number("sparsity", self.sparsity, at_least=0)
        _check_type("block", self.block, str, "text, empty where there is none")
        if self.alpha is not None:
            check_number("alpha", self.alpha)
        if self.alpha_error is not None:
            check_number("alpha_error", self.alpha_error)
        _check_type("shape", self.shape, (list, tuple), "a list of sizes, empty where they are not known")
        object.__setattr__(self, "shape", tuple(map(plain_value, self.shape)))
        for size in self.shape:
            check_integer("shape", size, 1)


@dataclass(frozen=True)
class SparsityPlan:
    """The sparsity of each layer of a model, and how it was found.

    Attributes:
        layers: each layer by name, in order of depth. What is not listed stays dense.
        target: the sparsity over all listed entries that was asked for.
        method: how it was allocated, see `SparsityOptions`.
        epsilon: half-width of the range of sparsities, relative to the target.
        granularity: what has a sparsity of its own: `"block"`, `"matrix"` or `"mixed"`.
        bounds: the smallest and the largest sparsity that a layer could get.
        seed: of whatever was random.
        options: everything else that was asked for, plain values by name: how alpha was measured, for example.
        notes: what the user should know of the plan, a sentence each.

    Raises:
        TypeError: a field has another type.
        ValueError: a field is out of range, or there are no layers.
    """

    layers: Mapping[str, PlannedLayer]
    target: float
    method: str
    epsilon: float = 0.0
    granularity: str = "block"
    bounds: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        make_plain(self)
        _check_type("layers", self.layers, Mapping, "planned layers by name")
        if not self.layers:
            raise ValueError("there are no layers: a plan has one at least")
        check_number("target", self.target, at_least=0, at_most=1)
        _check_type("method", self.method, str, "text, such as 'alpha'")
        check_number("epsilon", self.epsilon, at_least=0)
        check_choice("granularity", self.granularity, Granularity)
        if not isinstance(self.bounds, (list, tuple)) or len(self.bounds) != 2:
            raise ValueError(f"bounds must be two numbers, got {self.bounds!r:.80}")
        low, high = map(plain_value, self.bounds)
        check_number("bounds", low, at_least=0)
        check_number("bounds", high, at_least=low)
        object.__setattr__(self, "bounds", (low, high))
        check_integer("seed", self.seed, 0)
        _check_type("options", self.options, Mapping, "values by name")
        _check_type("notes", self.notes, (list, tuple), "a list of texts")
        for note in self.notes:
            _check_type("a note", note, str, "text")
        object.__setattr__(self, "notes", tuple(self.notes))

    @property
    def sparsity(self) -> dict[str, float]:
        """Share of the entries of each layer that becomes zero, by the layer's name."""
        return {name: layer.sparsity for name, layer in self.layers.items()}

    @property
    def total(self) -> float:
        """Share of all listed entries that becomes zero: sum of n_i p_i / sum of n_i, n_i a layer's size."""
        zeros = math.fsum(layer.size * layer.sparsity for layer in self.layers.values())
        return zeros / sum(layer.size for layer in self.layers.values())

    @property
    def blocks(self) -> dict[str, list[str]]:
        """Names of the layers of each block, blocks in order of depth; layers without a block are left out."""
        found: dict[str, list[str]] = {}
        for name, layer in self.layers.items():
            if layer.block:
                found.setdefault(layer.block, []).append(name)
        return found

    def unit_of(self, name: str) -> str:
        """Return what a layer shares its sparsity with: the name of its block, or its own."""
        block = self.layers[name].block
        return block if block and self.granularity == "block" else name

    def check_fits(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check that the plan was made for a model with these layers.

        Args:
            shapes: shape of the weight or of the stack of matrices of each layer of the model, by name; layers
                that are not in the plan may be among them.

        Raises:
            ValueError: a layer of the plan is missing, or has another shape; the message names it.
        """
        missing = [name for name in self.layers if name not in shapes]
        if missing:
            raise ValueError(
                f"the plan was made for another model: it has no layer {missing[0]!r} (of "
                f"{counted(len(self.layers), 'layer')} it lacks {len(missing)}); make a plan of this model"
            )
        other = [name for name, layer in self.layers.items() if not _same_shape(layer, shapes[name])]
        if other:
            layer = self.layers[other[0]]
            raise ValueError(
                f"the plan was made for another model: {other[0]!r} has shape {tuple(shapes[other[0]])}, the plan "
                f"says {layer.shape or layer.size}; make a plan of this model"
            )

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dict of plain values a layer, for a table or a file."""
        rows = []
        for name, layer in self.layers.items():
            values = asdict(layer)
            shape = "x".join(map(str, values.pop("shape")))
            rows.append({"layer": name, **values, "shape": shape})
        return rows

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan: as a table where the path ends in `.csv`, else as JSON, which `load` reads.

        Args:
            path: the file to make or to replace, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        text = self.to_csv() if Path(path).suffix == ".csv" else self.to_json()
        write_text_atomically(path, text, errors="backslashreplace")

    def to_csv(self) -> str:
        """Return the layers as CSV with a header: layer, size, sparsity, block, alpha, alpha_error, shape."""
        text = StringIO()
        writer = csv.DictWriter(text, ["layer", *_LAYER_FIELDS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return text.getvalue()

    def to_json(self) -> str:
        """Return the plan as JSON, floats in full."""
        values = {
            "format": FORMAT,
            "version": VERSION,
            **{name: getattr(self, name) for name in _PLAN_FIELDS},
            "total": self.total,
            "layers": [{"name": name, **asdict(layer)} for name, layer in self.layers.items()],
        }
        return json.dumps(values, indent=1, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SparsityPlan:
        """Read a plan that `save` wrote as JSON.

        Args:
            path: the file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no plan, is damaged, or comes from a newer version.
        """
        try:
            values = json.loads(Path(path).read_text("utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(_no_plan(path, f"it is no JSON ({error})")) from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(_no_plan(path, f"it lacks 'format': {FORMAT!r}"))
        if values.get("version") != VERSION:
            raise ValueError(
                f"{path} is a plan of version {values.get('version')!r}, this farms_tb reads {VERSION}: update it"
            )
        try:
            return _plan_of(values)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(_no_plan(path, f"it is damaged: {reason}")) from error


_LAYER_FIELDS = tuple(f.name for f in fields(PlannedLayer))
_PLAN_FIELDS = tuple(f.name for f in fields(SparsityPlan) if f.name != "layers")


def _no_plan(path: object, reason: str) -> str:
    """Return the message that refuses a file."""
    return (
        f"{path} is no plan that can be read: {reason}; expected JSON that SparsityPlan.save or "
        "`farms-tb sparsity MODEL -o plan.json` wrote"
    )


def _same_shape(layer: PlannedLayer, shape: Sequence[int]) -> bool:
    """Return whether a layer has this shape, given as that of its weight or of its stack of matrices.

    A weight (out, in) is a stack (1, out, in) or, stood upright, (1, in, out); a convolution's stack and weight
    have the number of their entries in common.
    """
    if math.prod(shape) != layer.size:
        return False
    if not layer.shape:
        return True
    sides, planned = (sorted(size for size in sizes if size > 1) for sizes in (shape, layer.shape))
    return sides == planned or len(shape) > 3 or _differ_by_groups(shape, layer.shape)


def _differ_by_groups(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether two stacks (K, R, C) may be one convolution, whose groups a file does not tell.

    G groups make G K matrices of it, with R or C, whichever the groups divide, smaller by G.
    """
    if not len(shape) == len(other) == 3:
        return False
    (matrices, *whole), (of_groups, *divided) = sorted((shape, other), key=lambda stack: stack[0])
    groups, rest = divmod(of_groups, matrices)
    rows, columns = whole
    return not rest and sorted(divided) in (sorted((rows / groups, columns)), sorted((rows, columns / groups)))


def _plan_of(values: dict[str, Any]) -> SparsityPlan:
    """Return the plan that decoded JSON holds; unknown fields are ignored.

    Raises:
        KeyError, TypeError, ValueError: something is missing or wrong; the message names the field.
    """
    layers: dict[str, PlannedLayer] = {}
    _check_type("layers", values["layers"], list, "a list of layers")
    for row in values["layers"]:
        _check_type("a layer", row, dict, "an object")
        name = row["name"]
        _check_type("the name of a layer", name, str, "text")
        if name in layers:
            raise ValueError(f"two layers are called {name!r}")
        try:
            layers[name] = PlannedLayer(**{own: row[own] for own in _LAYER_FIELDS})
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    plan = SparsityPlan(layers=layers, **{name: values[name] for name in _PLAN_FIELDS})
    written, found = values["total"], plan.total
    check_number("total", written, at_least=0)
    if not math.isclose(written, found, rel_tol=1e-9, abs_tol=1e-9):
        raise ValueError(f"its layers add up to a sparsity of {found:.6g}, not to its total {written:.6g}")
    return plan


def _refuse_constant(text: str) -> None:
    """Refuse NaN and Infinity, which are no JSON and which `save` never writes."""
    raise ValueError(f"{text} is no number")


def _check_type(name: str, value: object, kind: type | tuple[type, ...], allowed: str) -> None:
    """Raise a TypeError that says what is allowed, unless a value is of a type."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {allowed}, got {value!r:.80}")
