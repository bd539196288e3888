"""One update of all parameters of a param group, each with a learning rate of its own.

A group that is split by ratio is several groups to torch. On a GPU each of them takes as many kernel launches as
the whole group: torch's optimizers update the tensors of a group together, by `foreach` operations. On the CPU
torch goes through the tensors one by one in Python. In SGD, Adam and AdamW the learning rate is one factor in the
update of each tensor, and `foreach` operations take a factor for each tensor. So here a group is updated as a
whole: on a GPU with as many launches as torch needs without ratios; on the CPU in chunks that fit into its caches,
which takes less time than torch's step without ratios.

The operations are torch's own, so the results are bitwise identical to those of one group for each ratio. The
exception is SGD on a GPU: torch multiplies by the learning rate and adds in one operation, and here the product is
rounded. The first step of a parameter, which creates its state, is torch's. The user's gradients are only read.

With learning rate lr_i = lr * ratio_i and gradient g (negated where `maximize` is set), the updates are those of
torch's documentation of the optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from farms_tb.balancing.optimizer_checks import Group
from farms_tb.balancing.targets import Ratio, Scale

Tensors = list[Tensor] | tuple[Tensor, ...]  # as `foreach` operations take them

# Entries of the parameters that the CPU updates at once. With gradients and state these are 1.5 MB.
_CHUNK = 2**16


def merged_update(optimizer: Optimizer, group: Group, ratios: Mapping[int, Ratio]) -> Callable[[], None] | None:
    """Return a function that makes the step of one group with the gradients of now, or None where torch has to.

    Torch has to where there is nothing to merge, on other devices, with other optimizers, with options that ask
    for another way (`fused`, `capturable`, `differentiable`, `foreach=False`), with sparse gradients, tensors
    among the options or parameters of several kinds, with ratios that scale the weight decay as well, and at the
    first step of a parameter.

    Args:
        optimizer: any optimizer.
        group: one of its param groups.
        ratios: learning-rate ratio of a parameter by its `id`; 1 where there is none.

    Returns:
        The function, which takes and returns nothing and may be called once; or None.
    """
    rule = RULES.get(type(optimizer))
    if rule is None or not _takes_foreach(group):
        return None
    params = [p for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in params]
    own = [ratios.get(id(p), 1.0) for p in params]
    lrs = [ratio for ratio in own if not isinstance(ratio, Scale)]
    if len(lrs) < len(own) or len(set(lrs)) < 2 or not _are_alike(params, grads):
        return None
    states = _states(optimizer, params, rule.states(group))
    if states is None:
        return None
    return partial(_update, rule, group, lrs, params, grads, states)


def _takes_foreach(group: Group) -> bool:
    """Return whether the options of a group ask for, or allow, `foreach` operations on plain numbers."""
    if group["differentiable"] or group.get("capturable"):
        return False
    options = (*group.values(), *group.get("betas", ()))
    if any(isinstance(value, Tensor) for value in options):
        return False
    if group["foreach"] is not None:
        return bool(group["foreach"])
    # Torch chooses by itself where neither is set.
    return group["fused"] is None


def _on_gpu(params: Tensors) -> bool:
    return params[0].is_cuda


def _are_alike(params: Tensors, grads: Tensors) -> bool:
    """Return whether one operation takes all: dense real tensors of one dtype and device, no DTensor."""
    if not all(type(p) in (Tensor, nn.Parameter) for p in params):
        return False
    kinds = {(tensor.device, tensor.dtype, tensor.layout) for tensor in (*params, *grads)}
    first = params[0]
    if len(kinds) > 1 or not first.is_floating_point() or first.layout != torch.strided:
        return False
    if _on_gpu(params):
        return True
    # In half precision the CPU's `foreach` operations round differently from those on single tensors.
    return first.is_cpu and first.dtype.itemsize >= 4


def _states(optimizer: Optimizer, params: Tensors, names: Sequence[str]) -> dict[str, list[Tensor]] | None:
    """Return a list for each name, `exp_avg` say, with the state of all parameters; None where some is missing.

    None as well where the step counters are on a GPU.
    """
    by_parameter = [optimizer.state.get(p, {}) for p in params]
    states: dict[str, list[Tensor]] = {}
    for name in names:
        values = [state.get(name) for state in by_parameter]
        if any(value is None for value in values):
            return None
        states[name] = values
    # Once Adam was compiled its step counters are on the GPU, and reading them would wait for the GPU.
    if not all(step.is_cpu for step in states.get("step", ())):
        return None
    return states


@torch.no_grad()
def _update(
    rule: Rule,
    group: Group,
    ratios: Sequence[float],
    params: Tensors,
    grads: Tensors,
    states: Mapping[str, Tensors],
) -> None:
    """Write the parameters of one group and their states, which are in the order of the rule, chunk by chunk."""
    lrs = [group["lr"] * ratio for ratio in ratios]
    for chunk in _chunks(params):
        own = grads[chunk]
        if group["maximize"]:
            own = torch._foreach_neg(own)
        rule.update(group, lrs[chunk], params[chunk], own, *(state[chunk] for state in states.values()))


def _chunks(params: Tensors) -> Iterator[slice]:
    """Yield which parameters are updated at once: on a GPU all, on the CPU as many as its caches hold."""
    if _on_gpu(params):
        yield slice(None)
        return
    begin = size = 0
    for place, parameter in enumerate(params):
        size += parameter.numel()
        if size > _CHUNK and place > begin:
            yield slice(begin, place)
            begin, size = place, parameter.numel()
    yield slice(begin, None)


def _sgd(
    group: Group,
    lrs: Sequence[float],
    params: Tensors,
    grads: Tensors,
    buffers: Tensors | None = None,
) -> None:
    """Make a step of `torch.optim.SGD`: theta_i <- theta_i - lr_i * b_i.

    With weight decay w, momentum m and dampening d: g_i <- g_i + w * theta_i, b_i <- m * b_i + (1 - d) * g_i. With
    Nesterov momentum g_i + m * b_i takes the place of b_i in the step, and without momentum g_i does.

    Args:
        group: the options.
        lrs: learning rate lr_i of each parameter.
        params: the parameters theta_i.
        grads: their gradients g_i.
        buffers: their momentum buffers b_i; None without momentum.
    """
    if group["weight_decay"] != 0:
        grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
    if buffers is not None:
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads, alpha=1 - group["dampening"])
        # Not in place: these may be the user's gradients.
        grads = torch._foreach_add(grads, buffers, alpha=group["momentum"]) if group["nesterov"] else buffers
    if _on_gpu(params):
        torch._foreach_add_(params, torch._foreach_mul(grads, [-lr for lr in lrs]))
        return
    for parameter, grad, lr in zip(params, grads, lrs, strict=True):
        parameter.add_(grad, alpha=-lr)


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
    """Make a step of `torch.optim.Adam`: theta_i <- theta_i - lr_i / (1 - beta1^t) * m_i / (sqrt(v_i') + eps).

    At step t: m_i <- beta1 * m_i + (1 - beta1) * g_i, v_i <- beta2 * v_i + (1 - beta2) * g_i^2 and
    v_i' = v_i / (1 - beta2^t). Weight decay w is g_i <- g_i + w * theta_i, decoupled (AdamW)
    theta_i <- (1 - lr_i * w) * theta_i before the step.

    Args:
        group: the options.
        lrs: learning rate lr_i of each parameter.
        params: the parameters theta_i.
        grads: their gradients g_i.
        steps: the counter t of each parameter, on the CPU.
        means: m_i.
        squares: v_i.
        maxima: with AMSGrad the largest v_i so far, which takes the place of v_i in the step; else None.
        decoupled: whether weight decay is decoupled whatever the group says.
    """
    beta1, beta2 = group["betas"]
    decay = group["weight_decay"]
    decoupled = decoupled or group.get("decoupled_weight_decay", False)
    # As a tensor: for a number, torch would create a tensor for each counter.
    torch._foreach_add_(steps, torch.tensor(1.0, device="cpu"), alpha=1.0)
    if decay != 0:
        if decoupled:
            torch._foreach_mul_(params, [1 - lr * decay for lr in lrs])
        else:
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
    """Return the names of the state that `_sgd` takes, in its order."""
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def _adam_states(group: Group) -> tuple[str, ...]:
    """Return the names of the state that `_adam` takes, in its order."""
    names = ("step", "exp_avg", "exp_avg_sq")
    return (*names, "max_exp_avg_sq") if group["amsgrad"] else names


@dataclass(frozen=True)
class Rule:
    """How one class of optimizers moves parameters.

    Attributes:
        states: names of the state that a parameter of a group has once it was stepped.
        update: takes group, learning rates, parameters, gradients and a list for each of those states.
    """

    states: Callable[[Group], tuple[str, ...]]
    update: Callable[..., None]


# By the class itself: a subclass may define another step.
RULES: dict[type[Optimizer], Rule] = {
    SGD: Rule(_sgd_states, _sgd),
    Adam: Rule(_adam_states, _adam),
    AdamW: Rule(_adam_states, partial(_adam, decoupled=True)),
}
