"""Classification by squared error, and what is logged of it at the end of each epoch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from farms_tb import analyze
from recipes.tasks import ImageClassification

__all__ = ["TRAPS", "SquaredErrorClassification"]

TRAPS = "traps/"
"""What the names of the metrics begin with that count the traps of a layer."""


class SquaredErrorClassification(ImageClassification):
    """Image classification by the mean squared error between logits and one-hot labels.

    At the end of each epoch it also logs `train/accuracy`, on all training images; `weight_norm`, the Euclidean
    norm of all parameters together; and `traps/<layer>`, the outliers among the eigenvalues of the layer's
    shuffled entries (`num_traps` of a record). The arguments are those of `ImageClassification`.
    """

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared error of logits (B, num_classes) against the one-hot labels."""
        one_hot = functional.one_hot(target, prediction.shape[1])
        return functional.mse_loss(prediction, one_hot.to(prediction.dtype))

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """Log what an epoch has changed, from the weights at its end."""
        images, labels = self.trainer.datamodule.datasets["train"].tensors  # type: ignore[attr-defined]
        right = self(images.to(self.device)).argmax(1).cpu() == labels
        norms = torch.stack([parameter.norm() for parameter in self.parameters()])
        self.log_dict({"train/accuracy": right.float().mean(), "weight_norm": norms.norm()})
        # Traps are those of whole matrices in any case, and shuffling these takes less time than windows of them.
        for name, record in analyze(self, esd="full", null=True, threads=1).layers.items():
            if record.num_traps is not None:
                self.log(f"{TRAPS}{name}", record.num_traps)
