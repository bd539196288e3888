"""From examples to the inputs of a network, and from its outputs to scores: one head for each kind of task."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from recipes.finetune.tasks import Kind, Task

__all__ = ["HEADS", "Encoded", "Head", "Tokens"]

Row = Mapping[str, Any]
Scores = dict[str, float]

_STRIDE = 128  # tokens that neighbouring windows of a long text share, as in BERT's SQuAD script
_LONGEST_ANSWER = 30  # tokens
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Tokens:
    """How texts become tokens.

    Attributes:
        tokenizer: a fast tokenizer of transformers.
        length: most tokens of an input; what is longer is cut, or read in windows where spans are looked for.
    """

    tokenizer: Any
    length: int

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None, **options: Any) -> Any:
        """Return the tokens of texts, or of pairs of them."""
        return self.tokenizer(list(texts), pairs and list(pairs), max_length=self.length, **options)


@dataclass(frozen=True)
class Encoded:
    """Examples as a network reads them.

    Attributes:
        features: one dict of inputs each; a long text may have several.
        score: takes the predictions for `features`, with labels, and returns scores by name.
    """

    features: list[dict[str, Any]]
    score: Callable[[Any], Scores]


@dataclass(frozen=True)
class Head:
    """What depends on the kind of a task.

    Attributes:
        auto_class: name of the class of transformers that builds the network.
        peft_type: what PEFT calls the task.
        encode: turns examples into inputs.
        is_padded: whether all inputs have the same length already.
    """

    auto_class: str
    peft_type: str
    encode: Callable[[Sequence[Row], Task, Tokens], Encoded]
    is_padded: bool = False


def _texts(rows: Sequence[Row], template: str) -> list[str] | None:
    """Return one text an example; None for an empty template."""
    return [template.format(**row) for row in rows] if template else None


def _labelled_rows(rows: Sequence[Row], encoding: Any, as_label: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """Join tokens and labels, one dict an example."""
    features = []
    for index, row in enumerate(rows):
        tokens = {name: values[index] for name, values in encoding.items()}
        features.append({**tokens, "labels": as_label(row["label"])})
    return features


def _encode_classes(rows: Sequence[Row], task: Task, tokens: Tokens) -> Encoded:
    """Encode texts with one class each."""
    encoding = tokens(_texts(rows, task.text) or [], _texts(rows, task.pair), truncation=True)
    return Encoded(_labelled_rows(rows, encoding, int), _class_scores)


def _encode_numbers(rows: Sequence[Row], task: Task, tokens: Tokens) -> Encoded:
    """Encode texts with one number each."""
    encoding = tokens(_texts(rows, task.text) or [], _texts(rows, task.pair), truncation=True)
    return Encoded(_labelled_rows(rows, encoding, float), _number_scores)


def _encode_choices(rows: Sequence[Row], task: Task, tokens: Tokens) -> Encoded:
    """Encode texts with several endings, of which the label tells the right one: inputs (endings, length)."""
    endings = [
        tokens(_texts(rows, task.text) or [], _texts(rows, choice), truncation=True, padding="max_length")
        for choice in task.choices
    ]
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


def _encode_spans(rows: Sequence[Row], task: Task, tokens: Tokens) -> Encoded:
    """Encode questions with a text each, in windows; the labels are the first and last token of the answer.

    A window without the answer is labelled with its first token, which stands for no answer.
    """
    windows = tokens(
        [text.strip() for text in _texts(rows, task.text) or []],
        _texts(rows, task.pair),
        truncation="only_second",
        padding="max_length",
        stride=min(_STRIDE, tokens.length // 4),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    sources = windows.pop("overflow_to_sample_mapping")
    offsets = windows.pop("offset_mapping")
    features = []
    spans = []
    for index, source in enumerate(sources):
        inside = [
            span if part == 1 else None
            for span, part in zip(offsets[index], windows.sequence_ids(index), strict=True)
        ]
        start, end = _answer_tokens(rows[source]["answers"], inside)
        inputs = {name: values[index] for name, values in windows.items()}
        features.append({**inputs, "start_positions": start, "end_positions": end})
        spans.append(inside)
    contexts = [row[task.pair.strip("{}")] for row in rows]
    answers = [list(row["answers"]["text"]) for row in rows]

    def score(predictions: Any) -> Scores:
        starts, ends = predictions.predictions[:2]
        found = _best_spans(zip(sources, spans, starts, ends, strict=True), contexts)
        return _span_scores(found, answers)

    return Encoded(features, score)


_Inside = Sequence[tuple[int, int] | None]
"""For each token of a window its characters in the text, from and to; None outside of the text."""


def _answer_tokens(answers: Mapping[str, Sequence[Any]], inside: _Inside) -> tuple[int, int]:
    """Return first and last token of the first answer; (0, 0) where the window does not hold all of it."""
    if not answers["text"]:
        return 0, 0
    first = int(answers["answer_start"][0])
    last = first + len(answers["text"][0])
    covered = [index for index, span in enumerate(inside) if span and span[0] < last and span[1] > first]
    if not covered:
        return 0, 0
    begins, ends = inside[covered[0]], inside[covered[-1]]
    if begins is None or ends is None or begins[0] > first or ends[1] < last:
        return 0, 0
    return covered[0], covered[-1]


def _best_spans(windows: Any, contexts: Sequence[str]) -> list[str]:
    """Return the most probable span of each text, over all of its windows.

    Args:
        windows: index of the text, characters of the tokens, and logits of the first and the last token (L,).
        contexts: the texts.
    """
    best = [(-math.inf, "")] * len(contexts)
    for source, inside, starts, ends in windows:
        allowed = np.array([span is not None for span in inside])
        sums = np.where(allowed, starts, -np.inf)[:, None] + np.where(allowed, ends, -np.inf)[None]
        sums = np.triu(sums) + np.tril(np.full_like(sums, -np.inf), -1)
        sums[np.triu_indices_from(sums, _LONGEST_ANSWER)] = -np.inf
        start, end = np.unravel_index(np.argmax(sums), sums.shape)
        if sums[start, end] > best[source][0]:
            text = contexts[source][inside[start][0] : inside[end][1]]
            best[source] = (float(sums[start, end]), text)
    return [text for _, text in best]


def _span_scores(found: Sequence[str], answers: Sequence[Sequence[str]]) -> Scores:
    """Return SQuAD's exact match and F1, between 0 and 1: for each question the best over its answers."""
    exact = [
        max((_plain(text) == _plain(answer) for answer in right), default=False)
        for text, right in zip(found, answers, strict=True)
    ]
    f1 = [
        max((_overlap(text, answer) for answer in right), default=0.0)
        for text, right in zip(found, answers, strict=True)
    ]
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}


def _plain(text: str) -> str:
    """Return a text without case, punctuation, articles and extra spaces, as SQuAD compares answers."""
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", letters).split())


def _overlap(text: str, answer: str) -> float:
    """Return the F1 of the words of two texts."""
    words, right = _plain(text).split(), _plain(answer).split()
    if not words or not right:  # nothing but articles and punctuation
        return float(words == right)
    common = sum((Counter(words) & Counter(right)).values())
    return 2 * common / (len(words) + len(right))


HEADS: dict[Kind, Head] = {
    "classes": Head("AutoModelForSequenceClassification", "SEQ_CLS", _encode_classes),
    "number": Head("AutoModelForSequenceClassification", "SEQ_CLS", _encode_numbers),
    "choice": Head("AutoModelForMultipleChoice", "SEQ_CLS", _encode_choices, is_padded=True),
    "span": Head("AutoModelForQuestionAnswering", "QUESTION_ANS", _encode_spans, is_padded=True),
}
"""The head of each kind of task."""
