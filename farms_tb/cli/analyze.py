"""`farms-tb analyze`: measure each layer of a model or a file of weights.

A row for each layer, by FARMS windows and, unless `--no-full`, as a whole matrix; below the table what the numbers
say. All that the user may have got wrong is checked before the first layer is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from farms_tb.cli.arguments import (
    Base,
    Device,
    Filter,
    Key,
    ModelArgument,
    Output,
    OutputFormat,
    Pretrained,
    Strict,
    takes_spectrum_options,
)
from farms_tb.cli.exit_codes import finish
from farms_tb.cli.measuring import COLUMNS, Measured, MeasureRequest, checked_device, measure, null_is_quick
from farms_tb.cli.messages import complaints, say
from farms_tb.cli.output import Result, chosen_format, emit
from farms_tb.cli.sources import Source, open_source
from farms_tb.cli.tables import Column, Row, sort_rows
from farms_tb.options import SpectrumOptions, as_plain
from farms_tb.verdicts import Verdict
from farms_tb.viewing.diagnosis import ModelSummary, diagnose, summarise
from farms_tb.weights.names import counted

VERDICT_STYLES: dict[str, str] = {
    Verdict.TRAINED: "green",
    Verdict.RANDOM: "bold yellow",
    Verdict.COLLAPSED: "bold red",
    Verdict.OUTLIERS: "yellow",
    Verdict.NO_POWER_LAW: "yellow",
}
"""Colours of the verdicts in a terminal: red and bold for what to look at first."""

_COLUMNS = (
    Column("layer", "layer"),
    Column("shape", "K x R x C", optional=True),
    Column("alpha", "alpha", 3, error="alpha_error"),
    Column("alpha_error", "±", 3, error="alpha_error"),
    Column("effect", "effect", 3, error="effect_error", signed=True),
    Column("alpha_full", "full", 3, error="alpha_error", optional=True),
    Column("bias", "bias", 3, error="alpha_error", signed=True),
    # Its unit, the standard deviation of a few shuffled layers, is itself uncertain by 10 to 30 %.
    Column("z_score", "z", 1, digits=2, signed=True, optional=True),
    Column("ks_distance", "KS", 3, optional=True),
    Column("stable_rank", "st. rank", 1, optional=True),
    Column("verdict", "verdict", styles=VERDICT_STYLES),
)


@takes_spectrum_options
def analyze(
    model: ModelArgument,
    *,
    options: SpectrumOptions,
    full: Annotated[
        bool, typer.Option(help="Also measure whole matrices, for the bias of their alpha. Slow for large ones.")
    ] = True,
    null: Annotated[
        bool | None,
        typer.Option(
            "--null/--no-null",
            help="Also measure each layer in random order (permutation null), for effect, z and verdict. Default: "
            "where that takes less than a minute.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare the model as a whole with this one.")
    ] = None,
    against_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Where the weights lie in the file of --against, as --key.")
    ] = None,
    pretrained: Pretrained = False,
    key: Key = None,
    base: Base = None,
    patterns: Filter = None,
    sort: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Sort by a column of the CSV: alpha, bias, layer, ...")
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", "-r", help="Sort from the largest down.")] = False,
    output_format: OutputFormat = None,
    output: Output = None,
    strict: Strict = False,
    device: Device = "cpu",
) -> None:
    """Measure each layer of a model or a file of weights; of a run folder, its last checkpoint.

    alpha is the power-law exponent of the layer's spectrum by FARMS, ± its standard error. full is that of the
    whole matrix, and bias their difference, which comes from the matrix's shape. effect is alpha minus that of the
    layer's own entries in random order, negative where something was learnt, and z says how many standard
    deviations that is. KS is the distance between the spectrum and its power law, 0 the best. st. rank is the
    stable rank of the whole matrix: its squared Frobenius norm over its squared largest singular value; of a
    convolution, the mean over its matrices. The verdict says in a word what these numbers mean. Below the table
    stand up to five sentences on what to look at.
    """
    with complaints():
        form = chosen_format(output_format, output, inputs=(model, against, base))
        device = checked_device(device)
        if sort is not None and sort not in COLUMNS:
            raise ValueError(f"--sort {sort}: the columns are {', '.join(COLUMNS)}")
        source = open_source(model, pretrained=pretrained, key=key, base=base, options=options)
        other = None if against is None else _open_other(against, against_key, pretrained, options)
    request = MeasureRequest(options, full and options.esd == "farms", bool(null), tuple(patterns or ()), device)
    if null is None:
        request = replace(request, null=null_is_quick(source, request))
        if not request.null:
            say("effects and verdicts are left out: permutation nulls take over a minute (--null measures them)")
    console = Console(stderr=True)
    found = measure(source, request, console)
    parts, compared = [found], None
    if other is not None and not found.interrupted:
        compared = measure(other, replace(request, full=False), console)
        parts.append(compared)
    result = _result(model, found, against, compared, options)
    if sort is not None:
        result = replace(result, rows=sort_rows(result.rows, sort, reverse))
    with complaints():
        emit(result, form, output)
    finish(parts, result.rows, "alpha", strict)


def _result(
    model: str, found: Measured, against: str | None, compared: Measured | None, options: SpectrumOptions
) -> Result:
    """Return the table of a model, with what it says of the model as a whole.

    `model` and `against` are what the user called the models, `found` and `compared` their layers; of the second
    there are none where measuring was interrupted before.
    """
    rows = found.rows()
    complete = not (found.stopped or (compared is not None and compared.stopped))
    summaries = {model: summarise(found.report)}
    if against is not None and compared is not None:
        name = against if against != model else f"{against} (--against)"
        summaries[name] = summarise(compared.report)
    sentences = diagnose(found.report) if rows else []
    facts = {
        "model": model,
        "complete": complete,
        "options": as_plain(options),
        "summaries": {name: asdict(summary) for name, summary in summaries.items()},
        "diagnosis": sentences,
    }
    below = [*_whole_models(summaries), *sentences]
    return Result(f"{model}: {_summary(rows)}", _COLUMNS, rows, facts, complete, below, COLUMNS)


def _whole_models(summaries: Mapping[str, ModelSummary]) -> list[str]:
    """Return a line for each model: its mean metrics, and how many layers have each verdict."""
    lines = []
    for name, summary in summaries.items():
        if summary.mean_alpha is None or summary.weighted_alpha is None or summary.mean_log_norm is None:
            continue
        means = f"mean alpha {summary.mean_alpha:.3f}, alpha weighted by log norm {summary.weighted_alpha:.2f}"
        verdicts = "".join(f", {number} {verdict}" for verdict, number in summary.verdicts.items())
        lines.append(f"{name}: {means}, mean log norm {summary.mean_log_norm:.2f}{verdicts}")
    return lines


def _open_other(against: str, key: str | None, pretrained: bool, options: SpectrumOptions) -> Source:
    """Open the model to compare with; of a library, with random or trained weights as the other one has."""
    try:
        return open_source(against, pretrained=pretrained and not Path(against).exists(), key=key, options=options)
    except ValueError as error:  # --key is for the other file
        raise ValueError(str(error).replace("--key", "--against-key")) from error


def _summary(rows: Sequence[Row]) -> str:
    """Return how many layers have an alpha, and the span of the alphas."""
    alphas = [row["alpha"] for row in rows if row["alpha"] is not None]
    counts = f"{len(alphas)} of {counted(len(rows), 'layer')} with an alpha"
    if not alphas:
        return counts
    return f"{counts}, {min(alphas):.2f} to {max(alphas):.2f}"
