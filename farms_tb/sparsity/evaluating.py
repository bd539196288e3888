"""Run a model for its activations, every layer called as a module, and the data left as they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model for its activations alone: in evaluation mode, without gradients and without a cache of keys.

    Every layer is called as a module, so that its inputs are seen: compiled blocks run as they are written, and
    torch's encoders without their fast path, which calls none of their layers.

    Args:
        model: any module; its modes are put back at the end.
    """
    modes = {module: module.training for module in model.modules()}
    configs = _caching_configs(model)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    for config in configs:
        config.use_cache = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), _uncompiled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in modes.items():
            module.training = training
        for config in configs:
            config.use_cache = True


def call_on_copy(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Call a model with copies of the tensors of a batch: some models write into what they are given.

    Args:
        model: called with the batch as keyword arguments.
        batch: tensors, and other values, which are passed as they are.

    Returns:
        What the model returns.
    """
    return model(**pytree.tree_map_only(Tensor, torch.clone, dict(batch)))


def _uncompiled() -> AbstractContextManager[Any]:
    """Let compiled modules and functions run as they are written."""
    # Nothing is compiled before torch's compiler is loaded, which takes a second.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    as_written: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return as_written


def _caching_configs(model: nn.Module) -> list[Any]:
    """Return the configurations of `transformers` in a model that ask for a cache of keys and values.

    Such a cache would grow each time that a block is run. An encoder-decoder has one configuration for each half.
    """
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True:
            found[id(config)] = config
    return list(found.values())
