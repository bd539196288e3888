"""Which layer feeds each normalisation layer, whose learning-rate ratio it then takes.

A normalisation layer is told by what it does: its output does not change when its input is multiplied by a number.
So RMSNorms of any package count, whatever their class is called.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from farms_tb.weights.layers import Layer, clean_name, unwrap

_TORCH_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
# Names under which layers hold the number of their output channels: torch's, then transformers' Conv1D.
_OUTPUT_WIDTHS = ("out_channels", "out_features", "embed_dim", "nf")
_NORM_WIDTHS = ("num_features", "num_channels")


def norm_feeders(model: nn.Module, layers: Sequence[Layer]) -> dict[str, str]:
    """Find the layer that feeds each normalisation layer.

    By name, as the papers do (`bn1` follows `conv1` of the same module); failing that, the nearest layer
    registered before the norm whose output is as wide as the norm.

    Args:
        model: the model.
        layers: its layers, as `find_layers` lists them.

    Returns:
        Path of the norm to path of the module of the layer it follows. A norm that no layer feeds is left out.
    """
    modules = {layer.module_name: layer.module for layer in layers if layer.kind}
    feeders: dict[str, str] = {}
    nearest: dict[int | None, tuple[int, str]] = {}
    for position, (raw, module) in enumerate(unwrap(model).named_modules()):
        path = clean_name(raw)
        if path in modules:
            nearest[_output_width(modules[path])] = position, path
        elif is_norm(module):
            sibling = _sibling(path)
            wide = [nearest[width] for width in _norm_widths(module) if width in nearest]
            if sibling in modules:
                feeders[path] = sibling
            elif wide:
                feeders[path] = max(wide)[1]
    return feeders


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module normalises its input.

    Torch's own classes are known. Another module is one if it holds no parameters but vectors, which scale or
    shift channels, and if it maps `x` and `4 x` to the same output. It is called with a copy of itself on the CPU,
    so that neither its buffers nor the random state change, and none of its hooks runs.
    """
    if isinstance(module, _TORCH_NORMS):
        return True
    width = _channels(module)
    return width is not None and any(_ignores_scale(module, shape) for shape in _shapes(width))


def _sibling(path: str) -> str:
    """Return where the convolution of a norm is by the papers' rule: `layer1.bn2` gives `layer1.conv2`."""
    parent, _, own = path.rpartition(".")
    return ".".join(filter(None, (parent, re.sub("bn|norm", "conv", own))))


def _channels(module: nn.Module) -> int | None:
    """Return the length of the vectors that are all of a module's parameters; None where there are others."""
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    if not parameters or any(True for _ in module.children()):
        return None
    widths = set()
    for parameter in parameters:
        if is_lazy(parameter) or not parameter.is_floating_point() or sum(n > 1 for n in parameter.shape) != 1:
            return None
        widths.add(parameter.numel())
    return widths.pop() if len(widths) == 1 else None


def _shapes(width: int) -> Iterator[tuple[int, ...]]:
    """Yield shapes of inputs with `width` channels: channels last, then channels first."""
    yield 2, 3, width
    yield 2, width, 3, 3
    yield 2, width


def _ignores_scale(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Tell whether a module gives the same output for `x` and `4 x`, and not for every input the same."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    one, other = (torch.randn(shape, generator=generator, device="cpu") for _ in range(2))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        try:
            outputs = [_call(module, inputs) for inputs in (one, 4 * one, other)]
        except Exception:  # whatever a module does that takes no such input, it is no norm
            return False
    tensors = [output.float() for output in outputs if isinstance(output, Tensor) and output.shape == one.shape]
    if len(tensors) < len(outputs):
        return False
    first, scaled, different = tensors
    size = first.abs().mean()
    same, varied = (scaled - first).abs().mean(), (different - first).abs().mean()
    return bool(same < 0.01 * size) and bool(varied > 0.1 * size)


def _call(module: nn.Module, inputs: Tensor) -> object:
    """Call the forward method on a copy of a module with parameters of ones, in the mode for training."""
    replica = copy.copy(module)
    ones = {
        name: None if p is None else nn.Parameter(torch.ones(p.shape, device="cpu"), requires_grad=False)
        for name, p in module._parameters.items()
    }
    buffers = {name: None if b is None else b.detach().cpu().clone() for name, b in module._buffers.items()}
    replica.__dict__.update(_parameters=ones, _buffers=buffers, training=True)
    return type(module).forward(replica, inputs)


def _output_width(module: nn.Module) -> int | None:
    """Return the number of output channels of a layer: by its attributes, or the length of its bias."""
    for attribute in _OUTPUT_WIDTHS:
        width = getattr(module, attribute, None)
        if isinstance(width, int):
            return width
    bias = getattr(module, "bias", None)
    return bias.numel() if isinstance(bias, Tensor) and bias.ndim == 1 else None


def _norm_widths(norm: nn.Module) -> set[int]:
    """Return the numbers of channels that the input of a norm may have."""
    for attribute in _NORM_WIDTHS:
        width = getattr(norm, attribute, None)
        if isinstance(width, int):
            return {width}
    shape = getattr(norm, "normalized_shape", None)
    if isinstance(shape, (tuple, list, torch.Size)):
        return set(shape)
    channels = _channels(norm)
    return set() if channels is None else {channels}
