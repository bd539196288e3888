"""A run that stops and goes on ends bitwise identical to the uninterrupted run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    LambdaCallback,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from farms_tb import FARMSTempBalance, analyze
from tests.helpers import (
    BATCHES,
    LIGHTNING_NOISE,
    Module,
    Recorder,
    assert_same_state,
    assert_same_weights,
    make_data,
    make_trainer,
)

pytestmark = [
    *LIGHTNING_NOISE,
    # Most runs here resume without the ModelCheckpoint that wrote the file.
    pytest.mark.filterwarnings(r"ignore:.*callbacks used to create the checkpoint need to be provided"),
    # Lightning takes OnExceptionCheckpoint for a checkpoint to look for.
    pytest.mark.filterwarnings(r"ignore:.*\.fit\(ckpt_path="),
    # The recorder of rows here shows no histogram.
    pytest.mark.filterwarnings("ignore:histogram_every_n"),
]

EPOCHS = 4
ROOT = Path(__file__).resolve().parents[2]


class Resumable(Module):
    """Picks its batch by the number of steps taken: what a run sees does not depend on where it resumed."""

    def __init__(self) -> None:
        super().__init__(
            lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
            lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=EPOCHS * BATCHES + 1),
            "step",
        )
        self.batches = list(make_data(EPOCHS * BATCHES))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(self.batches[self.global_step])


class Fails(Callback):
    """Raises once, in the middle of an epoch."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            raise ZeroDivisionError("planned")


def train(callbacks: Any, ckpt_path: Any = None, **options: Any) -> tuple[Resumable, Any]:
    """Train, with no other checkpoints than those of the callbacks."""
    module, saves = Resumable(), any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer = make_trainer(callbacks, **{"max_epochs": EPOCHS, "enable_checkpointing": saves, **options})
    validation = make_data(1) if "val_check_interval" in options else None
    trainer.fit(module, make_data(), validation, ckpt_path=ckpt_path)
    return module, trainer


STOPS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "epoch end": ({"save_on_train_epoch_end": True}, {}, "epoch=1-step=8"),
    "mid-epoch": ({"every_n_train_steps": 3}, {}, "epoch=1-step=6"),
    "last batch": ({"every_n_train_steps": 4}, {}, "epoch=1-step=8"),
    "validation": ({"save_on_train_epoch_end": False}, {"val_check_interval": 2}, "epoch=1-step=6"),
    "validation at the end": ({"save_on_train_epoch_end": False}, {"val_check_interval": 4}, "epoch=1-step=8"),
}
CLOCKS: list[dict[str, Any]] = [
    {},
    {"every_n_steps": 3},
    {"every_n_epochs": 2},
    {"histogram_every_n": 2},
    {"lag_steps": 3},
]
# Runs that stop after six or eight steps stop before ratios apply, while they grow, while they apply, or after.
PHASES: list[dict[str, Any]] = [
    {"start": "9 steps"},
    {"start": "1 epoch", "ramp_steps": 6},
    {"start": 0.2, "until": 0.7, "measurements_per_epoch": 2},
    {"until": "5 steps", "every_n_steps": 2, "assign_func": "tb_sigmoid"},
    {"start": "3 steps", "ramp_steps": 2, "until": "2 epochs", "lag_steps": 3},
]


def finish_and_compare(
    clock: dict[str, Any],
    path: Path,
    module: Resumable,
    balance: FARMSTempBalance,
    logger: Recorder,
    failed: int = 0,
    **options: Any,
) -> None:
    """Resume from `path`: weights, ratios, report and what is logged from there on are those of the whole run."""
    resumed_balance, resumed_logger = FARMSTempBalance(**{"assign_func": "tb_linear_map", **clock}), Recorder()
    resumed, _ = train([resumed_balance], path, logger=resumed_logger, **options)
    assert_same_weights(resumed, module)
    assert resumed_balance.ratios == balance.ratios
    assert resumed_balance.report == balance.report
    assert_same_state(resumed_balance.state_dict(), balance.state_dict())
    ours, whole = (
        [(step, row) for step, row in log.rows if any(key.startswith("farms") for key in row)]
        for log in (resumed_logger, logger)
    )
    # Lightning counts the batch that failed as one that stepped: its step, ours with it, is one ahead.
    ours = [(step - failed, row) for step, row in ours if step is not None]
    assert ours == whole[-len(ours) :]
    assert 0 < len(ours) < len(whole)


