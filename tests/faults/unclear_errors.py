"""An error must say what is wrong: the option, the class, the format.

Right: `exclude=None` names the option, a wrapper without `Optimizer.__init__` works, a file of
another format that format, a URL that it is one. Second inputs: HDF5, ONNX and numpy files, `exclude=3`, and a
string for an optimizer.
"""

import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from farms_tb import TempBalance, analyze_checkpoint

warnings.simplefilter("ignore")


class Wrapper(torch.optim.Optimizer):
    """Wraps others without calling Optimizer.__init__."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    @property
    def param_groups(self):
        return [group for optimizer in self.inner for group in optimizer.param_groups]

    def step(self, closure=None):
        for optimizer in self.inner:
            optimizer.step()


def must_say(word: str, call, *allowed: type[Exception]) -> None:
    try:
        call()
    except allowed as error:
        assert word in str(error), f"{word!r} is not in: {error}"
        print(f"{type(error).__name__}: {error}")
    else:
        raise AssertionError(f"{word}: accepted")


net = nn.Sequential(*[nn.Linear(32, 32) for _ in range(5)])
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
wrong = (TypeError, ValueError)
must_say("exclude", lambda: TempBalance(net, optimizer, exclude=None, assign_func="tb_linear_map"), *wrong)
must_say("exclude", lambda: TempBalance(net, optimizer, exclude=3, assign_func="tb_linear_map"), *wrong)
must_say("str", lambda: TempBalance(net, "sgd", assign_func="tb_linear_map"), *wrong)

# A wrapper needs no error: the optimizers inside it are found, and step with the ratios that are claimed.
wrapper = Wrapper(optimizer)
balancer = TempBalance(net, wrapper, assign_func="tb_linear_map")
before = [parameter.detach().clone() for parameter in net.parameters()]
net(torch.randn(8, 32)).square().mean().backward()
wrapper.step()
for old, parameter, ratio in zip(before, net.parameters(), balancer.parameter_ratios().values(), strict=True):
    torch.testing.assert_close(old - parameter, 0.1 * ratio * parameter.grad, rtol=1e-3, atol=1e-6)
assert {0.5, 1.5} <= set(balancer.parameter_ratios().values())

FORMATS = {
    "GGUF": b"GGUF\x03\0\0\0" + bytes(100),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "numpy": b"\x93NUMPY\x01\0" + bytes(100),
    "ONNX": b"\x08\x08\x12\x07pytorch" + bytes(100),
}
with tempfile.TemporaryDirectory() as folder:
    for name, content in FORMATS.items():
        path = Path(folder) / "file.bin"
        path.write_bytes(content)
        must_say(name, lambda path=path: analyze_checkpoint(path), ValueError, ImportError)

for address in ("https://huggingface.co/gpt2", "s3://bucket/model.pt"):
    command = [sys.executable, "-m", "farms_tb.cli", "analyze", address]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr, result.stderr
    assert "download" in result.stderr, result.stderr
