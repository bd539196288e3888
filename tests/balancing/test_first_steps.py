"""The rate that a parameter takes is the one that is claimed, or the run is refused before a second step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from farms_tb import TempBalance
from tests.balancing.test_layerwise_step import OPTIMIZERS, SAM, Lookahead, build
from tests.helpers import assert_same_state, make_net

pytestmark = pytest.mark.filterwarnings("ignore:layer-wise learning rates are untested")

Params = list[nn.Parameter]


def set_grads(params: Any, value: float = 0.0) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) + value


def effective_ratios(params: Params, before: list[Tensor], lr: float) -> list[float]:
    """Return by how much of lr * gradient each parameter moved; plain SGD is meant."""
    return [float(((b - p.detach()) / (lr * p.grad)).median()) for p, b in zip(params, before, strict=True)]


class Plain(Optimizer):
    """Gradient descent as people write it, for others to be derived from.

    It cannot be built from its defaults, so that the trial before the first step has no say (`test_lr_probe.py`).
    """

    def __init__(self, params: Any, rate: Any = 0.1) -> None:
        super().__init__(params, {"lr": rate})

    def move(self, params: Any, lr: float) -> None:
        with torch.no_grad():
            for p in params:
                if p.grad is not None:
                    p.sub_(lr * p.grad)

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            self.move(group["params"], group["lr"])
        return loss


class ByData(Plain):
    """Writes through `.data`, as old optimizers do, which no version counter sees."""

    def move(self, params: Any, lr: float) -> None:
        for p in params:
            if p.grad is not None:
                p.data.sub_(lr * p.grad.data)


class ByCopy(Plain):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            options = {**group}
            self.move(options["params"], options["lr"])


class ByUnpacking(Plain):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for key, value in group.items():
                if key == "lr":
                    lr = value
            self.move(group["params"], lr)


class EverySecond(Plain):
    """Accumulates: every second call of step moves nothing, and looks at nothing."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return None if self.count % 2 else super().step(closure)


class WithState(Plain):
    def move(self, params: Any, lr: float) -> None:
        with torch.no_grad():
            for p in params:
                if p.grad is not None:
                    self.state[p]["sum"] = self.state[p].get("sum", 0) + p.grad
                    p.sub_(lr * self.state[p]["sum"])


class FillsItsStateFirst(Plain):
    """Moves nothing in its first step and does not look at the rate, as SOAP does."""

    def step(self, closure: Any = None) -> Any:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all("sum" in self.state[p] for p in params):
            return super().step(closure)
        for p in params:
            self.state[p]["sum"] = p.grad.clone()
        return None


GOOD = [Plain, ByData, ByCopy, ByUnpacking, EverySecond, WithState, FillsItsStateFirst]


class PairsByIndex(Plain):
    """AdaBound's way: a list of learning rates made at the start, zipped with the groups."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.base_lrs = [group["lr"] for group in self.param_groups]

    def step(self, closure: Any = None) -> Any:
        for index, group in enumerate(self.param_groups):
            self.move(group["params"], group["lr"] * (self.base_lrs[index] / self.base_lrs[index]))


class PairsWithObjects(Plain):
    """A list of something else, which is paired all the same."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.helpers = [object() for _ in self.param_groups]

    def step(self, closure: Any = None) -> Any:
        for group, _ in zip(self.param_groups, self.helpers, strict=False):
            self.move(group["params"], group["lr"])


class PairsByData(ByData, PairsWithObjects):
    pass


class PairsWithMomentumOfItsGroup(Plain):
    """A list in the group, with a tensor for each of its parameters."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group["momentum"] = [torch.zeros_like(p) for p in group["params"]]

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p, momentum in zip(group["params"], group["momentum"], strict=False):
                if p.grad is not None and p.shape == momentum.shape:
                    p.data.sub_(group["lr"] * momentum.mul_(0.9).add_(p.grad))


class PairsWithMomentum(Plain):
    """A list of its own, with a tensor for each parameter."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.momentum: list[Any] = [torch.zeros_like(p) for group in self.param_groups for p in group["params"]]

    def tensors(self) -> list[Tensor]:
        return self.momentum

    def step(self, closure: Any = None) -> Any:
        params = [(p, group["lr"]) for group in self.param_groups for p in group["params"]]
        for (p, lr), momentum in zip(params, self.tensors(), strict=True):
            p.data.sub_(lr * momentum.mul_(0.9).add_(p.grad))


