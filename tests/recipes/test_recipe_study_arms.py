"""Studies with arms of their own, and what a run keeps of its course."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from lightning import LightningModule, Trainer
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from recipes.data.digits import DigitsData
from recipes.errors import RecipeError
from recipes.study.cells import Cell, load_study
from recipes.study.course import Course, Ratios, Weights, best_epochs, evaluated_epochs
from recipes.study.one_run import run_once
from recipes.study.records import Job, Record, read_records, write_records
from recipes.tasks import ImageClassification
from tests.helpers import LIGHTNING_NOISE
from tests.recipes.recipe_runs import TINY_DARCY, TINY_STUDY

REVERSED = "+study.variants={reversed: ['balancing=farms', 'balancing.favor=small_alpha']}"


@pytest.fixture(autouse=True)
def _clear_hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def _cell(tmp_path: Path, *overrides: str) -> Cell:
    return load_study([*TINY_STUDY, f"study.folder={tmp_path}", *overrides]).cells[0]


def test_a_variant_is_the_arm_it_names_with_other_settings(tmp_path: Path) -> None:
    cell = _cell(tmp_path, REVERSED, "study.arms=[off,farms,reversed]")
    farms, changed = (cell.settings(Job(arm, "final", 1, 0.1)) for arm in ("farms", "reversed"))
    assert changed["balancing"].pop("favor") == "small_alpha"
    assert farms["balancing"].pop("favor") == "large_alpha"
    assert changed == farms
    assert cell.fingerprint("farms") != cell.fingerprint("reversed")


def test_a_variant_without_balancing_has_none_and_may_have_another_optimizer(tmp_path: Path) -> None:
    cell = _cell(tmp_path, "+study.variants={adam: ['optimizer=adam']}", "study.arms=[off,adam]")
    settings = cell.settings(Job("adam", "final", 1, 1e-3))
    assert settings["arm"] == "off"
    assert settings["optimizer"]["_target_"] == "torch.optim.Adam"
    assert settings["optimizer"]["lr"] == 1e-3


def test_settings_of_a_variant_win_over_those_of_the_command(tmp_path: Path) -> None:
    variants = "+study.variants={reversed: ['balancing=farms', 'balancing.favor=small_alpha']}"
    cell = _cell(tmp_path, variants, "study.arms=[off,reversed]", "balancing.favor=large_alpha")
    assert cell.settings(Job("reversed", "final", 1, 0.1))["balancing"]["favor"] == "small_alpha"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["study.arms=[off,reversed]"], "study.arms: there is no arm 'reversed'; there are .*farms"),
        (["+study.variants={farms: ['balancing=full']}"], "study.variants.farms is the name of an arm"),
        (["+study.variants={mine: farms}"], "study.variants.mine must be a list of settings"),
        (["+study.variants={mine: [balancing]}"], "study.variants.mine must be a list of settings"),
        (["+study.variants={mine: ['balancing=nothing']}", "study.arms=[off,mine]"], "nothing"),
        (["study.evaluations=0"], "study.evaluations must be a whole number of at least 1"),
        (["experiment=study/tiny_lm", "study.vary_data=true"], "its data have no seed to vary"),
        (["study.arms=[off,2]"], "study.arms: .*must be text, got 2; .*quotes"),
        (["+study.variants={2: ['balancing=full']}"], "study.variants: .*must be text, got 2; .*quotes"),
        (["optimizer.lr=0.5"], r"optimizer\.lr=0\.5 can't be set: .*arms\.farms\.lr"),
        (["+study.variants={v: ['optimizer=adam','optimizer.lr=0.5']}", "study.arms=[off,v]"], "optimizer.lr=0.5"),
        (["+study.variants={v: ['seed=5']}"], "study.variants.v: seed=5 can't be set: all arms"),
        (["+study.variants={v: ['ckpt_path=/x']}"], "ckpt_path=/x can't be set: .*anew"),
        (
            ["+study.variants={v: ['data.seed=5']}", "study.arms=[off,v]"],
            "data.seed=5 can't .*study.vary_data=false",
        ),
        (["data.seed=123"], "data.seed=123 can't .*study.vary_data=false"),
        (["data.seed=123", "study.vary_data=true"], "data.seed=123 can't .*study.vary_data=false"),
        (["arms.farms.lr=0"], "lr=0 of the arm .*arms.farms.lr above 0"),
        (["trainer.limit_test_batches=0"], "limit_test_batches=0: every run of a study is tested"),
        (["trainer.limit_val_batches=0.0"], "limit_val_batches=0.0: every run of a study is validated"),
        (["trainer.limit_train_batches=0"], "limit_train_batches=0: every run of a study trains"),
        (["trainer.max_steps=0"], "max_steps=0: every run of a study trains"),
        (["trainer.max_epochs=0", "scheduler=constant"], "max_epochs=0: every run of a study trains"),
        (["+trainer.max_time='00:00:00:00'"], "max_time=00:00:00:00: every run of a study trains"),
        (["+trainer.max_time={minutes: 0}"], "max_time=.*minutes.*: every run of a study trains"),
        (["trainer.devices=2"], "trainer.devices=2 .*one process.*study.workers"),
        (["trainer.num_nodes=2"], "trainer.num_nodes=2: .*one process"),
        (["trainer.devices=[0,1]"], r"trainer.devices=\[0, 1\] .*one process"),
        (["task.out_channels=null"], "compares accuracy needs the number of classes.*task.out_channels"),
        (
            ["+study.cells={digits_resnet: {seeds: 3}}"],
            "digits_resnet, .*none of experiment=digits_resnet18; did you",
        ),
        (["+study.cells.digits_resnet.seeds=3"], "digits_resnet, .*none of experiment=digits_resnet18; did you"),
    ],
)
def test_mistakes(tmp_path: Path, overrides: list[str], message: str) -> None:
    base = [text for text in TINY_STUDY if text.startswith("study.")] if "tiny_lm" in overrides[0] else TINY_STUDY
    with pytest.raises(RecipeError, match=message):
        load_study([*base, f"study.folder={tmp_path}", *overrides])


def test_a_run_may_have_a_time_that_it_does_not_reach(tmp_path: Path) -> None:
    assert _cell(tmp_path, "+trainer.max_time='00:10:00:00'").arms


def test_data_have_one_loader_for_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told before the first step."""
    cell = _cell(tmp_path)
    one = DigitsData.val_dataloader
    monkeypatch.setattr(DigitsData, "val_dataloader", lambda data: [one(data), one(data)])
    monkeypatch.setattr(ImageClassification, "training_step", lambda *arguments: pytest.fail("has trained"))
    with pytest.raises(RecipeError, match=r"DigitsData\.val_dataloader must return one DataLoader .*got a list"):
        run_once(cell.settings(Job("off", "final", 1, 0.1)))


