"""Callbacks of the recipes: checkpoints that survive a kill, progress, the last step's rates, the shuffles."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar

__all__ = ["BestCheckpoint", "EpochOrder", "LastCheckpoint", "LastStepRates", "Progress"]


class _WholeCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose files are whole at any moment.

    Lightning writes over the earlier checkpoint of the same name: a run that is killed meanwhile has none. Here
    the file is written under a temporary name, reaches the disk, and then takes its name.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove what a run that was killed while it saved has left."""
        super().setup(trainer, pl_module, stage)
        if self.dirpath is not None and trainer.is_global_zero:
            for part in Path(self.dirpath).glob(f".{self.filename}.ckpt.*.part"):
                part.unlink(missing_ok=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best score also in a run folder that was moved or copied, which Lightning takes for another."""
        super().load_state_dict(_moved(state_dict, Path(str(self.dirpath))))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save under a temporary name; the first process renames the file once it is on the disk.

        `farms_tb.atomic_write` is for one process: here all of them save parts of one file.
        """
        target = Path(filepath)
        # Every process takes part in saving and must be given the same name.
        part = target.with_name(trainer.strategy.broadcast(f".{target.name}.{os.getpid()}.part"))
        try:
            super()._save_checkpoint(trainer, str(part))
        except OSError:  # a full disk, which a half file would keep full
            part.unlink(missing_ok=True)
            raise
        if trainer.is_global_zero:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(target)
        trainer.strategy.barrier()
        self._last_checkpoint_saved = filepath


class BestCheckpoint(_WholeCheckpoint):
    """Keep the weights that are best on validation data, which are those that are tested.

    The options are those of Lightning's ModelCheckpoint.
    """

    @property
    def state_key(self) -> str:
        """The key of Lightning's class, so that checkpoints of earlier releases keep their best score."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)


def _moved(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the state of a ModelCheckpoint whose files lie in another folder now.

    Where its best file is neither here nor there any more, there is no best one.
    """
    best = state["best_model_path"]
    moved = {**state, "dirpath": str(folder)}
    if not best or (folder / Path(best).name).is_file():
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            moved[name] = state.get(name) and str(folder / Path(state[name]).name)
        scores = state.get("best_k_models", {})
        moved["best_k_models"] = {str(folder / Path(path).name): score for path, score in scores.items()}
        return moved
    if Path(best).is_file():
        return state
    moved.update(best_model_path="", best_model_score=None, kth_best_model_path="", kth_value=None)
    return {**moved, "best_k_models": {}}


class LastCheckpoint(_WholeCheckpoint):
    """Keep the state after the last epoch in `last.ckpt`, to resume from.

    `ModelCheckpoint(save_last=True)` does not: where it monitors a metric it writes `last.ckpt` when that has
    improved, and never after an epoch that was not validated. This is a class of its own because checkpoints tell
    the states of callbacks apart by class.

    Args:
        dirpath: The folder.
    """

    def __init__(self, dirpath: str | Path) -> None:
        super().__init__(dirpath, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)


class Progress(RichProgressBar):
    """Lightning's rich progress bar without the logger's version number."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Return what the bar shows at its end."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class EpochOrder(Callback):
    """Tell the sampler of the training data which epoch comes, also where processes share what it draws.

    Lightning then wraps the sampler. The wrapper of releases before 2.6 keeps the epoch to itself: every epoch
    had the same order of samples.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the epoch on to every sampler under the wrapper; before the epoch's first batch is drawn."""
        progress: Any = trainer.fit_loop.epoch_progress.current
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        while sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(progress.processed)
            sampler = getattr(getattr(sampler, "dataset", None), "_sampler", None)


class LastStepRates(Callback):
    """Remember the learning rates and the layers' ratios of the last step.

    After training the rate can't be asked for any more: the scheduler has moved on, often to zero. The rates are
    part of checkpoints, since a run that is resumed after its end takes no step of its own.

    Args:
        balancer: The balancing callback, None where there is none.

    Attributes:
        lr: Learning rate of the first param group; None before the first step.
        lrs: Learning rate of each parameter's group, by the parameter's name.
        ratios: Learning-rate ratio of each layer.
    """

    def __init__(self, balancer: Any = None) -> None:
        self.balancer = balancer
        self.lr: float | None = None
        self.lrs: dict[str, float] = {}
        self.ratios: dict[str, float] = {}
        self._names: list[list[str]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the names of the parameters in each param group."""
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        self._names = []
        for group in _groups(trainer):
            self._names.append([names[id(parameter)] for parameter in group["params"] if id(parameter) in names])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note what the coming step will use."""
        self.lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        for group, names in zip(_groups(trainer), self._names, strict=True):
            self.lrs.update(dict.fromkeys(names, float(group["lr"])))
        if self.balancer is not None:
            self.ratios = dict(self.balancer.ratios)

    def state_dict(self) -> dict[str, Any]:
        """Return the rates for the checkpoint: resuming a run that is over takes no step."""
        return {"lr": self.lr, "lrs": dict(self.lrs), "ratios": dict(self.ratios)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rates from a checkpoint."""
        self.lr, self.ratios = state_dict["lr"], dict(state_dict["ratios"])
        self.lrs = dict(state_dict.get("lrs", {}))  # 0.1 kept no more than the first group's

    def lr_of(self, parameters: Sequence[str]) -> float | None:
        """Return the learning rate of the group that the parameters of a layer are in.

        Args:
            parameters: Their names. Where none of them was trained, the first group's rate is returned.
        """
        known = [self.lrs[name] for name in parameters if name in self.lrs]
        return known[0] if known else self.lr


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the param groups of all optimizers."""
    return list(chain.from_iterable(optimizer.param_groups for optimizer in trainer.optimizers))
