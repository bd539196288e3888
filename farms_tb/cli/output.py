"""Write a result: to stdout or into a file; as a table, CSV, JSON or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, get_args

from rich.console import Console

from farms_tb.atomic_write import atomic_path, write_text_atomically
from farms_tb.cli.messages import say
from farms_tb.cli.tables import Column, Row, print_table

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
            raise ValueError("Parquet is no text for a terminal: say --output FILE")
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


def emit(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    facts: Mapping[str, Any],
    form: Format,
    output: Path | None,
    complete: bool,
) -> None:
    """Print or write a result.

    Args:
        title: heading of a table.
        columns: columns of a table; the other formats hold every figure.
        rows: one for each layer.
        facts: what JSON says besides.
        form: the format.
        output: the file; None for stdout.
        complete: whether that is all; if not, the file says so in its name.
    """
    text = ""
    if form == "table":
        console = Console() if output is None else Console(file=StringIO())
        print_table(console, title, columns, rows)
        text = "" if output is None else console.file.getvalue()  # type: ignore[attr-defined]
    elif form == "csv":
        text = _as_csv(rows)
    elif form == "json":
        text = _as_json(rows, facts)
    if output is None:
        print(text, end="")
        return
    path = output if complete else output.with_suffix(f".partial{output.suffix}")
    if form == "parquet":
        with atomic_path(path) as unfinished:
            _write_parquet(rows, unfinished)
    else:
        write_text_atomically(path, text)
    say(f"wrote {path}")


def _as_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV with a header; an empty cell where there is no figure."""
    text = StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _as_json(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """Return one object: the facts, and the rows as `"layers"`."""
    return json.dumps({**facts, "layers": rows}, indent=2) + "\n"


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as a Parquet file: text, 64-bit integers and doubles."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, whole = ("layer", "shape", "kind", "solver", "status"), ("num_eigenvalues",)
    kinds = {**dict.fromkeys(text, pa.string()), **dict.fromkeys(whole, pa.int64())}
    names = list(rows[0]) if rows else []
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in names])
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), path)