def test_arms_of_a_cell_have_one_metric(tmp_path: Path) -> None:
    variant = "+study.variants={v: ['balancing=farms','task.monitor=val/relative_l2']}"
    with pytest.raises(RecipeError, match=r"same metric, got nrmse of off, relative_l2 of v; .*task\.monitor"):
        load_study(["experiment=darcy_fno", variant, "study.arms=[off,v]", f"study.folder={tmp_path}"])
    both = ["experiment=darcy_fno", "task.monitor=val/relative_l2", f"study.folder={tmp_path}"]
    assert load_study(both).cells


def test_an_arm_may_have_a_function_of_the_rate(tmp_path: Path) -> None:
    OmegaConf.register_new_resolver("half", lambda lr: lr / 2, replace=True)
    variants = """+study.variants={v: ["optimizer.lr='\\${half:\\${lr}}'"], w: ["lr=0.5"]}"""
    try:
        cell = _cell(tmp_path, variants, "study.arms=[off,v,w]")
        assert cell.settings(Job("v", "final", 1, 0.3))["optimizer"]["lr"] == 0.15
    finally:
        OmegaConf.clear_resolver("half")
    assert cell.lr("w") == 0.5


def test_data_may_be_the_same_for_all_seeds(tmp_path: Path) -> None:
    cell = _cell(tmp_path, "data.seed=123", "study.vary_data=false")
    assert [cell.settings(Job("off", "final", seed, 0.1))["data"]["seed"] for seed in (1, 2)] == [123, 123]


@pytest.mark.parametrize("devices", ["1", "auto", "[1]"])
def test_a_run_may_choose_its_one_device(tmp_path: Path, devices: str) -> None:
    assert _cell(tmp_path, f"trainer.devices={devices}")


def test_evaluated_epochs_are_evenly_spaced_and_end_with_the_last() -> None:
    assert evaluated_epochs(100, 10) == set(range(10, 101, 10))
    assert evaluated_epochs(3, 10) == {1, 2, 3}
    assert evaluated_epochs(7, 1) == {7}
    for epochs in range(1, 30):
        for number in range(1, 12):
            found = evaluated_epochs(epochs, number)
            assert len(found) == min(epochs, number)
            assert max(found) == epochs


def test_the_best_epoch_is_that_of_validation_and_the_lowest_test_error_looks_at_the_test() -> None:
    scores = {
        1: {"val/loss": 2.0, "test/loss": 1.0},
        2: {"val/loss": 1.5, "test/loss": 1.8},
        3: {"val/loss": math.nan, "test/loss": 0.1},
    }
    assert best_epochs(scores, "loss") == {"best_epoch": 2, "best_val": 1.5, "best_test": 1.8, "lowest_test": 1.0}
    accuracies = {epoch: {"val/accuracy": 0.1 * epoch, "test/accuracy": 0.9 - 0.1 * epoch} for epoch in (1, 2)}
    assert best_epochs(accuracies, "accuracy") == {
        "best_epoch": 2,
        "best_val": pytest.approx(0.2),
        "best_test": pytest.approx(0.7),
        "lowest_test": pytest.approx(0.8),
    }
    assert all(map(math.isnan, best_epochs({1: {"val/loss": math.inf, "test/loss": 1.0}}, "loss").values()))


