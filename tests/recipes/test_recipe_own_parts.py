"""A model, data and config files of the user's own, in an empty folder outside the repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.config import CONFIG_DIR

ROOT = Path(CONFIG_DIR).parent
SECTION = "## Your own model and data in a recipe"

OWN_MODULE = """
import torch
from lightning import LightningModule


class Own(LightningModule):
    def __init__(self, width, optimizer, scheduler):
        super().__init__()
        sizes = ((64, width), (width, width), (width, 64))
        first, second, third = (torch.nn.Linear(*size) for size in sizes)
        self.layers = torch.nn.Sequential(first, second, torch.nn.Tanh(), third)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler

    def training_step(self, batch, index):
        return (self.layers(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, index):
        self.log("val/loss", self.training_step(batch, index))

    def test_step(self, batch, index):
        self.log("test/loss", self.training_step(batch, index))

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}
"""
OWN_MODEL = "_target_: waves.own.Own\nwidth: 48\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that the documentation shows, where a user would put them."""
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    section = text.partition(SECTION)[2].partition("\n## ")[0]
    for block in re.findall(r"```(?:python|yaml)\n(.*?)```", section, re.DOTALL):
        name = re.search(r"^# (\S+\.(?:py|yaml))$", block, re.MULTILINE)
        assert name, block
        file = tmp_path / name[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block, encoding="utf-8")
    return tmp_path


def _train(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipes.train", "--config-dir", "conf", "experiment=waves", *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_documented_files_train_from_an_empty_folder(folder: Path) -> None:
    short = ("logger=csv", "trainer=cpu", "paths.run_dir=run", "threads=1")
    result = _train(folder, *short, "balancing=full", "balancing.lr_max_ratio=1.9")
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "run/summary.json").read_text(encoding="utf-8"))
    assert (summary["name"], summary["arm"], summary["epochs"]) == ("waves", "full", 5)
    assert "test/nrmse" in summary["test"]
    assert {row["ratio"] for row in summary["layers"]} >= {0.5, 1.9}
    assert "lr_max_ratio: 1.9" in (folder / "run/config.yaml").read_text(encoding="utf-8")


def test_a_module_of_ones_own_takes_the_place_of_a_task(folder: Path) -> None:
    (folder / "waves/own.py").write_text(OWN_MODULE, encoding="utf-8")
    (folder / "conf/model/own.yaml").write_text(OWN_MODEL, encoding="utf-8")
    own = ("model=own", "task.monitor=val/loss", "trainer.max_epochs=2", "threads=1")
    result = _train(folder, "logger=csv", "trainer=cpu", "paths.run_dir=run", *own)
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "run/summary.json").read_text(encoding="utf-8"))
    assert list(summary["test"]) == ["test/loss"]
    assert "layers.1" in [row["layer"] for row in summary["layers"]]


def test_a_class_that_is_not_there_is_named(folder: Path) -> None:
    result = _train(folder, "model._target_=waves.parts.Nothing")
    assert result.returncode == 2
    assert "model=convolutions" in result.stderr
    assert "waves.parts.Nothing" in result.stderr
    assert "Traceback" not in result.stderr
