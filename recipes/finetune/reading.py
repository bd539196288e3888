"""Read a split of a task with `datasets`, from local files or, if allowed, from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from recipes.errors import RecipeError
from recipes.finetune.tasks import TASKS, Task

__all__ = ["Row", "Source", "read_split"]

Row = Mapping[str, Any]
"""An example: plain values by column."""

_HUB = {"glue": "nyu-mll/glue", "superglue": "aps/super_glue", "squad": "rajpurkar/squad"}
"""The data set of the hub that holds a benchmark, one configuration a task."""

_AS_IT_STANDS = {"keep_default_na": False, "na_values": [""]}  # pandas takes "NA" and "null" for nothing, too
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("from_json", {}),
    ".json": ("from_json", {}),
    ".parquet": ("from_parquet", {}),
    ".csv": ("from_csv", _AS_IT_STANDS),
    ".tsv": ("from_csv", {**_AS_IT_STANDS, "sep": "\t", "quoting": 3}),  # GLUE's files do not quote
}
"""What reads each kind of file."""

_NO_LABEL = (None, "", -1)  # -1 in splits whose labels are secret


@dataclass(frozen=True)
class Source:
    """Where a task is read from.

    Attributes:
        name: the task's name, see `recipes.finetune.tasks`.
        folder: holds `<benchmark>/<task>/<split>*.jsonl` and the like.
        hub: read from the Hugging Face hub instead.
    """

    name: str
    folder: Path
    hub: bool

    @property
    def task(self) -> Task:
        """What the task is."""
        return TASKS[self.name]

    @property
    def own_name(self) -> str:
        """The task's name within its benchmark."""
        return self.name.removeprefix("superglue_")


def read_split(source: Source, split: str) -> list[Row]:
    """Return the examples of a split, without those that have no label.

    An empty cell of a table (CSV or TSV) is an empty text, or no label.

    Args:
        source: where to read.
        split: `train`, `validation` or `test`, or what else the split is called.

    Raises:
        RecipeError: the split, a column, a text or every label is missing, or the hub does not answer.
    """
    import datasets

    datasets.disable_progress_bars()
    files = [] if source.hub else _files(source, split)
    found = _from_files(source, files) if files else _from_hub(source, split)
    columns = _columns(source.task)
    missing = [column for column in columns if column not in found.column_names]
    if missing:
        raise RecipeError(
            f"{source.name}: the split {split} lacks the columns {', '.join(missing)}; "
            f"it has {', '.join(found.column_names)}"
        )
    rows: list[Row] = list(found.select_columns(columns))
    if "label" in columns:
        rows = [row for row in rows if row["label"] not in _NO_LABEL]
    if not rows:
        raise RecipeError(f"{source.name}: the split {split} has no labelled example")
    if any(_is_table(file) for file in files):
        return [{name: "" if value is None else value for name, value in row.items()} for row in rows]
    place = " ".join(map(str, files)) or f"{source.name}: the split {split}"
    for column in columns:
        if any(row[column] is None for row in rows):
            raise RecipeError(f'{place}: the column {column} is null in an example; write "" for an empty text')
    return rows


def _columns(task: Task) -> list[str]:
    """Return the columns that a task needs."""
    return [*_text_columns(task), "answers" if task.kind == "span" else "label"]


def _text_columns(task: Task) -> list[str]:
    """Return the columns that the network reads."""
    texts = "".join((task.text, task.pair, *task.choices))
    return [name for _, name, _, _ in Formatter().parse(texts) if name]


def _from_hub(source: Source, split: str) -> Any:
    """Read a split from the hub, or from what an earlier download has left."""
    import datasets

    if source.task.group not in _HUB:
        raise RecipeError(f"data.hub=true: {source.name} is not on the hub; put its files under {source.folder}")
    path = _HUB[source.task.group]
    configuration = None if source.name == source.task.group else source.own_name
    try:
        return datasets.load_dataset(path, configuration, split=split)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"data.hub=true: {path} can't be read ({error}); see the network and HF_HUB_OFFLINE, or put the files "
            f"under {source.folder} with data.hub=false"
        ) from error


def _files(source: Source, split: str) -> list[Path]:
    """Return the files of a split, all of one format.

    Raises:
        RecipeError: there is none.
    """
    folder = source.folder / source.task.group / source.own_name
    names = (split, "dev") if split == "validation" else (split,)
    for name in names:
        for ending in _READERS:
            files = sorted(folder.glob(f"{name}*{ending}"))
            if files:
                return files
    raise RecipeError(
        f"{folder} has no file {split}* that ends in {', '.join(_READERS)}; put the files of {source.name} there, "
        "or allow the download with data.hub=true"
    )


def _is_table(file: Path) -> bool:
    """Return whether a file is CSV or TSV, whose cells are words without a type."""
    return _READERS[file.suffix][0] == "from_csv"


def _from_files(source: Source, files: Sequence[Path]) -> Any:
    """Read local files, which `datasets` keeps in a cache next to them."""
    import datasets

    reader, options = _READERS[files[0].suffix]
    if _is_table(files[0]):
        options = {**options, "converters": dict.fromkeys(_text_columns(source.task), str)}  # "007" is no number
    read = getattr(datasets.Dataset, reader)
    return read(list(map(str, files)), cache_dir=str(files[0].parent / ".cache"), **options)
