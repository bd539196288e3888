"""No ratio of a damaged checkpoint may become a learning rate.

Right: a NaN, infinite or negative ratio is refused with a ValueError, or every learning rate is finite and not
negative. Second inputs: numbers too large for a ratio, text, a bool, a complex number and a tensor.
"""

import copy
import math

import torch
from torch import nn

from farms_tb import TempBalance

DAMAGED = (
    math.nan,
    math.inf,
    -math.inf,
    -3.0,
    -1e-300,
    10**400,
    "0.5",
    None,
    True,
    1j,
    torch.tensor(math.nan),
    [1.0],
)

for value in (*DAMAGED, 1e300):
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(20, 20) for _ in range(4)])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    state = copy.deepcopy(balancer.state_dict())
    state["ratios"]["1"] = value
    try:
        balancer.load_state_dict(state)
    except ValueError as error:
        print("refused:", error)
        continue
    net(torch.randn(8, 20)).square().mean().backward()
    optimizer.step()
    rates = [group.lr for group in balancer.param_groups(optimizer)]
    assert all(math.isfinite(rate) and 0 <= rate <= 1 for rate in rates), f"{value!r} gives {rates}"
    assert all(bool(p.isfinite().all()) for p in net.parameters()), repr(value)