@pytest.mark.filterwarnings(*(mark.args[0] for mark in LIGHTNING_NOISE))
@pytest.mark.parametrize(("epochs", "steps"), [(3, -1), (-1, 5), (9, 6)])
def test_epochs_are_kept_whatever_ends_the_run(epochs: int, steps: int, tmp_path: Path) -> None:
    class Regression(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 1)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, weights = Regression(), Weights(10)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        max_steps=steps,
        callbacks=[Course(Ratios(None), weights)],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4))
    assert list(weights.epochs(module, 3)) == [1, 2, 3]


def _facts(cell: Cell, arm: str, evaluations: int) -> dict[str, Any]:
    return run_once(cell.settings(Job(arm, "final", 1, 0.1)), evaluations)[0]


@pytest.mark.filterwarnings("ignore")
def test_looking_at_epochs_changes_nothing_in_the_training(tmp_path: Path) -> None:
    cell = _cell(tmp_path, "trainer.max_epochs=4", "study.arms=[off,farms]")
    once, often = _facts(cell, "farms", 1), _facts(cell, "farms", 4)
    assert (once["val"], once["test"]) == (often["val"], often["test"])
    assert once["best_epoch"] == 4
    assert once["best_test"] == once["lowest_test"] == once["test"]
    assert often["best_val"] >= often["val"]
    assert often["lowest_test"] >= max(often["test"], often["best_test"])


@pytest.mark.filterwarnings("ignore")
def test_a_kept_epoch_scores_as_a_training_that_ends_there(tmp_path: Path) -> None:
    constant = ("scheduler=constant", "study.arms=[off]", "study.baseline=off")
    long = _facts(_cell(tmp_path, "trainer.max_epochs=2", *constant), "off", 2)
    short = _facts(_cell(tmp_path, "trainer.max_epochs=1", *constant), "off", 1)
    assert long["best_epoch"] in (1, 2)
    ends = {1: (short["val"], short["test"]), 2: (long["val"], long["test"])}
    assert (long["best_val"], long["best_test"]) == ends[long["best_epoch"]]
    assert long["lowest_test"] == max(short["test"], long["test"])


@pytest.mark.filterwarnings("ignore")
def test_mean_and_spread_of_the_ratios(tmp_path: Path) -> None:
    fixed = "[[layer1*, 2.0], [layer2*, 2.0], [layer3*, 2.0], [layer4*, 2.0], [conv1, 2.0], [fc, 2.0]]"
    variants = f"+study.variants={{twice: ['balancing=monitor', 'balancing.fixed={fixed}']}}"
    cell = _cell(tmp_path, variants, "study.arms=[off,farms,twice,alphadecay]")
    off, farms, twice, decay = (_facts(cell, arm, 1) for arm in ("off", "farms", "twice", "alphadecay"))
    assert (off["mean_ratio"], off["ratio_sd"]) == (1.0, 0.0)
    assert (twice["mean_ratio"], twice["ratio_sd"]) == (2.0, 0.0)
    assert (decay["mean_ratio"], decay["ratio_sd"]) == (1.0, 0.0)  # its ratios are of the weight decay
    assert 0.5 <= farms["mean_ratio"] <= 1.5
    assert 0 < farms["ratio_sd"] <= 0.5


@pytest.mark.filterwarnings("ignore")
def test_networks_that_keep_more_than_tensors_among_their_weights(tmp_path: Path) -> None:
    overrides = [*TINY_DARCY, "model=fno", "model.net.n_modes=[4,4]", "model.net.hidden_channels=4"]
    study = ["experiment=darcy_fno", "trainer.max_epochs=2", "study.arms=[off]", f"paths.data_dir={tmp_path}"]
    cell = load_study([*study, *overrides, f"study.folder={tmp_path}"]).cells[0]
    facts = _facts(cell, "off", 2)
    assert facts["best_val"] <= facts["val"]


def test_results_of_version_0_1_have_no_best_epoch(tmp_path: Path) -> None:
    record = Record(
        *("cell", "off", "final", 1, 0.1, "ok", "nrmse", 0.2, 0.3, 10, 10, 1.0),
        *(100, 4, 8, 3.0, 2.0, 0.1, "cpu", "0" * 12),
    )
    write_records(tmp_path, [record])
    path = tmp_path / "results.csv"
    columns = path.read_text().splitlines()
    path.write_text("\n".join(",".join(line.split(",")[:20]) for line in columns) + "\n")
    assert "best_val" not in path.read_text()
    (back,) = read_records(tmp_path).values()
    assert np.isnan([back.best_epoch, back.best_val, back.best_test, back.lowest_test, back.mean_ratio]).all()
    assert back.test == 0.3
