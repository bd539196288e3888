"""A run that is killed while its only checkpoint is written must keep the older one.

Lightning writes a checkpoint into the temporary folder and moves it, which copies where that is another file
system. Right: `last.ckpt` can be read after a kill, at any moment of the copy. The second input is a kill after
the file was written and before it has its name.
"""

import logging
import os
import signal
import tempfile
import warnings
from pathlib import Path

import lightning
import torch
from torch import nn

from recipes.callbacks import LastCheckpoint

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
OTHER_FILE_SYSTEM = Path("/dev/shm")


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(300, 300)

    def training_step(self, inputs, _):
        return self.net(inputs).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def killed_at(calls: list[int], number: int) -> None:
    """Kill this process at the given call."""
    calls.append(1)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_while_copying() -> None:
    send, calls = os.sendfile, []

    def sendfile(target, source, offset, count):
        if len(calls) == 2:  # the file of the second epoch: a part of it arrives
            send(target, source, offset, 100_000)
        killed_at(calls, 3)
        return send(target, source, offset, count)

    os.sendfile = sendfile


def kill_before_the_rename() -> None:
    replace, calls = os.replace, []

    def killing(source, target, **options):
        if str(target).endswith("last.ckpt"):
            killed_at(calls, 2)
        return replace(source, target, **options)

    os.replace = killing
    os.rename = killing


def train(folder: str, prepare) -> None:
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status == signal.SIGKILL, f"not killed: status {status}"
        return
    if OTHER_FILE_SYSTEM.is_dir():
        tempfile.tempdir = str(OTHER_FILE_SYSTEM)
    prepare()
    data = torch.utils.data.DataLoader(torch.randn(8, 300), 4)
    trainer = lightning.Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        callbacks=[LastCheckpoint(folder)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), data)
    os._exit(0)


def check(prepare) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train(folder, prepare)
        checkpoint = torch.load(Path(folder) / "last.ckpt", weights_only=True)
        assert checkpoint["epoch"] == 0, checkpoint["epoch"]


with tempfile.TemporaryDirectory() as here:
    two_file_systems = OTHER_FILE_SYSTEM.is_dir() and OTHER_FILE_SYSTEM.stat().st_dev != Path(here).stat().st_dev
if two_file_systems:
    check(kill_while_copying)
else:
    print("a copy needs two file systems: not tried here")
check(kill_before_the_rename)
