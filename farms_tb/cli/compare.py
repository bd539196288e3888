"""`farms-tb compare`: the alphas of two models, layer by layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

from farms_tb.cli.arguments import (
    MODEL_HELP,
    Device,
    Filter,
    Key,
    Output,
    OutputFormat,
    Pretrained,
    Strict,
    takes_spectrum_options,
)
from farms_tb.cli.exit_codes import finish
from farms_tb.cli.measuring import Wanted, checked_device, measure
from farms_tb.cli.messages import EXIT_INTERRUPTED, complaints, say
from farms_tb.cli.output import Result, chosen_format, emit
from farms_tb.cli.sources import open_source
from farms_tb.cli.tables import Column, Row
from farms_tb.options import SpectrumOptions, as_plain
from farms_tb.report import OK, LayerRecord

_COLUMNS = (
    Column("layer", "layer"),
    Column("shape", "K x R x C", optional=True),
    Column("alpha_a", "alpha A", 3, error="alpha_error_a"),
    Column("alpha_b", "alpha B", 3, error="alpha_error_b"),
    Column("change", "B - A", 3, error="change_error", signed=True),
    Column("change_error", "±", 3, error="change_error"),
    Column("change_in_errors", "(B - A)/±", 1, digits=2, signed=True),
)

_WRAPPERS = ("module.", "model.", "_orig_mod.")
"""What DataParallel and DDP, Lightning modules and `torch.compile` put before the names of a model's layers."""


@takes_spectrum_options
def compare(
    model_a: Annotated[str, typer.Argument(metavar="A", help=MODEL_HELP, show_default=False)],
    model_b: Annotated[str, typer.Argument(metavar="B", help="The same.", show_default=False)],
    *,
    options: SpectrumOptions,
    pretrained: Pretrained = False,
    key: Key = None,
    patterns: Filter = None,
    output_format: OutputFormat = None,
    output: Output = None,
    strict: Strict = False,
    device: Device = "cpu",
) -> None:
    """Compare the alphas of two models, layer by layer of the same name, the largest change first.

    Names are the same if they differ in the prefixes module., model. and _orig_mod. alone. ± is the standard error
    of the change: both alphas' standard errors, added in squares.
    """
    with complaints():
        form = chosen_format(output_format, output)
        wanted = Wanted(options, patterns=tuple(patterns or ()), device=checked_device(device))
        sources = [
            open_source(model, pretrained=pretrained and not Path(model).exists(), key=key)
            for model in (model_a, model_b)
        ]
    found = []
    for source in sources:
        found.append(measure(source, wanted, Console(stderr=True)))
        if found[-1].interrupted:
            say(f"{found[-1].stopped}: nothing to compare yet")
            raise typer.Exit(EXIT_INTERRUPTED)
    pairs = paired(*(part.records for part in found))
    rows = changes(pairs)
    complete = not any(part.stopped for part in found)
    facts = {"a": model_a, "b": model_b, "complete": complete, "options": as_plain(options)}
    with complaints():
        emit(Result(f"A: {model_a}\nB: {model_b}", _COLUMNS, rows, facts, complete), form, output)
    if all(None in (pair.a, pair.b) for pair in pairs):
        some_a, some_b = (", ".join(list(part.records)[:3]) or "none" for part in found)
        say(f"No layer has the same name in both: {some_a} in A, {some_b} in B.")
    finish(found, rows, "change", strict)


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
    bare = {name: _without_wrappers(name) for name in names}
    count = Counter(bare.values())
    return {short: name for name, short in bare.items() if count[short] == 1}


def _without_wrappers(name: str) -> str:
    while prefix := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), ""):
        name = name.removeprefix(prefix)
    return name


def changes(pairs: Iterable[Pair]) -> list[Row]:
    """Return a row for each layer, the largest change first, those without one last."""
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
