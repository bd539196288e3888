"""What arrives in the loggers, read back from what they wrote."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from farms_tb import FARMSTempBalance, analyze
from tests.helpers import BATCHES, EPOCHS, LIGHTNING_NOISE, Module, Recorder, fit, make_net, read_wandb_file

pytestmark = LIGHTNING_NOISE

LAYERS = ["net.0", "net.2", "net.5", "net.7", "net.9"]
SUMMARY = {"epoch", "farms/alpha_mean", "farms/alpha_std"}
WHILE_TRAINING = SUMMARY | {"farms/ratio_mean"}
PER_LAYER = {f"farms/{figure}/{layer}" for figure in ("alpha", "ratio", "lr") for layer in LAYERS}


def farms_rows(logger: Recorder) -> list[tuple[int, dict[str, float]]]:
    return [(step or 0, row) for step, row in logger.rows if "farms/alpha_mean" in row]


def test_rows() -> None:
    logger, balance, module = Recorder(), FARMSTempBalance(), Module()
    before = analyze(module).alphas
    fit(module, [balance], logger=logger)
    rows = farms_rows(logger)
    assert [step for step, _ in rows] == [epoch * BATCHES for epoch in range(EPOCHS + 1)]
    assert [row["epoch"] for _, row in rows] == list(range(EPOCHS + 1))
    for _, row in rows[:-1]:
        assert row.keys() == WHILE_TRAINING | PER_LAYER
        assert all(row[f"farms/lr/{layer}"] == 0.1 * row[f"farms/ratio/{layer}"] for layer in LAYERS)
    assert {layer: rows[0][1][f"farms/alpha/{layer}"] for layer in LAYERS} == before
    # The last row is of the final weights, which take no further step.
    assert rows[-1][1].keys() == SUMMARY | {f"farms/alpha/{layer}" for layer in LAYERS}
    assert {layer: rows[-1][1][f"farms/alpha/{layer}"] for layer in LAYERS} == analyze(module).alphas
    assert all(type(value) in (int, float) for _, row in rows for value in row.values())


def test_rows_line_up_with_the_users_own() -> None:
    logger = Recorder()
    fit(Module(), [FARMSTempBalance(every_n_steps=2)], logger=logger, accumulate_grad_batches=2)
    own = [step for step, row in logger.rows if "loss" in row]
    # A user's row is logged after its batch, ours before the next one.
    assert {step for step, _ in farms_rows(logger)} <= {0} | {step + 1 for step in own if step is not None}


@pytest.mark.parametrize("options", [{"every_n_steps": 6}, {"every_n_epochs": 2}])
def test_final_row_is_not_doubled(options: dict[str, Any]) -> None:
    logger = Recorder()
    fit(Module(), [FARMSTempBalance(**options)], logger=logger)
    steps = [step for step, _ in farms_rows(logger)]
    assert len(set(steps)) == len(steps)
    assert steps[-1] == EPOCHS * BATCHES


def test_layer_without_alpha_leaves_its_key_out() -> None:
    logger, net = Recorder(), make_net()
    net[5].weight.data.zero_()
    net[5].requires_grad_(False)
    fit(Module(net=net), [FARMSTempBalance()], logger=logger)
    row = farms_rows(logger)[0][1]
    assert PER_LAYER - row.keys() == {"farms/alpha/net.5", "farms/lr/net.5"}, "frozen: it has no learning rate"


def test_log_off() -> None:
    logger = Recorder()
    fit(Module(), [FARMSTempBalance(log=False)], logger=logger)
    assert logger.rows
    assert not farms_rows(logger)


def test_several_loggers() -> None:
    loggers = [Recorder(), Recorder()]
    fit(Module(), [FARMSTempBalance()], logger=loggers)
    assert farms_rows(loggers[0]) == farms_rows(loggers[1])
    assert farms_rows(loggers[0])


def test_csv(tmp_path: Path) -> None:
    fit(Module(), [FARMSTempBalance(histogram_every_n=1)], logger=CSVLogger(tmp_path, name="", version=""))
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["farms/alpha_mean"]]
    assert len(rows) == EPOCHS + 1
    assert rows[0].keys() >= SUMMARY | PER_LAYER
    assert [float(row["epoch"]) for row in rows] == list(range(EPOCHS + 1))
    assert [int(row["step"]) for row in rows] == [epoch * BATCHES for epoch in range(EPOCHS + 1)]
    assert all(float(rows[0][key]) > 0 for key in PER_LAYER)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(Module(), [FARMSTempBalance(histogram_every_n=2)], logger=TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert set(events.Tags()["scalars"]) >= PER_LAYER | SUMMARY
    histograms = events.Histograms("farms_esd/net.5")
    assert [event.step for event in histograms] == [0, 2 * BATCHES]
    assert histograms[0].histogram_value.num == sum(histograms[0].histogram_value.bucket)


@pytest.fixture(scope="module")
def wandb_records(tmp_path_factory: Any) -> list[Any]:
    """Every record in the file of an offline run that is over."""
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    folder = tmp_path_factory.mktemp("wandb")
    logger = WandbLogger(project="tests", save_dir=folder, offline=True)
    fit(Module(), [FARMSTempBalance(histogram_every_n=2)], logger=logger)
    wandb.finish()
    wandb.teardown()
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return read_wandb_file(path)


def wandb_rows(records: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        row: dict[str, Any] = {}
        for item in record.history.item:
            # A histogram comes as one JSON value or, from newer versions, as one item for each of its keys.
            key, *inner = item.nested_key or [item.key]
            value = json.loads(item.value_json)
            row[key] = {**row.get(key, {}), inner[0]: value} if inner else value
        rows.append(row)
    return [row for row in rows if "farms/alpha_mean" in row]


def test_wandb_rows(wandb_records: list[Any]) -> None:
    rows = wandb_rows(wandb_records)
    assert [row["epoch"] for row in rows] == list(range(EPOCHS + 1))
    assert [row["trainer/global_step"] for row in rows] == [epoch * BATCHES for epoch in range(EPOCHS + 1)]
    assert all(row.keys() >= WHILE_TRAINING | PER_LAYER for row in rows[:-1])


def test_wandb_histograms(wandb_records: list[Any]) -> None:
    rows = wandb_rows(wandb_records)
    with_histograms = [row["epoch"] for row in rows if "farms_esd/net.5" in row]
    assert with_histograms == [0, 2]
    histogram = rows[0]["farms_esd/net.5"]
    assert histogram["_type"] == "histogram"
    assert len(histogram["bins"]) == len(histogram["values"]) + 1


def test_wandb_axes(wandb_records: list[Any]) -> None:
    metrics = [r.metric for r in wandb_records if r.WhichOneof("record_type") == "metric"]
    axes = {metric.glob_name or metric.name: metric.step_metric for metric in metrics}
    assert axes["farms/*"] == "epoch"
    assert axes["farms_esd/*"] == "epoch"


def test_wandb_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    fit(Module(), [FARMSTempBalance(histogram_every_n=1)], logger=Recorder())
