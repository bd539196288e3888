"""Options given as numpy's scalars must not make checkpoints that torch's safe mode refuses.

`np.float64` is a float, so that a check of types lets it through; pickled, it names a function of numpy. Right:
a run with such options is resumed from its checkpoint. Second inputs: numpy's integers, bools and strings in
other options.
"""

import logging
import tempfile
import warnings
from pathlib import Path

import lightning
import numpy as np
import torch
from torch import nn

from farms_tb import FARMSTempBalance

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
OPTIONS = (
    {"lr_min_ratio": np.float64(0.3)},
    {"lr_min_ratio": np.float32(0.5)},
    {"exclude": np.array(["net.1"])},
    {"exclude": [np.str_("net.1")]},
    {"every_n_epochs": np.int64(1)},
    {"exclude_first": np.bool_(False)},
    {"esd": np.str_("full")},
)


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8))

    def training_step(self, inputs, _):
        return self.net(inputs).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(epochs: int, callback: FARMSTempBalance) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )


data = torch.utils.data.DataLoader(torch.randn(32, 16), 32)
for options in OPTIONS:
    try:
        callback = FARMSTempBalance(**options)
    except (TypeError, ValueError) as error:
        assert next(iter(options)) in str(error), error
        print(f"{options} refused: {error}")
        continue
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.ckpt"
        first = trainer(1, callback)
        first.fit(Net(), data)
        first.save_checkpoint(path)
        torch.load(path, weights_only=True)
        second = trainer(2, FARMSTempBalance(**options))
        second.fit(Net(), data, ckpt_path=path)
        assert second.global_step == 2, options
        print(options, "resumed")
