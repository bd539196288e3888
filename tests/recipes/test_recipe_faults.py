"""Kills, full disks and flipped bits: nothing is lost, nothing is logged twice, nothing damaged is used."""

from __future__ import annotations

import csv
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from hydra.core.global_hydra import GlobalHydra
from lightning import LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from recipes.callbacks import BestCheckpoint, LastCheckpoint
from recipes.data.cache import load_or_make, write_arrays
from recipes.loggers import RunFolderCSVLogger, forget_rows_after, read_rows
from recipes.study.__main__ import main as study
from recipes.study.cells import load_study
from recipes.study.effects import Row
from recipes.study.settings import SETTINGS_FILE, keep_settings
from recipes.study.statistics import Effect
from recipes.study.verdict import verdict
from recipes.train import train
from tests.recipes.recipe_runs import TINY_UNET
from tests.recipes.stoppers import FullDisk

Settings = Callable[..., DictConfig]


def _rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run without the times and the learning rates' names."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    return sorted(rows, key=lambda row: (float(row["step"]), sorted(row)))


def test_a_resumed_run_has_each_row_once(settings: Settings) -> None:
    tiny = (*TINY_UNET, "logger=csv", "trainer.max_epochs=3")
    straight = settings(*tiny)
    train(straight)
    stop = ("+callbacks.stop._target_=tests.recipes.stoppers.StopInEpoch", "+callbacks.stop.epoch=2")
    stopped = settings(*tiny, *stop)
    with pytest.raises(SystemExit):
        train(stopped)
    folder = Path(stopped.paths.run_dir)
    assert any(row["step"] == "6" for row in _rows(folder))  # logged after the checkpoint, to be logged again
    train(settings(*tiny, f"ckpt_path={folder}/checkpoints/last.ckpt"))
    assert _rows(folder) == _rows(Path(straight.paths.run_dir))


def test_a_run_killed_before_its_final_rows_logs_them_when_resumed(settings: Settings) -> None:
    tiny = (*TINY_UNET, "logger=csv")
    cfg = settings(*tiny)
    train(cfg)
    folder = Path(cfg.paths.run_dir)
    before = _rows(folder)
    forget_rows_after(folder / "metrics.csv", 6)  # the final weights' and the test's, of step 6
    assert len(_rows(folder)) < len(before)
    train(settings(*tiny, f"ckpt_path={folder}/checkpoints/last.ckpt"))
    assert _rows(folder) == before


def test_rows_that_a_full_disk_did_not_take_are_written_later(tmp_path: Path) -> None:
    logger = RunFolderCSVLogger(tmp_path)
    logger.log_metrics({"train/loss": 0.0}, step=0)
    logger.save()
    whole = (tmp_path / "metrics.csv").stat().st_size
    for step in range(1, 90):
        logger.log_metrics({"train/loss": step / 7}, step=step)
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 500, earlier[1]))
        with pytest.raises(OSError, match="large"):
            logger.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "metrics.csv").stat().st_size == whole
    logger.save()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.csv")] == [str(step) for step in range(90)]


def test_half_a_line_is_no_row(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    metrics.write_bytes(b"epoch,step\r\n0,5\r\n9,21")  # the last step was 210
    forget_rows_after(metrics, 100)
    assert read_rows(metrics) == [{"epoch": "0", "step": "5"}]
    logger = RunFolderCSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=6)
    logger.save()
    logger.log_metrics({"loss": 0.25, "epoch": 1}, step=7)
    logger.save()
    steps = [row["step"] for row in read_rows(metrics)]
    assert steps == ["5", "6", "7"]
    metrics.write_bytes(b"epoch,loss,step\r\n0,0.5,5\r\n0,0.4,0,0.3,6\r\n0,7\r\n,0.2,8\r\n")
    assert [row["step"] for row in read_rows(metrics)] == ["5", "8"], "lines of two rows in one, and of half a row"
    metrics.write_bytes(b"epo")
    assert read_rows(metrics) == []


