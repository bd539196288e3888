"""A layer whose spectrum has collapsed must not pass for the best trained one.

In three layers of one shape, one is random, one has a power-law spectrum as trained layers have, and one holds
its energy in a single direction while the rest fades over many decades, as weight decay leaves it. The
collapsed layer has by far the smallest alpha. Right: its status says what happened, and it keeps ratio 1. The
second input is a linear layer that collapsed to two directions.
"""

import warnings

import torch
from torch import nn

from farms_tb import TempBalance, analyze

warnings.simplefilter("ignore")


def with_spectrum(singular_values: torch.Tensor, slices: int) -> torch.Tensor:
    """Return (slices, 64, 64) matrices with these singular values and random directions."""
    left, right = (torch.linalg.qr(torch.randn(slices, 64, 64))[0] for _ in range(2))
    return 0.3 * (left * singular_values) @ right.mT


def check(net: nn.ModuleDict) -> None:
    report = analyze(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    balancer = TempBalance(net, optimizer, exclude_first=False, exclude_last=False, assign_func="tb_linear_map")
    print({name: (record.alpha, record.status) for name, record in report.layers.items()}, balancer.ratios)
    assert report.layers["trained"].status == "ok", report.layers["trained"]
    assert report.layers["collapsed"].status != "ok", report.layers["collapsed"]
    assert balancer.ratios["collapsed"] == 1.0, balancer.ratios


torch.manual_seed(0)
trained = torch.arange(1, 65) ** -0.75
one_direction = torch.logspace(-2, -7, 64)
one_direction[0] = 1.0
two_directions = torch.logspace(-2, -7, 64)
two_directions[:2] = torch.tensor([1.0, 0.8])

names = ("random", "trained", "collapsed")
convolutions = nn.ModuleDict({name: nn.Conv2d(64, 64, 3, bias=False) for name in names})
linears = nn.ModuleDict({name: nn.Linear(64, 64, bias=False) for name in names})
with torch.no_grad():
    for name, spectrum in (("trained", trained), ("collapsed", one_direction)):
        kernel = with_spectrum(spectrum, 9).permute(1, 2, 0).reshape(64, 64, 3, 3)
        convolutions[name].weight.copy_(kernel)
    for name, spectrum in (("trained", trained), ("collapsed", two_directions)):
        linears[name].weight.copy_(with_spectrum(spectrum, 1)[0])
check(convolutions)
check(linears)