class PairsWithMomentumOfGroups(PairsWithMomentum):
    """Such a list in a list, for the one group that it is built with."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.momentum = [self.momentum]

    def tensors(self) -> list[Tensor]:
        return self.momentum[0]  # type: ignore[no-any-return]


class CachedGroups(Plain):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.mine = [(group, list(group["params"])) for group in self.param_groups]

    def step(self, closure: Any = None) -> Any:
        for group, params in self.mine:
            self.move(params, group["lr"])


class CachedGroupsByData(ByData, CachedGroups):
    pass


class CachedRates(Plain):
    """Asks for its groups, and steps with a rate of its own."""

    def __init__(self, params: Any, rate: float = 0.1) -> None:
        super().__init__(params, rate)
        self.rate = rate

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            self.move(group["params"], self.rate)


class DefaultRates(Plain):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            self.move(group["params"], self.defaults["lr"])


class RateOfTheFirst(Plain):
    def step(self, closure: Any = None) -> Any:
        lr = self.param_groups[0]["lr"]
        for group in self.param_groups:
            self.move(group["params"], lr)


class OneGroup(Plain):
    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        self.move(group["params"], group["lr"])


class KeepsItsGroups(Plain):
    """The list of its groups, from before anything was attached."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.mine = self.param_groups

    def step(self, closure: Any = None) -> Any:
        assert self.param_groups
        for group in self.mine:
            self.move(group["params"], group["lr"])


