"""A weight that is a subclass of tensor must cost its own layer at most.

Quantised weights know few operations. Right: such a layer is dequantised and measured, or listed with the
reason; the others are measured. Second inputs: a subclass that can do nothing at all, in a model and in
`TempBalance` with the layer frozen.
"""

import warnings

import torch
from torch import nn

from farms_tb import TempBalance, analyze

warnings.simplefilter("ignore")


class Quantised(torch.Tensor):
    """Knows `dequantize` and `detach`."""

    @staticmethod
    def __new__(cls, integers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=torch.float32)

    def __init__(self, integers, scale) -> None:
        self.integers, self.scale = integers, scale

    def dequantize(self, *_):
        return self.integers.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].integers, args[0].scale)
        raise NotImplementedError(f"no {func}")


class Opaque(Quantised):
    """Does not tell its numbers."""

    def dequantize(self, *_):
        raise NotImplementedError("no dequantize")


torch.manual_seed(0)
integers = torch.randint(-127, 127, (64, 64), dtype=torch.int8)
for cls in (Quantised, Opaque):
    net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(5)])
    net[2].weight = nn.Parameter(cls(integers, 0.01), requires_grad=False)
    records = analyze(net).layers
    print(cls.__name__, {name: record.status for name, record in records.items()})
    assert all(records[name].alpha is not None for name in "0134"), records
    assert records["2"].alpha is not None or records["2"].status != "ok"
    trained = [p for p in net.parameters() if p.requires_grad]
    ratios = TempBalance(net, torch.optim.SGD(trained, lr=0.1), assign_func="tb_linear_map").ratios
    assert ratios.get("2", 1.0) == 1.0 or cls is Quantised, ratios
