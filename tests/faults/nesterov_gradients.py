"""A step must leave the gradients as they were.

Whatever reads `.grad` after the step, as the logging of norms or SAM does, would be wrong without a word. Torch's SGD
with nesterov writes into tensors that it is given. Right: no gradient changes. Second inputs: other variants of SGD,
Adam and AdamW, with every kind of implementation that runs on a CPU.
"""

import itertools
import warnings

import torch
from torch import nn

from farms_tb import TempBalance

warnings.simplefilter("ignore")


def largest_change(make) -> float:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 96), nn.Linear(96, 48), nn.Linear(48, 8))
    optimizer = make(net.parameters())
    TempBalance(net, optimizer)
    worst = 0.0
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(8, 16)).square().mean().backward()
        before = [p.grad.clone() for p in net.parameters()]
        optimizer.step()
        for parameter, gradient in zip(net.parameters(), before, strict=True):
            worst = max(worst, float((parameter.grad - gradient).abs().max()))
    return worst


SGD, ADAM = torch.optim.SGD, (torch.optim.Adam, torch.optim.AdamW)
for decay, foreach, maximize in itertools.product((0.0, 0.01), (None, True, False), (False, True)):
    shared = {"lr": 0.1, "weight_decay": decay, "foreach": foreach, "maximize": maximize}
    for momentum, nesterov in ((0, False), (0.9, False), (0.9, True)):
        options = {**shared, "momentum": momentum, "nesterov": nesterov}
        assert largest_change(lambda params, o=options: SGD(params, **o)) == 0, options
    for cls, amsgrad in itertools.product(ADAM, (False, True)):
        options = {**shared, "amsgrad": amsgrad}
        assert largest_change(lambda params, c=cls, o=options: c(params, **o)) == 0, (cls, options)
for cls, momentum in ((SGD, {"momentum": 0.9, "nesterov": True}), *((cls, {}) for cls in ADAM)):
    options = {"lr": 0.1, "fused": True, **momentum}
    assert largest_change(lambda params, c=cls, o=options: c(params, **o)) == 0, (cls, options)
