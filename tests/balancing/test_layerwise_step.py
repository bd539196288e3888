"""Learning rates shown to `step` alone: whatever the optimizer does, outside `step` nothing of it is seen."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from farms_tb import TempBalance
from farms_tb.balancing import foreach_update as merged_update
from farms_tb.balancing import layerwise_step, split_groups
from farms_tb.balancing.layerwise_step import LayerwiseStep
from farms_tb.balancing.optimizer_checks import check_optimizer, stepping_optimizers
from tests.helpers import assert_same_state, make_net, spy_on_updates

RATIOS = (0.5, 1.0, 1.7)
UNTESTED = pytest.mark.filterwarnings("ignore:layer-wise learning rates are untested")


def make_params(number: int = 4, ndim: int = 2) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*[3] * ndim, generator=generator)) for _ in range(number)]


def set_grads(params: list[nn.Parameter], step: int, sparse: bool = False) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator)
        p.grad = grad.to_sparse() if sparse else grad


def attach(optimizer: Optimizer, params: list[nn.Parameter]) -> LayerwiseStep:
    stepper = LayerwiseStep(optimizer)
    stepper.ratios = {id(p): ratio for p, ratio in zip(params, RATIOS, strict=False)}
    return stepper


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    "SGD foreach": ("SGD", {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "SGD fused": ("SGD", {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "SGD tensor lr": ("SGD", {"lr": torch.tensor(0.1), "momentum": 0.9}),
    "SGD differentiable": ("SGD", {"lr": 0.1, "maximize": True}),
    "Adam": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "Adam foreach": ("Adam", {"lr": 0.01, "foreach": True}),
    "Adam for-loop": ("Adam", {"lr": 0.01, "foreach": False}),
    "Adam fused": ("Adam", {"lr": 0.01, "fused": True}),
    "Adam tensor lr": ("Adam", {"lr": torch.tensor(0.01)}),
    "Adam fused tensor lr": ("Adam", {"lr": torch.tensor(0.01), "fused": True}),
    "AdamW": ("AdamW", {"lr": 0.01}),
    "AdamW foreach": ("AdamW", {"lr": 0.01, "foreach": True}),
    "AdamW fused": ("AdamW", {"lr": 0.01, "fused": True}),
    "Adagrad": ("Adagrad", {"lr": 0.05, "lr_decay": 0.1}),
    "Adagrad foreach": ("Adagrad", {"lr": 0.05, "foreach": True}),
    "Adagrad fused": ("Adagrad", {"lr": 0.05, "fused": True}),
    "Adadelta": ("Adadelta", {"lr": 1.0}),
    "Adadelta foreach": ("Adadelta", {"lr": 1.0, "foreach": True}),
    "Adamax": ("Adamax", {"lr": 0.01}),
    "Adamax foreach": ("Adamax", {"lr": 0.01, "foreach": True}),
    "ASGD": ("ASGD", {"lr": 0.05}),
    "ASGD foreach": ("ASGD", {"lr": 0.05, "foreach": True}),
    "NAdam": ("NAdam", {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    "NAdam foreach": ("NAdam", {"lr": 0.01, "foreach": True}),
    "RAdam": ("RAdam", {"lr": 0.01}),
    "RAdam foreach": ("RAdam", {"lr": 0.01, "foreach": True}),
    "RMSprop": ("RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "RMSprop foreach": ("RMSprop", {"lr": 0.01, "foreach": True}),
    "Adafactor": ("Adafactor", {"lr": 0.01}),
    "Adafactor foreach": ("Adafactor", {"lr": 0.01, "foreach": True}),
    "Muon": ("Muon", {"lr": 0.02}),
    "SparseAdam": ("SparseAdam", {"lr": 0.01}),
}
available = {key: value for key, value in OPTIMIZERS.items() if hasattr(torch.optim, value[0])}


def build(key: str, groups: Any) -> Optimizer:
    name, options = available[key]
    options = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
    optimizer: Optimizer = getattr(torch.optim, name)(groups, **options)
    return optimizer


@pytest.mark.parametrize("key", available)
def test_equals_an_optimizer_built_with_those_groups(key: str) -> None:
    """The oracle: torch's own groups, one a ratio, with lr written by hand before every step."""
    ours, theirs = make_params(), make_params()
    optimizer = build(key, ours)
    attach(optimizer, ours)
    by_hand = build(key, [{"params": [p]} for p in theirs])
    base = by_hand.param_groups[0]["lr"]
    base = base.clone() if isinstance(base, Tensor) else base
    for step in range(4):
        lr = base * (1 - 0.2 * step)
        optimizer.param_groups[0]["lr"] = lr
        for group, ratio in zip(by_hand.param_groups, (*RATIOS, 1.0), strict=True):
            group["lr"] = lr * ratio
        for params, stepped in ((ours, optimizer), (theirs, by_hand)):
            set_grads(params, step, sparse="Sparse" in key)
            stepped.step()
    # A foreach kernel may round differently for lists of another length; the others are bitwise identical.
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7, msg=lambda m, i=index: f"parameter {i}: {m}")


