"""Every config file composes, builds and runs; the arms have the published numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf

from farms_tb import FARMSTempBalance
from recipes.config import build, check_config
from recipes.errors import RecipeError
from recipes.train import CONFIG_DIR, build_run, train
from tests.recipes.recipe_runs import TINY_DARCY

Settings = Callable[..., DictConfig]

GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml") if not file.stem.startswith("_"))
    for folder in sorted(Path(CONFIG_DIR).iterdir())
    if folder.is_dir()
}
FILES = [(group, name) for group, names in GROUPS.items() for name in names]
EXPERIMENTS = GROUPS["experiment"]

# (farms, full-matrix TempBalance): (lowest ratio, highest ratio), (first, last layer left out); base learning rate
PUBLISHED = {
    "cifar100_resnet18": (((0.1, 1.9), (True, True)), ((0.2, 1.8), (True, True)), 0.1),
    "cifar100_vgg16": (((0.2, 1.8), (False, True)), ((0.3, 1.7), (True, True)), 0.05),
}
# What a config file needs from its neighbours.
COMPANIONS = {
    ("data", "digits"): ("model=resnet18",),
    ("data", "cifar10"): ("model=resnet18",),
    ("data", "cifar100"): ("model=resnet18",),
    ("model", "resnet18"): ("data=digits",),
    ("model", "resnet34"): ("data=digits",),
    ("model", "vgg16"): ("data=digits", "data.image_size=32"),
    ("model", "vgg19"): ("data=digits", "data.image_size=32"),
    ("trainer", "gpu"): ("trainer.accelerator=cpu",),
}


def test_groups_are_the_promised_ones() -> None:
    promised = {
        "model",
        "data",
        "optimizer",
        "scheduler",
        "farms",
        "logger",
        "trainer",
        "experiment",
        "paths",
        "debug",
    }
    assert set(GROUPS) == promised | {"callbacks"}
    assert set(EXPERIMENTS) == {"darcy_unet", "darcy_fno", "digits_resnet18", *PUBLISHED}


@pytest.mark.parametrize(("group", "name"), FILES, ids=lambda value: value)
def test_every_config_composes_and_builds(settings: Settings, tmp_path: Path, group: str, name: str) -> None:
    cfg = settings(f"{group}={name}", *COMPANIONS.get((group, name), ()), f"paths.run_dir={tmp_path}/run")
    check_config(cfg)
    run = build_run(cfg)
    assert isinstance(run.data, LightningDataModule)
    assert isinstance(run.model, LightningModule)
    assert sum(isinstance(callback, FARMSTempBalance) for callback in run.trainer.callbacks) == (
        cfg.farms is not None
    )  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_say_how_to_run_them(name: str) -> None:
    first, second = (Path(CONFIG_DIR) / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:2]
    assert first == "# @package _global_"
    assert second.startswith("# python -m recipes.train")
    assert name == "darcy_unet" or f"experiment={name}" in second


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_one_batch(settings: Settings, fake_cifar: Path, name: str) -> None:
    vision = ("model.net.width=8", "data.num_workers=0", "data.val_size=8", "data.batch_size=8")
    fno = ("model.net.hidden_channels=8", "model.net.n_modes=[4,4]")
    small = {
        "cifar": vision,
        "digits": ("model.net.width=8",),
        "darcy_fno": (*TINY_DARCY, *fno),
        "darcy_unet": (*TINY_DARCY, "model.net.width=4"),
    }
    overrides = next(options for start, options in small.items() if name.startswith(start))
    cfg = settings(f"experiment={name}", *overrides, "debug=one_batch", "trainer=cpu", "logger=csv")
    facts = train(cfg)
    assert facts["epochs"] == facts["steps"] == 1
    assert all(torch.isfinite(torch.tensor(value)) for value in facts["test"].values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(settings: Settings, name: str) -> None:
    *arms, lr = PUBLISHED[name]
    for arm, (ratios, ends) in zip(("farms", "full"), arms, strict=True):
        cfg = settings(f"experiment={name}", f"farms={arm}")
        farms = cfg.farms
        assert (farms.lr_min_ratio, farms.lr_max_ratio) == ratios
        assert (farms.exclude_first, farms.exclude_last) == ends
        assert (farms.esd, farms.min_eigenvalues) == (arm, 5 if arm == "farms" else 50)
        assert (farms.fit, farms.xmin_pos, farms.assign_func, farms.metric) == (
            "median",
            2,
            "tb_linear_map",
            "alpha",
        )
        assert (farms.window, farms.aspect_ratio, farms.windows_per_dim, farms.filter_zeros) == (
            100,
            1.0,
            9,
            False,
        )
        assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (lr, 0.9, 5e-4)
        assert (cfg.trainer.max_epochs, cfg.scheduler.T_max, cfg.scheduler.eta_min) == (200, 200, 0.0)
        assert (cfg.data.batch_size, cfg.model.net.width, cfg.seed) == (128, 64, 43)
    off = settings(f"experiment={name}", "farms=off")
    assert off.farms is None
    assert off.optimizer.lr == lr


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_arms_differ_in_the_callback_alone(settings: Settings, name: str) -> None:
    arms = [settings(f"experiment={name}", f"farms={arm}") for arm in ("farms", "full", "off", "monitor")]
    plain = [OmegaConf.to_container(cfg, resolve=True) for cfg in arms]
    for arm in plain:
        assert isinstance(arm, dict)
        for section in ("farms", "arm", "logger"):
            del arm[section]
    assert all(arm == plain[0] for arm in plain)
    assert (arms[3].farms.lr_min_ratio, arms[3].farms.lr_max_ratio) == (1.0, 1.0)


def test_fno_leaves_out_lifting_and_projection_by_name(settings: Settings) -> None:
    farms = build(settings("experiment=darcy_fno"), "farms")
    assert farms._balance.exclude == ("lifting.*", "projection.*")
    assert (farms._balance.exclude_first, farms._balance.exclude_last) == (False, False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model=resnet18",), "model=resnet18 and data=darcy do not go together: the model learns images"),
        (("data=digits",), "model=unet and data=digits do not go together: the model learns fields"),
        (("data.resolution=24",), r"model=unet does not fit data=darcy: .* must divide by 16, got \(24, 24\)"),
        (("model=vgg16", "data=digits"), "model=vgg16 does not fit data=digits: .*data.image_size=32"),
        (("farms.lr_min_ratio=2",), "farms: lr_min_ratio must not exceed lr_max_ratio"),
        (("farms.esd=fll",), "farms: esd must be one of 'farms', 'full', got 'fll'"),
        (("data.family=fog",), "data: data.family must be one of grf, bumps"),
        (("arm=full",), r"arm=full does not match farms=farms; choose with farms=farms\|full\|off\|monitor"),
        (("ckpt_path=/no/such.ckpt",), "ckpt_path=/no/such.ckpt is not a file"),
        (("threads=0",), "threads must be null or a positive number, got 0"),
        (("+colour=red",), "unknown settings at the top level: colour"),
        (("~task",), "missing settings at the top level: task"),
        (("lr=${nowhere}",), "the settings do not resolve: Interpolation key 'nowhere' not found"),
        (("~callbacks.checkpoint",), "exactly one ModelCheckpoint, got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_settings_stop_before_data_is_made(
    settings: Settings, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(settings(*overrides))
    assert not (tmp_path / "data").exists()
    assert not any((tmp_path / "runs").rglob("*.*"))


def test_missing_wandb_names_the_way_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(RecipeError, match=r"logger.wandb: .*farms-tb\[recipes\].*logger=csv"):
        train(settings())
