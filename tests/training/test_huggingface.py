"""The callback in a real `transformers.Trainer` that trains a tiny GPT-2."""

from __future__ import annotations

import inspect
import itertools
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

pytest.importorskip("transformers")

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import TrainerState

import farms_tb
from farms_tb import FARMSTrainerCallback, analyze
from farms_tb.training.measured_run import MeasuredRun
from tests.helpers import assert_same_weights, spy_on_updates

EPOCHS, STEPS, BATCH, LENGTH, VOCABULARY = 3, 4, 4, 8, 50

HEAD, FIRST = "lm_head", "transformer.h.0.attn.c_attn"


def make_model() -> PreTrainedModel:
    """Return a GPT-2 of two blocks, with dropout, whose head is tied to its embedding."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, **ends)
    )
    model.config.loss_type = "ForCausalLM"
    assert model.lm_head.weight is model.transformer.wte.weight
    return model


def make_data(size: int = STEPS * BATCH) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(VOCABULARY, (size, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def make_trainer(folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    data = options.pop("train_dataset", None) or make_data(options.pop("size", STEPS * BATCH))
    trainer_class = options.pop("trainer_class", Trainer)
    defaults: dict[str, Any] = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    return trainer_class(
        make_model(), arguments, train_dataset=data, eval_dataset=make_data(BATCH), callbacks=list(callbacks)
    )


def train(
    folder: Path, *callbacks: TrainerCallback, resume: str | None = None, **options: Any
) -> tuple[PreTrainedModel, Trainer]:
    trainer = make_trainer(folder, *callbacks, **options)
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    return trainer.model, trainer


class Probe(TrainerCallback):
    """Note what a user sees before each step, and every row that is logged."""

    def __init__(self, balance: FARMSTrainerCallback | None = None) -> None:
        self.balance = balance
        self.lrs: list[dict[str, float]] = []
        self.ratios: list[dict[str, float]] = []
        self.rows: list[dict[str, Any]] = []
        self.measured: list[tuple[int, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        names = {id(parameter): name for name, parameter in kwargs["model"].named_parameters()}
        groups = kwargs["optimizer"].param_groups
        self.lrs.append({names[id(p)]: group["lr"] for group in groups for p in group["params"]})
        if self.balance is not None:
            self.ratios.append(self.balance.parameter_ratios(kwargs["model"]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        assert "model" in kwargs
        self.rows.append(dict(logs))
        if "farms/alpha_mean" in logs:
            self.measured.append((state.global_step, state.epoch))


def balanced_layers(callback: FARMSTrainerCallback) -> dict[str, float]:
    return {name: ratio for name, ratio in callback.ratios.items() if ratio != 1}


# Learning rates


@pytest.mark.parametrize(
    ("optim", "name", "accumulate"),
    [("adamw_torch", "AdamW", 1), ("adamw_torch", "AdamW", 2), ("sgd", "SGD", 1)],
)
def test_lr_of_every_parameter_is_the_schedulers_times_the_ratio(
    tmp_path: Path, optim: str, name: str, accumulate: int
) -> None:
    options = {"optim": optim, "gradient_accumulation_steps": accumulate}
    plain = Probe()
    train(tmp_path, plain, **options)

    callback = FARMSTrainerCallback(assign_func="tb_linear_map")
    probe = Probe(callback)
    with spy_on_updates(name) as updates:
        model, _ = train(tmp_path, callback, probe, **options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    assert len(updates) == len(plain.lrs) == EPOCHS * STEPS / accumulate
    # Outside of the step, the user sees what there would be without the callback.
    assert probe.lrs == plain.lrs
    for step, lrs in enumerate(updates):
        expected = {name: lr * probe.ratios[step][name] for name, lr in plain.lrs[step].items()}
        assert {names[key]: lr for key, lr in lrs.items()} == expected
    assert min(probe.ratios[0].values()) == 0.5
    assert max(probe.ratios[0].values()) == 1.5
    assert probe.ratios[0] != probe.ratios[-1]
    assert callback.ratios[HEAD] == callback.ratios[FIRST] == 1


def test_what_the_optimizer_really_does(tmp_path: Path) -> None:
    shown: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            shown["wrapper"] = callback.param_groups(kwargs["optimizer"])
            shown["inner"] = callback.param_groups(kwargs["optimizer"].optimizer)

    callback = FARMSTrainerCallback(assign_func="tb_linear_map")
    model, _ = train(tmp_path, callback, Look(), num_train_epochs=1)

    assert shown["wrapper"] == shown["inner"]
    ratios = callback.parameter_ratios(model)
    held = [(name, group.ratio) for group in shown["wrapper"] for name in group.parameters]
    assert len(held) == len(ratios)
    assert dict(held) == ratios
    with pytest.raises(ValueError, match="is not one that is being balanced"):
        callback.param_groups(torch.optim.SGD(model.parameters(), lr=1.0))


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_ratio_1_is_bitwise_identical_to_no_callback(tmp_path: Path, optim: str) -> None:
    plain, _ = train(tmp_path, optim=optim)
    callback = FARMSTrainerCallback(lr_min_ratio=1.0, lr_max_ratio=1.0)
    same, _ = train(tmp_path, callback, optim=optim)
    assert_same_weights(same, plain)
    other, _ = train(tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map"), optim=optim)
    with pytest.raises(AssertionError, match="not bit-identical"):
        assert_same_weights(other, plain)


# When it measures


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 4, 8, 12]),
        ({"every_n_epochs": 2}, [0, 8, 12]),
        ({"every_n_steps": 5}, [0, 5, 10, 12]),
    ],
)
def test_clock(tmp_path: Path, options: dict[str, Any], steps: list[int]) -> None:
    probe = Probe()
    _, trainer = train(tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map", **options), probe)
    assert probe.measured == [(step, step / STEPS) for step in steps]
    rows = [row for row in trainer.state.log_history if "farms/alpha_mean" in row]
    assert [row["step"] for row in rows] == steps


def test_clock_counts_optimizer_steps_under_accumulation(tmp_path: Path) -> None:
    probe = Probe()
    train(
        tmp_path,
        FARMSTrainerCallback(every_n_steps=2, assign_func="tb_linear_map"),
        probe,
        gradient_accumulation_steps=2,
    )
    assert [step for step, _ in probe.measured] == [0, 2, 4, 6]


def test_passes_over_a_stream_are_epochs(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(make_data())

    probe = Probe()
    train(tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map"), probe, train_dataset=Stream(), max_steps=10)
    assert [step for step, _ in probe.measured] == [0, 4, 8, 10]


def test_an_endless_stream_is_told_to_measure_by_steps(tmp_path: Path) -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Any:
            return itertools.cycle(make_data())

    with pytest.warns(UserWarning, match="every_n_steps"):
        train(tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map"), train_dataset=Endless(), max_steps=10)
    train(
        tmp_path,
        FARMSTrainerCallback(every_n_steps=4, assign_func="tb_linear_map"),
        train_dataset=Endless(),
        max_steps=10,
    )


@pytest.mark.parametrize("lag", [1, 3, 100])
def test_lag(tmp_path: Path, lag: int) -> None:
    """Ratios become active so many steps after the weights were read; the first at once."""
    at_once, late = (
        FARMSTrainerCallback(every_n_steps=4, assign_func="tb_linear_map"),
        FARMSTrainerCallback(every_n_steps=4, lag_steps=lag, assign_func="tb_linear_map"),
    )
    probe = Probe(late)
    train(tmp_path, late, probe)
    # What is still in the background at the next measurement is applied and logged then, at the end it is not.
    applied = [step for step in (min(4 + lag, 8), min(8 + lag, 12)) if step < 12]
    assert [step for step, _ in probe.measured] == [0, *applied, 12]
    changes = [step for step in range(1, 12) if probe.ratios[step] != probe.ratios[step - 1]]
    assert changes == applied
    first = Probe(at_once)
    train(tmp_path, at_once, first)
    assert probe.ratios[0] == first.ratios[0]


def test_final_report_is_of_the_final_weights_even_where_the_best_are_loaded(tmp_path: Path) -> None:
    class Final(TrainerCallback):
        report = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.report = analyze(kwargs["model"])

    final, callback, probe = Final(), FARMSTrainerCallback(assign_func="tb_linear_map"), Probe()
    options = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    # Of a loss that falls, the largest is the first.
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    model, trainer = train(tmp_path, callback, final, probe, **options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert callback.report == final.report != analyze(model)
    assert [step for step, _ in probe.measured] == [0, 4, 8, 12]
    assert "train_runtime" in trainer.state.log_history[-1]


class Silent(Trainer):
    """A Trainer that logs nothing, so that callbacks never see its summary."""

    def log(self, logs: dict[str, float], *args: Any) -> None:
        pass


class StopEarly(TrainerCallback):
    """Stop where `EarlyStoppingCallback` does, and keep the report of the weights at that moment."""

    report = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == 2 * STEPS:
            control.should_training_stop = True
            self.report = analyze(kwargs["model"])
        return control


@pytest.mark.parametrize(
    "options",
    [{}, {"trainer_class": Silent}, {"save_strategy": "epoch", "load_best_model_at_end": True}],
    ids=["plain", "without summary", "best model"],
)
def test_final_report_after_an_early_stop(tmp_path: Path, options: dict[str, Any]) -> None:
    stop, callback, probe = StopEarly(), FARMSTrainerCallback(assign_func="tb_linear_map"), Probe()
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": True, "eval_strategy": "epoch"}
    _, trainer = train(tmp_path, callback, stop, probe, **options)
    assert callback.report == stop.report
    assert [step for step, _ in probe.measured] == [0, 4, 8]
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


class TakesStopBack(TrainerCallback):
    """Want two epochs at least, whoever stops the training before."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step < 2 * STEPS:
            control.should_training_stop = False
        return control