@pytest.mark.parametrize("key", available)
def test_lr_of_every_update_is_lr_times_ratio(key: str) -> None:
    params = make_params()
    optimizer = build(key, params)
    attach(optimizer, params)
    with spy_on_updates(available[key][0]) as seen:
        for step in range(3):
            set_grads(params, step, sparse="Sparse" in key)
            optimizer.step()
    expected = [float(optimizer.param_groups[0]["lr"] * ratio) for ratio in (*RATIOS, 1.0)]
    assert [[lrs[id(p)] for p in params] for lrs in seen] == [expected] * 3


@pytest.mark.parametrize("key", available)
@pytest.mark.parametrize("ratios", ["none", "ones"])
def test_ratio_one_is_bit_identical(key: str, ratios: str) -> None:
    states = []
    for attached in (True, False):
        params = make_params()
        optimizer = build(key, [{"params": params[:2]}, {"params": params[2:], "name": "mine"}])
        if attached:
            stepper = LayerwiseStep(optimizer)
            stepper.ratios = {} if ratios == "none" else {id(p): 1.0 for p in params}
        for step in range(4):
            set_grads(params, step, sparse="Sparse" in key)
            optimizer.step()
        states.append({"params": params, "optimizer": optimizer.state_dict()})
    assert_same_state(*states)


@pytest.mark.parametrize("key", available)
def test_outside_step_groups_are_the_users(key: str) -> None:
    params = make_params()
    optimizer = build(key, [{"params": params[:2], "tag": "a"}, {"params": params[2:], "tag": "b"}])
    groups, copies = optimizer.param_groups, [dict(group) for group in optimizer.param_groups]
    objects = [id(group) for group in groups]
    stepper = attach(optimizer, params)
    for step in range(2):
        set_grads(params, step, sparse="Sparse" in key)
        optimizer.step()
    assert optimizer.param_groups is groups
    assert [id(group) for group in groups] == objects
    for group, copy in zip(groups, copies, strict=True):
        assert group.keys() == copy.keys()
        assert all(group[name] is copy[name] for name in copy)
    keys = build(key, make_params()).state_dict()["param_groups"][0].keys()
    assert optimizer.state_dict()["param_groups"][0].keys() == keys | {"tag"}
    stepper.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("key", available)