class Hidden(Plain):
    """Holds another optimizer where nobody looks."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        inner = SGD(self.param_groups, lr=lr)
        self.call = lambda: inner.step()

    def step(self, closure: Any = None) -> Any:
        self.call()


BAD = [
    PairsByIndex,
    PairsWithObjects,
    PairsByData,
    PairsWithMomentumOfItsGroup,
    CachedGroups,
    CachedGroupsByData,
    CachedRates,
    DefaultRates,
    RateOfTheFirst,
    OneGroup,
    KeepsItsGroups,
    Hidden,
]


def balanced(cls: Any, **options: Any) -> tuple[nn.Module, Any, TempBalance]:
    net = make_net()
    optimizer = cls(net.parameters())
    return net, optimizer, TempBalance(net, optimizer, **{"assign_func": "tb_linear_map", **options})


@pytest.mark.parametrize("cls", GOOD)
def test_optimizers_that_use_their_groups_go_on(cls: Any) -> None:
    net, optimizer, balancer = balanced(cls)
    claimed = list(balancer.parameter_ratios().values())
    for step in range(6):
        params = list(net.parameters())
        before = [p.detach().clone() for p in params]
        set_grads(params)
        optimizer.step()
        idle = (cls is EverySecond and step % 2 == 0) or (cls is FillsItsStateFirst and step == 0)
        if cls is not WithState and not idle:
            assert effective_ratios(params, before, 0.1) == pytest.approx(claimed, rel=1e-3)


@pytest.mark.parametrize("cls", BAD)
def test_optimizers_that_do_not_are_refused_at_the_first_step(cls: Any) -> None:
    net, optimizer, _ = balanced(cls)
    set_grads(net.parameters())
    with pytest.raises(RuntimeError, match=r"lr_min_ratio|pass all"):
        optimizer.step()


@pytest.mark.parametrize("cls", [PairsWithMomentumOfItsGroup, PairsWithMomentum, PairsWithMomentumOfGroups])
def test_momentum_in_lists_is_refused_where_layers_have_one_shape(cls: Any) -> None:
    """Every layer would move at its rate, by the momentum of another one."""
    net = nn.Sequential(*[nn.Linear(12, 12, bias=False) for _ in range(5)])
    optimizer = cls(net.parameters())
    TempBalance(net, optimizer, assign_func="tb_linear_map")
    set_grads(net.parameters())
    with pytest.raises(RuntimeError, match="pairs its parameters with a list of its own, 'momentum'"):
        optimizer.step()


@pytest.mark.parametrize("cls", [*GOOD, *BAD])
def test_measuring_alone_goes_with_all(cls: Any) -> None:
    net, optimizer, balancer = balanced(cls, lr_min_ratio=1, lr_max_ratio=1)
    set_grads(net.parameters())
    for _ in range(2):
        optimizer.step()
    balancer.step()
    assert {group.ratio for group in balancer.param_groups(optimizer)} == {1.0}


@pytest.mark.parametrize("cls", BAD)
@pytest.mark.parametrize("skip", ["no gradients", "zero lr"])
def test_refused_when_training_really_begins(cls: Any, skip: str) -> None:
    """Steps before it that move nothing do not pass for a check."""
    net, optimizer, _ = balanced(cls)
    if skip == "zero lr":
        set_grads(net.parameters())
        optimizer.param_groups[0]["lr"] = 0.0
    try:
        for _ in range(3):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        set_grads(net.parameters())
        optimizer.step()
    except RuntimeError as error:
        assert "lr_min_ratio" in str(error) or "pass all" in str(error)  # noqa: PT017
    else:
        pytest.fail("not refused")


def frozen(net: nn.Module) -> None:
    net[5].requires_grad_(False)  # type: ignore[index]
    net[5].zero_grad()  # type: ignore[index]


def no_gradient(net: nn.Module) -> None:
    net[5].zero_grad()  # type: ignore[index]


def zero_gradient(net: nn.Module) -> None:
    for p in net[5].parameters():  # type: ignore[index]
        p.grad.zero_()


def tiny_gradient(net: nn.Module) -> None:
    for p in net[5].parameters():  # type: ignore[index]
        p.data.fill_(1.0)
        p.grad.fill_(1e-12)


@pytest.mark.parametrize("cls", GOOD)
@pytest.mark.parametrize("part", [frozen, no_gradient, zero_gradient, tiny_gradient])
def test_layers_that_cannot_move_do_not_count(cls: Any, part: Callable[[nn.Module], None]) -> None:
    net, optimizer, _ = balanced(cls)
    for _ in range(4):
        set_grads(net.parameters())
        part(net)
        optimizer.step()


@pytest.mark.parametrize("cls", GOOD)
def test_steps_that_grad_scaler_skips(cls: Any) -> None:
    net, optimizer, _ = balanced(cls)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        set_grads(net.parameters(), float("inf") if step < 2 else 0.0)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()


def test_a_layer_that_joins_later_is_checked() -> None:
    """More ratios than at the first steps: the list is too short from then on."""
    net = make_net()
    optimizer = PairsWithObjects([{"params": [p]} for p in net.parameters()])
    TempBalance(net, optimizer, assign_func="tb_linear_map")
    set_grads(net.parameters())
    for _ in range(3):
        optimizer.step()
    merged = PairsWithObjects(net.parameters())
    with pytest.raises(RuntimeError, match="another optimizer"):
        merged.step()


def test_checks_end_after_the_first_steps() -> None:
    """No norm of the parameters is taken any more, and the groups are plain dicts."""
    kinds: list[set[type]] = []

    class Recorder(Plain):
        def step(self, closure: Any = None) -> Any:
            kinds.append({type(group) for group in self.param_groups})
            return super().step(closure)

    net, optimizer, _ = balanced(Recorder)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        norms = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.norms += "norm" in str(func)
            return func(*args, **(kwargs or {}))

    norms = []
    for _ in range(4):
        set_grads(net.parameters())
        with Watch() as watch:
            optimizer.step()
        norms.append(watch.norms)
    assert norms[0] > 0
    assert norms[1:] == [0, 0, 0]
    assert kinds[1:] == [{dict}] * 3


# Several optimizers in one


class Several(Optimizer):
    """Muon and AdamW in one object, say: each has its part of the parameters."""

    def __init__(self, holder: Callable[..., Any], *inner: Optimizer) -> None:
        self.inner = holder(inner)
        super().__init__([p for o in inner for g in o.param_groups for p in g["params"]], {"lr": 0.1})
        self.param_groups = [g for o in inner for g in o.param_groups]

    def step(self, closure: Any = None) -> Any:
        for optimizer in flat(self.inner):
            optimizer.step()


def flat(held: Any) -> Iterator[Optimizer]:
    for value in held.values() if isinstance(held, dict) else held:
        if isinstance(value, Optimizer):
            yield value
        else:
            yield from flat(value)


HOLDERS: dict[str, Callable[..., Any]] = {
    "list": list,
    "tuple": tuple,
    "dict": lambda inner: dict(enumerate(inner)),
    "dict of lists": lambda inner: {"all": list(inner)},
    "list of dicts": lambda inner: [{"optimizer": one} for one in inner],
    "twice the same": lambda inner: {"all": inner, "first": inner[:0]},
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_optimizers_in_lists_and_dicts_are_found(holder: str) -> None:
    net = make_net()
    params = list(net.parameters())
    optimizer = Several(HOLDERS[holder], SGD(params[:4], lr=0.1), SGD(params[4:], lr=0.1))
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    before = [p.detach().clone() for p in params]
    set_grads(params)
    optimizer.step()
    claimed = list(balancer.parameter_ratios().values())
    assert effective_ratios(params, before, 0.1) == pytest.approx(claimed, rel=1e-3)
    assert [group.group for group in balancer.param_groups(optimizer)].count(0) > 1


def assert_moves_as_claimed(net: nn.Module, optimizer: Optimizer) -> None:
    """Balance a step without momentum at a rate of 0.1: each weight moves by its ratio, and ratios differ."""
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    params = list(net.parameters())
    before = [p.detach().clone() for p in params]
    set_grads(params)
    optimizer.step()
    claimed = list(balancer.parameter_ratios().values())
    assert effective_ratios(params, before, 0.1) == pytest.approx(claimed, rel=1e-3)
    assert {0.5, 1.5} <= set(claimed)


class WithoutInit(Optimizer):
    """Never calls the constructor of its base class, and shows the groups of those that it holds."""

    def __init__(self, *inner: Optimizer) -> None:
        self.inner = list(inner)

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return [group for optimizer in self.inner for group in optimizer.param_groups]

    def step(self, closure: Any = None) -> Any:
        for optimizer in self.inner:
            optimizer.step()


def test_a_wrapper_needs_no_constructor_of_its_base_class() -> None:
    net = make_net()
    optimizer = WithoutInit(SGD(net.parameters(), lr=0.1))
    assert_moves_as_claimed(net, optimizer)


def test_an_optimizer_that_refers_to_its_wrapper_ends() -> None:
    net = make_net()
    inner = SGD(net.parameters(), lr=0.1)
    outer = Lookahead(inner)
    inner.outer = outer  # type: ignore[attr-defined]
    balancer = TempBalance(net, outer, assign_func="tb_linear_map")
    assert len(balancer.param_groups(outer)) > 1


@pytest.mark.parametrize("wrap", [Lookahead, lambda inner: Lookahead(Lookahead(inner))])
def test_wrappers_that_are_not_given_are_right(wrap: Callable[[Optimizer], Optimizer]) -> None:
    """The wrapped optimizer is balanced, the wrapper steps it: nothing to refuse."""
    net = make_net()
    inner = SGD(net.parameters(), lr=0.1)
    outer = wrap(inner)
    TempBalance(net, inner, assign_func="tb_linear_map")
    for _ in range(3):
        set_grads(net.parameters())
        outer.step()


def test_sam_without_lists() -> None:
    net = make_net()
    optimizer = SAM(net.parameters(), SGD, lr=0.1)
    TempBalance(net, optimizer, assign_func="tb_linear_map")
    for _ in range(2):
        optimizer.step(lambda: set_grads(net.parameters()))


# Steps that were replaced on the instance


def replaced(optimizer: Optimizer) -> Callable[..., Any]:
    @torch.no_grad()
    def step(closure: Any = None) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)

    return step


@pytest.mark.parametrize("method", [True, False])
def test_a_replaced_step_is_refused(method: bool) -> None:
    net = make_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    step = replaced(optimizer)
    optimizer.step = MethodType(lambda self: step(), optimizer) if method else step  # type: ignore[method-assign]
    own = optimizer.step
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    set_grads(net.parameters())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="replaced on the instance"):
            optimizer.step()
    balancer.detach()
    optimizer.step()
    assert optimizer.step == own


def test_a_step_that_is_wrapped_works() -> None:
    """Profilers wrap a step like this, and schedulers wrap it once more."""
    net = make_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    original, calls = optimizer.step, []
    optimizer.step = MethodType(lambda self: (calls.append(1), original())[1], optimizer)  # type: ignore[method-assign]
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    lr = 0.1
    for _ in range(3):
        params = list(net.parameters())
        before = [p.detach().clone() for p in params]
        set_grads(params)
        optimizer.step()
        claimed = list(balancer.parameter_ratios().values())
        assert effective_ratios(params, before, lr) == pytest.approx(claimed, rel=1e-3)
        scheduler.step()
        lr *= 0.5
    assert len(calls) == 3


def test_a_hook_that_takes_the_ratios_away_is_refused() -> None:
    """What a pre-hook returns are the arguments of the step, the optimizer with the ratios among them."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    # Before the balancer: it hands its own on.
    optimizer.register_step_pre_hook(lambda own, args, kwargs: ((optimizer, *args[1:]), kwargs))
    TempBalance(net, optimizer, assign_func="tb_linear_map")
    set_grads(net.parameters())
    optimizer.step()
    hands_on = optimizer.register_step_pre_hook(lambda own, args, kwargs: (args, kwargs))
    optimizer.step()
    hands_on.remove()
    optimizer.register_step_pre_hook(lambda own, args, kwargs: ((own, *args[1:]), kwargs))
    with pytest.raises(RuntimeError, match=r"pre-hook of this SGD.*args\[0\]"):
        optimizer.step()


