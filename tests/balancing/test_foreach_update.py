"""A group that is updated at once, or, as on the CPU, in chunks: mostly on the CPU, as if it were a GPU."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from farms_tb.balancing import foreach_update as merged_update
from farms_tb.balancing.layerwise_step import LayerwiseStep
from tests.helpers import assert_same_state, spy_on_updates

RATIOS = (0.5, 1.0, 1.7, 0.5, 0.123)
SHAPES = ((3, 3), (4,), (2, 3, 3), (), (5, 2))
BASE = 0.01
UPDATES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {}),
    "SGD weight decay, maximize": (SGD, {"weight_decay": 0.1, "maximize": True}),
    "SGD momentum": (SGD, {"momentum": 0.9}),
    "SGD dampening": (SGD, {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    "SGD nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "SGD nesterov, no weight decay": (SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (Adam, {}),
    "Adam weight decay, maximize": (Adam, {"weight_decay": 0.1, "maximize": True}),
    "Adam amsgrad": (Adam, {"amsgrad": True, "eps": 1e-3, "betas": (0.5, 0.7)}),
    "AdamW": (AdamW, {"weight_decay": 0.1}),
    "AdamW no decay": (AdamW, {"weight_decay": 0.0}),
    "AdamW amsgrad, maximize": (AdamW, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
}


def make_params(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def attach(optimizer: Optimizer, params: list[nn.Parameter]) -> LayerwiseStep:
    stepper = LayerwiseStep(optimizer)
    stepper.ratios = {id(p): ratio for p, ratio in zip(params, RATIOS, strict=False)}
    return stepper


def by_hand(cls: Any, params: list[nn.Parameter], **options: Any) -> Optimizer:
    groups = [{"params": [p], "lr": BASE * ratio} for p, ratio in zip(params, RATIOS, strict=True)]
    optimizer: Optimizer = cls(groups, lr=BASE, **options)
    return optimizer


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_at_groups(self: Optimizer) -> None:
        assert all("lr" in group for group in self.param_groups)

    monkeypatch.setattr(merged_update, "_on_gpu", lambda params: True)
    # Where there is a GPU, this is what Adam and AdamW begin a step with, before the closure.
    for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
        if hasattr(Optimizer, name):
            monkeypatch.setattr(Optimizer, name, look_at_groups)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the number of parameters of each merged update."""
    made: list[int] = []
    original = merged_update._update

    def noted(rule: Any, group: Any, ratios: Any, params: Any, grads: Any, states: Any) -> None:
        made.append(len(params))
        original(rule, group, ratios, params, grads, states)

    monkeypatch.setattr(merged_update, "_update", noted)
    return made


