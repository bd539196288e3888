"""From examples to the inputs of a network, and from its outputs to scores: one head for each kind of task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from recipes.finetune.encoding import Encoded, Scores, Tokens
from recipes.finetune.reading import Row
from recipes.finetune.spans import encode_spans
from recipes.finetune.tasks import Kind, Task

__all__ = ["HEADS", "Head"]


@dataclass(frozen=True)
class Head:
    """What depends on the kind of a task.

    Attributes:
        auto_class: name of the class of transformers that builds the network.
        peft_type: what PEFT calls the task.
        encode: turns examples into inputs.
        scores: names of the scores that what it encodes is given.
        is_padded: whether all inputs have the same length already.
    """

    auto_class: str
    peft_type: str
    encode: Callable[[Sequence[Row], Task, Tokens], Encoded]
    scores: tuple[str, ...]
    is_padded: bool = False


def _labelled_rows(rows: Sequence[Row], encoding: Any, as_label: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """Join tokens and labels, one dict an example."""
    features = []
    for index, row in enumerate(rows):
        tokens = {name: values[index] for name, values in encoding.items()}
        features.append({**tokens, "labels": as_label(row["label"])})
    return features


def _encode_classes(rows: Sequence[Row], task: Task, tokens: Tokens) -> Encoded:
    """Encode texts with one class each."""
    encoding = tokens(rows, task.text, task.pair, truncation=True)
    return Encoded(_labelled_rows(rows, encoding, int), _class_scores)


def _encode_numbers(rows: Sequence[Row], task: Task, tokens: Tokens) -> Encoded:
    """Encode texts with one number each."""
    encoding = tokens(rows, task.text, task.pair, truncation=True)
    return Encoded(_labelled_rows(rows, encoding, float), _number_scores)


def _encode_choices(rows: Sequence[Row], task: Task, tokens: Tokens) -> Encoded:
    """Encode texts with several endings, of which the label tells the right one: inputs (endings, length)."""
    endings = [tokens(rows, task.text, choice, truncation=True, padding="max_length") for choice in task.choices]
    stacked = {name: list(zip(*(ending[name] for ending in endings), strict=True)) for name in endings[0]}
    return Encoded(_labelled_rows(rows, stacked, int), _class_scores)


def _class_scores(predictions: Any) -> Scores:
    """Return accuracy, the mean of the classes' F1, and Matthews' correlation coefficient.

    F1 is averaged over the classes that occur among labels or predictions.
    """
    labels = predictions.label_ids
    chosen = _first(predictions.predictions).argmax(-1)
    return {
        "accuracy": float(accuracy_score(labels, chosen)),
        "macro_f1": float(f1_score(labels, chosen, average="macro", zero_division=0.0)),
        "matthews": float(matthews_corrcoef(labels, chosen)),
    }


def _number_scores(predictions: Any) -> Scores:
    """Return Pearson's and Spearman's correlations; 0 where all predictions are equal."""
    values = _first(predictions.predictions).reshape(-1)
    labels = predictions.label_ids.reshape(-1)
    if np.ptp(values) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(values, labels).statistic),
        "spearman": float(spearmanr(values, labels).statistic),
    }


def _first(outputs: Any) -> NDArray[np.floating]:
    """Return the logits: some networks return hidden states along with them."""
    return np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)


_OF_CLASSES = ("accuracy", "macro_f1", "matthews")

HEADS: dict[Kind, Head] = {
    "classes": Head("AutoModelForSequenceClassification", "SEQ_CLS", _encode_classes, _OF_CLASSES),
    "number": Head("AutoModelForSequenceClassification", "SEQ_CLS", _encode_numbers, ("pearson", "spearman")),
    "choice": Head("AutoModelForMultipleChoice", "SEQ_CLS", _encode_choices, _OF_CLASSES, is_padded=True),
    "span": Head(
        "AutoModelForQuestionAnswering", "QUESTION_ANS", encode_spans, ("exact_match", "f1"), is_padded=True
    ),
}
"""The head of each kind of task."""