def test_a_step_that_was_assigned_to_the_class_works() -> None:
    """As packages do that speed up torch's optimizers."""

    class Patched(SGD):
        pass

    net = make_net()
    optimizer = Patched(net.parameters(), lr=0.1)
    Patched.step = Plain.__dict__["step"]  # type: ignore[method-assign]
    Patched.move = Plain.move  # type: ignore[attr-defined]
    assert_moves_as_claimed(net, optimizer)


# An optimizer that is exchanged


@pytest.mark.parametrize("cls", [SGD, Adam, Plain, ByData])
def test_an_exchanged_optimizer_is_refused(cls: Any) -> None:
    net = make_net()
    balancer = TempBalance(net, SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map")
    new = cls(net.parameters(), 0.1)
    set_grads(net.parameters())
    with pytest.raises(RuntimeError, match=r"exchange of the optimizer, detach\(\)"):
        new.step()
    balancer.detach()
    TempBalance(net, new, assign_func="tb_linear_map")
    new.step()


def test_optimizers_of_other_models_are_left_alone() -> None:
    net, other = make_net(), make_net(seed=1)
    one = SGD(net.parameters(), lr=0.1)
    two = SGD(other.parameters(), lr=0.1)
    TempBalance(net, one, assign_func="tb_linear_map")
    for _ in range(2):
        for params, optimizer in ((net.parameters(), one), (other.parameters(), two)):
            set_grads(params)
            optimizer.step()


def test_a_copied_optimizer_is_not_balanced_and_steps() -> None:
    net = make_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    TempBalance(net, optimizer, assign_func="tb_linear_map")
    both = copy.deepcopy({"net": net, "optimizer": optimizer})
    set_grads(both["net"].parameters())
    both["optimizer"].step()  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["replaced", "by hand"])
