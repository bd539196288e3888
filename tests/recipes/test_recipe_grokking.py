"""The grokking recipe: large initial weights, epochs of many passes, squared error, one picture of many runs."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from recipes.data.repeated_digits import RepeatedDigits
from recipes.grokking.__main__ import main
from recipes.grokking.task import SquaredErrorClassification
from recipes.models.mlp import ScaledMLP
from recipes.train import train

Settings = Callable[..., DictConfig]


def test_initial_weights_are_those_of_torch_times_the_scale() -> None:
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10))
    torch.manual_seed(3)
    scaled = ScaledMLP(width=20, init_scale=8.0)
    expected = [8 * parameter for parameter in plain.parameters()]
    assert all(torch.equal(*pair) for pair in zip(scaled.parameters(), expected, strict=True))
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter *= 8
    torch.testing.assert_close(scaled(images), plain(images.flatten(1)))


@pytest.mark.parametrize(
    ("options", "word"), [({"width": 0}, "width"), ({"depth": 0}, "depth"), ({"init_scale": 0}, "init_scale")]
)
def test_networks_that_cannot_be_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ScaledMLP(**options)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"in_features is 64, got images \(1, 32, 32\) of 1024"):
        ScaledMLP().check_input((1, 32, 32))


def epoch_of(data: RepeatedDigits, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the batches of an epoch; Lightning sets the epoch in the same way."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def test_an_epoch_is_so_many_passes() -> None:
    data = RepeatedDigits(passes=3, train_size=100, batch_size=40)
    data.setup("fit")
    batches = epoch_of(data, 0)
    assert [len(labels) for _, labels in batches] == [40, 40, 20] * 3
    expected = data.datasets["train"].tensors[0].flatten(1).sort(dim=0).values
    for first in (0, 3, 6):
        images = torch.cat([images for images, _ in batches[first : first + 3]])
        assert torch.equal(images.flatten(1).sort(dim=0).values, expected), "a pass has each image once"


def test_an_epoch_follows_from_seed_and_number() -> None:
    data = RepeatedDigits(passes=2, train_size=100, batch_size=50)
    data.setup("fit")
    later = epoch_of(data, 5)
    torch.rand(7)  # what others draw changes nothing
    assert all(torch.equal(a[1], b[1]) for a, b in zip(later, epoch_of(data, 5), strict=True))
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(later, epoch_of(data, 6), strict=True))


def test_less_than_one_pass_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.passes"):
        RepeatedDigits(passes=0)


def test_the_loss_is_the_squared_error_to_one_hot_labels() -> None:
    task = SquaredErrorClassification(nn.Identity(), 3, torch.optim.SGD)  # type: ignore[arg-type]
    logits = torch.tensor([[0.5, 0.0, 1.0], [0.0, 2.0, 0.0]])
    assert float(task.loss(logits, torch.tensor([2, 1]))) == pytest.approx((0.25 + 1) / 6)


def test_runs_are_drawn_in_one_picture(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.summary.draw_run", lambda *args, **options: [])  # seconds, and tested elsewhere
    folders = [tmp_path / "decay", tmp_path / "no_decay"]
    small = ("data.passes=2", "trainer.max_epochs=2", "logger=csv", "~callbacks.progress", "model.net.width=40")
    for folder, decay in zip(folders, (0.1, 0), strict=True):
        train(
            settings(
                "experiment=grokking_mlp", *small, f"optimizer.weight_decay={decay}", f"paths.run_dir={folder}"
            )
        )
    monkeypatch.setattr(sys, "argv", ["grokking", *map(str, folders), "--out", str(tmp_path)])
    main()
    assert (tmp_path / "grokking.png").stat().st_size > 10_000
    with (tmp_path / "grokking.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows[::3]] == ["initial weights x 8, decay 0.1", "initial weights x 8, decay 0"]
    assert [row["step"] for row in rows] == ["0", "10", "20"] * 2
    layers = [f"net.layers.{index}" for index in range(3)]
    for row in (rows[1], rows[2]):
        assert 0 <= float(row["train_accuracy"]) <= 1
        assert all(1 < float(row[f"alpha {layer}"]) < 4 and float(row[f"traps {layer}"]) >= 0 for layer in layers)


COLUMNS = b"step,farms/alpha/net.a,train/accuracy,val/accuracy,weight_norm\n"
ROWS = b"0,2.1,,,\n9,,0.5,0.4,40\n10,2.05,,,\n19,,0.9,0.4,41\n"


@pytest.mark.parametrize(
    ("metrics", "settings", "word"),
    [
        (COLUMNS + b"0,abc,,,\n9,,0.5,0.4,40\n", None, "abc"),
        (COLUMNS.replace(b"step", b"epoch") + ROWS, None, "step"),
        (b"\xff\xfe" + COLUMNS + ROWS, None, "utf-8"),
        (b"", None, "lacks alphas"),
        (COLUMNS + ROWS, "optimizer: {weight_de", "config.yaml"),
        (COLUMNS + ROWS, "optimizer: {weight_decay: 0.1}", "config.yaml"),
        (COLUMNS + ROWS, "", "config.yaml"),
    ],
)
def test_damaged_folders_end_in_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    metrics: bytes,
    settings: str | None,
    word: str,
) -> None:
    (tmp_path / "metrics.csv").write_bytes(metrics)
    if settings is not None:
        (tmp_path / "config.yaml").write_text(settings)
    monkeypatch.setattr(sys, "argv", ["grokking", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert word in capsys.readouterr().err


def test_runs_of_one_setting_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_bytes(COLUMNS + ROWS)
        settings = "optimizer: {weight_decay: 0.1}\nmodel: {net: {init_scale: 8}}"
        (tmp_path / name / "config.yaml").write_text(settings)
    folders = [str(tmp_path / name) for name in ("first", "second")]
    monkeypatch.setattr(sys, "argv", ["grokking", *folders, "--out", str(tmp_path)])
    main()
    with (tmp_path / "grokking.csv").open(newline="") as file:
        titles = {row["run"] for row in csv.DictReader(file)}
    assert titles == {f"initial weights x 8, decay 0.1, {name}" for name in ("first", "second")}


def test_half_a_line_is_not_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"\xef\xbb\xbf" + COLUMNS + ROWS + b"20,1.9")
    monkeypatch.setattr(sys, "argv", ["grokking", str(tmp_path), "--out", str(tmp_path)])
    main()
    with (tmp_path / "grokking.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "10"]


def test_a_place_that_cannot_be_written_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.csv").write_bytes(COLUMNS + ROWS)
    monkeypatch.setattr(sys, "argv", ["grokking", str(tmp_path), "--out", str(tmp_path / "metrics.csv")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--out" in capsys.readouterr().err


def test_a_folder_of_another_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["grokking", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "experiment=grokking_mlp" in capsys.readouterr().err
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,1.0\n")
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "lacks alphas" in capsys.readouterr().err
