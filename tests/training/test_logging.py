"""What arrives in the loggers, read back from what they wrote."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from farms_tb import FARMSTempBalance, LayerRecord, Report, analyze
from farms_tb.training.metrics import COLUMNS, Measurement, RunLog, depth_names, measurement_row
from farms_tb.training.sinks import log_measurement
from farms_tb.viewing.plots import read_history
from tests.helpers import BATCHES, EPOCHS, LIGHTNING_NOISE, Module, Recorder, fit, make_net

pytestmark = LIGHTNING_NOISE

LAYERS = ["net.0", "net.2", "net.5", "net.7", "net.9"]
SUMMARY = {"epoch", "farms/alpha_mean", "farms/alpha_std"}
WHILE_TRAINING = SUMMARY | {"farms/ratio_mean"}
PER_LAYER = {f"farms/{metric}/{layer}" for metric in ("alpha", "ratio", "lr", "rank_share") for layer in LAYERS}


NUMBERED = {
    f"farms_{metric}/{depth:02d}_{layer}"
    for metric in ("alpha", "ratio", "lr", "rank_share")
    for depth, layer in enumerate(LAYERS)
}
MEDIA = {"farms/alpha_curves", "farms/ratio_map", "farms/alpha_by_depth"}


def farms_rows(logger: Recorder) -> list[tuple[int, dict[str, float]]]:
    return [(step or 0, row) for step, row in logger.rows if "farms/alpha_mean" in row]


def test_rows() -> None:
    logger, balance, module = Recorder(), FARMSTempBalance(assign_func="tb_linear_map"), Module()
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
    assert rows[-1][1].keys() == SUMMARY | {
        f"farms/{metric}/{layer}" for metric in ("alpha", "rank_share") for layer in LAYERS
    }
    assert {layer: rows[-1][1][f"farms/alpha/{layer}"] for layer in LAYERS} == analyze(module).alphas
    assert all(type(value) in (int, float) for _, row in rows for value in row.values())


def test_rows_line_up_with_the_users_own() -> None:
    logger = Recorder()
    fit(
        Module(),
        [FARMSTempBalance(every_n_steps=2, assign_func="tb_linear_map")],
        logger=logger,
        accumulate_grad_batches=2,
    )
    own = [step for step, row in logger.rows if "loss" in row]
    # A user's row is logged after its batch, ours before the next one.
    assert {step for step, _ in farms_rows(logger)} <= {0} | {step + 1 for step in own if step is not None}


@pytest.mark.parametrize("options", [{"every_n_steps": 6}, {"every_n_epochs": 2}])
def test_final_row_is_not_doubled(options: dict[str, Any]) -> None:
    logger = Recorder()
    fit(Module(), [FARMSTempBalance(assign_func="tb_linear_map", **options)], logger=logger)
    steps = [step for step, _ in farms_rows(logger)]
    assert len(set(steps)) == len(steps)
    assert steps[-1] == EPOCHS * BATCHES


def test_layer_without_alpha_leaves_its_key_out() -> None:
    logger, net = Recorder(), make_net()
    net[5].weight.data.zero_()
    net[5].requires_grad_(False)
    fit(Module(net=net), [FARMSTempBalance(assign_func="tb_linear_map")], logger=logger)
    row = farms_rows(logger)[0][1]
    missing = {f"farms/{metric}/net.5" for metric in ("alpha", "rank_share", "lr")}
    assert PER_LAYER - row.keys() == missing, "frozen: it has no learning rate"


def test_log_off() -> None:
    logger = Recorder()
    fit(Module(), [FARMSTempBalance(log=False, assign_func="tb_linear_map")], logger=logger)
    assert logger.rows
    assert not farms_rows(logger)


def test_no_logger() -> None:
    balance = FARMSTempBalance(assign_func="tb_linear_map")
    fit(Module(), [balance], logger=False)
    assert balance.report is not None


def test_each_of_several_loggers_gets_its_own_form(tmp_path: Path) -> None:
    """One whose class nobody knows gets plain rows, whatever its neighbours get."""
    pytest.importorskip("tensorboard")
    unknown, board = Recorder(), TensorBoardLogger(tmp_path, name="", version="board")
    files = CSVLogger(tmp_path, name="", version="csv")
    fit(
        Module(),
        [FARMSTempBalance(histogram_every_n=1, assign_func="tb_linear_map")],
        logger=[unknown, board, files],
    )
    assert farms_rows(unknown)[0][1].keys() == WHILE_TRAINING | PER_LAYER
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        assert not NUMBERED & set(next(csv.reader(file)))
    assert set(read_events(tmp_path / "board").Tags()["scalars"]) >= NUMBERED


def test_names_sort_by_depth() -> None:
    names = [f"layer.{index}" for index in range(112)]
    report = Report({name: LayerRecord(alpha=2.0, kind="real", shape=(1, 4, 4)) for name in names})
    for count in (3, 10, 11, 100, 101, 112):
        shown = depth_names(Report({name: report.layers[name] for name in names[:count]}))
        assert sorted(shown.values()) == [shown[name] for name in names[:count]]
    assert (shown["layer.0"], shown["layer.111"]) == ("000_layer.0", "111_layer.111")


def test_a_number_is_the_layers_place_in_the_report() -> None:
    """Whether the layers before it could be measured or not: a layer keeps its panel over the run."""
    ok = LayerRecord(alpha=2.0, kind="real", shape=(1, 4, 4))
    report = Report({"a": ok, "b": LayerRecord(status="no stack"), "c": ok})
    assert set(measurement_row(report, {}, {}, {}, by_depth=True)) >= {"farms_alpha/00_a", "farms_alpha/02_c"}


@pytest.mark.parametrize("options", [{"x_axis": "steps"}, {"table_every_n": 0}])
def test_mistakes(options: dict[str, Any]) -> None:
    message = "x_axis must be one of 'epoch', 'step', got 'steps'|table_every_n must be at least 1, got 0"
    with pytest.raises(ValueError, match=message):
        FARMSTempBalance(assign_func="tb_linear_map", **options)


def test_csv(tmp_path: Path) -> None:
    fit(Module(), [FARMSTempBalance(assign_func="tb_linear_map")], logger=CSVLogger(tmp_path, name="", version=""))
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["farms/alpha_mean"]]
    assert len(rows) == EPOCHS + 1
    assert rows[0].keys() >= SUMMARY | PER_LAYER
    assert [float(row["epoch"]) for row in rows] == list(range(EPOCHS + 1))
    assert [int(row["step"]) for row in rows] == [epoch * BATCHES for epoch in range(EPOCHS + 1)]
    assert all(float(rows[0][key]) > 0 for key in PER_LAYER)


def test_csv_is_read_back_as_before(tmp_path: Path) -> None:
    balance = FARMSTempBalance(assign_func="tb_linear_map")
    fit(Module(), [balance], logger=CSVLogger(tmp_path, name="", version=""))
    history = read_history(tmp_path / "metrics.csv", LAYERS)
    assert history.layers == tuple(LAYERS)
    assert balance.report is not None
    assert {name: curve.values[-1] for name, curve in history.alpha.items()} == balance.report.alphas


def read_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    guidance = {"histograms": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=guidance).Reload()


@pytest.fixture(scope="module")
def events(tmp_path_factory: Any) -> Any:
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("board")
    balance = FARMSTempBalance(histogram_every_n=2, table_every_n=2, assign_func="tb_linear_map")
    fit(Module(), [balance], logger=TensorBoardLogger(folder, name="", version=""))
    return read_events(folder)


def test_tensorboard_scalars_sort_by_depth(events: Any) -> None:
    tags = set(events.Tags()["scalars"])
    assert tags >= NUMBERED | WHILE_TRAINING
    assert not tags & PER_LAYER
    alphas = sorted(tag for tag in tags if tag.startswith("farms_alpha/"))
    assert [tag.split("_", 2)[-1] for tag in alphas] == LAYERS
    assert [event.step for event in events.Scalars(alphas[0])] == [0, 4, 8, 12]


def test_tensorboard_histograms(events: Any) -> None:
    histograms = events.Histograms("farms_esd/02_net.5")
    assert [event.step for event in histograms] == [0, 2 * BATCHES]
    assert histograms[0].histogram_value.num == sum(histograms[0].histogram_value.bucket)


def test_tensorboard_table_and_pictures(events: Any) -> None:
    steps = [0, 2 * BATCHES, EPOCHS * BATCHES]
    texts = events.Tensors("farms/report/text_summary")
    assert [event.step for event in texts] == steps
    lines = texts[0].tensor_proto.string_val[0].decode().splitlines()
    assert lines[0] == f"| {' | '.join(COLUMNS)} |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {layer}" for layer in LAYERS]
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}
    assert set(events.Tags()["images"]) == MEDIA
    for name in MEDIA:
        assert [event.step for event in events.Images(name)] == steps
    first, *_, last = events.Images("farms/alpha_curves")
    assert first.encoded_image_string != last.encoded_image_string, "the curves grow"


def test_tensorboard_prefix(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path, name="", version="", prefix="mine")
    fit(
        Module(),
        [FARMSTempBalance(histogram_every_n=1, table_every_n=9, assign_func="tb_linear_map")],
        logger=logger,
    )
    tags = read_events(tmp_path).Tags()
    found = [tag for kind in ("scalars", "histograms", "images", "tensors") for tag in tags[kind]]
    assert all(tag.startswith("mine-farms") for tag in found if "farms" in tag)
    assert {"mine-farms_alpha/00_net.0", "mine-farms_esd/00_net.0", "mine-farms/alpha_curves"} <= set(found)


def test_pictures_hold_every_measurement() -> None:
    log, names = RunLog("epoch"), ["b", "a"]
    for epoch in range(4):
        alphas = dict.fromkeys(names, 2.0 + epoch)
        record = {name: LayerRecord(alpha=alpha, kind="real", shape=(1, 4, 4)) for name, alpha in alphas.items()}
        ratios = {} if epoch == 3 else {"b": 0.5, "a": 1.5}
        measurement = Measurement(Report(record), ratios, {}, {}, epoch, 10 * epoch)
        log.add(measurement)
    media = log.media(measurement)
    (axes, *_) = media.pictures["farms/alpha_curves"].axes
    assert [line.get_label() for line in axes.get_lines()] == names
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[2.0, 3.0, 4.0, 5.0]] * 2
    image = media.pictures["farms/ratio_map"].axes[0].images[0].get_array()
    assert np.array_equal(image, [[0.5] * 3, [1.5] * 3])
    assert [row[:3] for row in media.table] == [["b", "1x4x4", 5.0], ["a", "1x4x4", 5.0]]


def test_table_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(Module(), [FARMSTempBalance(table_every_n=1, assign_func="tb_linear_map")], logger=logger)
    tags = read_events(tmp_path).Tags()
    assert "farms/report/text_summary" in tags["tensors"]
    assert tags["images"] == []


@pytest.fixture(scope="module")
def mlflow_logger(tmp_path_factory: Any) -> Callable[..., Any]:
    """Makes loggers that write into one store, whose tables take long to set up."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from lightning.pytorch.loggers import MLFlowLogger

    folder = tmp_path_factory.mktemp("mlflow")
    options = {"tracking_uri": f"sqlite:///{folder / 'runs.db'}", "artifact_location": folder.as_uri()}

    return lambda **other: MLFlowLogger(**{**options, **other})