class StopAtOnce(TrainerCallback):
    """Stop when the first epoch is over."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == STEPS:
            control.should_training_stop = True
        return control


def test_training_that_goes_on_after_all_is_measured(tmp_path: Path) -> None:
    callback, probe = FARMSTrainerCallback(assign_func="tb_linear_map"), Probe()
    model, trainer = train(tmp_path, StopAtOnce(), callback, TakesStopBack(), probe)
    assert trainer.state.global_step == EPOCHS * STEPS
    # At the end of the first epoch the weights might have been the final ones.
    assert [step for step, _ in probe.measured] == [0, 4, 4, 8, 12]
    assert callback.report == analyze(model)
    other = FARMSTrainerCallback(assign_func="tb_linear_map")
    undisturbed, _ = train(tmp_path, other)
    assert_same_weights(model, undisturbed)


# What it logs


def test_log_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = FARMSTrainerCallback(assign_func="tb_linear_map")
    before, after = Probe(), Probe()
    _, trainer = train(tmp_path, before, callback, after)

    rows = [row for row in before.rows if "farms/alpha_mean" in row]
    assert rows == [row for row in after.rows if "farms/alpha_mean" in row]
    history = [row for row in trainer.state.log_history if "farms/alpha_mean" in row]
    assert [{**row, "step": step} for row, step in zip(rows, (0, 4, 8, 12), strict=True)] == history
    layers = [name for name, record in callback.report.layers.items() if record.alpha is not None]
    assert len(layers) == 9
    expected = {"epoch", "farms/alpha_mean", "farms/alpha_std"}
    expected |= {f"farms/{key}/{name}" for key in ("alpha", "rank_share") for name in layers}
    assert set(rows[-1]) == expected
    expected |= {"farms/ratio_mean"} | {f"farms/{key}/{name}" for key in ("ratio", "lr") for name in layers}
    assert [set(row) for row in rows[:-1]] == [expected] * EPOCHS
    assert all(rows[0][f"farms/lr/{name}"] == 0.01 * rows[0][f"farms/ratio/{name}"] for name in layers)
    assert rows[-1][f"farms/alpha/{FIRST}"] == callback.report.layers[FIRST].alpha
    # The trainer's own rows are as they were, its summary the last; the console is spared.
    assert "train_runtime" in trainer.state.log_history[-1]
    assert sum("loss" in row for row in trainer.state.log_history) == EPOCHS * STEPS
    console = capsys.readouterr().out
    assert "farms/alpha_mean" in console
    assert "farms/alpha/" not in console


def test_nothing_is_logged_where_it_is_turned_off_or_not_on_rank_zero(tmp_path: Path) -> None:
    class Elsewhere(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.is_world_process_zero = False

    for callbacks in (
        [FARMSTrainerCallback(log=False, assign_func="tb_linear_map")],
        [Elsewhere(), FARMSTrainerCallback(assign_func="tb_linear_map")],
    ):
        probe = Probe()
        _, trainer = train(tmp_path, *callbacks, probe, num_train_epochs=1)
        assert not probe.measured
        assert not any("farms/alpha_mean" in row for row in trainer.state.log_history)
        assert callbacks[-1].report is not None


class FakeWandb(WandbCallback):
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def setup(self, *args: Any, **kwargs: Any) -> None:
        pass

    on_train_begin = on_train_end = setup

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any
    ) -> None:
        self.rows.append(logs)


class FakeTensorBoard(TensorBoardCallback):
    def __init__(self) -> None:
        self.histograms: list[tuple[str, int]] = []
        self.scalars: set[str] = set()
        self.logging_dir = ""
        self.tb_writer = SimpleNamespace(
            add_text=lambda *_: None,
            add_scalar=lambda name, *_: self.scalars.add(name),
            add_histogram_raw=lambda name, **row: self.histograms.append((name, row["global_step"])),
            flush=lambda: None,
            close=lambda: None,
        )


def test_histograms_go_to_the_reporters_that_have_them(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    online, board, probe = FakeWandb(), FakeTensorBoard(), Probe()
    _, trainer = train(
        tmp_path, online, board, FARMSTrainerCallback(histogram_every_n=2, assign_func="tb_linear_map"), probe
    )
    name = f"farms_esd/02_{FIRST}"
    rows = [row for row in online.rows if "farms/alpha_mean" in row]
    assert [isinstance(row.get(name), wandb.Histogram) for row in rows] == [True, False, True, False]
    assert [step for key, step in board.histograms if key == f"train/{name}"] == [0, 8]
    assert f"train/farms_alpha/02_{FIRST}" in board.scalars
    # Others would not know what to do with one, and the history is saved as JSON.
    assert not any("farms_esd" in key for row in [*probe.rows, *trainer.state.log_history] for key in row)


# Resuming


@pytest.mark.parametrize(
    ("optim", "clock"),
    [
        ("adamw_torch", {}),
        ("sgd", {"every_n_steps": 3}),
        ("sgd", {"lag_steps": 3}),
        ("sgd", {"start": 0.3, "until": "7 steps", "ramp_steps": 3, "measurements_per_epoch": 2}),
    ],
)
def test_resume_is_bitwise_identical(tmp_path: Path, optim: str, clock: dict[str, Any]) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "optim": optim}
    whole = FARMSTrainerCallback(assign_func="tb_linear_map", **clock)
    expected, uninterrupted = train(tmp_path, whole, **options)
    history = [row for row in uninterrupted.state.log_history if "farms/alpha_mean" in row]
    options["save_strategy"] = "no"
    # An epoch's end, an epoch's middle, and its middle with the callback made anew by the trainer.
    for checkpoint, flag in (("checkpoint-4", False), ("checkpoint-6", False), ("checkpoint-6", True)):
        given = FARMSTrainerCallback(assign_func="tb_linear_map", **({} if flag else clock))
        model, trainer = train(
            tmp_path, given, resume=checkpoint, restore_callback_states_from_checkpoint=flag, **options
        )
        assert_same_weights(model, expected)
        (used,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, FARMSTrainerCallback)]
        assert (used is given) is not flag
        assert used.ratios == whole.ratios
        assert used.report == whole.report
        assert [row for row in trainer.state.log_history if "farms/alpha_mean" in row] == history


def test_a_callback_made_anew_keeps_its_preset(tmp_path: Path) -> None:
    train(tmp_path, FARMSTrainerCallback(preset="tempbalance"), save_strategy="steps", save_steps=6)
    given = FARMSTrainerCallback(preset="farms")
    _, trainer = train(tmp_path, given, resume="checkpoint-6", restore_callback_states_from_checkpoint=True)
    (used,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, FARMSTrainerCallback)]
    assert used.preset == "tempbalance"
    assert "yours" not in used.settings()


def test_state_is_plain_and_comes_back(tmp_path: Path) -> None:
    callback = FARMSTrainerCallback(
        exclude=["h.1.mlp.*"], lr_min_ratio=0.7, every_n_steps=3, assign_func="tb_linear_map"
    )
    train(tmp_path, callback, save_strategy="steps", save_steps=6)
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-6" / "trainer_state.json"))
    saved = state.stateful_callbacks["FARMSTrainerCallback"]
    # The checkpoint at step 6 holds the ratios of step 3: the measurement at 6 is yet to come.
    progress = saved["attributes"]["_restored"]
    assert (progress["step"], progress["measurements"]) == (3, 2)
    assert progress["balancer"]["ratios"][HEAD] == 1

    restored = FARMSTrainerCallback.from_state(saved)
    assert restored.state() == saved == json.loads(json.dumps(restored.state()))
    assert saved["args"]["exclude"] == ["h.1.mlp.*"]
    assert saved["args"]["lr_min_ratio"] == 0.7
    assert FARMSTrainerCallback(assign_func="tb_linear_map").state()["attributes"]["_restored"] is None
    # Every option is in it: a callback made anew has none of its own.
    objects = {"preset", "spectrum", "ratios", "schedule", "logging"}
    assert set(saved["args"]) == set(inspect.signature(FARMSTrainerCallback).parameters) - objects


def test_resume_with_the_callback_added_or_removed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6}
    train(tmp_path / "without", **options)
    callback, probe = FARMSTrainerCallback(assign_func="tb_linear_map"), Probe()
    train(tmp_path / "without", callback, probe, resume="checkpoint-6", **options)
    assert [step for step, _ in probe.measured] == [6, 8, 12]
    assert balanced_layers(callback)

    train(tmp_path / "with", FARMSTrainerCallback(assign_func="tb_linear_map"), **options)
    _, trainer = train(tmp_path / "with", resume="checkpoint-6", **options)
    assert trainer.state.global_step == EPOCHS * STEPS


def test_a_used_callback_resumes_from_a_checkpoint_without_it_as_a_new_one_does(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6}
    train(tmp_path / "without", **options)
    balance = {"assign_func": "tb_linear_map", "every_n_steps": 5}
    used = FARMSTrainerCallback(**balance)
    train(tmp_path / "other", used, learning_rate=0.1)
    probes = []
    for callback in (used, FARMSTrainerCallback(**balance)):
        probes.append(Probe(callback))
        train(tmp_path / "without", callback, probes[-1], resume="checkpoint-6", **options)
    assert probes[0].measured == probes[1].measured
    assert probes[0].ratios == probes[1].ratios


def test_resume_with_other_options_says_so_and_measures_anew(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6}
    train(tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map"), **options)
    callback, probe = FARMSTrainerCallback(lr_max_ratio=1.2, assign_func="tb_linear_map"), Probe()
    with pytest.warns(UserWarning, match="measuring anew: lr_max_ratio was 1.5 and is 1.2"):
        train(tmp_path, callback, probe, resume="checkpoint-6", **options)
    assert [step for step, _ in probe.measured][-3:] == [6, 8, 12]
    assert max(callback.ratios.values()) == 1.2


def test_resume_with_a_later_start_says_so_and_keeps_the_base_rates_until_then(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 6}
    train(tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map"), **options)
    callback = FARMSTrainerCallback(start="9 steps", assign_func="tb_linear_map")
    probe = Probe(callback)
    with pytest.warns(UserWarning, match="written with other settings: start was 0 and is '9 steps'$"):
        train(tmp_path, callback, probe, resume="checkpoint-6", **options)
    assert [set(ratios.values()) == {1} for ratios in probe.ratios] == [True] * 3 + [False] * 3
    assert [step for step, _ in probe.measured] == [8, 9, 12]


def test_a_measurement_that_no_step_would_take_is_not_logged(tmp_path: Path) -> None:
    """It is kept in the checkpoint, with which a longer run goes on."""
    callback, probe = FARMSTrainerCallback(lag_steps=100, assign_func="tb_linear_map"), Probe()
    train(tmp_path, callback, probe, save_strategy="epoch")
    assert [step for step, _ in probe.measured] == [0, 8, 12]
    assert not any(key.startswith("farms/ratio/") for key in probe.rows[-1])
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-12" / "trainer_state.json"))
    restored = state.stateful_callbacks["FARMSTrainerCallback"]["attributes"]["_restored"]
    assert restored["begun"] == [8, False]
    assert restored["balancer"]["begun"]


def test_state_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    train(tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map"), save_strategy="steps", save_steps=6)
    path = tmp_path / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["FARMSTrainerCallback"]["attributes"]["_restored"]["balancer"]["version"] = 99
    path.write_text(json.dumps(state))
    trainer = make_trainer(tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map"))
    with pytest.raises(ValueError, match="the state has version 99"):
        trainer.train(resume_from_checkpoint=str(path.parent))
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_second_train_starts_anew(tmp_path: Path) -> None:
    callback, probe = FARMSTrainerCallback(assign_func="tb_linear_map"), Probe()
    trainer = make_trainer(tmp_path, callback, probe)
    trainer.train()
    trainer.train()
    assert [step for step, _ in probe.measured] == [0, 4, 8, 12] * 2


def test_options_that_were_removed_are_named_and_the_checkpoint_loads(tmp_path: Path) -> None:
    train(tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map"), save_strategy="steps", save_steps=6)
    path = tmp_path / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    saved = state["stateful_callbacks"]["FARMSTrainerCallback"]
    saved["args"] |= {"max_overhead": 0.02, "timings_file": None}
    saved["attributes"]["_restored"] |= {"passed": [1, 4], "overhead": {"timings": []}}
    path.write_text(json.dumps(state))
    callback = FARMSTrainerCallback(assign_func="tb_linear_map")
    with pytest.warns(UserWarning, match="max_overhead.*every_n_epochs"):
        train(tmp_path, callback, resume="checkpoint-6", restore_callback_states_from_checkpoint=True)


def test_killed_after_the_last_step_and_resumed(tmp_path: Path) -> None:
    """The run was killed between its last checkpoint and the row of the final weights."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    whole = FARMSTrainerCallback(assign_func="tb_linear_map")
    _, uninterrupted = train(tmp_path, whole, **options)
    path = tmp_path / "checkpoint-12" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"] = [row for row in state["log_history"] if row["step"] < 12]
    state["stateful_callbacks"]["FARMSTrainerCallback"]["attributes"]["_restored"]["final_step"] = -1
    path.write_text(json.dumps(state))
    resumed = FARMSTrainerCallback(assign_func="tb_linear_map")
    _, trainer = train(tmp_path, resumed, resume="checkpoint-12", **options)
    assert resumed.report == whole.report
    rows = [row for row in trainer.state.log_history if "farms/alpha_mean" in row]
    assert rows == [row for row in uninterrupted.state.log_history if "farms/alpha_mean" in row]


