"""Tensors that say they are on a GPU, and are computed on the CPU: to see where code for GPUs puts what.

An operation on tensors of both devices is refused as a GPU would refuse it; what the CPU reads is noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)


class OnGpu(Tensor):
    """A tensor whose device is a GPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnGpu:
        """Wrap a tensor of the CPU."""
        made: OnGpu = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=GPU
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave it to the mode."""
        raise AssertionError(f"{func} outside of `pretended_gpu`")


class _Mode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.to_cpu: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        name = func.overloadpacket.__name__
        copies = name in ("_to_copy", "copy_")
        others = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.dim()]
        if ours and others and not copies:
            raise RuntimeError(f"expected all tensors to be on the same device: {func}")
        if ours and name == "_local_scalar_dense":
            self.to_cpu.append(ours[0].shape)
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        found = func(*tree_map(_values, args), **tree_map(_values, kwargs))
        if name == "_to_copy" and device is not None and device.type == "cpu" and ours:
            self.to_cpu.append(ours[0].shape)
            return found
        stays = bool(ours) if device is None else device.type == "cuda"
        if name == "copy_":
            return args[0]
        if not stays:
            return found
        # What was written in place is the tensor that was given.
        given = {id(tensor.values): tensor for tensor in ours}
        return tree_map(lambda leaf: given[id(leaf)] if id(leaf) in given else _wrapped(leaf), found)


def _values(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, OnGpu) else leaf


def _wrapped(leaf: Any) -> Any:
    return OnGpu(leaf) if isinstance(leaf, Tensor) else leaf


@contextmanager
def pretended_gpu() -> Iterator[list[torch.Size]]:
    """Let `OnGpu` tensors be computed with; yields the shapes of what the CPU read of them."""
    mode = _Mode()
    # As torch's own fake tensors do: where there is no driver, no device is switched to.
    torch._C._ensureCUDADeviceGuardSet()
    # Torch starts the driver before it names a GPU.
    with patch("torch.cuda._lazy_init"), mode:
        yield mode.to_cpu
