"""A step must leave the gradients as they were.

Whatever reads `.grad` after the step, as the logging of norms or SAM does, would be wrong unnoticed.
Torch's SGD with nesterov writes into tensors that it is given. Right: no gradient changes, unless torch's own
step changes it, as with `foreach=True`. Second inputs: other variants of SGD, Adam and AdamW, with every
implementation that runs on a CPU.
"""

import itertools
import warnings

import torch
from torch import nn

from farms_tb import TempBalance

warnings.simplefilter("ignore")


def largest_change(cls, options: dict, balanced: bool) -> float:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 96), nn.Linear(96, 48), nn.Linear(48, 8))
    optimizer = cls(net.parameters(), lr=0.1, **options)
    if balanced:
        TempBalance(net, optimizer, assign_func="tb_linear_map")
    worst = 0.0
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(8, 16)).square().mean().backward()
        before = [p.grad.clone() for p in net.parameters()]
        optimizer.step()
        for parameter, gradient in zip(net.parameters(), before, strict=True):
            worst = max(worst, float((parameter.grad - gradient).abs().max()))
    return worst


def check(cls, **options) -> None:
    if largest_change(cls, options, balanced=True) > 0:
        print(f"changed: {cls.__name__} {options}")
        assert largest_change(cls, options, balanced=False) > 0, (cls, options)


SGD, ADAM = torch.optim.SGD, (torch.optim.Adam, torch.optim.AdamW)
for decay, foreach, maximize in itertools.product((0.0, 0.01), (None, True, False), (False, True)):
    shared = {"weight_decay": decay, "foreach": foreach, "maximize": maximize}
    for momentum, nesterov in ((0, False), (0.9, False), (0.9, True)):
        check(SGD, **shared, momentum=momentum, nesterov=nesterov)
    for cls, amsgrad in itertools.product(ADAM, (False, True)):
        check(cls, **shared, amsgrad=amsgrad)
check(SGD, fused=True, momentum=0.9, nesterov=True)
for cls in ADAM:
    check(cls, fused=True)
