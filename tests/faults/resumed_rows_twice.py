"""A run that is killed and resumed must have each of its measurements in metrics.csv once.

The measurement at the start of an epoch has the step of the checkpoint before it, and the resumed run logs it
again. Right: the rows are those of the undisturbed run. Second input: a kill at the first batch of an epoch.
"""

import csv
import logging
import os
import signal
import tempfile
import warnings
from pathlib import Path

import lightning
import torch
from torch import nn

from farms_tb import FARMSTempBalance
from recipes.callbacks import LastCheckpoint
from recipes.loggers import RunFolderCSVLogger, forget_rows_after

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*[nn.Linear(20, 20) for _ in range(4)])

    def training_step(self, inputs, _):
        loss = self.net(inputs).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Kill(lightning.Callback):
    """Kills the process after a step, when its rows are written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            trainer.logger.save()
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: str, resume: str | None = None, killed_after: int = -1) -> None:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=RunFolderCSVLogger(folder),
        log_every_n_steps=1,
        callbacks=[FARMSTempBalance(assign_func="tb_linear_map"), LastCheckpoint(folder), Kill(killed_after)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), torch.utils.data.DataLoader(torch.ones(8, 20), 4), ckpt_path=resume)
    os._exit(0)


def measured(folder: str) -> list[tuple[str, str]]:
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        return [(row["epoch"], row["step"]) for row in csv.DictReader(file) if row.get("farms/alpha/net.1")]


with tempfile.TemporaryDirectory() as undisturbed:
    run(undisturbed)
    expected = measured(undisturbed)
assert len(expected) == 5, expected
for step in (5, 6, 7):
    with tempfile.TemporaryDirectory() as folder:
        run(folder, killed_after=step)
        checkpoint = torch.load(f"{folder}/last.ckpt", weights_only=True)
        forget_rows_after(Path(folder) / "metrics.csv", checkpoint["global_step"])
        run(folder, resume=f"{folder}/last.ckpt")
        print(step, measured(folder))
        assert measured(folder) == expected, (step, measured(folder), expected)