@pytest.mark.parametrize("clock", [*CLOCKS, *PHASES], ids=str)
@pytest.mark.parametrize("stop", STOPS)
def test_from_a_checkpoint(stop: str, clock: dict[str, Any], tmp_path: Path) -> None:
    saving, options, name = STOPS[stop]
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, **saving)
    balance, logger = FARMSTempBalance(**{"assign_func": "tb_linear_map", **clock}), Recorder()
    module, _ = train([balance, keep], logger=logger, **options)
    assert any(ratio != 1 for ratio in balance.ratios.values())
    finish_and_compare(clock, tmp_path / f"{name}.ckpt", module, balance, logger, **options)


@pytest.mark.parametrize("clock", [*CLOCKS[:2], CLOCKS[-1]], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_after_an_exception(first: bool, clock: dict[str, Any], tmp_path: Path) -> None:
    balance, logger = FARMSTempBalance(**{"assign_func": "tb_linear_map", **clock}), Recorder()
    module, _ = train([balance], logger=logger)
    broken = [FARMSTempBalance(**{"assign_func": "tb_linear_map", **clock}), Fails()]
    with pytest.raises(ZeroDivisionError, match="planned"):
        train([*(broken if first else broken[::-1]), OnExceptionCheckpoint(tmp_path, "broken")])
    finish_and_compare(clock, tmp_path / "broken.ckpt", module, balance, logger, failed=1)


def test_after_sigterm(tmp_path: Path) -> None:
    """What a cluster sends before it takes the machine away."""

    def terminate(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    balance, logger = FARMSTempBalance(assign_func="tb_linear_map"), Recorder()
    module, _ = train([balance], logger=logger)
    stop = LambdaCallback(on_train_batch_start=terminate)
    with pytest.raises(SIGTERMException):
        train([FARMSTempBalance(assign_func="tb_linear_map"), stop, OnExceptionCheckpoint(tmp_path, "terminated")])
    finish_and_compare({}, tmp_path / "terminated.ckpt", module, balance, logger)


def test_after_sigkill(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, warnings; warnings.simplefilter('ignore')\n"
        "from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint\n"
        "from farms_tb import FARMSTempBalance\n"
        "from tests.training.test_resume import train\n"
        "def die(trainer, *_):\n"
        "    if trainer.global_step == 10: os.kill(os.getpid(), signal.SIGKILL)\n"
        "keep = ModelCheckpoint(sys.argv[1], every_n_train_steps=1, save_top_k=-1)\n"
        "train([FARMSTempBalance(assign_func='tb_linear_map'), keep, LambdaCallback(on_train_batch_start=die)])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        timeout=120,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    balance, logger = FARMSTempBalance(assign_func="tb_linear_map"), Recorder()
    module, _ = train([balance], logger=logger)
    finish_and_compare({}, tmp_path / "epoch=2-step=10.ckpt", module, balance, logger)


@pytest.mark.parametrize("clock", [{}, {"every_n_steps": 5, "lag_steps": 4}], ids=str)
def test_after_the_last_epoch(clock: dict[str, Any], tmp_path: Path) -> None:
    """A finished run that is saved and given more epochs is the longer run, also while it measures."""
    options = {"assign_func": "tb_linear_map", **clock}
    balance, logger = FARMSTempBalance(**options), Recorder()
    module, _ = train([balance], logger=logger)
    _, trainer = train([FARMSTempBalance(**options)], max_epochs=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    finish_and_compare(clock, tmp_path / "end.ckpt", module, balance, logger)


@pytest.mark.parametrize("clock", [{}, {"every_n_steps": 3}, {"lag_steps": 3}], ids=str)
def test_killed_after_the_last_step(clock: dict[str, Any], tmp_path: Path) -> None:
    """Between the last checkpoint and the row of the final weights: Lightning then finds nothing left to train."""
    balance, logger = FARMSTempBalance(**{"assign_func": "tb_linear_map", **clock}), Recorder()
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=True)
    module, _ = train([balance, keep], logger=logger)
    finish_and_compare(clock, tmp_path / "epoch=3-step=16.ckpt", module, balance, logger)


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_resumed_after_the_end_shows_the_report_and_logs_nothing_more(
    used: bool, averages: bool, tmp_path: Path
) -> None:
    """Lightning finds nothing left to train; a callback that comes later may have averaged the final weights."""
    finished, options = FARMSTempBalance(assign_func="tb_linear_map"), {"assign_func": "tb_linear_map"}
    _, trainer = train([finished])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    logger, balance = Recorder(), FARMSTempBalance(**options)
    if used:
        train([balance], max_epochs=1)
        assert balance.report != finished.report
    later = [StochasticWeightAveraging(swa_lrs=0.05)] if averages else []
    module, trainer = train([balance, *later], tmp_path / "end.ckpt", logger=logger)
    assert not logger.rows
    assert balance.report == finished.report
    assert balance.ratios == finished.ratios
    assert balance.parameter_ratios(module)["net.5.weight"] == balance.ratios["net.5"] != 1
    assert_same_state(balance.state_dict(), finished.state_dict())
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def test_state_of_a_version_with_a_budget(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """`max_overhead` left its clock and its timings in the state."""
    saved = torch.load(checkpoints["balanced"], weights_only=True)
    state = saved["callbacks"]["FARMSTempBalance"]
    state |= {"passed": [1, 4], "overhead": {"timings": [["training", 0, 0, 1.0]]}}
    del state["final_step"]
    torch.save(saved, tmp_path / "old.ckpt")
    one, _ = train([FARMSTempBalance(assign_func="tb_linear_map")], tmp_path / "old.ckpt")
    other, _ = train([FARMSTempBalance(assign_func="tb_linear_map")], checkpoints["balanced"])
    assert_same_weights(one, other)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: Any) -> dict[str, Path]:
    """Mid-epoch checkpoints of a balanced run, one with ratios of 1, and a plain one."""
    paths = {}
    for name, callbacks in {
        "balanced": [FARMSTempBalance(assign_func="tb_linear_map")],
        "ones": [FARMSTempBalance(lr_min_ratio=1.0, lr_max_ratio=1.0)],
        "plain": [],
    }.items():
        folder = tmp_path_factory.mktemp(name)
        train([*callbacks, ModelCheckpoint(folder, every_n_train_steps=6, save_top_k=-1)])
        paths[name] = folder / "epoch=1-step=6.ckpt"
    return paths


def test_state_is_plain_values(checkpoints: dict[str, Path]) -> None:
    state = torch.load(checkpoints["balanced"], weights_only=True)["callbacks"]["FARMSTempBalance"]

    def leaves(value: Any) -> Any:
        if isinstance(value, dict):
            for key, inner in value.items():
                assert type(key) is str
                yield from leaves(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from leaves(inner)
        else:
            yield value

    assert {type(leaf) for leaf in leaves(state)} <= {float, int, str, bool, type(None)}
    assert state["balancer"]["version"] == 2
    assert (state["epoch"], state["step"], state["measurements"]) == (1, 4, 2)


def test_optimizer_and_scheduler_states_are_those_of_a_plain_run(checkpoints: dict[str, Path]) -> None:
    ones, plain = (torch.load(checkpoints[name], weights_only=True) for name in ("ones", "plain"))
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same_state(ones[key], plain[key], key)
    balanced = torch.load(checkpoints["balanced"], weights_only=True)
    assert_same_state(balanced["lr_schedulers"], plain["lr_schedulers"])
    groups = [checkpoint["optimizer_states"][0]["param_groups"] for checkpoint in (balanced, plain)]
    assert_same_state(*groups)


def test_callback_removed_with_ratios_of_one(checkpoints: dict[str, Path]) -> None:
    plain, _ = train([])
    resumed, _ = train([], checkpoints["ones"])
    assert_same_weights(resumed, plain)


def test_callback_removed_is_said_by_lightning(checkpoints: dict[str, Path]) -> None:
    with pytest.warns(UserWarning, match="FARMSTempBalance"):
        train([], checkpoints["balanced"])


def test_callback_added(checkpoints: dict[str, Path]) -> None:
    """A plain checkpoint resumes with a measurement at the first chance, not at the next epoch."""
    balance = FARMSTempBalance(assign_func="tb_linear_map")
    first: list[Any] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            first.append((trainer.global_step, dict(balance.ratios)))

    train([balance, Look()], checkpoints["plain"])
    assert first[0][0] == 6
    assert {0.5, 1.5} <= set(first[0][1].values())


def test_order_of_callbacks_does_not_matter(checkpoints: dict[str, Path]) -> None:
    one, _ = train([FARMSTempBalance(assign_func="tb_linear_map")], checkpoints["balanced"])
    other, _ = train(
        [Callback(), FARMSTempBalance(assign_func="tb_linear_map")],
        checkpoints["balanced"],
        enable_checkpointing=False,
    )
    assert_same_weights(one, other)


def test_options_changed(checkpoints: dict[str, Path]) -> None:
    """Said, and measured anew with the new options before the first step."""
    balance = FARMSTempBalance(lr_min_ratio=0.9, exclude=["net.5"], assign_func="tb_linear_map")
    first: list[Any] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            first.append((trainer.global_step, dict(balance.ratios)))

    message = (
        r"other settings, measuring anew: lr_min_ratio was 0.5 and is 0.9; exclude was \[\] and is \['net.5'\]$"
    )
    with pytest.warns(UserWarning, match=message):
        train([balance, Look()], checkpoints["balanced"])
    assert first[0][0] == 6
    assert sorted(first[0][1].values()) == [0.9, 1, 1, 1, 1.5]


def test_clock_and_logging_may_change_silently(checkpoints: dict[str, Path]) -> None:
    balance = FARMSTempBalance(every_n_steps=2, log=False, assign_func="tb_linear_map")
    train([balance], checkpoints["balanced"])


@pytest.mark.parametrize(
    ("options", "named", "strengths", "measured"),
    [
        ({"start": "3 epochs"}, "start was 0 and is '3 epochs'", [0] * 6 + [1] * 4, [8, 12, 16]),
        ({"start": "9 steps", "ramp_steps": 2}, "start .*; ramp_steps .*", [0] * 3 + [0.5] + [1] * 6, None),
        ({"start": "5 steps"}, "start was 0 and is '5 steps'", [1] * 10, [8, 12, 16]),
        ({"until": "3 epochs"}, "until was 1 and is '3 epochs'", [1] * 10, [8, 16]),
        ({"ramp_steps": 8}, "ramp_steps was 0 and is 8", [7 / 8] + [1] * 9, [8, 12, 16]),
    ],
    ids=str,
)
def test_start_until_and_ramp_are_those_of_the_resumed_run(
    options: dict[str, Any],
    named: str,
    strengths: list[float],
    measured: list[int] | None,
    checkpoints: dict[str, Path],
    tmp_path: Path,
) -> None:
    """One warning names what changed; the saved ratios need no new measurement."""
    saved = torch.load(checkpoints["balanced"], weights_only=True)["callbacks"]["FARMSTempBalance"]
    state, logger = saved["balancer"]["ratios"], Recorder()
    balance = FARMSTempBalance(assign_func="tb_linear_map", **options)
    seen: list[dict[str, float]] = []
    moved: list[bool] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            seen.append(balance.ratios)
            moved.append(len({group.lr for group in balance.param_groups(trainer.optimizers[0])}) > 1)

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1)
    with pytest.warns(UserWarning, match=f"written with other settings: {named}$"):
        train([balance, Look(), keep], checkpoints["balanced"], logger=logger)
    assert seen[0] == {name: 1 + strengths[0] * (ratio - 1) for name, ratio in state.items()}
    assert moved == [strength > 0 for strength in strengths]
    largest = [max(abs(ratio - 1) for ratio in ratios.values()) for ratios in seen]
    assert largest == pytest.approx([strength * 0.5 for strength in strengths])
    if measured is not None:
        assert [step for step, row in logger.rows if "farms/alpha_mean" in row] == measured
    # What was resumed with them has them: warnings are errors here.
    again = FARMSTempBalance(assign_func="tb_linear_map", **options)
    train([again], tmp_path / "epoch=1-step=7.ckpt")
    assert again.ratios == balance.ratios


def test_a_clock_that_does_not_know_the_phases_had_the_present_ones(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Warnings are errors here."""
    checkpoint = torch.load(checkpoints["balanced"], weights_only=True)
    saved = checkpoint["callbacks"]["FARMSTempBalance"]
    for name in ("start", "until", "ramp_steps"):
        del saved[name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    balance = FARMSTempBalance(assign_func="tb_linear_map", start="3 steps", ramp_steps=2)
    seen: list[dict[str, float]] = []

    class Look(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append(balance.ratios)

    train([balance, Look()], tmp_path / "old.ckpt")
    assert seen[0] == saved["balancer"]["ratios"]


def test_phases_and_options_changed_are_one_warning(checkpoints: dict[str, Path]) -> None:
    """The ramp goes on from where ratios began to apply, also where they are measured anew."""
    balance = FARMSTempBalance(lr_min_ratio=0.9, ramp_steps=14, assign_func="tb_linear_map")
    first: list[dict[str, float]] = []

    class Look(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            first.append(balance.ratios)

    message = "measuring anew: lr_min_ratio was 0.5 and is 0.9; ramp_steps was 0 and is 14$"
    with pytest.warns(UserWarning, match=message) as warned:
        train([balance, Look()], checkpoints["balanced"])
    assert len([one for one in warned if "other settings" in str(one.message)]) == 1
    assert max(first[0].values()) == pytest.approx(1.25)  # the seventh of 14 steps


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("start", "soon"),
        ("until", None),
        ("ramp_steps", -1),
        ("ramp_steps", "1"),
        *((name, "x") for name in ("epoch", "step", "measurements", "final_step", "started", "begun")),
        ("begun", 3),
    ],
)
def test_a_damaged_clock_is_refused_by_name(
    entry: str, value: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    saved = torch.load(checkpoints["balanced"], weights_only=True)
    saved["callbacks"]["FARMSTempBalance"][entry] = value
    torch.save(saved, tmp_path / "damaged.ckpt")
    balance = FARMSTempBalance(assign_func="tb_linear_map")
    with pytest.raises(ValueError, match=f"saved state of farms_tb is damaged: {entry} must"):
        train([balance], tmp_path / "damaged.ckpt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("balancer"), "is damaged: expected a dict with balancer"),
        (lambda state: state.update(balancer=[1]), "not a state of farms_tb"),
        (lambda state: state["balancer"].update(ratios=[1]), "is damaged: ratios must be a dict"),
    ],
    ids=["gone", "a list", "a list of ratios"],
)
def test_a_damaged_balancer_is_refused(
    damage: Callable[[dict[str, Any]], Any], message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    saved = torch.load(checkpoints["balanced"], weights_only=True)
    damage(saved["callbacks"]["FARMSTempBalance"])
    torch.save(saved, tmp_path / "damaged.ckpt")
    balance = FARMSTempBalance(assign_func="tb_linear_map")
    with pytest.raises(ValueError, match=message):
        train([balance], tmp_path / "damaged.ckpt")


def test_a_layer_resized_on_loading_is_measured_anew(tmp_path: Path) -> None:
    """As a new head, whose weights `on_load_checkpoint` leaves out: it has no null of the old shape."""

    class Resized(Module):
        def __init__(self, width: int) -> None:
            torch.manual_seed(0)
            sizes = [(6, 32), (32, width), (width, 32), (32, 2)]
            net = nn.Sequential(*(nn.Linear(*size) for size in sizes))
            super().__init__(lambda params: torch.optim.SGD(params, lr=0.1), net=net)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            for name, own in self.state_dict().items():
                if checkpoint["state_dict"][name].shape != own.shape:
                    checkpoint["state_dict"][name] = own

    first = make_trainer([FARMSTempBalance()], max_epochs=1)
    first.fit(Resized(40), make_data())
    first.save_checkpoint(tmp_path / "wide.ckpt")
    reports: list[Any] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            reports.append((balance.report, analyze(pl_module, null=True)))

    balance = FARMSTempBalance()
    message = r"measuring anew: layer net.1 had shape \(1, 40, 32\) and has \(1, 32, 10\); layer net.2 "
    with pytest.warns(UserWarning, match=message):
        make_trainer([balance, Look()]).fit(Resized(10), make_data(), ckpt_path=tmp_path / "wide.ckpt")
    found, fresh = reports[0]
    for name in ("net.1", "net.2"):
        assert found.layers[name].alpha == fresh.layers[name].alpha
        assert found.layers[name].null_mean == fresh.layers[name].null_mean


def test_monitored_mean_is_there_for_the_rest_of_the_epoch(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, monitor="farms/alpha_mean", save_top_k=-1, every_n_train_steps=1)
    train([FARMSTempBalance(assign_func="tb_linear_map"), keep], checkpoints["balanced"])
    assert len(keep.best_k_models) == EPOCHS * BATCHES - 6


def test_checkpoint_of_a_run_that_never_trained(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Validating from a checkpoint and saving again keeps the state."""
    trainer = make_trainer([FARMSTempBalance(assign_func="tb_linear_map")])
    trainer.validate(Resumable(), make_data(1), ckpt_path=checkpoints["balanced"], verbose=False)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    states = [
        torch.load(path, weights_only=True)["callbacks"]["FARMSTempBalance"]
        for path in (checkpoints["balanced"], tmp_path / "again.ckpt")
    ]
    assert_same_state(*states)
