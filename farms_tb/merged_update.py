"""One update of all parameters of a param group, each with a learning rate of its own.

On a GPU, torch's optimizers update the tensors of a param group together by `foreach` operations, a few kernel
launches for all of them; a group split by ratio takes as many times more. In SGD, Adam and AdamW the learning rate
is one factor in the update of each tensor, and `foreach` operations take a factor for each tensor. So here a whole
group is updated by as many launches as torch would need without ratios.

The operations are torch's own, so that Adam and AdamW come to the bits of a group for each ratio. In SGD, which in
torch multiplies by the learning rate and adds at once, the product is rounded here. State is begun by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

Group = dict[str, Any]
Tensors = list[Tensor] | tuple[Tensor, ...]  # as `foreach` operations take them


def merged_update(optimizer: Optimizer, group: Group, ratios: Mapping[int, float]) -> Callable[[], None] | None:
    """Return what makes the step of one group, now that its gradients are there, or None where torch has to.

    Torch has to where there is nothing to merge, on the CPU, with other optimizers, where torch takes no `foreach`
    operations (`fused`, `capturable`, `differentiable`, `foreach=False`), with sparse gradients, tensors among the
    options or parameters of several kinds, and at the first step of a parameter.

    Args:
        optimizer: any optimizer.
        group: one of its param groups.
        ratios: learning-rate ratio of a parameter by its `id`; 1 where there is none.
    """
    rule = RULES.get(type(optimizer))
    if rule is None or not _takes_foreach(group):
        return None
    params = [p for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in params]
    own = [ratios.get(id(p), 1.0) for p in params]
    if len(set(own)) < 2 or not _are_alike(params, grads):
        return None
    by_parameter = [optimizer.state.get(p, {}) for p in params]
    states = {name: [state.get(name) for state in by_parameter] for name in rule.states(group)}
    if any(value is None for values in states.values() for value in values):
        return None
    # Once Adam was compiled its counters are on the GPU, and to read them would be to wait for it.
    if not all(step.is_cpu for step in states.get("step", ())):
        return None
    return partial(_update, rule, group, own, params, grads, states)


def _takes_foreach(group: Group) -> bool:
    options = (*group.values(), *group.get("betas", ()))
    if group["differentiable"] or group.get("capturable") or any(isinstance(value, Tensor) for value in options):
        return False
    wanted = group["fused"] is None if group["foreach"] is None else group["foreach"]
    return bool(wanted) and _on_gpu(group["params"])


def _on_gpu(params: Tensors) -> bool:
    """Tell whether `foreach` saves launches: on the CPU it is a loop, and shorter lists stay in its caches."""
    return all(p.is_cuda for p in params)


def _are_alike(params: Tensors, grads: Tensors) -> bool:
    """Tell whether one launch can do: dense real tensors of one dtype on one device, and no subclass (DTensor)."""
    if not all(type(p) in (Tensor, nn.Parameter) for p in params):
        return False
    kinds = {(tensor.device, tensor.dtype, tensor.layout) for tensor in (*params, *grads)}
    return len(kinds) == 1 and params[0].is_floating_point() and params[0].layout == torch.strided


@torch.no_grad()
def _update(
    rule: Rule,
    group: Group,
    ratios: Sequence[float],
    params: Tensors,
    grads: Tensors,
    states: Mapping[str, Tensors],
) -> None:
    if group["maximize"]:
        grads = torch._foreach_neg(grads)
    rule.update(group, [group["lr"] * ratio for ratio in ratios], params, grads, *states.values())


def _sgd(
    group: Group,
    lrs: Sequence[float],
    params: Tensors,
    grads: Tensors,
    buffers: Tensors | None = None,
) -> None:
    if group["weight_decay"] != 0:
        grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
    if buffers is not None:
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads, alpha=1 - group["dampening"])
        if group["nesterov"]:
            torch._foreach_add_(grads, buffers, alpha=group["momentum"])
        else:
            grads = buffers
    torch._foreach_add_(params, torch._foreach_mul(grads, [-lr for lr in lrs]))


def _adam(
    group: Group,
    lrs: Sequence[float],
    params: Tensors,
    grads: Tensors,
    steps: Tensors,
    means: Tensors,
    squares: Tensors,
    maxima: Tensors | None = None,
    *,
    decoupled: bool = False,
) -> None:
    beta1, beta2 = group["betas"]
    decay = group["weight_decay"]
    # A tensor, or it would be made anew for each of them.
    torch._foreach_add_(steps, torch.tensor(1.0, device="cpu"), alpha=1.0)
    if decay != 0 and (decoupled or group.get("decoupled_weight_decay")):
        torch._foreach_mul_(params, [1 - lr * decay for lr in lrs])
    elif decay != 0:
        grads = torch._foreach_add(grads, params, alpha=decay)
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    if maxima is not None:
        torch._foreach_maximum_(maxima, squares)
    counts = [step.item() for step in steps]
    roots = torch._foreach_sqrt(squares if maxima is None else maxima)
    torch._foreach_div_(roots, [(1 - beta2**count) ** 0.5 for count in counts])
    torch._foreach_add_(roots, group["eps"])
    sizes = [-lr / (1 - beta1**count) for lr, count in zip(lrs, counts, strict=True)]
    torch._foreach_addcdiv_(params, means, roots, sizes)


def _sgd_states(group: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def _adam_states(group: Group) -> tuple[str, ...]:
    return ("step", "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))


@dataclass(frozen=True)
class Rule:
    """How one class of optimizers moves parameters.

    Attributes:
        states: names of the state that a parameter of a group has once it was stepped.
        update: takes group, learning rates, parameters, gradients and a list for each of those states.
    """

    states: Callable[[Group], tuple[str, ...]]
    update: Callable[..., None]


# By the very class: a subclass may step as it likes.
RULES: dict[type[Optimizer], Rule] = {
    SGD: Rule(_sgd_states, _sgd),
    Adam: Rule(_adam_states, _adam),
    AdamW: Rule(_adam_states, partial(_adam, decoupled=True)),
}