def test_training_that_no_hook_sees_is_said_at_the_next_measurement(how: str) -> None:
    net = make_net()
    optimizer = SGD(net.parameters(), lr=0.1)
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    step = replaced(optimizer)
    if how == "replaced":
        optimizer.step = step  # type: ignore[method-assign]
    set_grads(net.parameters())
    (optimizer.step if how == "replaced" else step)()
    with pytest.warns(UserWarning, match="trained since the last measurement, but not by SGD"):
        balancer.step()


def test_weights_that_are_loaded_are_no_training() -> None:
    net = make_net()
    balancer = TempBalance(net, SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map")
    net.load_state_dict(make_net(seed=1).state_dict())
    balancer.step()


# Gradients


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("way", [{}, {"foreach": False}, {"fused": True}], ids=str)
def test_sgd_leaves_gradients_as_they_were(
    nesterov: bool, weight_decay: float, maximize: bool, way: dict[str, Any]
) -> None:
    net = make_net()
    optimizer = SGD(
        net.parameters(),
        lr=0.1,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=weight_decay,
        maximize=maximize,
        **way,
    )
    TempBalance(net, optimizer, assign_func="tb_linear_map")
    check_gradients(net, optimizer)


@pytest.mark.parametrize(
    "key", [key for key in OPTIMIZERS if "Sparse" not in key and hasattr(torch.optim, key.split()[0])]
)
def test_no_step_changes_gradients_that_torchs_leaves(key: str) -> None:
    """Some of torch's own variants use gradients as memory for results: with ratios they may do so, too."""
    changed = []
    for attached in (True, False):
        net = nn.Sequential(*[nn.Linear(12, 12, bias=False) for _ in range(5)])
        optimizer = build(key, list(net.parameters()))
        if attached:
            TempBalance(net, optimizer, assign_func="tb_linear_map")
        found = set()
        for _ in range(3):
            set_grads(net.parameters())
            before = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
            optimizer.step()
            found |= {not torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True)}  # type: ignore[arg-type]
        changed.append(True in found)
    assert changed[0] <= changed[1]