def test_a_file_cut_after_any_byte_keeps_its_whole_lines(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    whole = "epoch,step,farms/alpha/größe\r\n0,10,2.5\r\n1,20,2.75\r\n".encode()
    metrics.write_bytes(whole)
    rows = read_rows(metrics)
    assert [row["farms/alpha/größe"] for row in rows] == ["2.5", "2.75"]
    for length in range(len(whole)):
        metrics.write_bytes(whole[:length])
        forget_rows_after(metrics, 100)
        assert read_rows(metrics) == rows[: max(0, whole[:length].count(b"\n") - 1)]


class _Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(30, 30)

    def training_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(x).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # Lightning's own, of a bare trainer
@pytest.mark.parametrize("kind", ["best", "last"])
def test_a_checkpoint_that_could_not_be_written_leaves_the_one_before(tmp_path: Path, kind: str) -> None:
    if kind == "last":
        keeper: BestCheckpoint | LastCheckpoint = LastCheckpoint(tmp_path)
    else:
        options = {"monitor": "loss", "filename": "best", "enable_version_counter": False}
        keeper = BestCheckpoint(tmp_path, save_on_train_epoch_end=True, **options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=5, accelerator="cpu", callbacks=[keeper], plugins=[FullDisk()], **quiet)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(_Net(), DataLoader(torch.randn(8, 30), 4))  # type: ignore[arg-type]
    assert torch.load(tmp_path / f"{kind}.ckpt", weights_only=True)["epoch"] == 0
    again = Trainer(max_epochs=5, accelerator="cpu", callbacks=[keeper], **quiet)
    again.fit(_Net(), DataLoader(torch.randn(8, 30), 4), ckpt_path=tmp_path / f"{kind}.ckpt")  # type: ignore[arg-type]
    assert [file.name for file in tmp_path.iterdir()] == [f"{kind}.ckpt"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_kill_before_a_checkpoint_has_its_name_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process leaves is what is there when the rename begins."""
    rename, left = Path.replace, []

    def killed(source: Path, target: Path) -> Path:
        if left:
            raise SystemExit("killed")
        left.append(target)
        return rename(source, target)

    def fit(**options: Any) -> None:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(max_epochs=3, accelerator="cpu", callbacks=[LastCheckpoint(tmp_path)], **quiet)
        trainer.fit(_Net(), DataLoader(torch.randn(8, 30), 4), **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(SystemExit, match="killed"):
            fit()
    assert left == [tmp_path / "last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0
    (part,) = tmp_path.glob(".*.part")
    part.rename(tmp_path / ".last.ckpt.1.part")  # the process that resumes has another number than the killed one
    fit(ckpt_path=tmp_path / "last.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_best_checkpoint_is_found_by_lightnings_key() -> None:
    """Checkpoints of earlier releases, made with Lightning's class, keep their best score."""
    assert BestCheckpoint(monitor="loss").state_key.startswith("ModelCheckpoint{")
    assert LastCheckpoint("folder").state_key.startswith("LastCheckpoint{")


def test_no_flipped_bit_in_a_cache_is_used_or_ends_the_run(tmp_path: Path) -> None:
    path, data = tmp_path / "x.npz", {"a": np.arange(40.0), "labels": np.arange(7)}
    write_arrays(path, {"v": 1}, data)
    blob = path.read_bytes()
    for byte in [*range(60), *range(len(blob) - 340, len(blob))]:
        for bit in range(8):
            damaged = bytearray(blob)
            damaged[byte] ^= 1 << bit
            path.write_bytes(damaged)
            found = load_or_make(path, {"v": 1}, lambda: data)
            assert found.keys() == data.keys()
            assert all(np.array_equal(found[name], data[name]) for name in data)


@pytest.mark.parametrize("damage", ["empty", "short", "almost whole", "archive of nothing", "array"])
def test_what_is_no_whole_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    path, data = tmp_path / "x.npz", {"a": np.arange(40.0)}
    write_arrays(path, {"v": 1}, data)
    if damage == "array":
        with path.open("wb") as file:
            np.save(file, data["a"])
    elif damage == "archive of nothing":
        path.write_bytes(b"PK\x05\x06" + bytes(18))
    else:
        path.write_bytes(path.read_bytes()[: {"empty": 0, "short": 30, "almost whole": -1}[damage]])
    assert np.array_equal(load_or_make(path, {"v": 1}, lambda: data)["a"], data["a"])


def test_a_resumed_run_goes_on_under_the_id_of_its_wandb_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "")
    cfg = settings(*TINY_UNET, "trainer.max_epochs=1", "scheduler=constant")
    train(cfg)
    folder = Path(cfg.paths.run_dir)
    resume = f"ckpt_path={folder}/checkpoints/last.ckpt"
    train(settings(*TINY_UNET, "scheduler=constant", resume))
    ids = [re.sub(r".*-", "", path.name) for path in folder.glob("wandb/offline-run-*")]
    assert len(set(ids)) == 1


def test_a_study_of_an_earlier_release_goes_on(tmp_path: Path) -> None:
    """Its settings.yaml has `farms` in place of `balancing`, with options that are gone."""
    (cell,) = load_study([f"study.folder={tmp_path}", "experiment=study/darcy_unet"]).cells
    saved = cell.identity()
    for arm in saved["arms"].values():
        options = {name: value for name, value in arm.pop("balancing").items() if name != "arm"}
        arm["farms"] = {**options, "max_overhead": None, "timings_file": None} if options else None
    cell.folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(saved), cell.folder / SETTINGS_FILE)
    keep_settings(cell)
    assert OmegaConf.load(cell.folder / SETTINGS_FILE) == OmegaConf.create(cell.identity())


def test_an_option_of_the_callback_reaches_every_arm_that_has_one(tmp_path: Path) -> None:
    options = [f"study.folder={tmp_path}", "experiment=study/darcy_unet", "balancing.every_n_epochs=5"]
    (cell,) = load_study(options).cells
    found = {arm: cfg.balancing.get("every_n_epochs") for arm, cfg in cell.arms.items()}
    assert found == {"off": None, "full": 5, "farms": 5, "noise_aware": 5, "placebo": 5}


def _row(arm: str, pairs: int, p: float) -> Row:
    effect = Effect(-0.1, -0.2, 0.0, p, pairs)
    return Row("cell", arm, "accuracy", 0.1, pairs, 0, 0.1, 0.01, effect, p, 0.0)


@pytest.mark.parametrize(("pairs", "proves_nothing"), [(1, True), (4, True), (5, False), (20, False)])
def test_a_study_with_few_seeds_says_that_it_proves_nothing(pairs: int, proves_nothing: bool) -> None:
    text = verdict([_row("farms", 20, 0.01), _row("full", pairs, 0.5)], "off")
    assert ("proves nothing" in text) == proves_nothing
    assert "farms has" in text


def test_a_study_writes_nothing_into_a_folder_that_another_one_works_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study/digits_resnet18_50"
    folder.mkdir(parents=True)
    GlobalHydra.instance().clear()
    with FileLock(folder / ".lock"), pytest.raises(SystemExit):
        study([f"study.folder={tmp_path}/study", "experiment=study/digits_resnet18_50", "study.arms=[off]"])
    assert "another study is at work" in capsys.readouterr().err
    assert [file.name for file in folder.iterdir()] == [".lock"]
