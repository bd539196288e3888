"""A random BERT of toy size with a tokenizer of words, and made files in the formats of the published tasks."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

GOOD = ["good", "fine", "great", "lovely"]
BAD = ["bad", "poor", "awful", "dreadful"]
FILLER = ["the", "film", "was", "a", "story", "of", "people", "in", "town", "and", "what", "they", "did", "it"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def write_model(folder: Path) -> str:
    """Write a BERT of two blocks, width 64, and its tokenizer."""
    torch.manual_seed(0)
    words = [*SPECIAL, *GOOD, *BAD, *FILLER, "?", ":"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def reviews(number: int, seed: int = 0) -> Iterator[tuple[str, int]]:
    """Yield sentences that praise, label 1, or blame, label 0; a third of them praises."""
    draw = random.Random(seed)
    for index in range(number):
        label = int(index % 3 == 0)
        words = [draw.choice(FILLER) for _ in range(6)]
        for place in draw.sample(range(6), 3):
            words[place] = draw.choice(GOOD if label else BAD)
        yield " ".join(words), label


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON lines, CSV or TSV, as the ending of the path says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
            return
        style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        writer = csv.DictWriter(file, list(rows[0]), **style)
        writer.writeheader()
        writer.writerows(rows)


def write_sst2(folder: Path, train: int = 160, ending: str = ".jsonl") -> None:
    """Write SST-2 in the format of GLUE, with a test split whose labels are secret."""
    for split, number in {"train": train, "validation": 20, "test": 5}.items():
        rows = [{"sentence": text, "label": label, "idx": 0} for text, label in reviews(number, seed=number)]
        if split == "test":
            rows = [{**row, "label": -1} for row in rows]
        write_rows(folder / "glue" / "sst2" / f"{split}{ending}", rows)


def made_task(folder: Path, task: str, train: int = 24) -> None:
    """Write a task of another kind than SST-2, in the format of its data set.

    Args:
        folder: what the settings call `paths.data_dir`.
        task: one of the keys of `_MADE`.
        train: training examples; the other splits have a third.
    """
    group, ending, make = _MADE[task]
    splits = ("train", "dev", "test") if group == "domain" else ("train", "validation")
    for split in splits:
        number = train if split == "train" else train // 3
        rows = [make(text, label) for text, label in reviews(number, seed=len(split))]
        write_rows(folder / group / task.removeprefix("superglue_") / f"{split}{ending}", rows)


def _stsb(text: str, label: int) -> dict[str, Any]:
    return {"sentence1": text, "sentence2": GOOD[0], "label": 5.0 * label, "idx": 0}


def _copa(text: str, label: int) -> dict[str, Any]:
    endings = {"choice1": f"it was {GOOD[0]}", "choice2": f"it was {BAD[0]}"}
    return {"premise": text, "question": "effect", **endings, "label": 1 - label, "idx": 0}


def _wic(text: str, label: int) -> dict[str, Any]:
    return {"word": text.split()[0], "sentence1": text, "sentence2": GOOD[0], "label": label, "idx": 0}


def _squad(text: str, label: int) -> dict[str, Any]:
    word = text.split()[2]
    answers = {"text": [word], "answer_start": [text.index(word)]}
    return {"id": "0", "title": "", "context": text, "question": f"what of {word} ?", "answers": answers}


def _scicite(text: str, label: int) -> dict[str, Any]:
    return {"text": text, "label": ("background", "method")[label], "metadata": {"section": "x"}}


_MADE = {
    "stsb": ("glue", ".jsonl", _stsb),
    "superglue_copa": ("superglue", ".jsonl", _copa),
    "superglue_wic": ("superglue", ".jsonl", _wic),
    "squad": ("squad", ".jsonl", _squad),
    "scicite": ("domain", ".jsonl", _scicite),
}
"""Benchmark, format and row of each task that can be made."""
