"""Which layer comes before each normalisation layer, whose learning-rate ratio the norm then takes.

Norms are told by what they are, and never called: a forward pass of a user's module may update statistics, draw
random numbers, run hooks or wait for other processes. `is_norm` states the rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from farms_tb.weights.layers import Layer, unwrap
from farms_tb.weights.names import clean_name

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
# Not `DiagonalNormal` and the like, which are distributions.
_NORM_CLASS = re.compile("norm(?!al$)", re.IGNORECASE)


def layers_before_norms(model: nn.Module, layers: Sequence[Layer]) -> dict[str, str]:
    """Find the layer that each normalisation layer follows.

    By name, as the papers do (`bn1` follows `conv1` of the same module); failing that, the nearest layer
    registered before the norm whose output is as wide as the norm. That is the layer that feeds it where modules
    are registered in the order in which they run. Llama registers both norms of a block behind its feed-forward
    part: they follow its last layer.

    Args:
        model: the model.
        layers: its layers, as `find_layers` lists them.

    Returns:
        Path of the norm to path of the module of the layer it follows; norms without such a layer are left out.

    Example:
        >>> from farms_tb.weights.layers import find_layers
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> layers_before_norms(model, find_layers(model))
        {'1': '0'}
    """
    modules = {layer.module_name: layer.module for layer in layers if layer.kind}
    followed: dict[str, str] = {}
    # By the number of its output channels, the layer registered last.
    nearest: dict[int, _Placed] = {}
    for position, (raw, module) in enumerate(unwrap(model).named_modules()):
        path = clean_name(raw)
        if path in modules:
            width = _output_width(module)
            if width is not None:
                nearest[width] = position, path
        elif is_norm(module):
            before = _layer_before(path, module, modules, nearest)
            if before is not None:
                followed[path] = before
    return followed


def is_norm(module: nn.Module) -> bool:
    """Return whether a module normalises its input, without calling it.

    Torch's own classes and classes derived from them do. A class of somebody else (LlamaRMSNorm, T5LayerNorm) does
    where it, or a class it derives from, has "norm" in its name, and where the module has one or two parameters,
    all vectors of one length: the scale and the shift of each channel. A shape such as `(1, C, 1, 1)` is a vector
    as well. Modules with submodules are no norms.
    """
    if isinstance(module, _TORCH_NORMS):
        return True
    if _channels(module) is None:
        return False
    classes = type(module).__mro__
    return any(_NORM_CLASS.search(cls.__name__) for cls in classes)


_Placed = tuple[int, str]
"""Position of a layer among all modules, and its path."""


def _layer_before(
    path: str, norm: nn.Module, modules: dict[str, nn.Module], nearest: dict[int, _Placed]
) -> str | None:
    """Return the path of the layer that a norm follows, see `layers_before_norms`; None where there is none."""
    sibling = _sibling(path)
    if sibling in modules:
        return sibling
    as_wide = [nearest[width] for width in _norm_widths(norm) if width in nearest]
    if not as_wide:
        return None
    _, path_before = max(as_wide)
    return path_before


def _sibling(path: str) -> str:
    """Return where the convolution of a norm is by the papers' rule: `layer1.bn2` gives `layer1.conv2`."""
    parent, dot, own = path.rpartition(".")
    return parent + dot + re.sub("bn|norm", "conv", own)


def _channels(module: nn.Module) -> int | None:
    """Return the length of the one or two vectors that are a module's parameters; None where it has others."""
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    if module._modules or len(parameters) not in (1, 2):
        return None
    first, last = parameters[0], parameters[-1]
    if not (_is_vector(first) and _is_vector(last)):
        return None
    return first.numel() if first.numel() == last.numel() else None


def _is_vector(parameter: Tensor) -> bool:
    """Return whether all but one dimension of a parameter have length 1. A lazy parameter has no shape yet."""
    if is_lazy(parameter):
        return False
    long_dimensions = [length for length in parameter.shape if length > 1]
    return len(long_dimensions) == 1


def _output_width(module: nn.Module) -> int | None:
    """Return the number of output channels of a layer: by its attributes, or the length of its bias."""
    width = _width(module, _OUTPUT_WIDTHS)
    if width is not None:
        return width
    # Not `module.bias`, which would compute a bias that is parametrized.
    bias = module._parameters.get("bias")
    return bias.numel() if bias is not None and not is_lazy(bias) and bias.ndim == 1 else None


def _norm_widths(norm: nn.Module) -> set[int]:
    """Return the numbers of channels that the input of a norm may have."""
    width = _width(norm, _NORM_WIDTHS)
    if width is not None:
        return {width}
    shape = getattr(norm, "normalized_shape", None)
    if isinstance(shape, (tuple, list, torch.Size)):
        return set(shape)
    channels = _channels(norm)
    return set() if channels is None else {channels}


def _width(module: nn.Module, attributes: Iterable[str]) -> int | None:
    """Return the first of these attributes of a module that is an integer; None where there is none."""
    values = (getattr(module, attribute, None) for attribute in attributes)
    return next((value for value in values if isinstance(value, int)), None)