# What MLflow's client and its packages say of themselves.
@pytest.mark.filterwarnings("ignore")
def test_mlflow(mlflow_logger: Callable[[], Any], tmp_path: Path) -> None:
    logger = mlflow_logger()
    balance = FARMSTempBalance(histogram_every_n=1, table_every_n=2, assign_func="tb_linear_map")
    fit(Module(), [balance], logger=logger)
    client, run_id = logger.experiment, logger.run_id
    assert client.get_run(run_id).data.metrics.keys() >= WHILE_TRAINING | PER_LAYER
    points = client.get_metric_history(run_id, "farms/alpha/net.5")
    assert [point.step for point in points] == [epoch * BATCHES for epoch in range(EPOCHS + 1)]
    assert balance.report is not None
    assert points[-1].value == balance.report.layers["net.5"].alpha
    for step in (0, 8, 12):
        found = {file.path for file in client.list_artifacts(run_id, f"farms/step_{step}")}
        names = {"report.csv", *(f"{name.removeprefix('farms/')}.png" for name in MEDIA)}
        assert found == {f"farms/step_{step}/{name}" for name in names}
    text = Path(client.download_artifacts(run_id, "farms/step_12/report.csv", str(tmp_path))).read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["layer"] for row in rows] == LAYERS
    assert [float(row["alpha"]) for row in rows] == list(balance.report.alphas.values())
    assert {row["ratio"] for row in rows} == {""}, "the final weights take no further step"


