"""Read a task, and draw what is trained on, what chooses the best epoch and what is tested.

All examples are rows of plain values by column. Nothing is downloaded unless the settings say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recipes.errors import RecipeError
from recipes.finetune.checks import check_score
from recipes.finetune.draw import Draw, draw_apart, draw_stratified, read_fraction
from recipes.finetune.reading import Row, Source, read_split
from recipes.finetune.tasks import TASKS, Task
from recipes.real import LabelledTexts, newsgroups20, reuters8
from recipes.values import Range

__all__ = ["Examples", "RealTexts", "TaskData"]

_REAL: dict[str, Callable[[Literal["train", "test"]], LabelledTexts]] = {
    "newsgroups20": newsgroups20,
    "reuters8": reuters8,
}
_HELD_OUT = 1000
_TEST_SEED = 0  # every run is tested on the same examples


@dataclass(frozen=True)
class Examples:
    """The examples of a run.

    Attributes:
        task: what they are.
        classes: names of the classes, in the order of their indices; empty where numbers or spans are predicted.
        train: examples to train on.
        val: examples to choose the best epoch on.
        test: examples to report.

    Raises:
        RecipeError: there is nothing to choose the best epoch on.
    """

    task: Task
    classes: tuple[str, ...]
    train: Sequence[Row]
    val: Sequence[Row]
    test: Sequence[Row]

    def __post_init__(self) -> None:
        if not self.val:
            raise RecipeError(
                "no example is left to choose the best epoch on; set data.val_size above 0 and data.fraction "
                "below 1"
            )


class RealTexts:
    """The labelled documents of `make real`: 20 Newsgroups or Reuters-8.

    Args:
        name: `newsgroups20` or `reuters8`.
        fraction: fraction of the training documents that is trained on, such as 0.05 or "1/20".
        val_size: other training documents, to choose the best epoch on.
        test_size: test documents, the same in every run; None for all.
        draw: `stratified` by the seed, or the `first` documents.
        seed: decides which documents are drawn.
        score: the score by which the best epoch is chosen, `accuracy` or `macro_f1`.

    Raises:
        RecipeError: the name or the score is unknown, or a number is out of range; on reading, the files are not
            there.
    """

    def __init__(
        self,
        name: str = "newsgroups20",
        fraction: float | str = 0.01,
        val_size: int = 200,
        test_size: int | None = None,
        draw: Draw = "stratified",
        seed: int = 0,
        score: str = "accuracy",
    ) -> None:
        if name not in _REAL:
            raise RecipeError(f"data.name must be one of {', '.join(_REAL)}, got {name}")
        Range(0).check("data.val_size", val_size)
        Range(1, null=True).check("data.test_size", test_size)
        check_score("data.score", score, "classes")
        self.name = name
        self.fraction, self.val_size, self.test_size = read_fraction(fraction), val_size, test_size
        self.draw, self.seed = draw, seed
        self.task = Task("real", "{text}", score=score)

    def read(self) -> Examples:
        """Read and draw.

        Raises:
            RecipeError: `make real` has not run, or too few documents are left over.
        """
        train, test = (_REAL[self.name](split) for split in ("train", "test"))
        chosen, held_out = draw_apart(train.labels, self.fraction, self.val_size, self.seed, self.draw)
        tested = list(range(len(test.labels)))
        if self.test_size is not None and self.test_size < len(tested):
            tested = draw_stratified(test.labels, self.test_size, _TEST_SEED)
        parts = [_documents(train, chosen), _documents(train, held_out), _documents(test, tested)]
        return Examples(self.task, train.classes, *parts)


def _documents(texts: LabelledTexts, indices: Sequence[int]) -> list[Row]:
    """Return some documents as rows."""
    return [{"text": texts.texts[index], "label": texts.labels[index]} for index in indices]


class TaskData:
    """A task of Model Balancing, from local files or, if allowed, from the Hugging Face hub.

    Args:
        task: its name, see `recipes.finetune.tasks`.
        folder: holds `<benchmark>/<task>/<split>*.jsonl`, or `.json`, `.csv`, `.tsv`, `.parquet`: splits are
            `train`, `validation` (or `dev`; of MNLI `validation_matched`) and, of the domain tasks, `test`.
        hub: read from the Hugging Face hub instead, which downloads what is not in its cache.
        fraction: fraction of the training examples that is trained on, such as 0.05 or "1/20".
        val_size: other training examples, to choose the best epoch on, where no published split serves; None for
            1000, or all that are left over where they are fewer.
        draw: `stratified` by the seed, or the `first` examples, as the authors do.
        seed: decides which examples are drawn.

    Raises:
        RecipeError: the task is unknown, or the fraction out of range; on reading, files or columns are missing.
    """

    def __init__(
        self,
        task: str,
        folder: str | Path,
        hub: bool = False,
        fraction: float | str = 1.0,
        val_size: int | None = None,
        draw: Draw = "stratified",
        seed: int = 0,
    ) -> None:
        if task not in TASKS:
            raise RecipeError(f"data.task must be one of {', '.join(TASKS)}, got {task}")
        self.task = TASKS[task]
        self.source = Source(task, Path(folder), hub)
        self.fraction, self.val_size = read_fraction(fraction), val_size
        self.draw, self.seed = draw, seed

    def read(self) -> Examples:
        """Read and draw.

        Raises:
            RecipeError: files or columns are missing, the hub does not answer, or too few examples are left over.
        """
        task = self.task
        splits: dict[str, Sequence[Row]] = {
            name: read_split(self.source, name) for name in ("train", task.validation, task.test) if name
        }
        classes: tuple[str, ...] = ()
        if task.kind in ("classes", "choice"):
            classes, splits = _with_indices(splits)
        strata = [row["label"] if classes else 0 for row in splits["train"]]
        held_out = self._held_out(len(strata))
        chosen, held = draw_apart(strata, self.fraction, held_out, self.seed, self.draw)
        train = [splits["train"][index] for index in chosen]
        val = splits[task.validation] if task.validation else [splits["train"][index] for index in held]
        return Examples(task, classes, train, val, splits[task.test])

    def _held_out(self, number: int) -> int:
        """Return how many training examples to hold out of so many."""
        if self.task.validation:
            return 0
        if self.val_size is not None:
            return self.val_size
        return min(_HELD_OUT, number - max(1, round(self.fraction * number)))


def _with_indices(splits: Mapping[str, Sequence[Row]]) -> tuple[tuple[str, ...], dict[str, Sequence[Row]]]:
    """Replace labels by indices into the sorted labels of the training split.

    Args:
        splits: the examples by split, with numbers or words as labels.

    Returns:
        The labels as text, and the splits.

    Raises:
        RecipeError: another split has a label that no training example has.
    """
    labels = sorted({row["label"] for row in splits["train"]})
    index = {label: number for number, label in enumerate(labels)}
    indexed: dict[str, Sequence[Row]] = {}
    for name, rows in splits.items():
        unknown = {row["label"] for row in rows} - index.keys()
        if unknown:
            raise RecipeError(f"the split {name} has labels that no training example has: {sorted(unknown)}")
        indexed[name] = [{**row, "label": index[row["label"]]} for row in rows]
    return tuple(map(str, labels)), indexed