def check_gradients(net: nn.Module, optimizer: Optimizer) -> None:
    for _ in range(3):
        set_grads(net.parameters())
        before = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
        optimizer.step()
        assert_same_state([p.grad for p in net.parameters()], before)


# Measuring only


class NoRates(Optimizer):
    """Its groups have no learning rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


class NoInit(Optimizer):
    """Never calls the constructor of its base class."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params), "lr": 0.1}]
        self.defaults = {}


REFUSED: dict[str, tuple[Callable[[Any], Optimizer], str]] = {
    "LBFGS": (torch.optim.LBFGS, "LBFGS takes one step"),
    "lr None": (lambda params: Plain(params, None), "lr=None"),
    "lr of a wrong type": (lambda params: Plain(params, "fast"), "number as its lr"),
    "no lr": (NoRates, "no 'lr'"),
    "no constructor": (NoInit, "Optimizer.__init__"),
    "ZeRO": (
        lambda params: type("ZeroRedundancyOptimizer", (Plain,), {})(params),
        "ZeroRedundancyOptimizer steps with parts",
    ),
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused_to_balance_but_measured(key: str) -> None:
    make, message = REFUSED[key]
    net = make_net()
    optimizer = make(net.parameters())
    with pytest.raises(ValueError, match=message) as caught:
        TempBalance(net, optimizer, assign_func="tb_linear_map")
    assert type(optimizer).__name__ in str(caught.value)
    balancer = TempBalance(net, optimizer, lr_min_ratio=1, lr_max_ratio=1)
    balancer.step()
    (group,) = balancer.param_groups(optimizer)
    assert group.ratio == 1
    assert group.lr in (None, 0.1, 1.0) or key == "lr of a wrong type"


def test_transformers_adafactor_chooses_its_own_rate() -> None:
    optimization = pytest.importorskip("transformers.optimization")
    net = make_net()
    optimizer = optimization.Adafactor(net.parameters())
    with pytest.raises(ValueError, match=r"Adafactor has lr=None.*relative_step=False"):
        TempBalance(net, optimizer, assign_func="tb_linear_map")
    TempBalance(net, optimizer, lr_min_ratio=1, lr_max_ratio=1).step()
    set_grads(net.parameters())
    optimizer.step()
    net = make_net()
    TempBalance(
        net,
        optimization.Adafactor(net.parameters(), lr=1e-3, relative_step=False, scale_parameter=False),
        assign_func="tb_linear_map",
    )


@pytest.mark.parametrize("assign_func", ["tb_sqrt", "tb_log2", "tb_sigmoid", "tb_step"])
def test_bounds_of_one_turn_every_map_off(assign_func: Any) -> None:
    net = make_net()
    optimizer = torch.optim.LBFGS(net.parameters())
    balancer = TempBalance(net, optimizer, assign_func=assign_func, lr_min_ratio=1, lr_max_ratio=1)
    optimizer.step(lambda: sum(p.square().sum() for p in net.parameters()))
    assert set(balancer.ratios.values()) == {1.0}
    assert not optimizer._optimizer_step_pre_hooks
