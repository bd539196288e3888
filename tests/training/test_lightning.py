"""The callback inside a real Trainer: exact learning rates with everything a Trainer can do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as sched

import farms_tb
from farms_tb import FARMSTempBalance, analyze, lr_ratios
from tests.helpers import (
    BATCH_SIZE,
    BATCHES,
    EPOCHS,
    LIGHTNING_NOISE,
    Module,
    Probe,
    Recorder,
    assert_same_state,
    assert_same_weights,
    fit,
    make_data,
    make_net,
    make_trainer,
    spy_on_updates,
)

pytestmark = LIGHTNING_NOISE

STEPS = EPOCHS * BATCHES


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finders write checkpoints where they run."""
    monkeypatch.chdir(tmp_path)


class Custom(sched.LRScheduler):
    """Sets lr from the lr before, group by group, as user-written schedulers do."""

    def get_lr(self) -> list[Any]:
        if self.last_epoch == 0:
            return [group["lr"] for group in self.optimizer.param_groups]
        return [group["lr"] * 0.8 + 0.001 for group in self.optimizer.param_groups]


def has_momentum(optimizer: Optimizer) -> bool:
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda o: None,
    "LambdaLR": lambda o: sched.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda o: sched.MultiplicativeLR(o, lambda epoch: 0.7),
    "StepLR": lambda o: sched.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: sched.MultiStepLR(o, [1, 2], gamma=0.5),
    "ConstantLR": lambda o: sched.ConstantLR(o, 0.3, total_iters=3),
    "LinearLR": lambda o: sched.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: sched.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: sched.PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: sched.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: sched.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "CyclicLR": lambda o: sched.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=has_momentum(o)),
    "OneCycleLR": lambda o: sched.OneCycleLR(o, 0.1, total_steps=STEPS + 1, cycle_momentum=has_momentum(o)),
    "ReduceLROnPlateau": lambda o: sched.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SequentialLR": lambda o: sched.SequentialLR(
        o, [sched.LinearLR(o, 0.1, total_iters=2), sched.CosineAnnealingLR(o, T_max=4)], milestones=[2]
    ),
    "nested": lambda o: sched.ChainedScheduler([SCHEDULERS["SequentialLR"](o), sched.StepLR(o, 5)], optimizer=o),
    "ChainedScheduler": lambda o: sched.ChainedScheduler(
        [sched.ConstantLR(o, 0.5, total_iters=2), sched.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "custom": Custom,
}

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "SGD foreach": ("SGD", {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "SGD fused": ("SGD", {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "Adam": ("Adam", {"lr": 0.1}),
    "Adam tensor lr": ("Adam", {"lr": torch.tensor(0.1)}),
    "Adam fused tensor lr": ("Adam", {"lr": torch.tensor(0.1), "fused": True}),
    "AdamW": ("AdamW", {"lr": 0.1, "amsgrad": True}),
    "AdamW fused": ("AdamW", {"lr": 0.1, "fused": True}),
    "Adagrad": ("Adagrad", {"lr": 0.1}),
    "Adadelta": ("Adadelta", {"lr": 0.1}),
    "Adamax": ("Adamax", {"lr": 0.1}),
    "ASGD": ("ASGD", {"lr": 0.1}),
    "NAdam": ("NAdam", {"lr": 0.1}),
    "RAdam": ("RAdam", {"lr": 0.1}),
    "RMSprop": ("RMSprop", {"lr": 0.1, "momentum": 0.9}),
    "Adafactor": ("Adafactor", {"lr": 0.1}),
    "Muon": ("Muon", {"lr": 0.1, "momentum": 0.9}),
}
OPTIMIZERS = {key: value for key, value in OPTIMIZERS.items() if hasattr(torch.optim, value[0])}


def module_for(optimizer: str, scheduler: str, interval: str = "step") -> Module:
    name, options = OPTIMIZERS[optimizer]

    def make(params: Any) -> Optimizer:
        copied = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
        # Two groups: schedulers keep a list of one entry each.
        params = list(params)
        made: Optimizer = getattr(torch.optim, name)([{"params": params[:3]}, {"params": params[3:]}], **copied)
        return made

    make_scheduler = None if scheduler == "none" else SCHEDULERS[scheduler]
    return Module(make, make_scheduler, interval, net=make_net(bias=name != "Muon"))


def run(module: Module, callbacks: list[Any], name: str) -> list[list[float]]:
    """Return the lr of each parameter at each step, as the update functions got it."""
    with spy_on_updates(name) as seen:
        fit(module, callbacks)
    assert len(seen) == STEPS
    return [[lrs[id(p)] for p in module.parameters()] for lrs in seen]


PAIRS = [(o, s) for o in OPTIMIZERS for s in SCHEDULERS]


# SequentialLR of torch 2.6 uses what torch 2.6 deprecates.
@pytest.mark.filterwarnings(r"ignore:The epoch parameter in `scheduler.step\(\)` was not necessary")
@pytest.mark.parametrize(("optimizer", "scheduler"), PAIRS)
def test_effective_lr_is_that_of_the_plain_run_times_ratio(optimizer: str, scheduler: str) -> None:
    name = OPTIMIZERS[optimizer][0]
    interval = "epoch" if scheduler == "ReduceLROnPlateau" else "step"
    plain = run(module_for(optimizer, scheduler, interval), [], name)
    balance = FARMSTempBalance(assign_func="tb_linear_map")
    module = module_for(optimizer, scheduler, interval)
    probe = Probe(balance)
    balanced = run(module, [balance, probe], name)
    steps = zip(probe.ratios, probe.kinds, plain, balanced, strict=True)
    for step, (ratios, kinds, before, now) in enumerate(steps):
        ratio = [ratios[id(p)] for p in module.parameters()]
        assert len(set(ratio)) >= 3, "nothing is balanced: the test shows nothing"
        # ReduceLROnPlateau of torch 2.6 puts a float where a tensor was.
        tensor_lr = kinds == {Tensor}
        assert tensor_lr or (kinds == {float} and ("tensor" not in optimizer or "Plateau" in scheduler))
        expected = [
            float(torch.tensor(lr) * r) if tensor_lr else lr * r for lr, r in zip(before, ratio, strict=True)
        ]
        assert now == expected, f"step {step}"
    # What schedulers, monitors and the user see is the plain run's.
    assert [[lrs[id(p)] for p in module.parameters()] for lrs in probe.lrs] == plain


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ratio_one_is_bitwise_identical_to_no_callback(optimizer: str) -> None:
    scheduler = "OneCycleLR" if OPTIMIZERS[optimizer][0] in ("SGD", "RMSprop", "AdamW") else "CosineAnnealingLR"
    plain, measured = module_for(optimizer, scheduler), module_for(optimizer, scheduler)
    expected = fit(plain)
    actual = fit(measured, [FARMSTempBalance(lr_min_ratio=1.0, lr_max_ratio=1.0)])
    assert_same_weights(measured, plain)
    assert_same_state(actual.optimizers[0].state_dict(), expected.optimizers[0].state_dict())
    assert_same_state(
        actual.lr_scheduler_configs[0].scheduler.state_dict(),
        expected.lr_scheduler_configs[0].scheduler.state_dict(),
    )


def test_sgd_moves_the_weights_by_lr_times_ratio() -> None:
    """No spying: the ratios come from `analyze` and `lr_ratios`, the learning rates from the weights."""
    module = Module(lambda params: torch.optim.SGD(params, lr=0.1))
    moved: dict[str, list[float]] = {}
    expected: dict[str, list[float]] = {}

    class Watch(Probe):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            if batch_idx == 0:
                alphas = analyze(pl_module).alphas
                inner = {name: alphas[name] for name in list(alphas)[1:-1]}
                self.layers = dict.fromkeys(alphas, 1.0) | lr_ratios(inner)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            for name, p in pl_module.named_parameters():
                layer = {"net.3": "net.2"}.get(name.rpartition(".")[0], name.rpartition(".")[0])
                lr = ((self.before[name] - p.detach()) * p.grad).sum() / p.grad.square().sum()
                moved.setdefault(name, []).append(float(lr))
                expected.setdefault(name, []).append(0.1 * self.layers[layer])

    fit(module, [Watch(), FARMSTempBalance(assign_func="tb_linear_map")])
    assert moved.keys() == expected.keys()
    for name in moved:
        assert moved[name] == pytest.approx(expected[name], rel=2e-3), name
    assert {round(lr, 6) for lrs in expected.values() for lr in lrs} >= {0.05, 0.1, 0.15}


# What a user can look at


def test_what_is_shown_is_what_is_used() -> None:
    balance, module = FARMSTempBalance(assign_func="tb_linear_map"), module_for("SGD", "ExponentialLR")
    shown: list[dict[str, float]] = []

    class Look(Probe):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
            for given in (optimizer, pl_module.optimizers()):
                groups = balance.param_groups(given)
                shown.append({name: group.lr for group in groups for name in group.parameters})
            names = [name for group in groups for name in group.parameters]
            assert sorted(names) == sorted(name for name, _ in pl_module.named_parameters())
            ratios = balance.parameter_ratios(pl_module)
            assert all(ratios[name] == group.ratio for group in groups for name in group.parameters)
            wrapped = balance.parameter_ratios(nn.DataParallel(pl_module))
            assert wrapped == {f"module.{name}": ratio for name, ratio in ratios.items()}
            assert all(balance.ratios[layer] == g.ratio for g in groups for layer in g.layers)
            assert {layer for group in groups for layer in group.layers} == set(balance.ratios)

    with spy_on_updates("SGD") as seen:
        fit(module, [Look(), balance])
    by_name = [{name: lrs[id(p)] for name, p in module.named_parameters()} for lrs in seen]
    assert shown[::2] == shown[1::2] == by_name


def test_after_training_the_groups_are_those_of_steps_without_ratios() -> None:
    """The optimizer has none any more; what they were last is still to be read."""
    balance, module = FARMSTempBalance(assign_func="tb_linear_map"), module_for("SGD", "ExponentialLR")
    trainer = fit(module, [balance])
    (optimizer,) = trainer.optimizers
    groups = balance.param_groups(optimizer)
    assert [(group.ratio, group.lr) for group in groups] == [(1, own["lr"]) for own in optimizer.param_groups]
    assert len(set(balance.parameter_ratios(module).values())) > 2


def test_nothing_to_show_before_training() -> None:
    balance, module = FARMSTempBalance(assign_func="tb_linear_map"), Module()
    assert balance.report is None
    assert balance.ratios == {}
    with pytest.raises(RuntimeError, match=r"nothing to show before training: call trainer.fit first"):
        balance.parameter_ratios(module)
    with pytest.raises(RuntimeError, match="nothing to show before training"):
        balance.param_groups(torch.optim.SGD(module.parameters()))


def test_param_groups_of_a_strange_optimizer() -> None:
    balance, module = FARMSTempBalance(assign_func="tb_linear_map"), Module()
    fit(module, [balance])
    with pytest.raises(ValueError, match="this SGD is not one that is being balanced"):
        balance.param_groups(torch.optim.SGD(module.parameters()))


def test_report_is_of_the_final_weights() -> None:
    balance, module = FARMSTempBalance(assign_func="tb_linear_map"), Module()
    fit(module, [balance])
    assert balance.report is not None
    assert balance.report.layers == analyze(module).layers


def test_optimizer_is_given_back() -> None:
    trainer = fit(Module(), [FARMSTempBalance(assign_func="tb_linear_map")])
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_optimizer_is_given_back_after_an_error() -> None:
    class Fails(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 2:
                raise ZeroDivisionError("in training_step")
            return super().training_step(batch, batch_idx)

    balance, module = FARMSTempBalance(assign_func="tb_linear_map"), Fails()
    trainer = make_trainer([balance])
    with pytest.raises(ZeroDivisionError, match="in training_step"):
        trainer.fit(module, make_data())
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert balance.ratios["net.2"] != 1


def test_same_callback_in_two_runs() -> None:
    balance = FARMSTempBalance(assign_func="tb_linear_map")
    modules = [Module(net=make_net(seed=s)) for s in (0, 1)]
    for module in modules:
        fit(module, [balance])
    fresh = Module(net=make_net(seed=1))
    fit(fresh, [FARMSTempBalance(assign_func="tb_linear_map")])
    assert_same_weights(modules[1], fresh)


@pytest.mark.parametrize("ends", ["fails", "has nothing left to train"])
def test_a_state_that_no_training_took_is_not_that_of_the_next(tmp_path: Path, ends: str) -> None:
    class Fails(Module):
        def on_train_start(self) -> None:
            raise ZeroDivisionError("before the first step")

        def on_fit_start(self) -> None:
            raise ZeroDivisionError("before the first step")

    checkpoint = tmp_path / "last.ckpt"
    balance = FARMSTempBalance(assign_func="tb_linear_map", every_n_steps=2)
    trainer = fit(Module(), [balance])
    trainer.save_checkpoint(checkpoint)
    saved = balance.state_dict()
    if ends == "fails":
        with pytest.raises(ZeroDivisionError):
            make_trainer([balance]).fit(Fails(), make_data(), ckpt_path=checkpoint)
    else:
        again = make_trainer([balance])
        again.fit(Module(), make_data(), ckpt_path=checkpoint)
        assert balance.state_dict()["step"] == saved["step"], "it can still be saved"
    reused, fresh = (Module(net=make_net(seed=5)) for _ in range(2))
    fit(reused, [balance])
    fit(fresh, [FARMSTempBalance(assign_func="tb_linear_map", every_n_steps=2)])
    assert_same_weights(reused, fresh)


def test_another_trainer_may_validate_with_the_same_callbacks() -> None:
    balance = FARMSTempBalance(assign_func="tb_linear_map")

    def validate(trainer: Any, pl_module: Any) -> None:
        make_trainer([balance]).validate(Module(), make_data(), verbose=False)

    seen, said = effective(Module(), [balance, LambdaCallback(on_train_epoch_end=validate)])
    assert seen == said
    assert len(seen) == STEPS


# When


class Calls(Probe):
    """Record at which (epoch, global step) new reports appear."""

    def __init__(self, balance: FARMSTempBalance) -> None:
        super().__init__(balance)
        self.at: list[tuple[int, int]] = []
        self.last: Any = None

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.balance.report is not self.last:
            self.last = self.balance.report
            self.at.append((trainer.current_epoch, trainer.global_step))


@pytest.mark.parametrize(
    ("options", "trainer_options", "expected"),
    [
        ({}, {}, [(0, 0), (1, 4), (2, 8)]),
        ({"every_n_epochs": 2}, {"max_epochs": 5}, [(0, 0), (2, 8), (4, 16)]),
        ({"every_n_steps": 3}, {}, [(0, 0), (0, 3), (1, 6), (2, 9)]),
        ({"every_n_steps": 4}, {}, [(0, 0), (1, 4), (2, 8)]),
        ({"every_n_steps": 1}, {"accumulate_grad_batches": 2}, [(e, e * 2 + s) for e in range(3) for s in (0, 1)]),
        ({"every_n_steps": 5}, {"accumulate_grad_batches": 2}, [(0, 0), (2, 5)]),
        ({"every_n_steps": 100}, {}, [(0, 0)]),
    ],
)
def test_when_it_measures(options: Any, trainer_options: Any, expected: Any) -> None:
    balance = FARMSTempBalance(assign_func="tb_linear_map", **options)
    calls = Calls(balance)
    fit(Module(), [balance, calls], **trainer_options)
    assert calls.at == expected


# What a Trainer can do


def effective(module: LightningModule, callbacks: list[Any], name: str = "SGD", **options: Any) -> tuple[Any, Any]:
    """Return lrs as stepped, and what lr * ratio says, for each step and parameter."""
    balance = next(c for c in callbacks if isinstance(c, FARMSTempBalance))
    probe = Probe(balance)
    with spy_on_updates(name) as seen:
        fit(module, [*callbacks, probe], **options)
    said = [
        {key: lr * ratios[key] for key, lr in lrs.items()}
        for lrs, ratios in zip(probe.lrs, probe.ratios, strict=True)
    ]
    assert any(len(set(lrs.values())) > 2 for lrs in seen)
    return seen, [{k: v for k, v in row.items() if k in lrs} for row, lrs in zip(said, seen, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.01},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"precision": "bf16-true"},
        {"barebones": True},
        {"fast_dev_run": 2},
        {"detect_anomaly": True},
        {"overfit_batches": 2},
        {"max_steps": 5, "max_epochs": -1},
        {"max_time": "00:00:01:00"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*barebones:UserWarning", "ignore:.*overfit", "ignore:.*fast_dev_run")
@pytest.mark.filterwarnings("ignore:.*`self.log.*barebones")
def test_trainer_options(options: dict[str, Any]) -> None:
    if options.get("barebones"):
        options = {**options, "logger": None, "enable_checkpointing": None, "log_every_n_steps": None}
        options |= {"enable_progress_bar": None, "enable_model_summary": None}
    seen, said = effective(Module(), [FARMSTempBalance(assign_func="tb_linear_map")], **options)
    assert seen == said


def test_grad_scaler_skips_steps() -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Overflows(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

    balance = FARMSTempBalance(assign_func="tb_linear_map")
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    module, probe = Overflows(), Probe(balance)
    with spy_on_updates("SGD") as seen:
        fit(module, [balance, probe], plugins=[plugin])
    assert len(seen) == STEPS - EPOCHS
    assert all(p.isfinite().all() for p in module.parameters())
    kept = [i for i in range(STEPS) if i % BATCHES != 1]
    said = [{key: lr * probe.ratios[i][key] for key, lr in probe.lrs[i].items()} for i in kept]
    assert seen == said


def test_lr_edited_in_training_step() -> None:
    """The closure of `step` runs `training_step`: a warm-up written there holds for that very step."""

    class WarmsUp(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.optimizers().param_groups[0]["lr"] = 0.01 * (self.global_step + 1)
            return super().training_step(batch, batch_idx)

    balance, module = FARMSTempBalance(assign_func="tb_linear_map"), WarmsUp()
    probe = Probe(balance)
    with spy_on_updates("SGD") as seen:
        fit(module, [balance, probe])
    for step, (lrs, ratios) in enumerate(zip(seen, probe.ratios, strict=True)):
        assert lrs == {key: 0.01 * (step + 1) * ratios[key] for key in lrs}


def test_lr_edited_in_optimizer_step() -> None:
    class WarmsUp(Module):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (self.global_step + 1)
            optimizer.step(closure=closure)

    seen, said = effective(WarmsUp(), [FARMSTempBalance(assign_func="tb_linear_map")])
    assert seen == said


class TwoOptimizers(Module):
    """Manual optimization of two parts, as a GAN does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False
        self.other = make_net(seed=1)

    def configure_optimizers(self) -> Any:
        one = torch.optim.SGD(self.net.parameters(), lr=0.1)
        other = torch.optim.Adam(self.other.parameters(), lr=0.01)
        return [one, other], [sched.ExponentialLR(one, 0.9), sched.StepLR(other, 2)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, net in zip(self.optimizers(), (self.net, self.other), strict=True):
            self.toggle_optimizer(optimizer)
            loss = nn.functional.mse_loss(net(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers():
            scheduler.step()


def test_manual_optimization_with_two_optimizers() -> None:
    module, balance = TwoOptimizers(), FARMSTempBalance(assign_func="tb_linear_map")
    probe = Probe(balance)
    with spy_on_updates("SGD") as first, spy_on_updates("Adam") as second:
        fit(module, [balance, probe])
    said = [
        {key: lr * ratios[key] for key, lr in lrs.items()}
        for lrs, ratios in zip(probe.lrs, probe.ratios, strict=True)
    ]
    assert first == said[::2]
    assert second == said[1::2]
    assert {layer.split(".")[0] for layer, ratio in balance.ratios.items() if ratio != 1} == {"net", "other"}
    assert sorted(balance.ratios.values())[0] == 0.5


class AccumulatesByHand(Module):
    """One step in two batches, with manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


@pytest.mark.parametrize("make", [TwoOptimizers, AccumulatesByHand])
@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"every_n_steps": 1, "until": 0.5}, range(STEPS // 2)),
        ({"every_n_steps": 1, "start": 0.5, "until": "9 steps"}, range(9)),
        ({"measurements_per_epoch": 2}, range(0, STEPS, 2)),
        ({"every_n_steps": 5}, [0, 5, 10]),
    ],
    ids=str,
)
def test_in_manual_optimization_the_clock_counts_batches(make: Any, options: Any, batches: Any) -> None:
    balance, strengths, at = FARMSTempBalance(assign_func="tb_linear_map", **options), [], []
    module = make()

    def note(trainer: Any, pl_module: Any, *_: Any) -> None:
        if not at or at[-1][1] is not balance.report:
            at.append((trainer.fit_loop.epoch_loop._batches_that_stepped, balance.report))
        groups = balance.param_groups(trainer.optimizers[0])
        strengths.append(len({group.ratio for group in groups}) > 1)

    fit(module, [balance, LambdaCallback(on_train_batch_start=note)])
    assert [batch for batch, _ in at] == list(batches)
    assert strengths == [batch >= options.get("start", 0) * STEPS for batch in range(STEPS)]


@pytest.mark.parametrize("options", [{"start": 0.5}, {"until": 0.5}], ids=str)
def test_in_manual_optimization_max_steps_are_no_length(options: Any) -> None:
    """It counts the steps of both optimizers, so that half of it is the end of the run."""
    balance = FARMSTempBalance(assign_func="tb_linear_map", **options)
    with pytest.raises(ValueError, match="fraction of a run whose length the trainer does not know"):
        fit(TwoOptimizers(), [balance], max_steps=STEPS)


class TakesTurns(TwoOptimizers):
    """Freezes one network for the step of the other, and ends each batch so, as loops for GANs do."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=0.01) for net in (self.net, self.other)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        nets = (self.net, self.other)
        for optimizer, net in zip(self.optimizers(), nets, strict=True):
            for one in nets:
                one.requires_grad_(one is net)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
            optimizer.step()


def test_a_network_that_waits_for_its_turn_stays_balanced() -> None:
    balance = FARMSTempBalance(assign_func="tb_linear_map", exclude_first=False, exclude_last=False)
    balanced: list[set[str]] = []

    def note(*_: Any) -> None:
        balanced.append({layer.split(".")[0] for layer, ratio in balance.ratios.items() if ratio != 1})

    fit(TakesTurns(), [balance, LambdaCallback(on_train_batch_end=note)])
    assert balanced == [{"net", "other"}] * STEPS


@pytest.mark.filterwarnings("ignore:only one layer of a kind is left to balance")
def test_unfreezing_adds_groups() -> None:
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[5:9])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[5:9], optimizer, lr=0.02)

    for order in (0, 1):
        balance = FARMSTempBalance(assign_func="tb_linear_map")
        module = Module(lambda params: torch.optim.SGD([p for p in params if p.requires_grad], lr=0.1))
        callbacks = [balance, Unfreeze()] if order == 0 else [Unfreeze(), balance]
        probe = Probe(balance)
        with spy_on_updates("SGD") as seen:
            fit(module, [*callbacks, probe], max_epochs=4)
        for lrs, shown, ratios in zip(seen, probe.lrs, probe.ratios, strict=True):
            assert lrs == {key: shown[key] * ratios[key] for key in lrs}
        frozen = id(module.net[5].weight)
        assert frozen not in seen[BATCHES - 1]
        assert frozen in seen[BATCHES]
        ratios = {step: probe.ratios[step][frozen] for step in range(4 * BATCHES)}
        assert all(ratios[step] == 1 for step in range(BATCHES)), "frozen layers take no part"
        assert any(ratios[step] != 1 for step in range(BATCHES, 4 * BATCHES)), "unfrozen layers take part"


class Exchanges(LambdaCallback):
    """Gives the trainer another optimizer in the middle of the second epoch."""

    def __init__(self, make: Callable[[Any], Optimizer]) -> None:
        def exchange(trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == BATCHES + 1:
                trainer.strategy.optimizers = [make(pl_module.parameters())]

        super().__init__(on_train_batch_end=exchange)


@pytest.mark.parametrize("options", [{}, {"lag_steps": 2}, {"every_n_epochs": 9}], ids=str)
def test_an_optimizer_exchanged_during_training_is_balanced(options: dict[str, Any]) -> None:
    balance = FARMSTempBalance(assign_func="tb_linear_map", **options)
    module = Module(lambda params: torch.optim.SGD(params, lr=0.1))
    first: list[Optimizer] = []
    note = LambdaCallback(on_train_start=lambda trainer, _: first.extend(trainer.optimizers))
    exchange = Exchanges(lambda params: torch.optim.Adam(params, lr=0.02))
    with spy_on_updates("SGD") as before, spy_on_updates("Adam") as after:
        trainer = fit(module, [balance, note, exchange])
    assert (len(before), len(after)) == (BATCHES + 1, STEPS - BATCHES - 1)
    ratios = balance.parameter_ratios(module)
    assert after[-1] == {id(p): 0.02 * ratios[name] for name, p in module.named_parameters()}
    assert len(set(ratios.values())) >= 3
    assert {len(set(lrs.values())) for lrs in (*before, *after)} == {4}, "no step goes unbalanced"
    assert not any(o._optimizer_step_pre_hooks for o in (*first, *trainer.optimizers))


@pytest.mark.parametrize("options", [{}, {"lag_steps": BATCHES}, {"until": f"{BATCHES} steps"}], ids=str)
def test_layers_exchanged_with_their_optimizer_are_measured_next(options: dict[str, Any]) -> None:
    """Also where a measurement of the old ones is in the background; not after `until`."""
    balance = FARMSTempBalance(assign_func="tb_linear_map", exclude_last=False, **options)
    ratios: list[dict[str, float]] = []

    def exchange(trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == BATCHES + 1:
            pl_module.net[7] = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
            trainer.strategy.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=0.1)]

    note = LambdaCallback(
        on_train_batch_end=exchange, on_before_optimizer_step=lambda *_: ratios.append(balance.ratios)
    )
    with pytest.warns(UserWarning, match="layers were exchanged with their optimizer, measuring anew: .* are new"):
        fit(Module(), [balance, note])
    assert len(ratios) == STEPS
    new = [step["net.7.0"] for step in ratios[BATCHES + 1 :]]
    assert all(ratio == 1 for ratio in new) if "until" in options else new[-1] != 1
    if not options:
        assert new[0] != 1


def test_layers_resized_with_their_optimizer_are_measured_next() -> None:
    balance, logger = FARMSTempBalance(assign_func="tb_linear_map"), Recorder()

    def exchange(trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == BATCHES + 1:
            pl_module.net[5], pl_module.net[7] = nn.Linear(16, 14), nn.Linear(14, 12)
            trainer.strategy.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=0.1)]

    message = r"layers were exchanged with their optimizer, measuring anew: layer net.5 had shape \(1, 16, 12\)"
    with pytest.warns(UserWarning, match=message):
        fit(Module(), [balance, LambdaCallback(on_train_batch_end=exchange)], logger=logger)
    steps = [step for step, row in logger.rows if "farms/alpha_mean" in row]
    assert steps == [0, BATCHES, BATCHES + 1, 2 * BATCHES, STEPS]


def test_an_optimizer_that_cannot_be_balanced_is_refused_when_it_comes() -> None:
    balance = FARMSTempBalance(assign_func="tb_linear_map")
    with pytest.raises(ValueError, match="LBFGS"):
        fit(Module(lambda params: torch.optim.SGD(params, lr=0.1)), [balance, Exchanges(torch.optim.LBFGS)])


def test_frozen_layer_takes_no_part() -> None:
    module, balance = Module(), FARMSTempBalance(assign_func="tb_linear_map")
    module.net[5].requires_grad_(False)
    fit(module, [balance])
    assert balance.ratios["net.5"] == 1
    assert sorted(balance.ratios.values()) == [0.5, 1, 1, 1, 1.5]
    assert balance.report is not None
    assert balance.report.layers["net.5"].alpha is not None


def test_tied_weight_belongs_to_its_first_owner() -> None:
    module, balance = (
        Module(),
        FARMSTempBalance(exclude_first=False, exclude_last=False, assign_func="tb_linear_map"),
    )
    extra = nn.Linear(12, 12)
    extra.weight = module.net[-3].weight
    module.extra = extra
    seen, said = effective(module, [balance])
    assert seen == said
    assert balance.report is not None
    assert balance.report.layers["extra"].status == "tied to 'net.7'"
    assert balance.parameter_ratios(module)["net.7.weight"] == balance.ratios["net.7"]


def test_lazy_layer_takes_part_once_it_has_values() -> None:
    net = make_net()
    net[2] = nn.LazyLinear(16)
    module, balance = Module(net=net), FARMSTempBalance(assign_func="tb_linear_map")
    probe = Probe(balance)
    fit(module, [balance, probe])
    ratios = [row[id(net[2].weight)] for row in probe.ratios]
    assert set(ratios[:BATCHES]) == {1.0}
    assert balance.ratios["net.2"] == ratios[-1] != 1


def test_weights_under_parametrizations() -> None:
    """Reading them for a measurement moves no power iteration; all their parts take the layer's ratio."""
    modules = []
    for callbacks in ([], [FARMSTempBalance(lr_min_ratio=1.0, lr_max_ratio=1.0)]):
        net = make_net()
        nn.utils.parametrizations.weight_norm(net[2])
        nn.utils.parametrizations.spectral_norm(net[5])
        modules.append(Module(net=net))
        fit(modules[-1], callbacks)
    assert_same_state(dict(modules[0].state_dict()), dict(modules[1].state_dict()))
    balance = FARMSTempBalance(assign_func="tb_linear_map")
    seen, said = effective(modules[0], [balance])
    assert seen == said
    by_name = balance.parameter_ratios(modules[0])
    for layer, parts in {"net.2": ("weight.original0", "weight.original1"), "net.5": ("weight.original",)}.items():
        assert balance.ratios[layer] != 1
        assert all(by_name[f"{layer}.parametrizations.{part}"] == balance.ratios[layer] for part in parts)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("part", ["submodule", "inner", "whole"])
def test_names_inside_torch_compile(part: str) -> None:
    module = Module()
    names = [name for name, _ in module.named_parameters()]
    if part == "submodule":
        module.net = torch.compile(module.net, backend="eager")
    elif part == "inner":
        module.net[2] = torch.compile(module.net[2], backend="eager")
    trained = torch.compile(module, backend="eager") if part == "whole" else module
    balance = FARMSTempBalance(assign_func="tb_linear_map")
    make_trainer([balance]).fit(trained, make_data())
    assert not any("_orig_mod" in name for name in balance.ratios)
    ratios = balance.parameter_ratios(module)
    assert list(ratios) == [name for name, _ in module.named_parameters()]
    assert [name.replace("_orig_mod.", "") for name in ratios] == names
    assert min(ratios.values()) < 1 < max(ratios.values())
    assert {n for g in balance.param_groups(module.optimizers()) for n in g.parameters} == set(names)


def test_lr_finder_before_fit() -> None:
    module, balance = (
        Module(lambda params: torch.optim.SGD(params, lr=0.1)),
        FARMSTempBalance(assign_func="tb_linear_map"),
    )
    module.lr = 0.1
    trainer = make_trainer([balance])
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    finder = Tuner(trainer).lr_find(module, make_data(), num_training=8, update_attr=False)
    assert finder is not None
    assert len(finder.results["lr"]) == 8
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    trainer.fit(module, make_data())
    plain = Module(lambda params: torch.optim.SGD(params, lr=0.1))
    fit(plain, [FARMSTempBalance(assign_func="tb_linear_map")])
    assert_same_weights(module, plain)


class LearnsItsRate(Module):
    """With an attribute for the finders, and batches of the size they ask for."""

    def __init__(self) -> None:
        super().__init__(lambda params: torch.optim.SGD(params, lr=self.lr))
        self.lr, self.batch_size = 0.1, 2

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(make_data().dataset, batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


@pytest.mark.parametrize("first", [True, False])
def test_finders_as_callbacks(first: bool) -> None:
    balance, module = FARMSTempBalance(assign_func="tb_linear_map"), LearnsItsRate()
    finders = [BatchSizeFinder(max_trials=2, steps_per_trial=1), LearningRateFinder(num_training_steps=6)]
    probe = Probe(balance)
    trainer = make_trainer([*finders, balance, probe] if first else [balance, *finders, probe])
    with spy_on_updates("SGD") as seen:
        trainer.fit(module)
    # Lightning before 2.6 goes on with a size that it has not tried.
    assert module.batch_size in (4, 8)
    steps = len(probe.lrs)
    assert steps == EPOCHS * BATCHES * BATCH_SIZE // module.batch_size
    for lrs, shown, ratios in zip(seen[-steps:], probe.lrs, probe.ratios, strict=True):
        assert lrs == {key: shown[key] * ratios[key] for key in lrs}
    finding = seen[:-steps]
    assert finding
    assert all(len(set(lrs.values())) == 1 for lrs in finding), "the finders saw plain training"


class FindAgain(LearningRateFinder):
    """Looks for a learning rate in the middle of training, as Lightning's documentation shows."""

    def on_fit_start(self, *_: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("how", ["tuner", "callback"])
def test_a_finder_brings_no_state_of_an_earlier_run(how: str) -> None:
    options: dict[str, Any] = {"assign_func": "tb_linear_map", "every_n_steps": 100, "start": "3 steps"}
    used = FARMSTempBalance(**options)
    fit(Module(net=make_net(seed=5)), [used])
    weights = []
    for balance in (used, FARMSTempBalance(**options)):
        module = LearnsItsRate()
        finder = [LearningRateFinder(num_training_steps=4)] if how == "callback" else []
        trainer = make_trainer([balance, *finder])
        if how == "tuner":
            Tuner(trainer).lr_find(module, num_training=4)
        trainer.fit(module)
        weights.append(module)
    assert_same_weights(*weights)


@pytest.mark.filterwarnings("ignore:.*SWA", "ignore:Swapping scheduler")
def test_the_epoch_that_averaging_adds_is_no_part_of_the_run() -> None:
    """With batch norms, Lightning's averaging adds an epoch without steps: half of the run stays half of it."""
    balance = FARMSTempBalance(assign_func="tb_linear_map", start=0.5)
    balanced: list[bool] = []
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    note = LambdaCallback(
        on_before_optimizer_step=lambda *_: balanced.append(len(set(balance.ratios.values())) > 1)
    )
    fit(Module(net=nn.Sequential(*make_net(), nn.BatchNorm1d(2))), [averaging, balance, note])
    assert balanced[:STEPS] == [step >= STEPS / 2 for step in range(STEPS)]


def test_epochs_of_different_lengths_take_no_fraction() -> None:
    for options in ({"start": 0.5}, {"measurements_per_epoch": 2}):
        balance = FARMSTempBalance(assign_func="tb_linear_map", **options)
        with pytest.raises(ValueError, match=r"epochs|every_n_steps"):
            fit(Module(), [balance, GradientAccumulationScheduler({0: 1, 1: 2})])
    fit(Module(), [FARMSTempBalance(assign_func="tb_linear_map"), GradientAccumulationScheduler({0: 1, 1: 2})])


def test_second_fit_does_not_go_back_to_a_state_restored_on_the_way() -> None:
    balance, module = FARMSTempBalance(assign_func="tb_linear_map"), LearnsItsRate()
    trainer = make_trainer([balance, FindAgain(num_training_steps=4)])
    trainer.fit(module)
    again, fresh = (Module(net=make_net(seed=5)) for _ in range(2))
    fit(again, [balance])
    fit(fresh, [FARMSTempBalance(assign_func="tb_linear_map")])
    assert_same_weights(again, fresh)


@pytest.mark.filterwarnings("ignore:.*SWA", "ignore:Swapping scheduler")
def test_stochastic_weight_averaging() -> None:
    balance = FARMSTempBalance(assign_func="tb_linear_map")
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=2)
    seen, said = effective(Module(), [balance, swa], max_epochs=5)
    assert seen == said


def test_weight_averaging() -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    seen, said = effective(
        Module(), [FARMSTempBalance(assign_func="tb_linear_map"), callbacks.EMAWeightAveraging(decay=0.5)]
    )
    assert seen == said


@pytest.mark.filterwarnings("ignore:.*SWA", "ignore:Swapping scheduler")
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_the_last_report_is_of_averaged_weights(name: str, last: bool) -> None:
    if name == "EMAWeightAveraging":
        callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
        average = callbacks.EMAWeightAveraging(decay=0.9)
    else:
        average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=2)
    balance, module = FARMSTempBalance(assign_func="tb_linear_map"), Module()
    trainer = fit(module, [average, balance] if last else [balance, average], max_epochs=5)
    assert balance.report is not None
    assert balance.report.layers == analyze(module).layers
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


@pytest.mark.parametrize("validate", [True, False])
def test_others_may_monitor_the_mean_alpha(validate: bool, tmp_path: Any) -> None:
    balance = FARMSTempBalance(assign_func="tb_linear_map")
    stop = EarlyStopping("farms/alpha_mean", mode="max", patience=0, min_delta=1e6)
    keep = ModelCheckpoint(
        tmp_path, monitor="farms/alpha_mean", save_top_k=-1, save_on_train_epoch_end=not validate
    )
    trainer = make_trainer([balance, stop, keep], enable_checkpointing=True)
    trainer.fit(Module(), make_data(), make_data() if validate else None)
    assert stop.stopped_epoch == 1
    assert len(keep.best_k_models) == 2
    assert all(float(value) > 1 for value in keep.best_k_models.values())
    assert {"farms/alpha_mean", "farms/alpha_std"} <= trainer.callback_metrics.keys()


def test_monitored_mean_is_of_this_epoch() -> None:
    balance, module = FARMSTempBalance(assign_func="tb_linear_map"), Module()
    pairs = []

    def note(trainer: Any, pl_module: Any) -> None:
        assert balance.report is not None
        alphas = [alpha for alpha in balance.report.alphas.values() if alpha is not None]
        pairs.append((float(trainer.callback_metrics["farms/alpha_mean"]), math.fsum(alphas) / len(alphas)))

    fit(module, [balance, LambdaCallback(on_train_epoch_end=note)])
    assert len(pairs) == EPOCHS
    assert all(logged == pytest.approx(measured, rel=1e-6) for logged, measured in pairs)


def test_monitored_mean_of_broken_weights_is_not_that_of_before() -> None:
    def break_weights(trainer: Any, pl_module: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.data.fill_(math.nan)

    stop = EarlyStopping("farms/alpha_mean", mode="max", patience=100, check_on_train_epoch_end=True)
    balance = FARMSTempBalance(assign_func="tb_linear_map")
    with pytest.warns(UserWarning, match="no alpha"):
        fit(Module(), [balance, LambdaCallback(on_train_epoch_end=break_weights), stop])
    assert stop.stopped_epoch == 1


def test_learning_rate_monitor_sees_the_schedulers_lr() -> None:
    rows = []
    for callbacks in ([], [FARMSTempBalance(log=False, assign_func="tb_linear_map")]):
        logger = Recorder()
        fit(module_for("SGD", "OneCycleLR"), [*callbacks, LearningRateMonitor(log_momentum=True)], logger=logger)
        rows.append([(step, row) for step, row in logger.rows if any("lr-" in key for key in row)])
    assert rows[0] == rows[1]
    assert len(rows[0]) == STEPS


def test_the_lr_that_is_logged_is_that_of_the_weight() -> None:
    def biases_first(params: Any) -> Optimizer:
        params = list(params)
        biases = [param for param in params if param.ndim == 1]
        weights = [param for param in params if param.ndim > 1]
        return torch.optim.SGD([{"params": biases, "lr": 0.01}, {"params": weights, "lr": 0.05}], lr=0.1)

    balance, recorder = FARMSTempBalance(assign_func="tb_linear_map"), Recorder()
    fit(Module(biases_first), [balance], logger=recorder)
    row = next(row for _, row in recorder.rows if "farms/lr/net.2" in row)
    assert row["farms/ratio/net.2"] != 1
    assert row["farms/lr/net.2"] == pytest.approx(0.05 * row["farms/ratio/net.2"])


@pytest.mark.filterwarnings("ignore:.*fast_dev_run")
def test_a_trial_of_one_step_takes_any_two_fractions() -> None:
    balance = FARMSTempBalance(assign_func="tb_linear_map", start=0.2, until=0.5)
    fit(Module(), [balance], fast_dev_run=True)
    assert balance.report is not None


def test_sam_in_manual_optimization() -> None:
    class Sharp(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure)

        def configure_optimizers(self) -> Any:
            from tests.balancing.test_layerwise_step import SAM

            return SAM(self.parameters(), torch.optim.SGD, lr=0.1)

    balance, module = FARMSTempBalance(assign_func="tb_linear_map"), Sharp()
    with spy_on_updates("SGD") as seen:
        fit(module, [balance])
    assert len(seen) == STEPS
    by_name = balance.parameter_ratios(module)
    assert seen[-1] == {id(p): 0.1 * by_name[name] for name, p in module.named_parameters()}


def test_layer_that_loses_its_alpha() -> None:
    """Warned about once, then at ratio 1; the others go on, and no learning rate is NaN."""
    module, balance = (
        Module(lambda params: torch.optim.SGD(params, lr=0.1)),
        FARMSTempBalance(assign_func="tb_linear_map"),
    )

    class Breaks(Probe):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.net[2].weight.data.zero_()

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            if trainer.current_epoch >= 1:
                pl_module.net[2].weight.grad.zero_()

    probe = Breaks(balance)
    with pytest.warns(UserWarning, match="keep the base learning rate: net.2: all weights are zero") as caught:
        fit(module, [probe, balance], max_epochs=4)
    assert len([w for w in caught if "base learning rate" in str(w.message)]) == 1
    key = id(module.net[2].weight)
    assert all(ratios[key] == 1 for ratios in probe.ratios[BATCHES:])
    assert all(math.isfinite(ratio) for ratios in probe.ratios for ratio in ratios.values())
    assert sorted(set(balance.ratios.values())) == [0.5, 1, 1.5]


def test_only_fit_is_balanced() -> None:
    balance, module = FARMSTempBalance(assign_func="tb_linear_map"), Module()
    trainer = make_trainer([balance])
    trainer.validate(module, make_data(), verbose=False)
    assert balance.report is None
    trainer.fit(module, make_data(), make_data())
    trainer.validate(module, make_data(), verbose=False)
    assert balance.report is not None


# Refused at the start


def refused(module: LightningModule, callbacks: list[Any], error: Any, match: str, **options: Any) -> None:
    trainer = make_trainer(callbacks, **options)
    started = []
    trainer.callbacks.append(LambdaCallback(on_train_batch_start=lambda *_: started.append(1)))
    with pytest.raises(error, match=match):
        trainer.fit(module, make_data())
    assert not started
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in trainer.optimizers)


def test_two_callbacks_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `FARMSTempBalance`"):
        make_trainer(
            [
                FARMSTempBalance(assign_func="tb_linear_map"),
                FARMSTempBalance(log=False, assign_func="tb_linear_map"),
            ]
        )
    trainer = make_trainer([FARMSTempBalance(assign_func="tb_linear_map")])
    trainer.callbacks.append(FARMSTempBalance(assign_func="tb_linear_map"))
    with pytest.raises(ValueError, match="two FARMSTempBalance callbacks: keep one"):
        trainer.fit(Module(), make_data())


def test_callback_together_with_tempbalance_is_refused() -> None:
    class Mixed(Module):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.balancer = farms_tb.TempBalance(self.net, optimizer, assign_func="tb_linear_map")
            return optimizer

    trainer = make_trainer([FARMSTempBalance(assign_func="tb_linear_map")])
    with pytest.raises(
        ValueError, match="already has layer-wise learning rates: use one FARMSTempBalance or Temp"
    ):
        trainer.fit(Mixed(), make_data())


def test_lbfgs_is_refused() -> None:
    refused(
        Module(torch.optim.LBFGS),
        [FARMSTempBalance(assign_func="tb_linear_map")],
        ValueError,
        "LBFGS takes one step",
    )


@pytest.mark.parametrize("preset", ["farms", "monitor"])
def test_no_optimizer_is_refused(preset: Any) -> None:
    class Without(Module):
        def configure_optimizers(self) -> Any:
            return None

    with pytest.warns(UserWarning, match="with no optimizer"):
        refused(
            Without(),
            [FARMSTempBalance(preset=preset)],
            ValueError,
            r"none of the model's layers has a parameter in .*only measured; farms_tb.analyze\(model\)",
        )


class Optimizable:
    """All that Lightning asks of an optimizer: the attributes of torch's, and not its class."""

    def __init__(self, params: Any) -> None:
        self._sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        self.param_groups, self.defaults, self.state = self._sgd.param_groups, self._sgd.defaults, self._sgd.state
        self.step, self.zero_grad = self._sgd.step, self._sgd.zero_grad
        self.state_dict, self.load_state_dict = self._sgd.state_dict, self._sgd.load_state_dict


def test_an_optimizer_that_is_none_of_torchs_is_measured_only() -> None:
    with pytest.raises(TypeError, match=r"got Optimizable.*measure only"):
        fit(Module(Optimizable), [FARMSTempBalance(assign_func="tb_linear_map")])
    plain, measured = Module(Optimizable), Module(Optimizable)
    fit(plain)
    balance, shown = FARMSTempBalance(preset="monitor"), []
    note = LambdaCallback(
        on_train_batch_start=lambda trainer, module, *_: shown.extend(balance.param_groups(module.optimizers()))
    )
    fit(measured, [balance, note])
    assert_same_weights(measured, plain)
    assert balance.report is not None
    assert balance.report.layers == analyze(measured).layers
    assert len(shown) == STEPS
    assert {(group.ratio, group.lr) for group in shown} == {(1, 0.1)}


def test_foreign_parameters_are_refused() -> None:
    other = [nn.Parameter(torch.zeros(3))]
    module = Module(lambda params: torch.optim.SGD(other, lr=0.1))
    refused(
        module,
        [FARMSTempBalance(assign_func="tb_linear_map")],
        ValueError,
        "none of the model's layers has a parameter in the optimizer",
    )


def test_model_without_layers_is_refused() -> None:
    class Flat(Module):
        def __init__(self) -> None:
            super().__init__(net=nn.Flatten())
            self.scale = nn.Parameter(torch.ones(()))

        def loss(self, batch: Any) -> Tensor:
            return self.scale * batch[0].mean()

    refused(
        Flat(),
        [FARMSTempBalance(assign_func="tb_linear_map")],
        ValueError,
        "Flat has no layer that can be analysed",
    )


def test_pattern_that_matches_nothing_is_refused() -> None:
    match = r"exclude='lifting\*' matches no layer; the layers are net.0, net.2"
    refused(
        Module(), [FARMSTempBalance(exclude=["net.2", "lifting*"], assign_func="tb_linear_map")], ValueError, match
    )


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy", "XLAStrategy", "XLAFSDPStrategy"])
def test_strategies_are_refused_by_name(name: str) -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    base = type(name, (SingleDeviceStrategy,), {})
    for cls in (base, type("MyStrategy", (base,), {})):
        trainer = make_trainer(
            [FARMSTempBalance(assign_func="tb_linear_map")], strategy=cls(accelerator=None), accelerator="auto"
        )
        trainer.strategy.accelerator = make_trainer().accelerator
        with pytest.raises(ValueError, match=f"does not work with {name}: .*Use one device, DDP or FSDP2"):
            FARMSTempBalance(assign_func="tb_linear_map").setup(trainer, Module(), "fit")
        FARMSTempBalance(assign_func="tb_linear_map").setup(trainer, Module(), "validate")


# Norms


class Block(nn.Module):
    """A residual block with names as torchvision gives them, the norms listed after both convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8))
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        images = inputs[:, :, None, None].expand(-1, -1, 4, 4)
        hidden = self.bn2(self.conv2(self.bn1(self.conv1(images)).tanh())) + self.downsample(images)
        return self.head(self.fc(self.norm(hidden.mean((2, 3)))))


@pytest.mark.parametrize("norms", ["follow", "base"])
def test_norms(norms: Any) -> None:
    balance = FARMSTempBalance(norms=norms, exclude_first=False, exclude_last=False, assign_func="tb_linear_map")
    module = Module(net=Block())
    seen, said = effective(module, [balance])
    assert seen == said
    ratios, layers = balance.parameter_ratios(module), balance.ratios
    assert len(set(layers.values())) > 3
    follows = {"bn1": "conv1", "bn2": "conv2", "downsample.1": "downsample.0", "norm": "downsample.0"}
    for norm, feeder in follows.items():
        for part in ("weight", "bias"):
            expected = layers[f"net.{feeder}"] if norms == "follow" else 1.0
            assert ratios[f"net.{norm}.{part}"] == expected, norm
    for layer in ("conv1", "conv2", "downsample.0", "fc", "head"):
        assert ratios[f"net.{layer}.weight"] == ratios[f"net.{layer}.bias"] == layers[f"net.{layer}"]


def test_exclusions() -> None:
    balance, module = FARMSTempBalance(exclude=["net.5"], assign_func="tb_linear_map"), Module()
    fit(module, [balance])
    for layer in ("net.0", "net.5", "net.9"):
        assert balance.ratios[layer] == 1
        assert balance.parameter_ratios(module)[f"{layer}.weight"] == 1
    assert {balance.ratios["net.2"], balance.ratios["net.7"]} == {0.5, 1.5}
