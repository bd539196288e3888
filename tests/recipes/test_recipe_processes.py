"""Several processes: one run on two of them, and several runs side by side."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from omegaconf import DictConfig
from torch.utils.data import DataLoader, DistributedSampler

from farms_tb.viewing.plots import read_history
from recipes.config import CONFIG_DIR
from recipes.data.download import FILES, FOLDER
from recipes.errors import RecipeError
from recipes.folder import SHARED_FOLDER, _new_folder, open_run_folder
from recipes.run import build_run
from recipes.train import train
from tests.children import child_processes
from tests.recipes.pdebench_files import write_flow
from tests.recipes.process_runs import train_in_pair
from tests.recipes.recipe_runs import TINY_UNET, no_checkpoint
from tests.spectra.test_distributed import free_port

Settings = Callable[..., DictConfig]
ROOT = Path(CONFIG_DIR).parent
PROCESSES = ("trainer.accelerator=cpu", "trainer.devices=2")


def run(folder: Path, data: Path, *overrides: str) -> str:
    """Run from the command line; return what was printed."""
    command = [sys.executable, "-m", "recipes.train", f"paths.output_dir={folder}/runs", *overrides]
    result = subprocess.run(
        [*command, f"paths.data_dir={data}", "logger=csv", "~callbacks.pictures"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr + result.stdout
    assert "logging interval" not in result.stderr  # Lightning's advice, which is not for users
    return result.stdout


def run_in_pair(folder: Path, runs: dict[str, tuple[str, ...]]) -> None:
    """Train one run after the other on two processes, which share one import of everything."""
    context = child_processes()
    port = free_port()
    pair = [context.Process(target=train_in_pair, args=(rank, port, folder, runs)) for rank in (0, 1)]
    try:
        for process in pair:
            process.start()
        for process in pair:
            process.join(240)
        logs = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("?.log"))]
        assert [process.exitcode for process in pair] == [0, 0], "\n".join(logs)
    finally:
        for process in pair:
            process.kill()


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as rows:
        return [float(row["train/loss"]) for row in csv.DictReader(rows) if row.get("train/loss")]


def best_weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["state_dict"])


def assert_same_run(folder: Path, single: Path) -> None:
    """Assert that two folders hold the same losses, scores, ratios and weights, to rounding."""
    assert losses(folder) == pytest.approx(losses(single), rel=1e-4)
    one, other = summary(folder), summary(single)
    assert one["test"] == pytest.approx(other["test"], rel=1e-3, abs=1e-6)
    assert [row["ratio"] for row in one["layers"]] == pytest.approx(
        [row["ratio"] for row in other["layers"]], 1e-3
    )
    torch.testing.assert_close(best_weights(folder), best_weights(single), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 of torch 2.6 needs a GPU")
def test_ddp_and_fsdp_train_the_same_network(tmp_path: Path) -> None:
    """Whether a process holds all weights or a part of them."""
    tiny = tuple(option for option in TINY_UNET if option != "trainer=cpu")
    options = (*tiny, *PROCESSES, "data.batch_size=2", "balancing=full", "logger=csv", "~callbacks.pictures")
    run_in_pair(tmp_path, {strategy: (*options, f"trainer={strategy}") for strategy in ("ddp", "fsdp")})
    assert summary(tmp_path / "ddp")["steps"] == 2 * 12 // (2 * 2)  # epochs, samples, processes, batch
    assert_same_run(tmp_path / "fsdp", tmp_path / "ddp")


def test_two_processes_forecast_as_one_does(settings: Settings, tmp_path: Path) -> None:
    """By command: it starts the second process, and there is one folder, which the first process alone writes."""
    write_flow(tmp_path / "data" / FOLDER / FILES["cfd1d"].file_name, dimensions=1, samples=22)
    thin = ("data.every_point=1", "data.every_frame=1", "data.rollout_to=13", "data.fraction=1/2")
    net = ("model.net.hidden_channels=8", "model.net.n_modes=[4]")
    short = ("trainer.max_epochs=2", "arms.farms.min_eigenvalues=2")
    options = ("experiment=sciml/cfd1d_fno", *thin, *net, *short)
    alone = settings(*options, "data.batch_size=10", "trainer=cpu", "logger=csv", "~callbacks.pictures")
    train(alone)
    printed = run(tmp_path / "pair", tmp_path / "data", *options, "data.batch_size=5", *PROCESSES, "trainer=ddp")
    assert printed.count("run folder") == 1
    (folder,) = (tmp_path / "pair/runs/sciml/cfd1d_fno").iterdir()
    history = read_history(folder / "metrics.csv")
    assert history.alpha["net.projection.fcs.0"].steps == (0, 1, 2)  # the first process alone logs
    assert_same_run(folder, Path(alone.paths.run_dir))


class OldWrapper(DistributedSamplerWrapper):
    """Lightning's wrapper as it was before 2.6, which does not tell the sampler the epoch; half of the order."""

    def __init__(self, sampler: Any) -> None:
        super().__init__(sampler, num_replicas=2, rank=0, shuffle=False)
        self.drawn: list[list[Any]] = []

    def set_epoch(self, epoch: int) -> None:
        DistributedSampler.set_epoch(self, epoch)

    def __iter__(self) -> Iterator[Any]:
        self.drawn.append(list(super().__iter__()))
        return iter(self.drawn[-1])


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging interval")
@pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)")
@pytest.mark.parametrize("experiment", ["digits_resnet18", "grokking_mlp"])
def test_epochs_differ_with_lightnings_old_sampler_too(
    settings: Settings, tmp_path: Path, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("data.train_size=40", "data.val_size=20", "data.test_size=20", "trainer.max_epochs=3", "trainer=cpu")
    thin = ("model.net.width=4", "balancing=off", "logger=csv", f"paths.run_dir={tmp_path}/run")
    run = build_run(settings(f"experiment={experiment}", *small, *thin))
    run.data.setup("fit")
    made = run.data.train_dataloader()
    wrapper = OldWrapper(made.sampler)
    shared = DataLoader(made.dataset, made.batch_size, sampler=wrapper)
    monkeypatch.setattr(run.data, "train_dataloader", lambda: shared)
    run.trainer.fit(run.model, datamodule=run.data)
    expected = []
    for epoch in range(3):
        made.sampler.set_epoch(epoch)
        expected.append(list(made.sampler)[::2])
    assert wrapper.drawn == expected
    assert expected[0] != expected[1] != expected[2]


def test_joblib_runs_a_sweep_side_by_side(tmp_path: Path) -> None:
    sizes = ("data.train_size=64", "data.val_size=20", "data.test_size=20", "model.net.width=4")
    tiny = ("experiment=digits_resnet18", "balancing=off", "debug=one_batch", "trainer=cpu", *sizes)
    sweep = ("sweep=seeds", "seeds='1,2'", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    run(tmp_path, tmp_path / "data", *tiny, *sweep)
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
    first = open_run_folder(settings(), no_checkpoint)
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
    assert open_run_folder(settings(), no_checkpoint) == first.resolve()
    monkeypatch.delenv(SHARED_FOLDER)
    with pytest.raises(RecipeError, match=r"process 1 can't know the run folder .*set paths\.run_dir="):
        open_run_folder(settings(), no_checkpoint)
    assert open_run_folder(settings(f"paths.run_dir={first}"), no_checkpoint) == first


def test_a_sweep_starts_no_processes(settings: Settings, tmp_path: Path) -> None:
    options = (*PROCESSES, "trainer=ddp", "logger=csv", f"paths.run_dir={tmp_path}")
    build_run(settings(*options))
    with pytest.raises(RecipeError, match=r"a sweep can't start the 2 processes .*hydra/launcher=slurm"):
        build_run(settings(*options, "sweep=seeds"))
