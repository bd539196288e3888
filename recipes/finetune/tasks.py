"""What the tasks of Model Balancing (Liu et al., EMNLP 2024, arXiv 2410.12178) are.

Columns are those of the data sets `nyu-mll/glue`, `aps/super_glue` and `rajpurkar/squad` of the Hugging Face hub,
and of the domain tasks as published for "Don't Stop Pretraining" (Gururangan et al., ACL 2020): `text`, `label`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TASKS", "Kind", "Task"]

Kind = Literal["classes", "number", "choice", "span"]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        group: the benchmark that it is part of, and the folder of its files.
        text: what the network reads; names of columns in braces.
        pair: the second text; empty for none.
        kind: what is predicted: one of several classes, a number, one of several endings, or a span of the text.
        score: the score by which the best epoch is chosen.
        choices: the endings to choose from, with `kind="choice"`.
        validation: the published split that the best epoch is chosen on; empty to hold training examples out.
        test: the published split that is tested. Test labels of GLUE, SuperGLUE and SQuAD are not public, so there
            it is the published validation split.
    """

    group: str
    text: str
    pair: str = ""
    kind: Kind = "classes"
    score: str = "accuracy"
    choices: tuple[str, ...] = ()
    validation: str = ""
    test: str = "validation"


def _domain(score: str) -> Task:
    """Return a task of a domain: one text, and three published splits with labels."""
    return Task("domain", "{text}", score=score, validation="validation", test="test")


TASKS = {
    "sst2": Task("glue", "{sentence}"),
    "mnli": Task("glue", "{premise}", "{hypothesis}", test="validation_matched"),
    "qnli": Task("glue", "{question}", "{sentence}"),
    "qqp": Task("glue", "{question1}", "{question2}"),
    "cola": Task("glue", "{sentence}", score="matthews"),
    "mrpc": Task("glue", "{sentence1}", "{sentence2}"),
    "stsb": Task("glue", "{sentence1}", "{sentence2}", kind="number", score="pearson"),
    "rte": Task("glue", "{sentence1}", "{sentence2}"),
    "superglue_boolq": Task("superglue", "{question}", "{passage}"),
    "superglue_rte": Task("superglue", "{premise}", "{hypothesis}"),
    "superglue_cb": Task("superglue", "{premise}", "{hypothesis}"),
    "superglue_wic": Task("superglue", "{word}: {sentence1}", "{sentence2}"),
    "superglue_multirc": Task("superglue", "{paragraph}", "{question} {answer}", score="macro_f1"),
    "superglue_copa": Task(
        "superglue", "{premise} What is the {question}?", kind="choice", choices=("{choice1}", "{choice2}")
    ),
    "squad": Task("squad", "{question}", "{context}", kind="span", score="f1"),
    "rct": _domain("macro_f1"),
    "scicite": _domain("macro_f1"),
    "chemprot": _domain("accuracy"),
    "scierc": _domain("macro_f1"),
    "hyperpartisan": _domain("macro_f1"),
}
"""Every task by name."""
