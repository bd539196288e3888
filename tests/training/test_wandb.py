"""What arrives in W&B, read back from the file of a real offline run."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb")

import wandb
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn

from farms_tb import EsdHistogram, FARMSTempBalance, LayerRecord, Report
from farms_tb.printable import printable
from farms_tb.training.metrics import COLUMNS, LAYER_METRICS, MAX_LOGGED_LAYERS, Measurement, RunLog
from farms_tb.training.sinks import log_measurement
from tests.helpers import BATCHES, EPOCHS, LIGHTNING_NOISE, Module, fit, read_wandb_file
from tests.training.test_logging import LAYERS, MEDIA, NUMBERED, WHILE_TRAINING

pytestmark = LIGHTNING_NOISE
STEPS = [epoch * BATCHES for epoch in range(EPOCHS + 1)]


class OfflineRun:
    """A run that is over, and its folder.

    Attributes:
        rows: each logged row, with only the leaves of the nested values: `("key",)` or `("key", "part")`.
        definitions: of metrics, by name.
    """

    def __init__(self, folder: Path) -> None:
        wandb.finish()
        wandb.teardown()
        (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        self.files = path.parent / "files"
        self.rows: list[dict[tuple[str, ...], Any]] = []
        self.definitions: dict[str, Any] = {}
        self.number_of_definitions = 0
        self.summary: dict[tuple[str, ...], Any] = {}
        for record in read_wandb_file(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                self.rows.append(leaves(record.history.item))
            elif kind == "summary":
                self.summary |= leaves(record.summary.update)
            elif kind == "metric":
                self.definitions[record.metric.name or record.metric.glob_name] = record.metric
                self.number_of_definitions += 1

    @property
    def farms_rows(self) -> list[dict[str, Any]]:
        """Rows of the callback, nested values put together again."""
        found = []
        for row in self.rows:
            whole: dict[str, Any] = {}
            for (key, *inner), value in row.items():
                whole[key] = {**whole.get(key, {}), inner[0]: value} if inner else value
            found.append(whole)
        return [row for row in found if any("farms" in key for key in row)]


def leaves(items: Any) -> dict[tuple[str, ...], Any]:
    """Flatten items, whichever way a nested value was written: as one of JSON, or one for each of its parts."""
    found: dict[tuple[str, ...], Any] = {}
    for item in items:
        path, value = tuple(item.nested_key) or (item.key,), json.loads(item.value_json)
        found |= {(*path, key): part for key, part in value.items()} if isinstance(value, dict) else {path: value}
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Iterator[OfflineRun]:
    """A run with everything that can be logged."""
    folder = tmp_path_factory.mktemp("wandb")
    logger = WandbLogger(project="tests", save_dir=folder, offline=True)
    fit(
        Module(),
        [FARMSTempBalance(histogram_every_n=2, table_every_n=2, assign_func="tb_linear_map")],
        logger=logger,
    )
    return OfflineRun(folder)


def test_rows(run: OfflineRun) -> None:
    assert [row["epoch"] for row in run.farms_rows] == list(range(EPOCHS + 1))
    assert [row["trainer/global_step"] for row in run.farms_rows] == STEPS
    for row in run.farms_rows[:-1]:
        assert {key for key in row if key.startswith("farms_") and "_esd" not in key} == NUMBERED
        assert row.keys() >= WHILE_TRAINING
        assert not any(key.startswith(("farms/alpha/", "farms/ratio/", "farms/lr/")) for key in row)


def test_sections_are_in_order_of_depth(run: OfflineRun) -> None:
    """W&B sorts a section's panels by name; a section is what is before the first slash, or before the last."""
    keys = run.farms_rows[0].keys()
    for metric in ("alpha", "ratio", "lr", "esd"):
        section = sorted(key for key in keys if key.partition("/")[0] == f"farms_{metric}")
        assert [key.split("_", 2)[2] for key in section] == LAYERS
        assert {key.rpartition("/")[0] for key in section} == {f"farms_{metric}"}


def test_histograms(run: OfflineRun) -> None:
    with_histograms = [row for row in run.farms_rows if "farms_esd/02_net.5" in row]
    assert [row["epoch"] for row in with_histograms] == [0, 2]
    histogram = with_histograms[0]["farms_esd/02_net.5"]
    assert histogram["_type"] == "histogram"
    assert len(histogram["bins"]) == len(histogram["values"]) + 1


