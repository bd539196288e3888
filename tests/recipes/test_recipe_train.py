"""A whole run: what it leaves behind, resuming, the command line."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from farms_tb.viewing.plots import read_history
from recipes.config import CONFIG_DIR, build
from recipes.errors import RecipeError
from recipes.folder import open_run_folder, run_folder
from recipes.metrics import nrmse
from recipes.train import train
from tests.helpers import read_wandb_file
from tests.recipes.recipe_runs import TINY_UNET, compose_settings, no_checkpoint

Settings = Callable[..., DictConfig]
ROOT = Path(CONFIG_DIR).parent


class Finished(NamedTuple):
    """A run that is over."""

    cfg: DictConfig
    facts: dict[str, Any]
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """The default experiment at toy size, with W&B offline."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)
        patch.setenv("WANDB_API_KEY", "")
        cfg = compose_settings(f"paths.output_dir={root}/runs", f"paths.data_dir={root}/data", *TINY_UNET)
        with redirect_stdout(StringIO()) as printed:
            facts = train(cfg)
        yield Finished(cfg, facts, Path(cfg.paths.run_dir), printed.getvalue())


def test_run_folder_is_complete(finished: Finished) -> None:
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        "config.yaml",
        "checkpoints",
        "metrics.csv",
        "alpha.png",
        "lr_ratio.png",
        "lr_ratio_map.png",
        "predictions.png",
        "report.html",
        "summary.json",
        "wandb",
    }
    assert {path.name for path in (finished.folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert finished.folder.parent == Path(finished.cfg.paths.output_dir) / "darcy_unet"
    for picture in ("alpha.png", "lr_ratio.png", "lr_ratio_map.png", "predictions.png"):
        assert (finished.folder / picture).read_bytes().startswith(b"\x89PNG")
    assert "net.bottleneck.conv1" in (finished.folder / "report.html").read_text(encoding="utf-8")


def test_config_is_saved_resolved(finished: Finished) -> None:
    text = (finished.folder / "config.yaml").read_text(encoding="utf-8")
    assert "${" not in text
    assert OmegaConf.create(text) == OmegaConf.to_container(finished.cfg, resolve=True)


def test_metrics_hold_the_layers_and_the_scores(finished: Finished) -> None:
    with (finished.folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"train/loss", "val/nrmse", "test/nrmse", "farms/alpha_mean", "epoch", "step"} <= set(rows[0])
    history = read_history(finished.folder / "metrics.csv")
    curve = history.alpha["net.bottleneck.conv1"]
    assert curve.epochs == (0, 1, 2)
    assert curve.steps == (0, 3, 6)
    assert history.ratio["net.bottleneck.conv1"].epochs[:2] == (0, 1)


def test_best_checkpoint_is_the_one_that_validates_best_and_is_tested(finished: Finished) -> None:
    with (finished.folder / "metrics.csv").open(newline="") as file:
        scores = [float(row["val/nrmse"]) for row in csv.DictReader(file) if row["val/nrmse"]]
    assert finished.facts["best_score"] == pytest.approx(min(scores))
    assert finished.facts["best_epoch"] == scores.index(min(scores)) + 1

    data = build(finished.cfg, "data")
    data.setup("test")
    net = build(finished.cfg, "model.net").eval()
    weights = torch.load(finished.folder / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    net.load_state_dict({name.removeprefix("net."): tensor for name, tensor in weights.items()})
    a, u = data.datasets["test"].tensors
    with torch.no_grad():
        assert finished.facts["test"]["test/nrmse"] == pytest.approx(float(nrmse(net(a), u)), rel=1e-4)


def test_summary_holds_facts_and_layers(finished: Finished) -> None:
    summary = json.loads((finished.folder / "summary.json").read_text(encoding="utf-8"))
    layers = {row["layer"]: row for row in summary.pop("layers")}
    assert summary == finished.facts
    assert len(layers) == 23
    assert layers["net.encoders.0.conv1"]["note"] == "one row or one column: no spectrum"
    row = layers["net.bottleneck.conv1"]
    history = read_history(finished.folder / "metrics.csv")
    assert row["alpha_farms"] == pytest.approx(history.alpha["net.bottleneck.conv1"].values[-1])
    assert (
        layers["net.encoders.1.conv1"]["alpha_full"] > layers["net.encoders.1.conv1"]["alpha_farms"] + 0.5
    )  # 2:1
    assert row["ratio"] == pytest.approx(history.ratio["net.bottleneck.conv1"].values[1])
    assert row["lr"] == pytest.approx(history.lr["net.bottleneck.conv1"].values[1])


def test_the_table_and_the_scores_are_printed(finished: Finished) -> None:
    for words in (
        "alpha full",
        "alpha FARMS",
        "net.bottleneck.conv1",
        "test/nrmse",
        str(finished.folder),
        "summary.json",
    ):
        assert words in finished.printed


def test_offline_wandb_run_reads_back(finished: Finished) -> None:
    (file,) = finished.folder.glob("wandb/offline-run-*/run-*.wandb")
    records = read_wandb_file(file)
    keys = {item.key or "/".join(item.nested_key) for record in records for item in record.history.item}
    assert len(list(finished.folder.glob("wandb/offline-run-*/files/media/images/pictures/predictions*.png"))) == 1
    kinds = {record.WhichOneof("record_type") for record in records}
    # The layers' keys are numbered by depth.
    named = {re.sub(r"(farms_\w+/)\d+_", r"\1", key) for key in keys}
    assert {"farms_alpha/net.bottleneck.conv1", "farms_ratio/net.bottleneck.conv1"} <= named
    assert {"val/nrmse", "test/nrmse"} <= keys
    assert {"run", "exit"} <= kinds  # finished, not cut


@pytest.mark.parametrize("arm", ["full", "off", "monitor"])
def test_other_arms_run(settings: Settings, arm: str) -> None:
    cfg = settings(*TINY_UNET, f"balancing={arm}", "logger=csv")
    train(cfg)
    folder = Path(cfg.paths.run_dir)
    assert (folder / "alpha.png").exists() == (arm != "off")
    layers = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["layers"]
    assert all(row["ratio"] == 1.0 for row in layers) == (arm != "full")


def test_monitoring_changes_nothing(settings: Settings) -> None:
    watched, alone = (train(settings(*TINY_UNET, f"balancing={arm}", "logger=csv")) for arm in ("monitor", "off"))
    assert watched["test"] == alone["test"]


def _last_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)[
        "state_dict"
    ]
    return weights


def test_resuming_goes_on_in_the_same_folder(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = (*TINY_UNET, "scheduler=constant", "logger=csv")
    straight = settings(*tiny, "trainer.max_epochs=3")
    train(straight)
    stopped = settings(*tiny, "trainer.max_epochs=1")
    train(stopped)
    checkpoint = Path(stopped.paths.run_dir) / "checkpoints/last.ckpt"
    resumed = settings(*tiny, "trainer.max_epochs=3", f"ckpt_path={checkpoint}")
    facts = train(resumed)

    assert Path(resumed.paths.run_dir) == Path(stopped.paths.run_dir)
    assert facts["epochs"] == 3
    expected, found = (_last_weights(Path(cfg.paths.run_dir)) for cfg in (straight, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    first, second = (read_history(Path(cfg.paths.run_dir) / "metrics.csv") for cfg in (straight, resumed))
    assert first == second
    assert "other settings" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "best"),
    [
        (("callbacks.checkpoint.monitor=epoch", "callbacks.checkpoint.mode=min"), 1),  # never better than at first
        (("trainer.check_val_every_n_epoch=2",), 2),
    ],
    ids=["no_epoch_is_better", "not_every_epoch_is_validated"],
)
def test_last_checkpoint_is_that_of_the_last_epoch(
    settings: Settings, options: tuple[str, ...], best: int
) -> None:
    tiny = (*TINY_UNET, "balancing=off", "logger=csv", *options)
    cfg = settings(*tiny, "trainer.max_epochs=3")
    assert train(cfg)["best_epoch"] == best
    last = Path(cfg.paths.run_dir) / "checkpoints/last.ckpt"
    saved = torch.load(last, weights_only=True)
    assert (saved["epoch"], saved["global_step"]) == (2, 9)
    facts = train(settings(*tiny, "trainer.max_epochs=3", f"ckpt_path={last}"))
    assert (facts["best_epoch"], facts["steps"]) == (best, 9)
    assert {path.name for path in last.parent.iterdir()} == {"best.ckpt", "last.ckpt"}


def test_resuming_cuts_the_metrics_back_to_the_checkpoint(settings: Settings) -> None:
    cfg = settings(*TINY_UNET, "logger=csv")
    train(cfg)
    folder = Path(cfg.paths.run_dir)
    metrics, before = folder / "metrics.csv", read_history(folder / "metrics.csv")
    with metrics.open("a", newline="") as file:  # a row of an epoch that was killed before its checkpoint
        header = metrics.read_text(encoding="utf-8").splitlines()[0].split(",")
        values = {"step": "9", "epoch": "3", "farms/alpha/net.bottleneck.conv1": "7.0"}
        csv.writer(file).writerow([values.get(name, "") for name in header])
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    train(settings(*TINY_UNET, "logger=csv", f"ckpt_path={folder}/checkpoints/last.ckpt"))
    assert read_history(metrics).alpha == before.alpha
    again = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_run_says_how_to_go_on(
    error: BaseException,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*args: object) -> None:
        raise error

    monkeypatch.setattr("recipes.train.measure_layers", interrupt)
    cfg = settings(*TINY_UNET, "logger=csv")
    with pytest.raises(type(error)):
        train(cfg)
    assert (
        f"repeat the command with ckpt_path={cfg.paths.run_dir}/checkpoints/last.ckpt" in capsys.readouterr().out
    )


def test_resuming_with_other_settings(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings(*TINY_UNET, "logger=csv")
    train(cfg)
    resume = f"ckpt_path={cfg.paths.run_dir}/checkpoints/last.ckpt"
    with pytest.raises(RecipeError, match=r"another model; repeat that run's overrides .*config\.yaml"):
        train(settings(*TINY_UNET, "model.net.width=8", "logger=csv", resume))
    # Optimizer and scheduler go on as the checkpoint has them, whatever the settings say.
    for override in ("optimizer.weight_decay=0", "arms.farms.lr=0.5", "optimizer=sgd"):
        with pytest.raises(RecipeError, match="another optimizer; repeat"):
            train(settings(*TINY_UNET, override, "logger=csv", resume))
    with pytest.warns(UserWarning, match="measuring anew: lr_max_ratio was 1.5 and is 1.25"):
        train(settings(*TINY_UNET, "balancing.lr_max_ratio=1.25", "logger=csv", resume))
    assert "other settings under 'balancing'" in capsys.readouterr().out


def test_training_longer_keeps_the_scheduler_or_says_how(settings: Settings) -> None:
    cfg = settings(*TINY_UNET, "logger=csv")
    train(cfg)
    longer = ("trainer.max_epochs=4", "logger=csv", f"ckpt_path={cfg.paths.run_dir}/checkpoints/last.ckpt")
    with pytest.raises(RecipeError, match=r"another scheduler.*add scheduler\.T_max=2"):
        train(settings(*TINY_UNET, *longer))
    assert train(settings(*TINY_UNET, *longer, "scheduler.T_max=2"))["epochs"] == 4


def test_a_folder_with_another_run_is_left_alone(settings: Settings) -> None:
    cfg = settings(*TINY_UNET, "logger=csv")
    train(cfg)
    folder = Path(cfg.paths.run_dir)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match=r"holds another run .*ckpt_path="):
        train(settings(*TINY_UNET, "logger=csv", "seed=7", f"paths.run_dir={folder}"))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("keeps_best", [True, False])
def test_a_moved_run_goes_on_with_its_best_weights(settings: Settings, tmp_path: Path, keeps_best: bool) -> None:
    cfg = settings(*TINY_UNET, "logger=csv")
    facts = train(cfg)
    moved = tmp_path / "moved"
    shutil.move(cfg.paths.run_dir, moved)
    if not keeps_best:
        (moved / "checkpoints" / "best.ckpt").unlink()
    again = train(settings(*TINY_UNET, "logger=csv", f"ckpt_path={moved}/checkpoints/last.ckpt"))
    if keeps_best:
        assert again["best_checkpoint"] == str(moved / "checkpoints" / "best.ckpt")
        assert (again["best_score"], again["test"]) == (facts["best_score"], facts["test"])
    else:
        assert not again["best_checkpoint"]
        assert again["test"]


def test_a_run_without_a_test_keeps_its_results(settings: Settings) -> None:
    cfg = settings(*TINY_UNET, "logger=csv", "trainer.limit_test_batches=0")
    assert train(cfg)["test"] == {}
    assert (Path(cfg.paths.run_dir) / "summary.json").is_file()


def test_two_runs_in_one_second_have_two_folders(settings: Settings) -> None:
    folders = {open_run_folder(settings(), no_checkpoint) for _ in range(3)}
    assert len(folders) == 3


def test_a_folder_has_one_run_at_a_time(settings: Settings, tmp_path: Path) -> None:
    cfg = settings(*TINY_UNET, "logger=csv", f"paths.run_dir={tmp_path / 'run'}")
    with run_folder(cfg, no_checkpoint), pytest.raises(RecipeError, match="another run is at work in"):
        train(settings(*TINY_UNET, "logger=csv", f"paths.run_dir={tmp_path / 'run'}"))
    train(cfg)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    resumed = settings(*TINY_UNET, "logger=csv", f"ckpt_path={checkpoint}")
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    with run_folder(resumed, no_checkpoint), pytest.raises(RecipeError, match="another run is at work"):
        train(settings(*TINY_UNET, "logger=csv", f"ckpt_path={checkpoint}"))
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before
    assert not (tmp_path / "run" / ".lock").exists()


def test_unwritable_output_folder(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for option in ("paths.output_dir", "paths.run_dir"):
        with pytest.raises(
            RecipeError, match=r"the output folder can't be written.*paths\.output_dir=.*paths\.run_dir="
        ):
            train(settings(f"{option}={tmp_path}/file/x"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("path", ["runs/a::b", "s3://bucket/run"])
def test_a_run_folder_is_on_this_machine(settings: Settings, path: str) -> None:
    with pytest.raises(RecipeError, match=r"paths\.run_dir must be the path of a folder on this machine"):
        train(settings(f"paths.run_dir={path}"))


def test_a_run_folder_may_begin_at_home(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_run_folder(settings('paths.run_dir="~/run"'), no_checkpoint) == tmp_path / "run"


def test_a_terminal_that_knows_few_characters(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recipes.train", *TINY_UNET, "logger=csv", f"paths.run_dir='{tmp_path}/ü'"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def _command_line(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipes.train", *overrides], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_command_line_shows_mistakes_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = _command_line(f"paths.output_dir={tmp_path}/file")
    assert result.returncode == 2
    assert "error: the output folder can't be written" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
