"""`farms-tb prune`: carry out a plan on a model in files, and write the pruned model as a folder.

By magnitude, weights are streamed from file to file, one tensor in memory at a time. Wanda and SparseGPT load the
model by transformers. A run that was stopped goes on where it stopped when the same command is repeated.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from farms_tb.cli.measuring import checked_device, progress_bar
from farms_tb.cli.messages import EXIT_INPUT, EXIT_INTERRUPTED, EXIT_PART, complaints, say
from farms_tb.cli.tables import Column, print_table
from farms_tb.report import OK
from farms_tb.sparsity import PruneReport, SparsityPlan
from farms_tb.sparsity.calibration_files import CalibrationFile
from farms_tb.sparsity.methods import Structure
from farms_tb.sparsity.options import PruneMethod
from farms_tb.sparsity.prune_files import PreparedRun, PruneWish, prepare, prune_files
from farms_tb.weights.names import counted

_COLUMNS = (
    Column("layer", "layer"),
    Column("block", "block", optional=True),
    Column("size", "entries", 0, optional=True),
    Column("planned", "planned", 4),
    Column("sparsity", "achieved", 4),
    Column("output_error", "output error", 4),
)
EXIT_CODES_OF_PRUNING = """
\b
Exit codes:
    0  pruned, and the output folder is whole
    1  stopped, by a full disk for example; repeat the command to go on
    2  wrong usage or input
  130  interrupted; repeat the command to go on
"""


def prune(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder with safetensors, or, by magnitude, a single safetensors file.",
            show_default=False,
        ),
    ],
    *,
    plan: Annotated[
        Path, typer.Option(metavar="FILE", help="The plan: what farms-tb sparsity MODEL -o plan.json wrote.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to make.")],
    method: Annotated[
        PruneMethod,
        typer.Option(
            help="magnitude: the smallest entries of a matrix, no data needed; wanda: the smallest entry times "
            "norm of its input; sparsegpt: the smallest error of the output, and what stays is corrected for it."
        ),
    ] = "magnitude",
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text in UTF-8, or token ids (.pt, .safetensors). Needed but for magnitude, where it adds the "
            "output errors to the table. Needs transformers, as the model is loaded.",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Calibration sequences, chosen at random.")] = 128,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a calibration sequence. Default: 2048, or the context of the model if smaller. Ids "
            "(sequences, tokens) have their own length."
        ),
    ] = None,
    structure: Annotated[
        Structure,
        typer.Option(
            help="2:4 and 4:8: so many zeros in each group of consecutive inputs, for plans of 50 %; mixed:8: N "
            "of each 8, by the plan."
        ),
    ] = "unstructured",
    seed: Annotated[int, typer.Option(help="Of the choice of calibration sequences.")] = 0,
    device: Annotated[
        str, typer.Option(help="Where a model with calibration data runs: cpu, cuda, cuda:1.")
    ] = "cpu",
) -> None:
    """Carry out a plan: zero the entries of a model's weights, and write the model to a new folder.

    The output has the same files, names and types of tensors as MODEL; configuration and tokenizer are copied, and
    sparsity.json says what was done to each layer. Of each matrix exactly the planned share becomes zero, to one
    entry. The folder appears when it is whole; a run that was stopped goes on where it stopped when the same
    command is repeated.
    """
    with complaints():
        wish = PruneWish(
            model=Path(model),
            plan=SparsityPlan.load(plan),
            output=output,
            method=method,
            structure=structure,
            calibration=None if calibration is None else CalibrationFile(calibration, sequences, length, seed),
            seed=seed,
            device=checked_device(device),
        )
        run = prepare(wish)
    _say_what_is_copied(run)
    report = _carried_out(run)
    _print(report, output)
    say(f"wrote {output}")


def _say_what_is_copied(run: PreparedRun) -> None:
    """Say which files of the model's folder are not in the output, and which weights in it are not pruned."""
    others = run.others
    if others.left_out:
        say(f"not copied, since they hold dense weights: {', '.join(others.left_out)}")
    if others.other_models:
        say(f"not copied, since other models are in them: {', '.join(others.other_models)}")
    if others.unpruned:
        say(f"copied and not pruned, since modules.json names their folders: {', '.join(others.unpruned)}")


def _carried_out(run: PreparedRun) -> PruneReport:
    """Prune, with a progress bar; what is warned of is said below it, of a run that was stopped, too."""
    caught: list[warnings.WarningMessage] = []
    with _endings(run):
        try:
            with (
                progress_bar(Console(stderr=True), 1) as show,
                warnings.catch_warnings(record=True) as caught,
            ):
                warnings.simplefilter("always", UserWarning)

                def progress(what: str, done: int, total: int) -> None:
                    show(description=what, completed=done, total=total)

                return prune_files(run, progress)
        finally:
            for warning in caught:
                if issubclass(warning.category, UserWarning):
                    say(str(warning.message), style="yellow")


@contextmanager
def _endings(run: PreparedRun) -> Iterator[None]:
    """Turn what can stop a run into a message and an exit code."""
    state = run.unfinished.folder
    try:
        yield
    except KeyboardInterrupt:
        say(f"Interrupted: what is finished is in {state}. Repeat the command to go on", style="red")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room on the disk" if is_full else "remove the cause"
        say(
            f"Stopped: {str(error) or type(error).__name__}. What is finished is in {state}: {remedy}, and repeat "
            "the command to go on",
            style="red",
        )
        raise typer.Exit(EXIT_PART) from error
    except ValueError as error:
        say(f"Error: {error}", style="red")
        raise typer.Exit(EXIT_INPUT) from error


def _print(report: PruneReport, output: Path) -> None:
    """Print what was done to each layer to stdout, and the total below."""
    rows: list[dict[str, Any]] = [{**row, "status": OK} for row in report.rows()]
    size = sum(layer.size for layer in report.layers.values())
    planned = sum(layer.size * layer.planned for layer in report.layers.values()) / size
    rows.append({"layer": "total", "size": size, "planned": planned, "sparsity": report.sparsity, "status": OK})
    title = (
        f"{output}: {report.method}, {report.structure}; {report.sparsity:.6f} of {size:,} entries of "
        f"{counted(len(report.layers), 'layer')} are zero ({report.seconds:.1f} s)"
    )
    print_table(Console(), title, _COLUMNS, rows)