@pytest.mark.usefixtures("as_on_a_gpu")
class TestTheUpdate:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("key", UPDATES)
    def test_is_that_of_a_group_for_each_ratio(self, key: str, dtype: torch.dtype, updates: list[int]) -> None:
        cls, options = UPDATES[key]
        ours, theirs = make_params(dtype), make_params(dtype)
        optimizer: Any = cls(ours, lr=BASE, foreach=True, **options)  # type: ignore[call-arg]
        attach(optimizer, ours)
        reference = by_hand(cls, theirs, foreach=True, **options)
        for step in range(6):
            if cls is SGD:  # each step from the same place: a rounding of its own is all that it may differ by
                for one, other in zip(ours, theirs, strict=True):
                    other.data.copy_(one.detach())
                    if "momentum_buffer" in reference.state[other]:
                        reference.state[other]["momentum_buffer"].copy_(optimizer.state[one]["momentum_buffer"])
            before = [p.detach().clone() for p in ours]
            for params, stepped in ((ours, optimizer), (theirs, reference)):
                set_grads(params, step)
                stepped.step()
            for one, other, old in zip(ours, theirs, before, strict=True):
                if cls is SGD:
                    moved = (old - other).abs()
                    # The product's rounding, and where it tips it, that of the sum.
                    rounding = torch.finfo(dtype).eps * (moved + one.detach().abs())
                    assert ((one - other).abs() <= rounding).all()
                else:
                    assert torch.equal(one, other)
        # The first step begins the state, which is torch's; without momentum there is none.
        assert updates == [len(SHAPES)] * (6 if cls is SGD and "momentum" not in options else 5)
        states = [[opt.state[p] for p in ps] for opt, ps in ((optimizer, ours), (reference, theirs))]
        assert_same_state(*states)

    @pytest.mark.parametrize("cls", [SGD, Adam, AdamW])
    def test_a_ratio_more_is_no_operation_more(self, cls: Any) -> None:
        def operations(ratios: tuple[float, ...]) -> Counter[str]:
            params = make_params()
            optimizer = cls(
                params, lr=BASE, foreach=True, weight_decay=0.1, **({"momentum": 0.9} if cls is SGD else {})
            )
            LayerwiseStep(optimizer).ratios = {id(p): r for p, r in zip(params, ratios, strict=True)}
            set_grads(params, 0)
            optimizer.step()
            with CountOperations() as count:
                optimizer.step()
            return count.seen

        plain, two, five = (
            operations((1,) * 5),
            operations((1, 1, 1, 1, 0.5)),
            operations((0.1, 0.2, 0.3, 0.4, 0.5)),
        )
        assert two == five
        assert five.total() == plain.total() + (cls is SGD)

    def test_lr_is_the_schedulers_times_the_ratio(self) -> None:
        params = make_params()
        optimizer = AdamW(params, lr=BASE, foreach=True)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        attach(optimizer, params)
        with spy_on_updates("AdamW") as seen:
            for step in range(4):
                set_grads(params, step)
                optimizer.step()
                scheduler.step()
        assert [[lrs[id(p)] for p in params] for lrs in seen] == [
            [BASE * 0.5**step * ratio for ratio in RATIOS] for step in range(4)
        ]

    def test_closure_may_set_the_lr(self) -> None:
        params = make_params()
        optimizer = SGD(params, lr=BASE, foreach=True)
        attach(optimizer, params)

        def closure() -> float:
            optimizer.param_groups[0]["lr"] = 0.5
            set_grads(params, 0)
            return 7.0

        with spy_on_updates("SGD") as seen:
            assert optimizer.step(closure) == 7.0
        assert seen == [{id(p): 0.5 * ratio for p, ratio in zip(params, RATIOS, strict=True)}]

    @pytest.mark.parametrize("cls", [SGD, Adam, AdamW])
    def test_gradients_are_those_of_the_closure(self, cls: Any, updates: list[int]) -> None:
        """Lightning hands every step a closure, which makes new gradients."""
        ours, theirs = make_params(), make_params()
        optimizer = cls(ours, lr=BASE, foreach=True)
        attach(optimizer, ours)
        reference = by_hand(cls, theirs, foreach=True)
        for step in range(4):
            for params, stepped in ((ours, optimizer), (theirs, reference)):

                def closure(params: Any = params, stepped: Any = stepped, step: int = step) -> float:
                    stepped.zero_grad()
                    set_grads(params, step)
                    if step == 2:
                        params[1].grad = None
                    return 7.0

                assert stepped.step(closure) == 7.0
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if cls is SGD else 0, atol=0)
        assert updates == ([5, 5, 4, 5] if cls is SGD else [5, 4, 5])

    def test_parameters_without_gradients_and_those_that_join(self, updates: list[int]) -> None:
        ours, theirs = make_params(), make_params()
        optimizer = AdamW(ours, lr=BASE, foreach=True)
        attach(optimizer, ours)
        reference = by_hand(AdamW, theirs, foreach=True)
        for step in range(5):
            for params, stepped in ((ours, optimizer), (theirs, reference)):
                set_grads(params, step)
                if step < 3:
                    params[1].grad = None
                stepped.step()
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        # Torch begins the state of the first four at the first step, of the fifth at the fourth.
        assert updates == [4, 4, 5]

    def test_hooks_find_parameters_updated(self, updates: list[int]) -> None:
        params = make_params()
        optimizer = SGD(params, lr=BASE, foreach=True)
        found: list[Tensor] = []
        optimizer.register_step_post_hook(lambda *_: found.append(params[0].detach().clone()))
        attach(optimizer, params)
        set_grads(params, 0)
        optimizer.step()
        assert updates
        assert torch.equal(found[0], params[0])

    def test_gradients_are_free_to_go(self, updates: list[int]) -> None:
        params = make_params()
        optimizer = SGD(params, lr=BASE, foreach=True)
        attach(optimizer, params)
        set_grads(params, 0)
        grads = [weakref.ref(p.grad) for p in params]
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert updates
        assert [grad() for grad in grads] == [None] * len(params)

    def test_a_step_that_raises_moves_nothing(self, updates: list[int]) -> None:
        params = make_params()
        optimizer = SGD(params, lr=BASE, foreach=True)
        attach(optimizer, params)
        set_grads(params, 0)
        before = [p.detach().clone() for p in params]

        def fail() -> float:
            raise KeyError("in the closure")

        with pytest.raises(KeyError):
            optimizer.step(fail)
        assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
        optimizer.step()
        assert updates == [5]

    def test_groups_are_merged_one_by_one(self, updates: list[int]) -> None:
        params = make_params()
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5, "foreach": False}]
        optimizer = SGD(groups, lr=BASE, foreach=True)
        attach(optimizer, params)
        set_grads(params, 0)
        with spy_on_updates("SGD") as seen:
            optimizer.step()
        assert updates == [2]
        assert [seen[0][id(p)] for p in params] == [
            lr * ratio for lr, ratio in zip((BASE, BASE, 0.5, 0.5, 0.5), RATIOS, strict=True)
        ]


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_foreach" in str(func):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Mine(SGD):
    pass


