"""Several processes: one run on two of them, and several runs side by side."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from omegaconf import DictConfig

from farms_tb.plots import read_history
from recipes.errors import RecipeError
from recipes.folder import SHARED_FOLDER, _new_folder, open_run_folder
from recipes.train import CONFIG_DIR, build_run
from tests.recipes.recipe_runs import TINY_UNET

Settings = Callable[..., DictConfig]
ROOT = Path(CONFIG_DIR).parent
PROCESSES = ("trainer.accelerator=cpu", "trainer.devices=2")


def run(folder: Path, *overrides: str) -> str:
    """Run from the command line; return what was printed."""
    command = [sys.executable, "-m", "recipes.train", f"paths.output_dir={folder}/runs", *overrides]
    result = subprocess.run(
        [*command, f"paths.data_dir={folder}/data", "logger=csv", "~callbacks.pictures"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout


def summary(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("runs/*/*/summary.json")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def losses(folder: Path) -> list[float]:
    (file,) = folder.glob("runs/*/*/metrics.csv")
    with file.open(newline="", encoding="utf-8") as rows:
        return [float(row["train/loss"]) for row in csv.DictReader(rows) if row.get("train/loss")]


@pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 of torch 2.6 needs a GPU")
def test_ddp_and_fsdp_train_the_same_network(tmp_path: Path) -> None:
    """Whether a process holds all weights or a part of them: the same losses, ratios and scores, in one folder."""
    tiny = tuple(option for option in TINY_UNET if option != "trainer=cpu")
    for strategy in ("ddp", "fsdp"):
        folder = tmp_path / strategy
        printed = run(folder, *tiny, *PROCESSES, f"trainer={strategy}", "data.batch_size=2", "farms=full")
        assert printed.count("run folder") == 1
        assert len(list((folder / "runs/darcy_unet").iterdir())) == 1
        assert summary(folder)["steps"] == 2 * 12 // (2 * 2)  # epochs, samples, processes, batch
        (alphas,) = folder.glob("runs/*/*/metrics.csv")
        assert read_history(alphas).alpha["net.bottleneck.conv1"].steps == (
            0,
            3,
            6,
        )  # the first process alone logs
    ddp, fsdp = tmp_path / "ddp", tmp_path / "fsdp"
    assert losses(fsdp) == pytest.approx(losses(ddp), rel=1e-4)
    one, other = summary(ddp), summary(fsdp)
    assert other["test"] == pytest.approx(one["test"], rel=1e-3, abs=1e-6)
    for row, twin in zip(one["layers"], other["layers"], strict=True):
        assert twin["ratio"] == pytest.approx(row["ratio"], rel=1e-3)
    weights = [torch.load(Path(s["best_checkpoint"]), weights_only=True)["state_dict"] for s in (one, other)]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


def test_joblib_runs_a_sweep_side_by_side(tmp_path: Path) -> None:
    sizes = ("data.train_size=64", "data.val_size=20", "data.test_size=20", "model.net.width=4")
    tiny = ("experiment=digits_resnet18", "farms=off", "debug=one_batch", "trainer=cpu", *sizes)
    run(tmp_path, *tiny, "sweep=seeds", "seeds='1,2'", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    found = [json.loads(file.read_text(encoding="utf-8")) for file in tmp_path.glob("runs/digits*/*/summary.json")]
    assert sorted(facts["seed"] for facts in found) == [1, 2]
    assert found[0]["test"] != found[1]["test"]


@pytest.mark.parametrize("name", ["slurm", "submitit_slurm"])
def test_slurm_launcher_composes(name: str) -> None:
    overrides = ["experiment=sciml/cfd2d_fno", "sweep=seeds", f"hydra/launcher={name}", "hydra.launcher.nodes=3"]
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        cfg = compose("train", overrides=overrides, return_hydra_config=True)
    launcher = instantiate(cfg.hydra.launcher)
    assert type(launcher).__name__ == "SlurmLauncher"
    assert launcher.params["nodes"] == 3
    assert set(launcher.params) <= {field.name for field in fields(SlurmQueueConf)}
    assert launcher.params["submitit_folder"] == "runs/multirun/.submitit/%j"
    if name == "slurm":
        assert (launcher.params["name"], launcher.params["gpus_per_node"]) == ("sciml/cfd2d_fno", 1)


def test_runs_that_start_at_once_have_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: _new_folder(tmp_path / "runs"), range(64)))
    assert len(set(folders)) == 64


def test_further_processes_use_the_first_ones_folder(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_run_folder(settings())
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
    assert open_run_folder(settings()) == first.resolve()
    monkeypatch.delenv(SHARED_FOLDER)
    with pytest.raises(RecipeError, match=r"process 1 can't know the run folder .*set paths\.run_dir="):
        open_run_folder(settings())
    assert open_run_folder(settings(f"paths.run_dir={first}")) == first


def test_a_sweep_starts_no_processes(settings: Settings, tmp_path: Path) -> None:
    options = (*PROCESSES, "trainer=ddp", "logger=csv", f"paths.run_dir={tmp_path}")
    build_run(settings(*options))
    with pytest.raises(RecipeError, match=r"a sweep can't start the 2 processes .*hydra/launcher=slurm"):
        build_run(settings(*options, "sweep=seeds"))
