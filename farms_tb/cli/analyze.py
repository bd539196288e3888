"""`farms-tb analyze`: measure each layer of a model or a file of weights.

A row for each layer, by FARMS windows and, unless `--no-full`, as a whole matrix. Everything the user may have got
wrong is checked before the first layer is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from farms_tb.cli.arguments import (
    Device,
    Filter,
    Key,
    ModelArgument,
    Null,
    Output,
    OutputFormat,
    Pretrained,
    Strict,
    takes_spectrum_options,
)
from farms_tb.cli.exit_codes import finish
from farms_tb.cli.measuring import COLUMNS, Wanted, checked_device, measure
from farms_tb.cli.messages import complaints
from farms_tb.cli.output import Result, chosen_format, emit
from farms_tb.cli.sources import open_source
from farms_tb.cli.tables import Column, Row, sort_rows
from farms_tb.options import SpectrumOptions, as_plain

_COLUMNS = (
    Column("layer", "layer"),
    Column("shape", "K x R x C", optional=True),
    Column("alpha", "alpha", 3, error="alpha_error"),
    Column("alpha_error", "±", 3, error="alpha_error"),
    Column("alpha_full", "full", 3, error="alpha_error"),
    Column("bias", "bias", 3, error="alpha_error", signed=True),
    # Its unit, the standard deviation of a few shuffled layers, is itself uncertain by 10 to 30 %.
    Column("z_score", "z", 1, digits=2, signed=True),
    Column("ks_distance", "KS", 3),
    Column("stable_rank", "st. rank", 1),
)


@takes_spectrum_options
def analyze(
    model: ModelArgument,
    *,
    options: SpectrumOptions,
    full: Annotated[
        bool, typer.Option(help="Also measure whole matrices, for the bias of their alpha. Slow for large ones.")
    ] = True,
    null: Null = False,
    pretrained: Pretrained = False,
    key: Key = None,
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
    whole matrix, and bias their difference, which comes from the matrix's shape. z says how many standard
    deviations alpha lies from that of a random layer of the same shape. KS is the distance between the spectrum
    and its power law, 0 the best. st. rank is the stable rank of the whole matrix: its squared Frobenius norm over
    its squared largest singular value; of a convolution, the mean over its matrices.
    """
    with complaints():
        form = chosen_format(output_format, output)
        also_full = full and options.esd == "farms"
        wanted = Wanted(options, also_full, null, tuple(patterns or ()), checked_device(device))
        _check_column(sort)
        source = open_source(model, pretrained=pretrained, key=key, embeddings=options.embeddings)
    found = measure(source, wanted, Console(stderr=True))
    rows: Sequence[Row] = found.rows()
    if sort is not None:
        rows = sort_rows(rows, sort, reverse)
    facts = {"model": model, "complete": not found.stopped, "options": as_plain(options)}
    result = Result(f"{model}: {_summary(rows)}", _COLUMNS, rows, facts, not found.stopped)
    with complaints():
        emit(result, form, output)
    finish([found], rows, "alpha", strict)


def _check_column(sort: str | None) -> None:
    """Raise a ValueError where there is no such column to sort by; None sorts by nothing."""
    if sort is not None and sort not in COLUMNS:
        raise ValueError(f"--sort {sort}: the columns are {', '.join(COLUMNS)}")


def _summary(rows: Sequence[Row]) -> str:
    """Return how many layers have an alpha, and the span of the alphas."""
    alphas = [row["alpha"] for row in rows if row["alpha"] is not None]
    counts = f"{len(alphas)} of {len(rows)} layers have an alpha"
    if not alphas:
        return counts
    return f"{counts}, {min(alphas):.2f} to {max(alphas):.2f}"