def test_torchs_own_write_nothing_into_their_groups(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken for granted, so that no group has to be looked at after a step."""
    monkeypatch.setattr(split_groups, "merged_update", lambda *_: None)
    params = make_params()
    optimizer = build(key, params)
    stepper = attach(optimizer, params)
    for step in range(3):
        set_grads(params, step, sparse="Sparse" in key)
        optimizer.step()
        assert [split.written_by_step() for split in stepper._kept if split is not None] == [set()]


def test_every_torch_optimizer_is_tested_or_refused() -> None:
    classes = {name for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    assert classes - {name for name, _ in OPTIMIZERS.values()} == {"LBFGS", "Optimizer", "Rprop"}


def test_tensor_lr_stays_a_tensor() -> None:
    params = make_params()
    kinds = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            kinds.extend(type(group["lr"]) for group in self.param_groups)
            return super().step(closure)

    lr = torch.tensor(0.1)
    optimizer = Recorder(params, lr=lr)
    with pytest.warns(UserWarning, match="untested with Recorder"):
        attach(optimizer, params)
    kinds.clear()  # the steps of the trial on two matrices
    set_grads(params, 0)
    optimizer.step()
    assert kinds == [Tensor] * 3
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == torch.tensor(0.1)


def test_user_sees_split_groups_in_order() -> None:
    params = make_params()
    optimizer = torch.optim.SGD([{"params": params[:3], "lr": 0.1}, {"params": params[3:], "lr": 0.2}])
    stepper = attach(optimizer, params)
    found = [
        (g.index, [id(p) for p in g.params], g.ratio, g.lr)
        for g in split_groups.split_groups(optimizer, stepper.ratios)
    ]
    a, b, c, d = map(id, params)
    assert found == [(0, [a], 0.5, 0.05), (0, [b], 1.0, 0.1), (0, [c], 1.7, 0.1 * 1.7), (1, [d], 1.0, 0.2)]


# Optimizers of one's own


class Counting(torch.optim.SGD):
    """Keeps a counter of its own in each group, as many do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["counter"] = group.get("counter", 1000) + 1
        return super().step(closure)


class CountingInPlace(torch.optim.SGD):
    """Counts in a tensor, in place, as capturable optimizers do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["counter"] = torch.zeros(())

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["counter"] += 1
        return super().step(closure)


class CountingInList(torch.optim.SGD):
    """Counts in a list, as a number and as a tensor."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["counter"] = [0, [torch.zeros(())]]

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["counter"][0] += 1
            group["counter"][1][0] += 1
        return super().step(closure)


class CountingInDict(torch.optim.SGD):
    """Counts in a dict that is empty at first."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["counter"] = {}

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["counter"]["steps"] = group["counter"].get("steps", 0) + 1
        return super().step(closure)


@UNTESTED
@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Counting, 1003),
        (CountingInPlace, 3),
        (CountingInList, [3, [torch.tensor(3.0)]]),
        (CountingInDict, {"steps": 3}),
    ],
)
def test_group_state_written_by_step_reaches_the_user(cls: Any, expected: int) -> None:
    params = make_params()
    optimizer = cls(params, lr=0.1)
    attach(optimizer, params)
    counter = optimizer.param_groups[0].get("counter")
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    assert optimizer.param_groups[0]["counter"] == expected
    if counter is not None:
        assert optimizer.param_groups[0]["counter"] is counter


class CachesItsStepSize(Optimizer):
    """Keeps the step size for parameters of one age in a list of its group, as RAdam of several packages does."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.01})
        for group in self.param_groups:
            self.prepare(group)

    def prepare(self, group: dict[str, Any]) -> None:
        group["buffer"] = [[None, None] for _ in range(10)]

    def step_size(self, group: dict[str, Any], age: int) -> float:
        cached = group["buffer"][age % 10]
        if cached[0] != age:
            cached[:] = age, group["lr"] / (1 + age)
        return float(cached[1])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["age"] = self.state[p].get("age", 0) + 1
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(self.step_size(group, self.state[p]["age"]) * p.grad)


class CachesInDict(CachesItsStepSize):
    """By name, in a dict that is empty at first."""

    def prepare(self, group: dict[str, Any]) -> None:
        group["buffer"] = {}

    def step_size(self, group: dict[str, Any], age: int) -> float:
        if group["buffer"].get("age") != age:
            group["buffer"].update(age=age, size=group["lr"] / (1 + age))
        return float(group["buffer"]["size"])


class SumsRates(CachesItsStepSize):
    """Keeps the sum of all rates in a list: it has to last from one step to the next."""

    def prepare(self, group: dict[str, Any]) -> None:
        group["sums"] = [0.0] * len(group["params"])

    def step_size(self, group: dict[str, Any], age: int) -> float:
        group["sums"][0] += group["lr"]
        return float(group["sums"][0])


class MomentumByParameter(CachesItsStepSize):
    """Keeps the momentum in a dict of the group, with the parameters as keys; it is empty at first."""

    def prepare(self, group: dict[str, Any]) -> None:
        group["momentum"] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = group["momentum"].setdefault(p, torch.zeros_like(p))
                    p.sub_(group["lr"] * momentum.mul_(0.9).add_(p.grad))


@UNTESTED
@pytest.mark.parametrize("cls", [CachesItsStepSize, CachesInDict, SumsRates, MomentumByParameter])
@pytest.mark.parametrize("ones", [True, False], ids=["some of ratio 1", "none of ratio 1"])
def test_lists_and_dicts_in_groups_are_those_of_groups_built_by_hand(cls: Any, ones: bool) -> None:
    """With ratios that change, of which two become one, and steps in which a parameter has no gradient."""
    ours, theirs = make_params(5), make_params(5)
    optimizer, by_hand = cls(ours, lr=0.1), cls([{"params": [p]} for p in theirs], lr=0.1)
    stepper = LayerwiseStep(optimizer)
    ratios = [0.5, 1.0 if ones else 0.7, 1.7, 1.3, 0.9]
    for step in range(12):
        if step == 4:
            ratios = [0.6, 1.0 if ones else 0.7, 1.1, 1.2, 0.8]
        if step == 8 and cls is not SumsRates:  # whose sum is one for a group
            ratios = [0.6, 1.0 if ones else 0.7, 0.6, 0.6, 0.8]
        stepper.ratios = {id(p): ratio for p, ratio in zip(ours, ratios, strict=True)}
        for group, ratio in zip(by_hand.param_groups, ratios, strict=True):
            group["lr"] = 0.1 * ratio
        for params, stepped in ((ours, optimizer), (theirs, by_hand)):
            set_grads(params, step)
            if step in (2, 6):
                params[3].grad = None
            stepped.step()
    assert_same_state(ours, theirs)


class ScalesByList(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.param_groups[0]["scales"] = [1.0, 1.0]
        self.seen: list[float] = []

    def step(self, closure: Any = None) -> Any:
        self.seen += [group["scales"][0] for group in self.param_groups]
        return super().step(closure)


@UNTESTED
def test_a_list_that_the_user_writes_in_place_reaches_the_step() -> None:
    params = make_params()
    optimizer = ScalesByList(params, lr=0.1)
    attach(optimizer, params)
    for step in range(5):
        set_grads(params, step)
        optimizer.param_groups[0]["scales"][0] = float(step)
        optimizer.step()
    assert optimizer.seen == [float(step) for step in range(5) for _ in range(3)]


@UNTESTED
def test_names_in_a_group_are_those_of_its_parameters() -> None:
    """Torch has them there where an optimizer is built from named parameters."""
    seen: list[tuple[list[int], list[str]]] = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.extend((list(map(id, g["params"])), g["param_names"]) for g in self.param_groups)
            return super().step(closure)

    params, names = make_params(), ["a", "b", "c", "d"]
    optimizer = Recorder(params, lr=0.1)
    optimizer.param_groups[0]["param_names"] = names
    attach(optimizer, params)
    set_grads(params, 0)
    optimizer.step()
    a, b, c, d = map(id, params)
    assert seen == [([a], ["a"]), ([b, d], ["b", "d"]), ([c], ["c"])]
    assert optimizer.param_groups[0]["param_names"] is names == ["a", "b", "c", "d"]


@UNTESTED
def test_step_that_calls_super_is_scaled_once() -> None:
    params = make_params()
    torch.optim.SGD(make_params(), lr=1.0)  # makes torch hook SGD.step itself as well
    optimizer = Counting(params, lr=0.1)
    attach(optimizer, params)
    before = [p.detach().clone() for p in params]
    set_grads(params, 0)
    optimizer.step()
    moved = [float(((b - p.detach()) / p.grad).mean()) for p, b in zip(params, before, strict=True)]
    assert moved == pytest.approx([0.05, 0.1, 0.17, 0.1], rel=1e-4)


class WritesLr(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = group["lr"] * 0.9
        return super().step(closure)


class WritesLrInPlace(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"].mul_(0.9)
        return super().step(closure)


class KeepsLrSum(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["weight_sum"] = group.get("weight_sum", 0.0) + group["lr"]
        return super().step(closure)


class AddsGroups(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        self.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
        return super().step(closure)


class ReplacesGroups(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        self.param_groups = list(self.param_groups)
        return super().step(closure)


CANNOT: list[tuple[Any, Any, str]] = [
    (WritesLr, 0.1, r"WritesLr.step\(\) wrote group\['lr'\].*lr_min_ratio=lr_max_ratio=1"),
    (WritesLrInPlace, torch.tensor(0.1), r"WritesLrInPlace.step\(\) wrote group\['lr'\]"),
    (KeepsLrSum, 0.1, r"keeps group\['weight_sum'\], which depends on the learning rate"),
    (AddsGroups, 0.1, r"added or removed param groups"),
    (ReplacesGroups, 0.1, r"replaced its param_groups"),
]


@UNTESTED
@pytest.mark.parametrize(("cls", "lr", "message"), CANNOT)
def test_optimizers_that_cannot_are_refused_at_the_step(cls: Any, lr: Any, message: str) -> None:
    params = make_params()
    optimizer = cls(params, lr=lr)
    groups = optimizer.param_groups
    attach(optimizer, params)
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert optimizer.param_groups is groups


@UNTESTED
@pytest.mark.parametrize(("cls", "lr", "message"), CANNOT)
def test_the_same_optimizers_work_while_ratios_are_one(cls: Any, lr: Any, message: str) -> None:
    params = make_params()
    optimizer = cls(params, lr=lr.clone() if isinstance(lr, Tensor) else lr)
    LayerwiseStep(optimizer)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()


class SAM(Optimizer):
    """Sharpness-aware minimization as commonly written: two evaluations, the inner optimizer moves."""

    def __init__(self, params: Any, inner: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = inner(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p.add_(p.grad, alpha=self.param_groups[0]["rho"])
        closure()
        with torch.no_grad():
            for p, old in zip(params, kept, strict=True):
                p.copy_(old)
        self.base_optimizer.step()
        return loss


class Lookahead(Optimizer):
    """Wraps an optimizer without its own __init__, as common implementations do."""

    def __init__(self, inner: Optimizer, every: int = 2) -> None:
        self.inner, self.every, self.count = inner, every, 0
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % self.every == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, s in zip(group["params"], slow, strict=True):
                    s.lerp_(p.detach(), 0.5)
                    p.data.copy_(s)
        return loss


@pytest.mark.parametrize(
    "wrap",
    [
        lambda params: SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9),
        lambda params: Lookahead(torch.optim.SGD(params, lr=0.1, momentum=0.9)),
        lambda params: Lookahead(SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9)),
    ],
    ids=["SAM", "Lookahead", "Lookahead of SAM"],
)
def test_wrappers_scale_once(wrap: Callable[[Any], Optimizer]) -> None:
    params = make_params()
    optimizer = wrap(params)
    inner = list(stepping_optimizers(optimizer))
    assert [type(o) for o in inner] == [torch.optim.SGD]
    attach(inner[0], params)

    def closure() -> Tensor:
        set_grads(params, 0)
        return torch.zeros(())

    with spy_on_updates("SGD") as seen:
        for _ in range(3):
            optimizer.step(closure)
    assert [[lrs[id(p)] for p in params] for lrs in seen] == [[0.05, 0.1, 0.1 * 1.7, 0.1]] * 3


@UNTESTED
def test_a_class_that_lists_its_subclasses_sees_none() -> None:
    listed: list[str] = []

    class Registered(torch.optim.SGD):
        def __init_subclass__(cls, *, name: str) -> None:
            assert name not in listed
            listed.append(name)

    class Mine(Registered, name="mine"):
        pass

    params = make_params()
    optimizer = Mine(params, lr=0.1)
    attach(optimizer, params)
    set_grads(params, 0)
    with spy_on_updates("SGD") as seen:
        optimizer.step()
    assert [seen[0][id(p)] for p in params] == [0.1 * ratio for ratio in (*RATIOS, 1.0)]
    assert listed == ["mine"]


# The split of a step is kept for the next


def set_lr(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["lr"] = 0.3


def set_lr_in_place(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.3)
    optimizer.step()
    optimizer.param_groups[0]["lr"].mul_(0.5)


def set_options(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0].update(momentum=0.5, weight_decay=0.1)


def change_keys(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    group = optimizer.param_groups[0]
    group["tag"] = None
    optimizer.step()
    del group["tag"]
    group["other"] = None


def add_key_that_the_step_drops(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    for value in (1, 2):
        optimizer.param_groups[0]["dropped"] = value
        optimizer.step()
        assert "dropped" not in optimizer.param_groups[0]


def set_counter(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["counter"] = 7


def replace_ratios(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    stepper.ratios = {id(p): 0.1 for p in params[1:]}


def ratios_in_place(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    assert isinstance(stepper.ratios, dict)
    stepper.ratios[id(params[1])] = 0.2


def other_order(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"].reverse()


def replace_parameter(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    params[2] = optimizer.param_groups[0]["params"][2] = nn.Parameter(torch.ones(3, 3))


def drop_parameter(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"].pop()


def add_group(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    moved = optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [moved], "lr": 0.7})


def drop_group(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    add_group(optimizer, stepper, params)
    optimizer.step()
    del optimizer.param_groups[0]


def replace_group(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.3


def all_ones_for_a_step(optimizer: Optimizer, stepper: LayerwiseStep, params: list[nn.Parameter]) -> None:
    ratios, stepper.ratios = stepper.ratios, {}
    optimizer.param_groups[0]["momentum"] = 0.5
    optimizer.step()
    stepper.ratios = ratios


EDITS = [
    set_lr,
    set_lr_in_place,
    set_options,
    change_keys,
    add_key_that_the_step_drops,
    set_counter,
    replace_ratios,
    ratios_in_place,
    other_order,
    replace_parameter,
    drop_parameter,
    add_group,
    drop_group,
    replace_group,
    all_ones_for_a_step,
]


@pytest.mark.parametrize("edit", EDITS)
def test_what_changes_between_steps_counts(edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is a stepper that splits the groups anew at every step."""
    seen: list[Any] = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append([{**group, "params": list(map(places, group["params"]))} for group in self.param_groups])
            for group in self.param_groups:
                group["counter"] = group.get("counter", 1000) + 1
                group.pop("dropped", None)
            return super().step(closure)

    Recorder.__module__ = "torch.optim.sgd"

    def places(parameter: nn.Parameter) -> int:
        return next(i for i, p in enumerate(params) if p is parameter)

    shown = []
    for keep in (True, False):
        params, seen = make_params(), []
        optimizer = Recorder(params, lr=0.1, momentum=0.9)
        stepper = attach(optimizer, params)
        if not keep:
            monkeypatch.setattr(split_groups._Split, "still_of", lambda self, group: False)
        for step in range(4):
            set_grads(params, step)
            if step == 2:
                edit(optimizer, stepper, params)
            optimizer.step()
        groups = [{**group, "params": []} for group in optimizer.param_groups]
        shown.append({"seen": seen, "params": params, "groups": groups})
    assert_same_state(*shown)


def test_unchanged_groups_are_not_split_again(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params()
    optimizer = torch.optim.RMSprop(params, lr=0.1)
    attach(optimizer, params)
    split = []
    original = split_groups._by_ratio
    monkeypatch.setattr(split_groups, "_by_ratio", lambda *args: split.append(args) or original(*args))
    for step in range(5):
        set_grads(params, step)
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()
    assert len(split) == 1


def test_tensors_of_a_group_are_scaled_within_each_step() -> None:
    """An lr that is written in place counts, and no step begins with what the one before wrote into its own."""
    params = make_params()
    lr = torch.tensor(0.1)
    optimizer = torch.optim.SGD(params, lr=lr)
    stepper = attach(optimizer, params)
    shown = []
    for step in range(2):
        set_grads(params, step)
        with spy_on_updates("SGD"):
            optimizer.step()
        shown.append([id(group["lr"]) for split in stepper._kept for group in split.shown])
    assert set(shown[0]).isdisjoint(shown[1])


# Closures, hooks and errors


@pytest.mark.parametrize("pass_by", ["position", "keyword"])
def test_closure_may_edit_groups(pass_by: str) -> None:
    params = make_params()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    attach(optimizer, params)
    group = optimizer.param_groups[0]

    def closure() -> float:
        assert optimizer.param_groups[0] is group
        group["lr"], group["momentum"] = 0.4, 0.3
        set_grads(params, 0)
        return 7.0

    with spy_on_updates("SGD") as seen:
        loss = optimizer.step(closure) if pass_by == "position" else optimizer.step(closure=closure)
    assert loss == 7.0
    assert [seen[0][id(p)] for p in params] == [0.4 * ratio for ratio in (*RATIOS, 1.0)]
    assert (group["lr"], group["momentum"]) == (0.4, 0.3)


class LooksFirst(torch.optim.SGD):
    """Holds on to the list of groups from before the closure runs."""

    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        first = groups[0]
        with torch.enable_grad():
            closure()
        self.seen = [(float(group["lr"]), len(group["params"])) for group in groups]
        assert first is groups[0]


@UNTESTED
def test_closure_after_the_groups_were_read() -> None:
    params = make_params()
    optimizer = LooksFirst(params, lr=0.1)
    attach(optimizer, params)

    def edit() -> None:
        optimizer.param_groups[0]["lr"] = 0.4

    def grow() -> None:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 3.0})

    optimizer.step(edit)
    assert optimizer.seen == [(0.2, 1), (0.4, 2), (0.4 * 1.7, 1)]
    optimizer.step(grow)
    assert optimizer.seen[-1] == (3.0, 1)
    assert len(optimizer.param_groups) == 2


def test_users_post_hook_keeps_what_it_writes() -> None:
    """Some step their scheduler in a hook: with momentum cycling it writes more than lr."""
    params = make_params()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def hook(opt: Optimizer, args: Any, kwargs: Any) -> None:
        opt.param_groups[0]["lr"] *= 0.5
        opt.param_groups[0]["momentum"] -= 0.1

    optimizer.register_step_post_hook(hook)
    attach(optimizer, params)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.7)


def test_users_pre_hook_may_edit_groups() -> None:
    params = make_params()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    attach(optimizer, params)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: opt.param_groups[0].update(lr=0.2))
    set_grads(params, 0)
    with spy_on_updates("SGD") as seen:
        optimizer.step()
    assert [seen[0][id(p)] for p in params] == [0.2 * ratio for ratio in (*RATIOS, 1.0)]


@UNTESTED
def test_step_that_raises_leaves_nothing_behind() -> None:
    params = make_params()
    optimizer = Counting(params, lr=0.1)
    stepper = attach(optimizer, params)

    def fail() -> None:
        raise KeyError("in the closure")

    set_grads(params, 0)
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(KeyError, match="in the closure"):
        optimizer.step(fail)
    assert [dict(group) for group in optimizer.param_groups] == groups
    # Neither a step with ratios of 1 nor one with others is confused by what the failed one left.
    stepper.ratios = {}
    optimizer.param_groups[0]["counter"] = 5
    optimizer.step()
    assert optimizer.param_groups[0]["counter"] == 6
    stepper.ratios = {id(p): ratio for p, ratio in zip(params, RATIOS, strict=False)}
    optimizer.step()
    assert optimizer.param_groups[0]["counter"] == 7


def test_steps_skipped_by_grad_scaler() -> None:
    params = make_params()
    optimizer = torch.optim.SGD(params, lr=0.1)
    attach(optimizer, params)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in params]
    for step in range(3):
        set_grads(params, step)
        for p in params:
            assert p.grad is not None
            p.grad *= float("inf") if step == 1 else scaler.scale(torch.tensor(1.0)).item()
        with spy_on_updates("SGD") as seen:
            scaler.step(optimizer)
        scaler.update()
        assert len(seen) == (step != 1)
        for lrs in seen:
            assert [lrs[id(p)] for p in params] == [0.1 * ratio for ratio in (*RATIOS, 1.0)]
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_checkpoints_are_interchangeable_with_plain_ones() -> None:
    params = make_params()
    optimizer = torch.optim.Adam(params, lr=0.1)
    attach(optimizer, params)
    set_grads(params, 0)
    optimizer.step()
    plain = torch.optim.Adam(make_params(), lr=0.1)
    plain.load_state_dict(optimizer.state_dict())
    assert_same_state(plain.state_dict(), optimizer.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    set_grads(params, 1)
    with spy_on_updates("Adam") as seen:
        optimizer.step()
    assert [seen[0][id(p)] for p in params] == [0.1 * ratio for ratio in (*RATIOS, 1.0)]


@pytest.mark.parametrize("ratio", [0.0, 1e-8, 1e8])
def test_extreme_ratios(ratio: float) -> None:
    params = make_params(1)
    optimizer = torch.optim.SGD(params, lr=1e-3)
    LayerwiseStep(optimizer).ratios = {id(params[0]): ratio}
    before = params[0].detach().clone()
    set_grads(params, 0)
    optimizer.step()
    assert params[0].grad is not None
    torch.testing.assert_close(params[0].detach(), before - 1e-3 * ratio * params[0].grad)


def test_optimizer_that_gets_its_parameters_later() -> None:
    optimizer = torch.optim.SGD([{"params": []}], lr=0.1)
    assert list(stepping_optimizers(optimizer)) == [optimizer]


def test_groups_that_are_empty_or_whole() -> None:
    """A group without parameters, one of a single ratio, one where nothing has a ratio."""
    params = make_params(3)
    optimizer = torch.optim.SGD([{"params": []}, {"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    LayerwiseStep(optimizer).ratios = {id(p): 0.3 for p in params[:2]}
    set_grads(params, 0)
    with spy_on_updates("SGD") as seen:
        optimizer.step()
    assert [seen[0][id(p)] for p in params] == [0.1 * 0.3, 0.1 * 0.3, 0.1]


# Compiled


def compiled_step(optimizer: Optimizer, form: str) -> Callable[[], Any]:
    step: Any = {"step": optimizer.step, "function": lambda: optimizer.step()}[form]
    compiled: Callable[[], Any] = torch.compile(step, backend="eager")
    return compiled


@pytest.mark.parametrize(
    ("key", "form", "gpu"),
    [
        ("SGD foreach", "function", False),
        ("SGD foreach", "step", True),
        ("AdamW foreach", "function", True),
        ("Adam tensor lr", "step", False),
    ],
)
def test_compiled_step_follows_the_ratios(key: str, form: str, gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is not compiled, and without compiling again once the first change has made an input of them."""
    monkeypatch.setattr(merged_update, "_on_gpu", lambda params: gpu)
    torch._dynamo.reset()
    ours, theirs = make_params(), make_params()
    optimizer, by_hand = build(key, ours), build(key, [{"params": [p]} for p in theirs])
    stepper = attach(optimizer, ours)
    base = optimizer.param_groups[0]["lr"]
    step = compiled_step(optimizer, form)
    compiled = []
    for epoch in range(5):
        ratios = [0.5 + 0.1 * epoch + 0.05 * place for place in range(len(ours))]
        stepper.ratios = {id(p): ratio for p, ratio in zip(ours, ratios, strict=True)}
        for group, ratio in zip(by_hand.param_groups, ratios, strict=True):
            group["lr"] = base * ratio
        for batch in range(2):
            for params in (ours, theirs):
                set_grads(params, 2 * epoch + batch)
            step()
            by_hand.step()
        for one, other in zip(ours, theirs, strict=True):
            # Compiled, Adam counts its steps in single precision.
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < compiled[0] <= compiled[1] == compiled[-1]


def test_compiled_training_step_follows_the_ratios() -> None:
    torch._dynamo.reset()
    nets = [make_net(), make_net()]
    inputs = torch.randn(8, 6)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in nets]
    steppers = [LayerwiseStep(optimizer) for optimizer in optimizers]

    def training_step(net: nn.Module, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        net(inputs).square().mean().backward()
        optimizer.step()

    compiled = torch.compile(training_step, backend="eager")
    for epoch in range(4):
        for net, stepper in zip(nets, steppers, strict=True):
            params = enumerate(net.parameters())
            stepper.ratios = {id(p): 0.5 + 0.1 * epoch + 0.05 * place for place, p in params}
        for _ in range(2):
            compiled(nets[0], optimizers[0])
            training_step(nets[1], optimizers[1])
        for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gpu", [False, True], ids=["", "as on a GPU"])
def test_compiled_model_is_not_compiled_again(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_update, "_on_gpu", lambda params: gpu)
    torch._dynamo.reset()
    net = make_net()
    model = torch.compile(net, backend="aot_eager")
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, foreach=True)
    stepper = LayerwiseStep(optimizer)
    inputs = torch.randn(8, 6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch in range(4):
            stepper.ratios = {id(p): 0.5 + epoch * 0.1 + place * 0.05 for place, p in enumerate(net.parameters())}
            for _ in range(2):
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                optimizer.step()


# Captured in a CUDA graph


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Say that a graph is being captured. It stands in for CUDA's answer alone: nothing is captured here."""

    def say(yes: bool) -> None:
        monkeypatch.setattr(layerwise_step, "_is_capturing", lambda: yes)

    return say


CAPTURED = (
    r"SGD.step\(\) was captured in a CUDA graph.*leave the step out of the graph.*lr_min_ratio=lr_max_ratio=1"
)


def test_captured_with_ratios_is_refused(capturing: Callable[[bool], None]) -> None:
    params = make_params()
    optimizer = torch.optim.SGD(params, lr=0.1)
    attach(optimizer, params)
    set_grads(params, 0)
    before = [p.detach().clone() for p in params]
    capturing(True)
    with pytest.raises(RuntimeError, match=CAPTURED):
        optimizer.step()
    assert_same_state([p.detach() for p in params], before)


def test_ratios_after_a_capture_are_refused(capturing: Callable[[bool], None]) -> None:
    """A graph that is run again calls no hook: nothing could tell it."""
    params = make_params()
    optimizer = torch.optim.SGD(params, lr=0.1)
    stepper = LayerwiseStep(optimizer)
    set_grads(params, 0)
    capturing(True)
    optimizer.step()
    capturing(False)
    stepper.ratios = {id(p): 1.0 for p in params}
    with pytest.raises(RuntimeError, match=CAPTURED):
        stepper.ratios = {id(params[0]): 0.5}
    assert set(stepper.ratios.values()) == {1.0}


def test_measuring_alone_goes_with_a_capture(capturing: Callable[[bool], None]) -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    balancer = TempBalance(net, optimizer, lr_min_ratio=1, lr_max_ratio=1)
    capturing(True)
    set_grads(list(net.parameters()), 0)
    optimizer.step()
    balancer.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("balanced", [True, False])
def test_real_graph(balanced: bool) -> None:
    params = [nn.Parameter(p.detach().cuda()) for p in make_params()]
    optimizer = torch.optim.AdamW(params, lr=torch.tensor(0.1, device="cuda"), capturable=True)
    stepper = attach(optimizer, params) if balanced else LayerwiseStep(optimizer)
    for p in params:
        p.grad = torch.ones_like(p)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if balanced:
        with pytest.raises(RuntimeError, match="was captured in a CUDA graph"), torch.cuda.graph(graph):
            optimizer.step()
        return
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    with pytest.raises(RuntimeError, match="was captured in a CUDA graph"):
        stepper.ratios = {id(params[0]): 0.5}


@pytest.mark.parametrize("detach", [True, False])
def test_attached_optimizer_is_freed(detach: bool) -> None:
    params = make_params()
    optimizer = torch.optim.SGD(params, lr=0.1)
    stepper = attach(optimizer, params)
    set_grads(params, 0)
    optimizer.step()
    if detach:
        stepper.detach()
    references = [weakref.ref(thing) for thing in (optimizer, stepper, *params)]
    del optimizer, stepper, params
    gc.collect()
    assert [reference() for reference in references] == [None] * 6


def test_stays_attached_when_nothing_else_holds_on_to_it() -> None:
    params = make_params(1)
    optimizer = torch.optim.SGD(params, lr=0.1)
    LayerwiseStep(optimizer).ratios = {id(params[0]): 0.5}
    gc.collect()
    set_grads(params, 0)
    with spy_on_updates("SGD") as seen:
        optimizer.step()
    assert seen == [{id(params[0]): 0.05}]
    with pytest.raises(ValueError, match="already has layer-wise learning rates"):
        LayerwiseStep(optimizer)


# Refused at the start


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS takes one step along one direction"):
        LayerwiseStep(torch.optim.LBFGS(make_params()))


@pytest.mark.parametrize("thing", [None, 0.1, nn.Linear(2, 2)])
def test_what_is_no_optimizer_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=f"need a torch.optim.Optimizer, got {type(thing).__name__}"):
        check_optimizer(thing)


def test_group_without_lr_is_refused() -> None:
    class Parameterless(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

    with pytest.raises(ValueError, match="param group 0 of Parameterless has no 'lr' to scale"):
        LayerwiseStep(Parameterless(make_params()))


def test_zero_is_refused_by_name() -> None:
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        pass

    class Mine(ZeroRedundancyOptimizer):
        pass

    for cls in (ZeroRedundancyOptimizer, Mine):
        with pytest.raises(ValueError, match="ZeroRedundancyOptimizer steps with parts of parameters"):
            LayerwiseStep(cls(make_params(), lr=0.1))


def test_second_attachment_is_refused_until_the_first_lets_go() -> None:
    optimizer = torch.optim.SGD(make_net().parameters(), lr=0.1)
    first = LayerwiseStep(optimizer)
    with pytest.raises(ValueError, match=r"already has layer-wise learning rates: use one .* detach\(\)"):
        LayerwiseStep(optimizer)
    first.detach()
    first.detach()
    LayerwiseStep(optimizer)


def test_rprop_warns() -> None:
    with pytest.warns(UserWarning, match="Rprop uses its lr for the first step alone"):
        LayerwiseStep(torch.optim.Rprop(make_params()))


def test_adafactor_warns_that_its_rate_is_capped() -> None:
    with pytest.warns(UserWarning, match=r"Adafactor steps with 1 / sqrt\(step\)"):
        LayerwiseStep(torch.optim.Adafactor(make_params()))


def test_untested_class_warns_and_names_the_check() -> None:
    with pytest.warns(UserWarning, match=r"untested with Counting: check callback.param_groups\(optimizer\)"):
        LayerwiseStep(Counting(make_params(), lr=0.1))
