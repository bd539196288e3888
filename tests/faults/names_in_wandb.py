"""Names of layers that mean something to W&B must not end a run.

`define_metric` takes `*` for a wildcard, and refuses it within a name. Right: the run trains to its end. Second
inputs: `*` at the end, where it would match the curves of other layers, and slashes, quotes and backslashes.
"""

import logging
import os
import tempfile
import warnings

os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")

import lightning
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import nn

from farms_tb import FARMSTempBalance

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
NAMES = ("q*k", "q*", "*", "a/b", "quote\"'`", "back\\slash", "<b>${x}")


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({name: nn.Linear(24, 24) for name in ("first", *NAMES, "last")})

    def training_step(self, inputs, _):
        for layer in self.net.values():
            inputs = layer(inputs)
        return inputs.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


with tempfile.TemporaryDirectory() as folder:
    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[FARMSTempBalance(assign_func="tb_linear_map")],
        logger=WandbLogger(save_dir=folder, project="x", offline=True),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Net(), torch.utils.data.DataLoader(torch.randn(32, 24), 32))
    trainer.logger.experiment.finish()
    assert trainer.global_step == 1
