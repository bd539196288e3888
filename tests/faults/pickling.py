"""Reports must come back from processes that a strategy starts, and a used callback must be pickled.

`ddp_spawn` trains in processes of its own, and what the callback has measured stays there. Right: report and
ratios are in the script after `fit`; callbacks and `TempBalance` can be pickled before and after use. Second
inputs: a deep copy, and a used callback that trains again after pickling.
"""

import copy
import logging
import pickle
import warnings

import lightning
import torch
from torch import nn

from farms_tb import FARMSTempBalance, TempBalance

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8))

    def training_step(self, inputs, _):
        return self.net(inputs).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(callback: FARMSTempBalance, **options) -> None:
    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **options,
    )
    trainer.fit(Net(), torch.utils.data.DataLoader(torch.randn(64, 16), 32))


def main() -> None:
    callback = FARMSTempBalance(assign_func="tb_linear_map")
    fit(callback, strategy="ddp_spawn", devices=2)
    assert callback.report is not None
    assert len(callback.ratios) == 4

    callback = FARMSTempBalance(assign_func="tb_linear_map")
    pickle.loads(pickle.dumps(callback))
    fit(callback)
    for again in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert again.ratios == callback.ratios
        fit(again)
        assert set(again.ratios) == set(callback.ratios)

    net = Net()
    balancer = TempBalance(net, net.configure_optimizers(), assign_func="tb_linear_map")
    again = pickle.loads(pickle.dumps(balancer))
    assert again.ratios == balancer.ratios
    assert again.parameter_ratios() == balancer.parameter_ratios()


if __name__ == "__main__":
    main()
