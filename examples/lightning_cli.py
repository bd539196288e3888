"""The callback in LightningCLI: python examples/lightning_cli.py fit --config examples/lightning_cli.yaml.

Options of the callback are in the YAML file, and can be overridden:
--trainer.callbacks.init_args.lr_max_ratio=1.2. Needs pip install "jsonargparse[signatures]".
"""

import torch
from lightning import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from lightning_trainer import Regression
from torch.utils.data import DataLoader, TensorDataset


class SineData(LightningDataModule):
    """Random points and the sine of their sum."""

    def __init__(self, size: int = 512, batch_size: int = 32) -> None:
        super().__init__()
        self.size, self.batch_size = size, batch_size

    def train_dataloader(self) -> DataLoader:
        """Return the batches of an epoch."""
        inputs = torch.randn(self.size, 16)
        return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True).sin()), self.batch_size)


if __name__ == "__main__":
    cli = LightningCLI(Regression, SineData, save_config_callback=None)  # or a config.yaml is left in this folder
    (balancer,) = (found for found in cli.trainer.callbacks if type(found).__name__ == "FARMSTempBalance")
    print(balancer.report)
