"""Settings of toy size."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from recipes.config import CONFIG_DIR

TINY_DARCY = (
    *("data.resolution=16", "data.train_size=12", "data.val_size=4", "data.test_size=4", "data.batch_size=4"),
    *("data.workers=1", "trainer=cpu", "trainer.log_every_n_steps=1"),
)
TINY_UNET = (*TINY_DARCY, "trainer.max_epochs=2", "model.net.width=4")
TINY_TOKENS = (
    *("data.length=16", "data.vocabulary=64", "data.val_tokens=50", "data.test_tokens=50", "data.batch_size=4"),
    "data.parts=2",
)
TINY_LLAMA = (
    *("model.net.width=32", "model.net.hidden=64", "model.net.depth=2", "model.net.heads=2"),
    *TINY_TOKENS,
)
TINY_STUDY = (
    *("experiment=digits_resnet18", "model.net.width=2", "trainer.max_epochs=2", "trainer=cpu"),
    *("data.train_size=20", "data.val_size=40", "data.test_size=40", "data.batch_size=10"),
    *('study.arms=["off",farms]', "study.seeds=4", "study.grid=[1,2]", "study.tune_seeds=1", "study.extend=0"),
)


def compose_settings(*overrides: str) -> DictConfig:
    """Compose the settings as the command line does."""
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def no_checkpoint(folder: Path) -> None:
    """Return the checkpoint of a run folder that has none."""
