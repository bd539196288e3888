"""The optimizers that one would take instead of layer-wise balancing: LARS, LAMB, Muon, layer-wise decay.

All of them set rates by layer in some way of their own, and none measures a spectrum. The rules are those of
pytorch-optimizer and timm. What is here gives them the papers' numbers and tells which parameters get which rule.
That takes the network, where an optimizer of torch takes its parameters: `make_optimizer` calls either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from farms_tb.missing import cannot_import
from farms_tb.weights.blocks import blocks_of
from farms_tb.weights.layers import find_layers
from recipes.errors import RecipeError

__all__ = ["adamw_layer_decay", "lamb", "lars", "make_optimizer", "muon", "takes_network"]

OptimizerFactory = Callable[[Any], Optimizer]
"""Makes an optimizer from an iterable of parameters or, if it is one of this module, from a network."""


def takes_network(factory: OptimizerFactory) -> bool:
    """Return whether a factory is one of this module, with or without arguments bound to it."""
    function = factory.func if isinstance(factory, partial) else factory
    return function in (lars, lamb, muon, adamw_layer_decay)


def make_optimizer(factory: OptimizerFactory, net: nn.Module) -> Optimizer:
    """Make the optimizer of a network.

    Args:
        factory: Called with the network if it is one of this module, and with its parameters otherwise.
        net: The network.

    Raises:
        RecipeError: A package is missing, or the optimizer can't train this network.
    """
    return factory(net if takes_network(factory) else net.parameters())


def lars(
    net: nn.Module,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    trust_coefficient: float = 1e-3,
) -> Optimizer:
    """Return LARS (You, Gitman and Ginsburg, 2017, arXiv 1708.03888), with the paper's numbers as defaults.

    SGD with momentum m, whose update of each weight w with gradient g is

        v <- m v + eta |w| / (|g| + weight_decay |w|) (g + weight_decay w),  w <- w - lr v

    where |.| is the norm over the whole tensor and eta the trust coefficient. A step therefore moves each weight
    by about lr * eta of its norm, and `lr` is far larger than that of SGD. Vectors, that is biases, also those of
    shape (C, 1, 1), and the weights of norms, get plain SGD without decay. Complex weights count as pairs of real
    ones.

    Args:
        net: The network.
        lr: Learning rate.
        momentum: m.
        weight_decay: L2 penalty of the weights.
        trust_coefficient: eta.

    Raises:
        RecipeError: pytorch-optimizer is not installed, or `net` is no network.
    """
    optimizers = _pytorch_optimizer("lars")
    parameters = list(_checked(net, "lars").parameters())
    made: Optimizer = _lars_with_vectors(optimizers.LARS)(
        parameters,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
    )
    return made


def _lars_with_vectors(package: Any) -> Any:
    """Return the package's LARS, which goes by the number of dimensions, with this module's rule for vectors.

    Args:
        package: The class; it comes with an optional package, so that this one can't be made at import.
    """

    class LARS(package):  # type: ignore[misc]
        """LARS, with plain SGD for vectors of any shape."""

        def _can_use_foreach(self, group: dict[str, Any]) -> bool:
            shaped = any(map(_is_shaped_vector, group["params"]))
            return not shaped and bool(super()._can_use_foreach(group))

        def _step_per_param(self, group: dict[str, Any]) -> None:
            vectors = [parameter for parameter in group["params"] if _is_shaped_vector(parameter)]
            others = [parameter for parameter in group["params"] if not _is_shaped_vector(parameter)]
            super()._step_per_param({**group, "params": others})
            for vector in vectors:
                if vector.grad is None:
                    continue
                update = vector.grad
                if group["momentum"] > 0:
                    update = self.state[vector]["momentum_buffer"].mul_(group["momentum"]).add_(update)
                vector.add_(update, alpha=-group["lr"])

    return LARS


def lamb(
    net: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.01,
) -> Optimizer:
    """Return LAMB (You et al., ICLR 2020, arXiv 1904.00962), with the paper's numbers as defaults.

    With m and v as in Adam, the update of each weight w is

        r = m / (sqrt(v) + 1e-6) + weight_decay w,  w <- w - lr min(|w|, 10) / |r| r

    where |.| is the norm over the whole tensor. Vectors, that is biases and the weights of norms, get Adam's
    m / (sqrt(v) + 1e-6) without decay and norms, as in the authors' code. As there, m and v have no bias
    correction. The norms of weights cancel it; vectors move 3 to 7 times as far as with Adam in the first hundred
    steps, so a warm-up is of use. Complex weights count as pairs of real ones.

    Args:
        net: The network.
        lr: Learning rate; the share of its norm that a weight moves in a step.
        betas: Decay of m and v.
        weight_decay: Of the weights.

    Raises:
        RecipeError: pytorch-optimizer is not installed, or `net` is no network.
    """
    optimizers = _pytorch_optimizer("lamb")
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in _checked(net, "lamb").parameters():
        (vectors if _is_vector(parameter) else matrices).append(parameter)
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "adam": True, "weight_decay": 0.0}]
    made: Optimizer = optimizers.Lamb(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=tuple(betas),
        weight_decay=weight_decay,
        weight_decouple=False,  # inside of the norm, as in the paper
        adam_debias=True,  # without it the package divides lr by 1 - beta1 ** step, ten times lr at first
    )
    return made


def muon(
    net: nn.Module,
    lr: float,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
) -> Optimizer:
    """Return Muon for the hidden matrices of a network, and AdamW for all other parameters.

    Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
    orthogonal one, approximately: five Newton-Schulz steps bring its singular values near 1. The numbers are those
    of Liu et al. (2025, arXiv 2502.16982). With their factor 0.2 sqrt(max(rows, columns)) an update is as large as
    one of AdamW, so that both take the same learning rate and decay.

    Hidden matrices are the weights of linear layers, convolutions and attention, but for the last one of the
    network and, where there is no embedding, the first one. The order is that of registration. Kernels of
    convolutions are taken as matrices (out, in * size), and stacked queries, keys and values as one matrix.

    Args:
        net: The network.
        lr: Learning rate of both, as one would choose it for AdamW.
        momentum: Of Muon, with Nesterov's correction.
        betas: Of AdamW.
        weight_decay: Of both, decoupled.

    Raises:
        RecipeError: pytorch-optimizer is not installed, `net` is no network, or it has complex weights or no
            hidden matrix.
    """
    optimizers = _pytorch_optimizer("muon")
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    names = _hidden_matrices(_checked(net, "muon"))
    for name, parameter in net.named_parameters():
        if parameter.is_complex():
            raise RecipeError(
                f"optimizer=muon orthogonalises real matrices, and {name} is complex; choose "
                "optimizer=lars|lamb|adamw"
            )
        (hidden if name in names else others).append(parameter)
    if not hidden:
        raise RecipeError(
            "optimizer=muon finds no matrix between the first and the last layer of the network; choose "
            "optimizer=adamw, or a deeper network"
        )
    groups = [{"params": hidden, "use_muon": True}, {"params": others, "use_muon": False}]
    made: Optimizer = optimizers.Muon(
        [group for group in groups if group["params"]],
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        use_adjusted_lr=True,
        adamw_lr=lr,
        adamw_betas=tuple(betas),
        adamw_wd=weight_decay,
        adamw_eps=1e-8,
    )
    return made


def adamw_layer_decay(
    net: nn.Module,
    lr: float,
    layer_decay: float = 0.75,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.05,
) -> Optimizer:
    """Return AdamW whose learning rates decay from the output to the input: lr * layer_decay ** (n - depth).

    The rule for fine-tuning transformers (Clark et al., ELECTRA, ICLR 2020; Bao et al., BEiT, ICLR 2022), by
    timm's `param_groups_layer_decay` with its defaults. Depth is 0 at the input and n at the output. timm's
    networks tell it themselves, by `group_matcher`. In others each block, such as a transformer's layer, is a
    level of depth, and so is what is registered before, between and after blocks. The network must register its
    layers in the order in which it uses them.

    Biases and other vectors get no weight decay, and neither do the parameters that the network names in
    `no_weight_decay`.

    Args:
        net: The network.
        lr: Learning rate of the output layer.
        layer_decay: Factor from one level of depth to the one before.
        betas: Of AdamW.
        weight_decay: Of AdamW.

    Raises:
        RecipeError: timm is not installed, `net` is no network, or it has no blocks to tell the depth by.
    """
    try:
        from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
    except ImportError as error:
        raise _missing("adamw_layer_decay", error) from error
    without_decay: Collection[str] = getattr(_checked(net, "adamw_layer_decay"), "no_weight_decay", set)()
    groups = param_groups_layer_decay(
        net if hasattr(net, "group_matcher") else _with_depths(net),  # type: ignore[arg-type]
        weight_decay=weight_decay,
        no_weight_decay_list=without_decay,
        layer_decay=layer_decay,
    )
    for group in groups:
        group["lr"] = lr * group.pop("lr_scale")  # torch's optimizers and schedulers know no lr_scale
    return AdamW(groups, lr=lr, betas=tuple(betas))  # type: ignore[arg-type]


def _checked(net: Any, choice: str) -> nn.Module:
    """Return the network; refuse parameters, which do not tell the layers that they are of."""
    if isinstance(net, nn.Module):
        return net
    raise RecipeError(
        f"optimizer={choice} needs the network, got {type(net).__name__}: call "
        "recipes.optimizers.make_optimizer(optimizer, net) in place of optimizer(parameters)"
    )


def _pytorch_optimizer(choice: str) -> ModuleType:
    """Import pytorch-optimizer, which takes a second, for one choice of optimizer."""
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise _missing(choice, error) from error
    return pytorch_optimizer


def _missing(choice: str, error: ImportError) -> RecipeError:
    """Return the error for a package that is not installed, or fails when it is imported."""
    return RecipeError(cannot_import(f"optimizer={choice}", error, "pip install 'farms-tb[baselines]'"))


def _is_vector(parameter: torch.Tensor) -> bool:
    """Return whether at most one dimension is larger than 1, as in the bias (C, 1, 1) of a layer on fields."""
    return sum(size > 1 for size in parameter.shape) <= 1


def _is_shaped_vector(parameter: torch.Tensor) -> bool:
    """Return whether a vector has more than one dimension."""
    return parameter.ndim > 1 and _is_vector(parameter)


def _hidden_matrices(net: nn.Module) -> set[str]:
    """Return the names of the weights between the first and the last layer."""
    layers = [layer for layer in find_layers(net) if layer.has_rule]
    has_embedding = any(isinstance(module, nn.Embedding) for module in net.modules())
    ends = layers[-1:] if has_embedding else [*layers[:1], *layers[-1:]]
    named = dict(net.named_parameters())
    hidden: set[str] = set()
    for layer in layers:
        hidden.update(name for name in layer.parameters if not _is_vector(named[name]))
    for layer in ends:
        hidden.difference_update(layer.parameters)
    return hidden


@dataclass(frozen=True)
class _DeepNet:
    """What timm asks of a network: its parameters, and the depth of each.

    Attributes:
        net: The network.
        depths: Depth of each parameter by name.
    """

    net: nn.Module
    depths: Mapping[str, int]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the network's parameters."""
        return self.net.named_parameters()

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return the function from the name of a parameter to its depth."""
        return self.depths.__getitem__


def _with_depths(net: nn.Module) -> _DeepNet:
    """Number the blocks of a network, and what is between them, in the order in which the network registers them.

    Raises:
        RecipeError: There are no repeated blocks.
    """
    blocks = set(blocks_of({layer.name: layer.shape for layer in find_layers(net) if layer.has_rule}).values())
    if not blocks:
        raise RecipeError(
            f"optimizer=adamw_layer_decay finds no repeated blocks in {type(net).__name__} to tell the depth of "
            "layers by: choose optimizer=adamw, or give the network a method group_matcher(coarse), as timm's have"
        )
    depths: dict[str, int] = {}
    depth, before = -1, None
    for name, _ in net.named_parameters():
        block = next((path for path in blocks if name.startswith(f"{path}.")), "")
        if block != before:
            depth, before = depth + 1, block
        depths[name] = depth
    return _DeepNet(net, depths)