def test_table(run: OfflineRun) -> None:
    tables = [row["farms/report"] for row in run.farms_rows if "farms/report" in row]
    assert [row["epoch"] for row in run.farms_rows if "farms/report" in row] == [0, 2, 3]
    for entry, alphas in zip(tables, (run.farms_rows[0], run.farms_rows[2], run.farms_rows[3]), strict=True):
        content = json.loads((run.files / entry["path"]).read_text())
        assert content["columns"] == list(COLUMNS)
        assert [line[0] for line in content["data"]] == LAYERS
        by_depth = [alphas[f"farms_alpha/{depth:02d}_{layer}"] for depth, layer in enumerate(LAYERS)]
        assert [line[2] for line in content["data"]] == pytest.approx(by_depth)
    first = json.loads((run.files / tables[0]["path"]).read_text())["data"][1]
    assert first[1] == "1x16x12"
    assert first[COLUMNS.index("ratio")] == run.farms_rows[0]["farms_ratio/01_net.2"]
    assert first[-1] == "ok"


def test_pictures(run: OfflineRun) -> None:
    from PIL import Image

    for row in (run.farms_rows[index] for index in (0, 2, 3)):
        assert {key for key in row if isinstance(row[key], dict) and row[key]["_type"] == "image-file"} == MEDIA
        for name in MEDIA:
            with Image.open(run.files / row[name]["path"]) as image:
                assert image.size == (row[name]["width"], row[name]["height"])
                assert len(image.convert("L").getcolors(256) or []) > 20, "not an empty page"


def test_every_curve_is_plotted_against_the_epoch(run: OfflineRun) -> None:
    """Each by its own definition: the logger has a pattern `*` that matches them too."""
    keys = {key for row in run.farms_rows for key in row if key.startswith("farms")}
    assert {key: run.definitions[key].step_metric for key in keys} == dict.fromkeys(keys, "epoch")
    assert run.number_of_definitions == len(run.definitions), "defined once"


def test_summary_has_the_last_of_every_layer(run: OfflineRun) -> None:
    ratios, alphas = run.farms_rows[-2], run.farms_rows[-1]
    for depth, layer in enumerate(LAYERS):
        for metric, row in (("alpha", alphas), ("ratio", ratios)):
            key = f"farms_{metric}/{depth:02d}_{layer}"
            assert run.summary[key,] == row[key]
    assert run.definitions["farms/alpha_mean"].summary.min
    assert run.definitions["farms/alpha_mean"].summary.last


@pytest.mark.parametrize(
    ("options", "axis"),
    [
        ({}, "mine-epoch"),
        ({"x_axis": "step"}, "trainer/global_step"),
        ({"every_n_steps": 2}, "trainer/global_step"),
        ({"every_n_steps": 2, "x_axis": "epoch"}, "mine-epoch"),
    ],
)
def test_x_axis_and_prefix(tmp_path: Path, options: dict[str, Any], axis: str) -> None:
    logger = WandbLogger(project="tests", save_dir=tmp_path, offline=True, prefix="mine")
    fit(Module(), [FARMSTempBalance(assign_func="tb_linear_map", **options)], logger=logger)
    run = OfflineRun(tmp_path)
    farms = {key: row for row in run.farms_rows for key in row if "farms" in key}
    assert {key.partition("/")[0] for key in farms} == {
        f"mine-farms{end}" for end in ("", "_alpha", "_ratio", "_lr", "_rank_share")
    }
    assert {run.definitions[key].step_metric for key in farms} == {axis}
    assert all(axis in row for row in run.farms_rows)


ODD_NAMES = [
    *("q*k", "ends*", "*", "a b", "ü\"'[x]<y>", "a/b", "a:b", "?", "\\", "{}", "%s", "**"),
    *("\ud800", "\x1b[2J", "$\\x$"),
]


def test_odd_names_of_layers(tmp_path: Path) -> None:
    """W&B knows `*` as a pattern: it refuses one in the middle, and one at the end matches other names."""
    net = nn.Sequential(nn.Linear(6, 12), nn.ModuleDict({name: nn.Linear(12, 12) for name in ODD_NAMES}))
    net.append(nn.Linear(12, 2))

    class Odd(Module):
        def loss(self, batch: Any) -> Tensor:
            hidden = net[0](batch[0])
            for layer in net[1].values():
                hidden = layer(hidden)
            return net[2](hidden).square().mean()

    logger = WandbLogger(project="tests", save_dir=tmp_path, offline=True)
    fit(
        Odd(net=net),
        [FARMSTempBalance(histogram_every_n=2, table_every_n=2, assign_func="tb_linear_map")],
        logger=logger,
        max_epochs=2,
    )
    run = OfflineRun(tmp_path)
    for depth, name in enumerate(ODD_NAMES, start=1):
        key = f"farms_alpha/{depth:02d}_net.1.{printable(name)}"
        assert all(key in row for row in run.farms_rows), name
        assert (key in run.definitions) == ("*" not in name), name
    assert run.definitions["farms_alpha/00_net.0"].step_metric == "epoch"