def test_mlflow_without_a_place_for_tables_ends_no_training(
    mlflow_logger: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "taken").touch()  # a file, where the folder of the artifacts would be
    logger = mlflow_logger(experiment_name="taken", artifact_location=(tmp_path / "taken").as_uri())
    balance = FARMSTempBalance(table_every_n=1, assign_func="tb_linear_map")
    with pytest.warns(UserWarning, match="table and pictures are left out"):
        fit(Module(), [balance], logger=logger)
    assert len(logger.experiment.get_metric_history(logger.run_id, "farms/alpha/net.5")) == EPOCHS + 1


@pytest.mark.filterwarnings("ignore")
def test_mlflow_takes_names_it_does_not_allow(mlflow_logger: Callable[[], Any]) -> None:
    """And more metrics at once than it takes in one batch."""
    ok = LayerRecord(alpha=2.0, kind="real", shape=(1, 4, 4))
    report = Report({"odd[name]": ok, **{f"layer.{index}": ok for index in range(400)}})
    ratios = dict.fromkeys(report.layers, 1.0)
    logger = mlflow_logger()
    log_measurement([logger], Measurement(report, ratios, ratios, {}, 0, 0), RunLog("epoch"))
    metrics = logger.experiment.get_run(logger.run_id).data.metrics
    assert len(metrics) == 3 * 401 + 3
    assert "farms/alpha/oddname" in metrics


def test_wandb_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="every_n is set"):
        fit(
            Module(),
            [FARMSTempBalance(histogram_every_n=1, table_every_n=1, assign_func="tb_linear_map")],
            logger=Recorder(),
        )