def left_to_torch() -> dict[str, Any]:
    def sparse(params: list[nn.Parameter]) -> Optimizer:
        for p in params:
            p.grad = p.grad.to_sparse() if p.dim() else p.grad  # type: ignore[union-attr]
        return SGD(params, lr=BASE, foreach=True)

    def complex_too(params: list[nn.Parameter]) -> Optimizer:
        params[1] = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        return SGD(params, lr=BASE, foreach=True)

    def two_dtypes(params: list[nn.Parameter]) -> Optimizer:
        params[1] = nn.Parameter(torch.ones(2, dtype=torch.float64))
        return SGD(params, lr=BASE, foreach=True)

    return {
        "for-loop": lambda params: SGD(params, lr=BASE, foreach=False),
        "fused": lambda params: SGD(params, lr=BASE, fused=True),
        "tensor lr": lambda params: SGD(params, lr=torch.tensor(BASE)),
        "subclass": lambda params: Mine(params, lr=BASE, foreach=True),
        "other optimizer": lambda params: torch.optim.RMSprop(params, lr=BASE, foreach=True),
        "sparse": sparse,
        "complex": complex_too,
        "two dtypes": two_dtypes,
    }


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.filterwarnings("ignore:layer-wise learning rates are untested")
@pytest.mark.parametrize("case", left_to_torch())
def test_left_to_torch(case: str, updates: list[int]) -> None:
    params = make_params()
    set_grads(params, 0)
    optimizer = left_to_torch()[case](params)
    attach(optimizer, params)
    for p in params:
        p.grad = torch.ones_like(p) if p.grad is None else p.grad
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        optimizer.step()
    assert updates == []
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=True))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("option", [{}, {"capturable": True}, {"differentiable": True}, {"betas": torch.ones(2)}])
def test_options_of_a_group_that_torch_has_to_see_to(option: dict[str, Any]) -> None:
    params = make_params()
    optimizer = Adam(params, lr=BASE, foreach=True)
    set_grads(params, 0)
    optimizer.step()
    ratios = {id(params[0]): 0.5}
    group = {**optimizer.param_groups[0], **option}
    assert (merged_update.merged_update(optimizer, group, ratios) is None) == bool(option)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_nothing_to_merge(updates: list[int]) -> None:
    """One ratio in a group: torch's own step, bitwise."""
    states = []
    for ratio in (0.5, None):
        params = make_params()
        optimizer = SGD(params, lr=BASE if ratio else BASE * 0.5, foreach=True)
        if ratio:
            LayerwiseStep(optimizer).ratios = {id(p): ratio for p in params}
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        states.append(params)
    assert_same_state(*states)
    assert updates == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("key", UPDATES)
