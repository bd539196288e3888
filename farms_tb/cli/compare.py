"""`farms-tb compare`: the alphas of two models, layer by layer.

Say, of one network before and after training, or by two ways of training. Each is measured as `analyze` measures
it, by FARMS windows or whole matrices as `--esd` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from farms_tb.cli.arguments import (
    MODEL_HELP,
    Base,
    Device,
    Filter,
    Key,
    Output,
    OutputFormat,
    Pretrained,
    Strict,
    takes_spectrum_options,
)
from farms_tb.cli.differences import NO_DIFFERENCE, weight_differences
from farms_tb.cli.exit_codes import finish
from farms_tb.cli.measuring import Measured, MeasureRequest, Reading, checked_device, measure
from farms_tb.cli.messages import EXIT_INTERRUPTED, complaints, say
from farms_tb.cli.output import Result, chosen_format, emit
from farms_tb.cli.pairing import Pair, changes, paired
from farms_tb.cli.sources import Source, open_source
from farms_tb.cli.tables import Column, Row
from farms_tb.options import SpectrumOptions, as_plain
from farms_tb.report import OK
from farms_tb.weights.adapter_files import adapter_folder
from farms_tb.weights.files import takes_key

_COLUMNS = (
    Column("layer", "layer"),
    Column("shape", "K x R x C", optional=True),
    Column("alpha_a", "alpha A", 3, error="alpha_error_a"),
    Column("alpha_b", "alpha B", 3, error="alpha_error_b"),
    Column("change", "B - A", 3, error="change_error", signed=True),
    Column("change_error", "±", 3, error="change_error"),
    Column("change_in_errors", "(B - A)/±", 1, digits=2, signed=True, optional=True),
    Column("difference_norm", "|D|/|A|", 4),
    Column("difference_rank", "rank D", 0),
    Column("difference_alpha", "alpha D", 3, optional=True),
)
_KEYS = tuple(changes([Pair("", None, None)])[0])
"""Names of the values in a row without those of the difference."""


@takes_spectrum_options
def compare(
    model_a: Annotated[str, typer.Argument(metavar="A", help=MODEL_HELP, show_default=False)],
    model_b: Annotated[str, typer.Argument(metavar="B", help="The same.", show_default=False)],
    *,
    options: SpectrumOptions,
    difference: Annotated[
        bool,
        typer.Option(
            help="Also measure D, the difference of the weights: its norm, rank and alpha. Reads both again."
        ),
    ] = True,
    pretrained: Pretrained = False,
    key: Key = None,
    base: Base = None,
    patterns: Filter = None,
    output_format: OutputFormat = None,
    output: Output = None,
    strict: Strict = False,
    device: Device = "cpu",
) -> None:
    """Compare the alphas of two models, layer by layer of the same name, the largest change first.

    Names are the same if they differ in the prefixes module., model. and _orig_mod. alone. ± is the standard error
    of the change: the root of the sum of both alphas' squared standard errors. D is the difference of the weights
    B - A: |D|/|A| its Frobenius norm against that of A, rank D the number of directions that hold 99 % of its
    energy, alpha D its own alpha. The folder of an adapter (LoRA or DoRA by PEFT) is merged onto the other model,
    or onto --base.
    """
    with complaints():
        form = chosen_format(output_format, output, inputs=(model_a, model_b, base))
        request = MeasureRequest(options, patterns=tuple(patterns or ()), device=checked_device(device))
        sources = _open_both((model_a, model_b), options, pretrained, key, base)
    found = _measure_all(sources, request)
    pairs = paired(*(part.records for part in found))
    rows, keys = changes(pairs), _KEYS
    parts: list[Reading] = [*found]
    if difference:
        differences = weight_differences(sources, pairs, request)
        parts.append(differences)
        rows = [_with_difference(row, differences.by_layer.get(row["layer"], NO_DIFFERENCE)) for row in rows]
        keys = tuple(dict.fromkeys((*_KEYS, *NO_DIFFERENCE)))
    complete = not any(part.stopped for part in parts)
    facts = {"a": model_a, "b": model_b, "complete": complete, "options": as_plain(options)}
    result = Result(f"A: {model_a}\nB: {model_b}", _COLUMNS, rows, facts, complete, keys=keys)
    with complaints():
        emit(result, form, output)
    if not any(pair.in_both for pair in pairs):
        some_a, some_b = (", ".join(list(part.records)[:3]) or "none" for part in found)
        say(f"No layer has the same name in both: {some_a} in A, {some_b} in B.")
    finish(parts, rows, "change", strict)


def _with_difference(row: Row, difference: Row) -> Row:
    """Return the row of a layer with the metrics of the difference of its weights."""
    reasons = [part["status"] for part in (row, difference) if part["status"] != OK]
    return {**row, **difference, "status": "; ".join(reasons) or OK}


def _measure_all(sources: Sequence[Source], request: MeasureRequest) -> list[Measured]:
    """Measure models one after the other; Ctrl-C ends the command, since half a comparison is of no use."""
    found = []
    for source in sources:
        measured = measure(source, request, Console(stderr=True))
        if measured.interrupted:
            say(f"{measured.stopped}: nothing to compare yet")
            raise typer.Exit(EXIT_INTERRUPTED)
        found.append(measured)
    return found


def _open_both(
    models: tuple[str, str], options: SpectrumOptions, pretrained: bool, key: str | None, base: str | None
) -> list[Source]:
    """Open two models; of a file, an adapter and a model by name, each takes the option that is for it.

    `pretrained` is for models by name, `key` for files, and `base` for adapters, whose base is the other of the
    two models where none is given.

    Raises:
        ValueError: there is a key and no file, or a base and no adapter; for the others see `open_source`.
    """
    are_files = [Path(model).exists() for model in models]
    are_adapters = [adapter_folder(model) is not None for model in models]
    if key is not None and not any(are_files):
        raise ValueError(f"--key is for files of weights, {models[0]} and {models[1]} are none")
    if base is not None and not any(are_adapters):
        raise ValueError(f"--base is for the folder of an adapter, {models[0]} and {models[1]} are none")
    keys = [key if _takes_key(model) else None for model in models]
    if keys == [None, None]:
        keys = [key, key]  # neither takes one, which opening them says
    sources = []
    for side, model in enumerate(models):
        other = 1 - side
        if are_adapters[side]:
            other_is_base = are_files[other] and not are_adapters[other]
            own_base = base or (models[other] if other_is_base else None)
            sources.append(open_source(model, key=keys[side], base=own_base, options=options))
        elif are_files[side]:
            sources.append(open_source(model, key=keys[side], options=options))
        else:
            sources.append(open_source(model, pretrained=pretrained, options=options))
    return sources


def _takes_key(model: str) -> bool:
    """Return whether a key may be for a model: a file by torch.save, or an adapter, whose base may be one."""
    if adapter_folder(model) is not None:
        return True
    try:
        return takes_key(model)
    except (FileNotFoundError, ValueError):
        return True  # the folder of a run, or what opening it refuses
