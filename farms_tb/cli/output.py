"""Write a result: to stdout or into a file; as a table, CSV, JSON or Parquet.

`chosen_format` runs before anything is measured, so that a mistake costs no time; `emit` writes. A table is for
the eye and rounds its numbers, the other formats hold every value of every row in full.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, get_args

import typer
from rich.console import Console
from rich.text import Text

from farms_tb.atomic_write import atomic_path, write_text_atomically
from farms_tb.cli.messages import EXIT_PART, say
from farms_tb.cli.tables import Column, Row, print_table
from farms_tb.missing import cannot_import
from farms_tb.printable import printable
from farms_tb.weights.files import ENDINGS

Format = Literal["table", "csv", "json", "parquet"]

_FILES_OF_RUNS = ("metrics.csv", "config.yaml", "hparams.yaml", "summary.json")
"""What loggers and recipes write into the folder of a run."""

_FILES_OF_MODELS = (
    *("config.json", "adapter_config.json", "generation_config.json", "preprocessor_config.json", "modules.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("config_sentence_transformers.json", "sparsity.json"),
)
"""What Hugging Face, Sentence Transformers and `prune` write next to weights."""


def chosen_format(form: Format | None, output: Path | None, inputs: Iterable[str | None] = ()) -> Format:
    """Return the format to write, after a check that it can be written.

    Args:
        form: what the user asked for; None for the format of the file's ending, and for a table without one.
        output: the file; None for stdout.
        inputs: what is read, None for nothing: a file among them is not to be written.

    Raises:
        ValueError: it cannot be written there.
        ImportError: it needs a package that is not installed.
    """
    chosen = form or "table"
    if form is None and output is not None:
        chosen = next((known for known in get_args(Format) if output.suffix.lower() == f".{known}"), "table")
    if chosen == "parquet":
        if output is None:
            raise ValueError("Parquet is no text for a terminal: pass --output FILE")
        try:
            import pyarrow.parquet  # noqa: F401
        except Exception as error:  # what a broken installation raises is anything
            raise ImportError(cannot_import("--format parquet", error, 'pip install "farms-tb[cli]"')) from error
    if output is not None:
        check_output(output, inputs)
    return chosen


def check_output(output: Path, inputs: Iterable[str | None] = ()) -> None:
    """Raise a ValueError where a file cannot be made, or would replace weights or another file that is read."""
    if output.is_dir():
        raise ValueError(f"cannot write {output}: it is a folder")
    if output.name.endswith(ENDINGS):
        raise ValueError(f"--output {output}: this is the name of a file of weights, which it would replace")
    if output.exists() and any(Path(path).exists() and output.samefile(path) for path in inputs if path):
        raise ValueError(f"--output {output}: this is the file that is read, which it would replace")
    if output.exists() and any(_belongs_to(output, Path(path)) for path in inputs if path):
        raise ValueError(
            f"--output {output}: a file of the run or the model, which it would replace: choose another name"
        )
    if output.exists() and not output.is_file():
        return  # a pipe or a device is written to as it is
    try:
        with TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error.strerror}") from error


def _belongs_to(output: Path, path: Path) -> bool:
    """Return whether a file of this name is one of a run's or a model's own.

    A folder that is read has them at any depth, a file of weights has some of the model next to it.
    """
    folder = output.parent.resolve()  # A link of the file's name is replaced itself, not what it leads to.
    if path.is_dir():
        return output.name in (*_FILES_OF_RUNS, *_FILES_OF_MODELS) and folder.is_relative_to(path.resolve())
    return path.is_file() and output.name in _FILES_OF_MODELS and folder == path.parent.resolve()


@dataclass(frozen=True)
class Result:
    """What a command has found.

    Attributes:
        title: heading of a table.
        columns: columns of a table; the other formats hold every value of a row.
        rows: one for each layer.
        facts: what JSON says about all layers together.
        complete: whether that is all; if not, a file says so in its name.
        below: lines below a table.
        keys: names of the values of a row, for a CSV or Parquet file without rows.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    facts: Mapping[str, Any]
    complete: bool
    below: Sequence[str] = ()
    keys: Sequence[str] = ()


def emit(result: Result, form: Format, output: Path | None) -> None:
    """Print or write a result.

    An incomplete one goes into a file of another name, `a.partial.csv` for `a.csv`: a script that waits for the
    file must not take a part for all.

    Raises:
        typer.Exit: the file cannot be written, as the disk has filled up, say; the result is printed instead.
    """
    if output is None:
        _print(result, form)
        return
    path = output if result.complete else output.with_suffix(f".partial{output.suffix}")
    try:
        if form == "parquet":
            with atomic_path(path) as unfinished:
                _write_parquet(result.rows, _keys(result), unfinished)
        else:
            write_text_atomically(path, _as_text(result, form))
    except OSError as error:
        say(f"Error: {error}. The result is printed instead, so that it is not lost", style="red")
        _print(result, "csv" if form == "parquet" else form)
        raise typer.Exit(EXIT_PART) from error
    say(f"wrote {path}")


def _print(result: Result, form: Format) -> None:
    """Print a result to stdout; only a table adapts to the terminal."""
    if form == "table":
        _print_table(Console(), result)
    else:
        print(_as_text(result, form), end="")


def _as_text(result: Result, form: Format) -> str:
    """Return a result as the content of a text file."""
    if form == "csv":
        return _as_csv(result.rows, _keys(result))
    if form == "json":
        return json.dumps({**result.facts, "layers": result.rows}, indent=2) + "\n"
    text = StringIO()
    _print_table(Console(file=text), result)
    return text.getvalue()


def _print_table(console: Console, result: Result) -> None:
    """Print a table, and what is said below it, each on lines of its own."""
    print_table(console, result.title, result.columns, result.rows)
    for line in result.below:
        console.print()
        console.print(Text(printable(line)), soft_wrap=not console.is_terminal)


def _as_csv(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """Return the rows as CSV with a header; an empty cell where there is no value.

    Control characters in names are shown as escapes, since CSV may go to a terminal; JSON has its own escapes.
    """
    text = StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_with_text(row, printable) for row in rows)
    return text.getvalue()


def _keys(result: Result) -> list[str]:
    """Return the keys that all rows have."""
    return list(result.rows[0] if result.rows else result.keys)


def _with_text(row: Row, change: Callable[[str], str]) -> dict[str, Any]:
    """Return a row with its texts changed and its numbers as they are."""
    return {key: change(cell) if isinstance(cell, str) else cell for key, cell in row.items()}


def _write_parquet(rows: Sequence[Row], keys: Sequence[str], path: Path) -> None:
    """Write the rows as a Parquet file: text, 64-bit integers and doubles."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"num_eigenvalues": pa.int64()}
    for name in ("layer", "shape", "kind", "solver", "verdict", "status"):
        types[name] = pa.string()
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in keys])
    encodable = [_with_text(row, _encodable) for row in rows]
    pq.write_table(pa.Table.from_pylist(encodable, schema=schema), path)


def _encodable(text: str) -> str:
    """Return text with an escape in place of each lone surrogate, which UTF-8 lacks."""
    return text.encode("utf-8", "backslashreplace").decode()