def test_on_the_cpu_it_is_that_of_a_group_for_each_ratio(
    key: str, foreach: bool | None, dtype: torch.dtype, updates: list[int]
) -> None:
    cls, options = UPDATES[key]
    ours, theirs = make_params(dtype), make_params(dtype)
    optimizer: Any = cls(ours, lr=BASE, foreach=foreach, **options)  # type: ignore[call-arg]
    attach(optimizer, ours)
    reference = by_hand(cls, theirs, foreach=foreach, **options)
    for step in range(6):
        for params, stepped in ((ours, optimizer), (theirs, reference)):
            set_grads(params, step)
            stepped.step()
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    merged = 6 if cls is SGD and "momentum" not in options else 5
    assert updates == [len(SHAPES)] * (0 if dtype == torch.bfloat16 else merged)
    assert_same_state(*[[opt.state[p] for p in ps] for opt, ps in ((optimizer, ours), (reference, theirs))])


@pytest.mark.parametrize(
    ("most", "chunks"),
    [(1, [[9], [4], [18], [1], [10]]), (13, [[9, 4], [18], [1, 10]]), (10**4, [[9, 4, 18, 1, 10]])],
)
def test_chunks(most: int, chunks: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is as large as its parameters together may be, or one parameter that is larger."""
    params = make_params()
    monkeypatch.setattr(merged_update, "_CHUNK", most)
    assert [[p.numel() for p in params[chunk]] for chunk in merged_update._chunks(params)] == chunks
    states = []
    for number in (most, 10**6):
        monkeypatch.setattr(merged_update, "_CHUNK", number)
        params = make_params()
        optimizer = AdamW(params, lr=BASE, maximize=True)
        attach(optimizer, params)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        states.append([*params, *optimizer.state.values()])
    assert_same_state(*states)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("key", UPDATES)
def test_on_a_gpu_it_is_that_of_a_group_for_each_ratio(key: str, updates: list[int]) -> None:
    cls, options = UPDATES[key]
    ours, theirs = make_params(device="cuda"), make_params(device="cuda")
    optimizer: Any = cls(ours, lr=BASE, **options)  # type: ignore[call-arg]
    attach(optimizer, ours)
    reference = by_hand(cls, theirs, **options)
    for step in range(6):
        for params, stepped in ((ours, optimizer), (theirs, reference)):
            set_grads(params, step)
            stepped.step()
    assert len(updates) >= 5
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if cls is SGD else 0, atol=1e-6 if cls is SGD else 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cls", [SGD, Adam, AdamW])
def test_on_a_gpu_the_launches_are_those_of_a_plain_step(cls: Any) -> None:
    def launches(ratios: tuple[float, ...]) -> int:
        params = make_params(device="cuda")
        optimizer = cls(params, lr=BASE, **({"momentum": 0.9} if cls is SGD else {}))
        LayerwiseStep(optimizer).ratios = {id(p): r for p, r in zip(params, ratios, strict=True)}
        set_grads(params, 0)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        return sum(event.count for event in profile.key_averages() if "multi_tensor_apply" in event.key)

    plain = launches((1,) * 5)
    assert 0 < launches((0.1, 0.2, 0.3, 0.4, 0.5)) <= plain + (cls is SGD)
