"""Wikipedia's articles as plain text, and labelled documents."""

from __future__ import annotations

import bz2
import csv
import html
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from recipes.real.files import checked

__all__ = ["LabelledTexts", "Part", "Split", "newsgroups20", "plain_text", "reuters8", "wikipedia"]

Part = Literal["evaluation", "calibration"]
Split = Literal["train", "test"]

MIN_CHARACTERS = 5000
"""Shorter articles are left out: most of them only point to another one."""

_HEADER_LINES = 3  # of a table: names, types and roles of the columns
_LONGEST_DOCUMENT = 1 << 24

_TEXT = re.compile(r"<text[^>]*>(.*?)</text>", flags=re.DOTALL)
# Removed with all they hold, before anything else.
_REMOVED = re.compile(
    r"<!--.*?-->|<ref[^>]*/>|<(ref|math|gallery|source|code|pre|timeline)\b.*?</\1>"
    r"|==\s*(See also|References|Notes|External links|Further reading|Bibliography)\s*==.*",
    flags=re.DOTALL,
)
_INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\|).)*?\|\}", flags=re.DOTALL)  # a template, a table
_MEDIA = re.compile(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]")
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]")
_ADDRESS = re.compile(r"\[\w+:\S+ ?([^\]]*)\]")
_MARKS = re.compile(r"'{2,}|<[^>]*>|__\w+__")
_EMPTY = re.compile(r" \([\s,;]*\)")  # what is left of a pronunciation
_PROSE = re.compile(r"^\w.{60,}$", flags=re.MULTILINE)  # no heading, list or caption


@dataclass(frozen=True)
class LabelledTexts:
    """Documents with one label each.

    Attributes:
        texts: the documents.
        labels: for each document the index of its class.
        classes: the names of the classes, in alphabetical order.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def wikipedia(part: Part) -> list[str]:
    """Return articles of the English Wikipedia as paragraphs of plain text, one string an article.

    Headings, lists, tables, formulas and notes are left out, and articles of less than 5000 characters. The rest
    alternate, in the order of the dump: the first is for evaluation, the second for calibration, and so on.

    Args:
        part: which half.

    Raises:
        ValueError: `part` is neither.
        RecipeError: the file is not there, or is another.
    """
    parts = get_args(Part)
    if part not in parts:
        raise ValueError(f"part must be one of {parts}, got {part!r}")
    first = parts.index(part)
    return list(_articles()[first::2])


@cache
def _articles() -> tuple[str, ...]:
    """Return all articles that are long enough, in the order of the dump."""
    with bz2.open(checked("wikipedia"), "rt", encoding="utf-8") as file:
        sources = _TEXT.findall(file.read())
    articles = (plain_text(html.unescape(source)) for source in sources)
    return tuple(article for article in articles if len(article) >= MIN_CHARACTERS)


def plain_text(source: str) -> str:
    """Return the paragraphs of an article in MediaWiki's markup, one a line.

    Args:
        source: the markup.
    """
    text = _REMOVED.sub("", source)
    count = 1
    while count:  # templates and tables hold others: from the inside out
        text, count = _INNERMOST.subn("", text)
    text = _MEDIA.sub("", text)
    text = _LINK.sub(r"\1", text)
    text = _ADDRESS.sub(r"\1", text)
    text = _MARKS.sub("", text)
    text = html.unescape(text)
    text = _EMPTY.sub("", text)
    return "\n".join(" ".join(line.split()) for line in _PROSE.findall(text))


def reuters8(split: Split) -> LabelledTexts:
    """Return news of 8 classes, skewed to two of them: 5485 to train, 2189 to test; lower case, no punctuation.

    Args:
        split: which documents.

    Raises:
        ValueError: `split` is neither.
        RecipeError: the file is not there, or is another.
    """
    return _labelled("reuters8", split)


def newsgroups20(split: Split) -> LabelledTexts:
    """Return messages of 20 newsgroups: 11293 to train, 7528 to test; lower case, no punctuation.

    Subjects are kept, so words of a group's name can occur.

    Args:
        split: which documents.

    Raises:
        ValueError: `split` is neither.
        RecipeError: the file is not there, or is another.
    """
    return _labelled("newsgroups20", split)


def _labelled(name: str, split: Split) -> LabelledTexts:
    """Read a table of labels and documents; rows without a label, or cut short, are left out.

    Args:
        name: name of the data set.
        split: which documents.

    Raises:
        ValueError: `split` is neither "train" nor "test".
        RecipeError: the file is not there, or is another.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")
    limit = csv.field_size_limit(_LONGEST_DOCUMENT)  # that of the whole process, which is put back
    try:
        with checked(f"{name} {split}").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[_HEADER_LINES:]
    finally:
        csv.field_size_limit(limit)
    names = []
    texts = []
    for row in rows:
        if len(row) == 2 and row[0]:
            names.append(row[0])
            texts.append(row[1])
    classes = tuple(sorted(set(names)))
    labels = tuple(map(classes.index, names))
    return LabelledTexts(tuple(texts), labels, classes)
