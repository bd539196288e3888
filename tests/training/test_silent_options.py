"""Options that have no effect say so."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import IterableDataset

from farms_tb import FARMSTempBalance
from tests.helpers import LIGHTNING_NOISE, Module, Recorder, fit, make_data, make_net, make_trainer

pytestmark = LIGHTNING_NOISE


class Stream(IterableDataset):
    """Batches without a known number, all over again if asked for."""

    def __init__(self, endless: bool) -> None:
        self.endless = endless

    def __iter__(self) -> Any:
        return itertools.cycle(make_data()) if self.endless else iter(make_data())


def train_on_stream(callback: FARMSTempBalance, *, endless: bool, **options: Any) -> None:
    stream = torch.utils.data.DataLoader(Stream(endless), batch_size=None)
    make_trainer([callback], max_epochs=-1, **options).fit(Module(), stream)


@pytest.mark.parametrize(("option", "loggers"), [("histogram_every_n", "csv"), ("table_every_n", "none")])
def test_media_that_no_logger_shows(option: str, loggers: str, tmp_path: Path) -> None:
    callback = FARMSTempBalance(assign_func="tb_linear_map", **{option: 1})
    logger = CSVLogger(tmp_path) if loggers == "csv" else False
    with pytest.warns(UserWarning, match=f"{option} is set") as caught:
        fit(Module(), [callback], logger=logger)
    (said,) = [w for w in caught if option in str(w.message)]
    assert said.filename == fit.__code__.co_filename
    fit(Module(), [callback], logger=logger)  # said once


def test_media_that_one_of_several_loggers_shows(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    callback = FARMSTempBalance(histogram_every_n=1, table_every_n=9, assign_func="tb_linear_map")
    fit(Module(), [callback], logger=[Recorder(), TensorBoardLogger(tmp_path)])


def test_media_without_logging_are_not_missed() -> None:
    fit(Module(), [FARMSTempBalance(log=False, histogram_every_n=1, assign_func="tb_linear_map")])


def test_one_endless_epoch() -> None:
    with pytest.warns(UserWarning, match="every_n_steps"):
        train_on_stream(FARMSTempBalance(assign_func="tb_linear_map"), endless=True, max_steps=10)


def test_a_long_first_epoch_is_named_while_it_lasts() -> None:
    class Stop(FARMSTempBalance):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_start(trainer, *args)
            assert trainer.global_step <= 1000, "no warning"

    with pytest.raises(UserWarning, match="every_n_steps"):
        train_on_stream(Stop(), endless=True, max_steps=1500)


def test_streams_that_end_and_measuring_by_steps_say_nothing() -> None:
    train_on_stream(FARMSTempBalance(assign_func="tb_linear_map"), endless=False, max_steps=10)
    train_on_stream(FARMSTempBalance(every_n_steps=4, assign_func="tb_linear_map"), endless=True, max_steps=10)


def test_mean_alpha_is_of_the_layers_that_are_trained() -> None:
    class WithTeacher(Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = make_net(seed=3).requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    logger, balance, module = Recorder(), FARMSTempBalance(assign_func="tb_linear_map"), WithTeacher()
    trainer = fit(module, [balance], logger=logger)
    assert balance.report is not None
    alphas = {name: alpha for name, alpha in balance.report.alphas.items() if alpha is not None}
    assert {name.split(".")[0] for name in alphas} == {"net", "teacher"}
    own = [alpha for name, alpha in alphas.items() if name.startswith("net.")]
    mean = math.fsum(own) / len(own)
    *_, before, row = [row for _, row in logger.rows if "farms/alpha_mean" in row]
    assert row["farms/alpha_mean"] == pytest.approx(mean, rel=1e-12)
    assert row["farms/alpha/teacher.0"] == alphas["teacher.0"], "measured all the same"
    monitored = float(trainer.callback_metrics["farms/alpha_mean"])
    assert monitored == pytest.approx(before["farms/alpha_mean"], rel=1e-6)


def test_mean_alpha_of_frozen_and_unheld_layers() -> None:
    """Frozen by `requires_grad` inside the optimizer, or left out of it: neither is trained."""
    net = nn.Sequential(*make_net())
    net[2].requires_grad_(False)
    held = [p for index in (0, 2, 5, 7) for p in net[index].parameters()]
    # All three trained layers are balanced: a single one has nothing to be balanced with, which is warned about.
    logger, balance = (
        Recorder(),
        FARMSTempBalance(exclude_first=False, exclude_last=False, assign_func="tb_linear_map"),
    )
    fit(Module(lambda _: torch.optim.SGD(held, lr=0.1), net=net), [balance], logger=logger)
    row = next(row for _, row in logger.rows if "farms/alpha_mean" in row)
    alphas = [row[f"farms/alpha/net.{index}"] for index in (0, 5, 7)]
    assert row["farms/alpha_mean"] == pytest.approx(math.fsum(alphas) / 3, rel=1e-12)
