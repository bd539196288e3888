"""Measure and balance the layers of a network in Lightning's Trainer: python examples/lightning_trainer.py."""

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from farms_tb import FARMSTempBalance


class Regression(LightningModule):
    """A module as you would write it without the callback."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.Tanh())]
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), *hidden, nn.Linear(64, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer with one learning rate; the callback scales it for each layer."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


if __name__ == "__main__":
    seed_everything(0)
    inputs = torch.randn(512, 16)
    data = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True).sin()), batch_size=32)

    balancer = FARMSTempBalance(lr_min_ratio=0.8, lr_max_ratio=1.2)
    trainer = Trainer(max_epochs=3, callbacks=[balancer], logger=False, enable_checkpointing=False)
    trainer.fit(Regression(), data)

    print(balancer.report)
    for name, ratio in balancer.ratios.items():
        print(f"{name}: learning rate {ratio:.2f} times the base rate")
