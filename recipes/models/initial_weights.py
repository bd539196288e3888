"""Initial weights of the convolutional networks (He et al., 2015)."""

from __future__ import annotations

from torch import nn

__all__ = ["init_convolutions"]


def init_convolutions(net: nn.Module) -> None:
    """Draw new weights for every convolution, and set its bias to 0 where it has one.

    A weight is normal with variance 2 / (out_channels * height * width of the kernel), under which ReLUs keep the
    variance of the gradients from layer to layer.

    Args:
        net: The network, changed in place; the order of its modules decides which weights a seed gives.
    """
    for module in net.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