def large_report(layers: int) -> Report:
    """A report made by hand of a model with as many metrics a layer as there can be."""
    histogram = EsdHistogram((1,) * 50, -3.0, 1.0)
    return Report(
        {
            f"blocks.{index}.linear": LayerRecord(
                alpha=2.0 + 0.001 * index,
                null_mean=2.1,
                null_std=0.1,
                rank_99=40,
                num_eigenvalues=64,
                kind="real",
                shape=(1, 64, 64),
                adapter_change=0.1,
                histogram=histogram,
            )
            for index in range(layers)
        }
    )


@pytest.mark.parametrize("beyond", [0, 1])
def test_never_more_than_ten_thousand_keys(
    run: OfflineRun, tmp_path: Path, beyond: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting every leaf of every nested value, of rows and summary, of the largest model that is logged."""
    # The pictures are the same few keys for any model, and take seconds to draw of so many layers.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    pictures = {key for row in run.rows for key in row if key[0] in MEDIA}
    assert {key[0] for key in pictures} == MEDIA
    report = large_report(MAX_LOGGED_LAYERS + beyond)
    ones = dict.fromkeys(report.layers, 1.0)
    summary = {"farms/ratio_mean": 1.0, "farms/lambda": 1.0}
    logger, run_log = WandbLogger(project="tests", save_dir=tmp_path, offline=True), RunLog("epoch")
    measurement = Measurement(report, ones, ones, summary, 0, 0, table=not beyond)
    run_log.add(measurement)
    log_measurement([logger], measurement, run_log)
    large = OfflineRun(tmp_path)
    keys = set().union(*large.rows) | set(large.summary) | pictures
    per_layer = {key for key in keys if key[0].startswith("farms_")}
    assert len(per_layer) == (0 if beyond else (len(LAYER_METRICS) + 3) * MAX_LOGGED_LAYERS)
    others = {".".join(key) for key in keys - per_layer}
    assert {"farms/alpha_mean", "farms/lambda"} <= others
    assert beyond or "farms/report.path" in others
    assert len(others) < 100
    assert len(keys) < 10_000


def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from farms_tb import FARMSTrainerCallback
    from tests.training.test_huggingface import FIRST, train

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    callback = FARMSTrainerCallback(table_every_n=9, histogram_every_n=2, assign_func="tb_linear_map")
    train(tmp_path / "run", callback, report_to=["wandb"])
    run = OfflineRun(tmp_path)
    rows = [row for row in run.farms_rows if f"train/farms_alpha/02_{FIRST}" in row]
    assert [row["train/epoch"] for row in rows] == list(range(EPOCHS + 1))
    assert [f"train/farms_esd/02_{FIRST}" in row for row in rows] == [True, False, True, False]
    assert ["train/farms/report" in row for row in rows] == [True, False, False, True]
    assert {f"train/{name}" for name in MEDIA} <= rows[-1].keys()
    keys = {key for row in rows for key in row if "/farms" in key}
    assert {run.definitions[key].step_metric for key in keys} == {"train/epoch"}
    assert run.definitions["*"].step_metric == "train/global_step"


@pytest.mark.parametrize("trainer", ["Lightning", "Hugging Face"])
def test_a_disk_without_room_for_tables_ends_no_training(
    trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("wandb.Table.bind_to_run", full)
    options: Any = {"table_every_n": 1, "assign_func": "tb_linear_map"}
    if trainer == "Lightning":
        logger = WandbLogger(project="tests", save_dir=tmp_path, offline=True)
        training = partial(fit, Module(), [FARMSTempBalance(**options)], logger=logger)
    else:
        pytest.importorskip("transformers")
        from farms_tb import FARMSTrainerCallback
        from tests.training.test_huggingface import train

        training = partial(train, tmp_path / "run", FARMSTrainerCallback(**options), report_to=["wandb"])
    with pytest.warns(UserWarning, match=r"table and pictures are left out.*No space left"):
        training()
    rows = OfflineRun(tmp_path).farms_rows
    assert len([row for row in rows if any("farms_alpha/" in key for key in row)]) == EPOCHS + 1
    assert not any("report" in key for row in rows for key in row)
