r"""Names must be drawn as they are, although matplotlib takes `$...$` for mathematics and `\` for a command.

Right: pictures of a run whose folder or layers have such names are drawn, and a run that logs a table of
pictures trains to its end. Second inputs: a lone backslash, braces, underscores and carets, and an unpaired
dollar.
"""

import logging
import tempfile
import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from farms_tb import FARMSTempBalance
from farms_tb.viewing.plots import save_all

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
NAMES = ("$\\x$", "back\\slash", "{a}_^", "a$b", "$$")


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({name: nn.Linear(20, 20) for name in ("first", *NAMES, "last")})

    def training_step(self, inputs, _):
        return sum(layer(inputs).square().mean() for layer in self.net.values())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


with tempfile.TemporaryDirectory() as parent:
    for name in NAMES:
        folder = Path(parent) / f"lr {name}"
        folder.mkdir()
        (folder / "metrics.csv").write_text(f"epoch,step,farms/alpha/a,farms/alpha/{name}\n0,0,2,2.1\n1,1,2,2.2\n")
        assert save_all(folder), name
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=TensorBoardLogger(parent),
        callbacks=[FARMSTempBalance(table_every_n=1, assign_func="tb_linear_map")],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Net(), torch.utils.data.DataLoader(torch.randn(8, 20), 4))
