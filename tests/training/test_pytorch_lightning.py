"""The callback in the Trainer of `pytorch_lightning`, whose classes are not those of `lightning`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn

from farms_tb import FARMSTempBalance
from tests.helpers import (
    BATCHES,
    EPOCHS,
    LIGHTNING_NOISE,
    assert_same_weights,
    make_data,
    make_net,
    read_wandb_file,
)

pytestmark = LIGHTNING_NOISE

PACKAGES = [lightning.pytorch, pytorch_lightning]


def make_module(package: Any) -> Any:
    class Net(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, targets = batch
            return nn.functional.mse_loss(self.net(inputs), targets)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]

    return Net()


def fit(package: Any, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> tuple[Any, Any]:
    """Train with the Trainer of a package; return the module and the trainer."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, "logger": False}
    defaults = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1, "enable_checkpointing": False, **quiet}
    module, trainer = make_module(package), package.Trainer(callbacks=list(callbacks), **{**defaults, **options})
    trainer.fit(module, make_data(), ckpt_path=ckpt_path)
    return module, trainer


def test_the_packages_are_two() -> None:
    assert not issubclass(FARMSTempBalance, pytorch_lightning.Callback)


def test_same_run_in_both_packages() -> None:
    runs = []
    for package in PACKAGES:
        balance = FARMSTempBalance(assign_func="tb_linear_map")
        module, trainer = fit(package, balance)
        groups = balance.param_groups(module.optimizers())
        runs.append((module, balance, groups, trainer.callback_metrics["farms/alpha_mean"]))
        assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    (module, balance, groups, mean), (expected, other, *rest) = runs
    assert_same_weights(module, expected)
    assert {0.5, 1.5} <= set(balance.ratios.values())
    assert balance.ratios == other.ratios
    assert balance.report == other.report
    assert [groups, mean] == rest


def test_ratio_one_is_bit_identical_to_no_callback() -> None:
    plain, _ = fit(pytorch_lightning)
    measured, _ = fit(pytorch_lightning, FARMSTempBalance(lr_min_ratio=1.0, lr_max_ratio=1.0))
    assert_same_weights(measured, plain)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning .* newer")
@pytest.mark.parametrize("goes_on_in", PACKAGES, ids=lambda package: package.__name__)
def test_resume_is_bit_identical(goes_on_in: Any, tmp_path: Path) -> None:
    whole = FARMSTempBalance(every_n_steps=3, assign_func="tb_linear_map")
    keep = pytorch_lightning.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    expected, _ = fit(pytorch_lightning, whole, keep, enable_checkpointing=True)
    balance = FARMSTempBalance(every_n_steps=3, assign_func="tb_linear_map")
    module, _ = fit(goes_on_in, balance, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same_weights(module, expected)
    assert balance.ratios == whole.ratios


def test_two_callbacks_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `FARMSTempBalance`"):
        pytorch_lightning.Trainer(
            callbacks=[
                FARMSTempBalance(assign_func="tb_linear_map"),
                FARMSTempBalance(assign_func="tb_linear_map"),
            ],
            logger=False,
        )


def test_strategy_is_refused_by_name() -> None:
    from pytorch_lightning.strategies import FSDPStrategy

    trainer = pytorch_lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.__class__ = type("Mine", (FSDPStrategy,), {})
    with pytest.raises(ValueError, match=r"does not work with FSDPStrategy: .*Use one device, DDP or FSDP2"):
        FARMSTempBalance(assign_func="tb_linear_map").setup(trainer, make_module(pytorch_lightning), "fit")


def test_tensorboard_gets_histograms(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path, name="", version="")
    fit(pytorch_lightning, FARMSTempBalance(histogram_every_n=2, assign_func="tb_linear_map"), logger=logger)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert [event.step for event in events.Histograms("farms_esd/02_net.5")] == [0, 2 * BATCHES]
    assert len(events.Scalars("farms/alpha_mean")) == EPOCHS + 1


def test_wandb_gets_histograms_and_axes(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    logger = pytorch_lightning.loggers.WandbLogger(project="tests", save_dir=tmp_path, offline=True)
    fit(pytorch_lightning, FARMSTempBalance(histogram_every_n=2, assign_func="tb_linear_map"), logger=logger)
    wandb.finish()
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    records = read_wandb_file(path)
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    axes = {metric.name: metric.step_metric for metric in metrics}
    assert (axes["farms_alpha/02_net.5"], axes["farms_esd/02_net.5"]) == ("epoch", "epoch")
    keys = [{(item.nested_key or [item.key])[0] for item in record.history.item} for record in records]
    assert ["farms_esd/02_net.5" in row for row in keys if "farms/alpha_mean" in row] == [True, False, True, False]
