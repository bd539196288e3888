"""Write a result: to stdout or into a file; as a table, CSV, JSON or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, get_args

from rich.console import Console

from farms_tb.atomic_write import atomic_path, write_text_atomically
from farms_tb.cli.messages import say
from farms_tb.cli.tables import Column, Row, print_table
from farms_tb.viewing.names import printable

Format = Literal["table", "csv", "json", "parquet"]


def chosen_format(form: Format | None, output: Path | None) -> Format:
    """Return the format that was asked for, or else that of the file's ending.

    Raises:
        ValueError: it cannot be written there.
        ImportError: it needs a package that is not installed.
    """
    ending = "" if output is None else output.suffix.removeprefix(".")
    chosen: Format = form or (ending if ending in get_args(Format) else "table")  # type: ignore[assignment]
    if chosen == "parquet":
        if output is None:
            raise ValueError("Parquet is no text for a terminal: pass --output FILE")
        if not find_spec("pyarrow"):
            raise ImportError('--format parquet needs pyarrow: pip install "farms-tb[cli]"')
    if output is not None:
        if output.is_dir():
            raise ValueError(f"cannot write {output}: it is a folder")
        try:
            with TemporaryFile(dir=output.parent):
                pass
        except OSError as error:
            raise ValueError(f"cannot write {output}: {error.strerror}") from error
    return chosen


@dataclass(frozen=True)
class Result:
    """What a command has found.

    Attributes:
        title: heading of a table.
        columns: columns of a table; the other formats hold every value of a row.
        rows: one for each layer.
        facts: what JSON says about all layers together.
        complete: whether that is all; if not, a file says so in its name.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    facts: Mapping[str, Any]
    complete: bool


def emit(result: Result, form: Format, output: Path | None) -> None:
    """Print or write a result.

    Args:
        result: what was found.
        form: the format.
        output: the file; None for stdout.

    Raises:
        OSError: the file cannot be written.
    """
    if output is None:
        _print(result, form)
        return
    path = output if result.complete else output.with_suffix(f".partial{output.suffix}")
    if form == "parquet":
        with atomic_path(path) as unfinished:
            _write_parquet(result.rows, unfinished)
    else:
        write_text_atomically(path, _as_text(result, form))
    say(f"wrote {path}")


def _print(result: Result, form: Format) -> None:
    if form == "table":
        print_table(Console(), result.title, result.columns, result.rows)
    else:
        print(_as_text(result, form), end="")


def _as_text(result: Result, form: Format) -> str:
    if form == "csv":
        return _as_csv(result.rows)
    if form == "json":
        return json.dumps({**result.facts, "layers": result.rows}, indent=2) + "\n"
    text = StringIO()
    print_table(Console(file=text), result.title, result.columns, result.rows)
    return text.getvalue()


def _as_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV with a header; an empty cell where there is no value.

    Control characters in names are shown as escapes, since CSV may go to a terminal; JSON has its own escapes.
    """
    text = StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: printable(cell) if isinstance(cell, str) else cell for key, cell in row.items()})
    return text.getvalue()


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as a Parquet file: text, 64-bit integers and doubles."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, whole = ("layer", "shape", "kind", "solver", "status"), ("num_eigenvalues",)
    kinds = {**dict.fromkeys(text, pa.string()), **dict.fromkeys(whole, pa.int64())}
    names = list(rows[0]) if rows else []
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in names])
    pq.write_table(pa.Table.from_pylist([_encodable(row) for row in rows], schema=schema), path)


def _encodable(row: Row) -> dict[str, Any]:
    """Return a row with an escape in place of each lone surrogate, which UTF-8 lacks."""
    return {
        key: cell.encode("utf-8", "backslashreplace").decode() if isinstance(cell, str) else cell
        for key, cell in row.items()
    }
