"""Questions whose answer is a span of a text, as in SQuAD (Rajpurkar et al., EMNLP 2016)."""

from __future__ import annotations

import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recipes.errors import RecipeError
from recipes.finetune.encoding import Encoded, Scores, Tokens
from recipes.finetune.reading import Row
from recipes.finetune.tasks import Task

__all__ = ["encode_spans"]

_STRIDE = 128  # tokens that neighbouring windows of a long text share, as in BERT's SQuAD script
_LONGEST_ANSWER = 30  # tokens
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def encode_spans(rows: Sequence[Row], task: Task, tokens: Tokens) -> Encoded:
    """Encode questions with a text each, in windows; the labels are the first and last token of the answer.

    A window without the answer is labelled with its first token, which stands for no answer.

    Raises:
        RecipeError: a question leaves no room for the text.
    """
    _check_questions(rows, task, tokens)
    windows = tokens(
        rows,
        task.text,
        task.pair,
        truncation="only_second",
        padding="max_length",
        stride=_stride(tokens.length),
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


def _stride(length: int) -> int:
    """Return how many tokens neighbouring windows of such a length share."""
    return min(_STRIDE, length // 4)


def _check_questions(rows: Sequence[Row], task: Task, tokens: Tokens) -> None:
    """Refuse a length that the longest question fills, up to the tokens that windows share."""
    questions = [task.text.format(**row).strip() for row in rows]
    found = tokens.tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]
    longest = max(map(len, found))
    taken = longest + tokens.tokenizer.num_special_tokens_to_add(pair=True)
    if tokens.length - taken > _stride(tokens.length):
        return
    enough = next(length for length in itertools.count(taken) if length - taken > _stride(length))
    raise RecipeError(
        f"model.length={tokens.length} leaves too little of the text next to a question of {longest} tokens; "
        f"set it to at least {enough}"
    )


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
        is_text = np.array([span is not None for span in inside])
        first, last = np.ogrid[: len(inside), : len(inside)]
        possible = is_text[first] & is_text[last] & (first <= last) & (last < first + _LONGEST_ANSWER)
        sums = np.where(possible, starts[first] + ends[last], -np.inf)
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