def test_resumed_after_the_end_nothing_is_logged_twice(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "epoch"}
    train(tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map"), **options)
    _, trainer = train(
        tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map"), resume="checkpoint-12", **options
    )
    steps = [row["step"] for row in trainer.state.log_history if "farms/alpha_mean" in row]
    assert steps == [0, 4, 8, 12]


def test_an_optimizer_exchanged_during_training_is_balanced(tmp_path: Path) -> None:
    class Exchange(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                trainer.optimizer = trainer.accelerator.prepare_optimizer(
                    torch.optim.SGD(trainer.model.parameters(), lr=0.5)
                )

    callback = FARMSTrainerCallback(assign_func="tb_linear_map")
    trainer = make_trainer(tmp_path, callback, Exchange())
    with spy_on_updates("SGD") as updates:
        trainer.train()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    ratios = callback.parameter_ratios(trainer.model)
    assert len(updates) == 6
    assert {names[key]: lr for key, lr in updates[-1].items()} == {name: 0.5 * r for name, r in ratios.items()}
    assert min(ratios.values()) < 1 < max(ratios.values())
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_a_used_callback_can_be_pickled(tmp_path: Path) -> None:
    callback = FARMSTrainerCallback(lr_min_ratio=0.7, assign_func="tb_linear_map")
    model, _ = train(tmp_path, callback)
    copied = pickle.loads(pickle.dumps(callback))
    assert copied.report == callback.report
    assert copied.ratios == callback.ratios
    assert copied.parameter_ratios(model) == callback.parameter_ratios(model)
    assert copied.options == callback.options
    again, fresh = (
        train(tmp_path, copied)[0],
        train(tmp_path, FARMSTrainerCallback(lr_min_ratio=0.7, assign_func="tb_linear_map"))[0],
    )
    assert_same_weights(again, fresh)


# Letting go


def test_optimizer_is_left_as_it_was_found(tmp_path: Path) -> None:
    _, trainer = train(tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map"))
    inner = trainer.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks


class Failing(TrainerCallback):
    def __init__(self) -> None:
        self.fails = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.fails and state.global_step == 2:
            self.fails = False
            raise KeyboardInterrupt


def test_training_again_after_an_error(tmp_path: Path) -> None:
    callback = FARMSTrainerCallback(assign_func="tb_linear_map")
    probe = Probe(callback)
    trainer = make_trainer(tmp_path, callback, probe, Failing())
    with spy_on_updates("AdamW") as updates:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.train()
    assert len(updates) == 2 + EPOCHS * STEPS
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for update, lrs, ratios in zip(updates, probe.lrs, probe.ratios, strict=True):
        assert {names[key]: lr for key, lr in update.items()} == {k: lr * ratios[k] for k, lr in lrs.items()}
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("step", ["measure_if_due", "finish"])
def test_an_error_while_measuring_leaves_no_hooks(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MeasuredRun, step, interrupted)
    trainer = make_trainer(tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map"))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_detach_after_an_error(tmp_path: Path) -> None:
    callback = FARMSTrainerCallback(assign_func="tb_linear_map")
    trainer = make_trainer(tmp_path, callback, Failing())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    callback.detach()
    callback.detach()
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
    assert callback.ratios


def test_a_callback_put_in_place_of_one_that_an_error_stopped(tmp_path: Path) -> None:
    first, second = (FARMSTrainerCallback(assign_func="tb_linear_map") for _ in range(2))
    trainer = make_trainer(tmp_path, first, Failing())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(first)
    trainer.add_callback(second)
    with pytest.raises(ValueError, match=r"detach\(\) .*FARMSTrainerCallback"):
        trainer.train()
    first.detach()
    trainer.train()
    assert balanced_layers(second)
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_a_measurement_that_fails_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("farms_tb.balancing.measured_model.measure", fail)
    trainer = make_trainer(tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map"))
    with pytest.raises(RuntimeError, match="no memory"):
        trainer.train()
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


# What is refused


@pytest.mark.parametrize("options", [{"assign_func": "tb_linear_map"}, {"preset": "monitor"}], ids=str)
def test_two_callbacks(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="two FARMSTrainerCallback callbacks: keep one"):
        train(tmp_path, FARMSTrainerCallback(**options), FARMSTrainerCallback(**options))


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("DEEPSPEED", "does not work with DeepSpeed: .* Use one device, DDP or FSDP2"),
        ("FSDP", "does not work with FSDP1: it flattens"),
        ("MEGATRON_LM", "does not work with Megatron-LM"),
        ("XLA", "does not work with XLA devices"),
    ],
)
def test_backends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, message: str) -> None:
    callback = FARMSTrainerCallback(assign_func="tb_linear_map")
    trainer = make_trainer(tmp_path)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType(backend))
    with pytest.raises(ValueError, match=message):
        callback.on_init_end(trainer.args, trainer.state, trainer.control)
    with pytest.raises(ValueError, match=message):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_fsdp2_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", SimpleNamespace(fsdp_version=2))
    FARMSTrainerCallback(assign_func="tb_linear_map").on_init_end(trainer.args, trainer.state, trainer.control)


def test_optimizers_that_step_in_the_backward_pass(tmp_path: Path) -> None:
    class AdaLomo(torch.optim.SGD):
        pass

    trainer = make_trainer(tmp_path, FARMSTrainerCallback(assign_func="tb_linear_map"))
    trainer.optimizer = AdaLomo(trainer.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="AdaLomo: it moves the layers during the backward pass, not in step"):
        trainer.train()
    monitor = FARMSTrainerCallback(preset="monitor")
    trainer = make_trainer(tmp_path, monitor)
    trainer.optimizer = AdaLomo(trainer.model.parameters(), lr=0.1)
    trainer.train()
    assert monitor.report is not None


def test_nothing_to_show_before_training() -> None:
    callback, model = FARMSTrainerCallback(assign_func="tb_linear_map"), make_model()
    assert callback.report is None
    assert callback.ratios == {}
    with pytest.raises(RuntimeError, match=r"FARMSTrainerCallback has nothing to show .* trainer\.train"):
        callback.parameter_ratios(model)
    with pytest.raises(RuntimeError, match="nothing to show before"):
        callback.param_groups(torch.optim.SGD(model.parameters(), lr=1.0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"esd": "farm"}, ValueError, "esd must be one of 'farms', 'full', got 'farm'"),
        ({"every_n_epochs": 0}, ValueError, "every_n_epochs must be at least 1, got 0"),
        ({"every_n_steps": 1.5}, TypeError, "every_n_steps must be an integer"),
        ({"histogram_every_n": 0}, ValueError, "histogram_every_n must be at least 1, got 0"),
        ({"log": "yes"}, TypeError, "log must be True or False"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FARMSTrainerCallback(assign_func="tb_linear_map", **options)


def test_says_how_to_install_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "farms_tb.training.huggingface")
    monkeypatch.setitem(sys.modules, "transformers.trainer_callback", None)
    with pytest.raises(ImportError, match=r'pip install "farms-tb\[transformers\]"'):
        farms_tb.FARMSTrainerCallback  # noqa: B018


def test_called_outside_of_a_trainer_it_still_keeps_the_history(tmp_path: Path) -> None:
    callback = FARMSTrainerCallback(assign_func="tb_linear_map")
    model = make_model()
    trainer = make_trainer(tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for event in (callback.on_train_begin, callback.on_epoch_begin):
        event(trainer.args, trainer.state, trainer.control, model=model, optimizer=optimizer)
    assert "farms/alpha_mean" in trainer.state.log_history[0]
    callback.detach()
