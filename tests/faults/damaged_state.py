"""A damaged state must end a resume in a ValueError that names what is damaged, and change nothing.

Right: `TempBalance.load_state_dict` raises a ValueError; ratios and learning rates are what they were. Second inputs:
the state of `FARMSTempBalance`, with the same damages one level deeper, and states that are no dict.
"""

import copy

import torch
from torch import nn

from farms_tb import FARMSTempBalance, TempBalance


def must_refuse(load, state: object, case: str) -> None:
    try:
        load(state)
    except ValueError as error:
        print(f"{case}: {error}")
    else:
        raise AssertionError(f"{case} was accepted")


torch.manual_seed(0)
net = nn.Sequential(*[nn.Linear(20, 20) for _ in range(4)])
optimizer = torch.optim.SGD(net.parameters(), 0.1)
balancer = TempBalance(net, optimizer)
state = balancer.state_dict()
record = state["report"]["1"]
DAMAGES = {
    "version is text": {"version": "2"},
    "ratios are a list": {"ratios": [1]},
    "a ratio is None": {"ratios": {**state["ratios"], "1": None}},
    "options are a list": {"options": [1]},
    "report is a list": {"report": [1]},
    "a record of a later version": {"report": {"1": {**record, "new": 1}}},
    "a record without its shape": {"report": {"1": {}}},
    "an alpha that is a dict": {"report": {"1": {**record, "alpha": {}}}},
    "a status that is a number": {"report": {"1": {**record, "status": 3}}},
}
ratios = balancer.ratios
for case, change in DAMAGES.items():
    must_refuse(balancer.load_state_dict, {**copy.deepcopy(state), **change}, case)
for case in (None, [], "text", {}, {"version": 2}):
    must_refuse(balancer.load_state_dict, case, repr(case))
assert balancer.ratios == ratios

for case, change in DAMAGES.items():
    callback = FARMSTempBalance()
    saved = {**copy.deepcopy(callback.state_dict()), "balancer": {**copy.deepcopy(state), **change}}
    must_refuse(callback.load_state_dict, saved, f"callback, {case}")
