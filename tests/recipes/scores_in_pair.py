"""What each of two processes scores in `test_recipe_tasks.py`: sets that they do not divide."""

from __future__ import annotations

import json
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from recipes.tasks import FieldRegression, ImageClassification, LanguageModel

SIZES = (1, 2, 5)
"""Samples a batch: repeated ones are alone in theirs, among others, or in a set of one batch."""
Part = tuple[Any, tuple[Tensor, Tensor]]


def parts() -> dict[str, Part]:
    """Return a task of each kind, with five samples, of which the first has by far the largest error."""
    torch.manual_seed(0)
    outlier = torch.tensor([10.0, 1, 1, 1, 1])[:, None, None]
    fields = (torch.randn(5, 1, 16), torch.randn(5, 1, 16) * outlier)
    images = (torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 2, 2, 1]))
    tokens = (torch.tensor([[0, 0], [1, 2], [2, 1], [1, 1], [2, 2]]), torch.randint(3, (5, 2)))
    rate = partial(SGD, lr=0.1)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    return {
        "fields": (FieldRegression(nn.Conv1d(1, 1, 3, padding=1), rate), fields),
        "images": (ImageClassification(classifier, 3, rate), images),
        "text": (LanguageModel(nn.Embedding(3, 3), rate), tokens),
    }


def scores(**options: Any) -> dict[str, dict[str, float]]:
    """Return the validation and test scores of each task, by its name and the size of a batch."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    found = {}
    for name, (task, samples) in parts().items():
        for size in SIZES:
            trainer = Trainer(accelerator="cpu", logger=False, **quiet, **options)
            loader = DataLoader(TensorDataset(*samples), batch_size=size)
            (validated,) = trainer.validate(task, loader, verbose=False)
            (tested,) = trainer.test(task, loader, verbose=False)
            found[f"{name} {size}"] = {**validated, **tested}
    return found


def score_in_pair(rank: int, port: int, folder: Path) -> None:
    """Score as one of two processes, and write what was found."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(world)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = scores(strategy="ddp", devices=2)
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()  # left to the end of the process, gloo now and then aborts it
