"""The benchmark of the diagnosis: what it trains, how it scores, and that it goes on where it stopped."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.diagnosis import __main__ as diagnosis
from benchmarks.diagnosis import generalisation, held_back, report
from benchmarks.diagnosis.measures import MEASURES
from benchmarks.diagnosis.networks import NETWORKS
from benchmarks.diagnosis.training import Settings, digits, train
from benchmarks.intervals import bootstrap
from benchmarks.rows import Rows

FEW_STEPS = {"CNN": Settings(3), "MLP": Settings(3), "transformer": Settings(3, "AdamW", lr=1e-3)}


@pytest.mark.parametrize(("network", "layer"), [("CNN", "7"), ("MLP", "3"), ("transformer", "blocks.0.key")])
def test_a_frozen_layer_keeps_its_weight_and_no_other_does(network: str, layer: str) -> None:
    net = NETWORKS[network]()
    start = {name: value.clone() for name, value in net.named_parameters()}
    settings = FEW_STEPS[network]
    settings = Settings(3, settings.optimizer, settings.lr, lr_factors={layer: 0.0})
    train(net, digits(100, seed=0), settings, seed=0)
    kept = [name for name, value in net.named_parameters() if torch.equal(value, start[name])]
    assert kept == [f"{layer}.weight"]


def test_noise_replaces_labels_and_keeps_the_images() -> None:
    clean, noisy = digits(200, seed=1), digits(200, seed=1, label_noise=0.5)
    assert torch.equal(clean.images, noisy.images)
    assert torch.equal(clean.test_labels, noisy.test_labels)
    changed = float((clean.labels != noisy.labels).float().mean())
    assert 0.35 < changed < 0.55  # nine tenths of one half


def test_a_run_is_scored_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(held_back.SETTINGS, "MLP", FEW_STEPS["MLP"])
    wanted = [run for run in held_back.runs(2) if run["network"] == "MLP" and run["factor"] == 0]
    rows = Rows(tmp_path / "held_back.csv", held_back.KEYS)
    held_back.measure(wanted[0], rows)
    assert rows[0]["distance"] == 1.0, "a frozen layer has moved less than any other"
    assert all(0 <= float(rows[0][name]) <= 1 for name in MEASURES if name != "ww_alpha")
    again = Rows(tmp_path / "held_back.csv", held_back.KEYS)
    assert list(again.missing(wanted)) == wanted[1:]


def test_networks_of_a_longer_list_begin_with_the_shorter_one() -> None:
    short, long = generalisation.runs(3), generalisation.runs(60)
    assert long[: len(short)] == short
    for depth in generalisation.DEPTHS:
        noise = [run["label_noise"] for run in long if run["depth"] == depth]
        assert sorted({value: noise.count(value) for value in noise}.values()) == [15] * 4


def test_a_network_is_summarised(tmp_path: Path) -> None:
    run = {"depth": 3.0, "net": 0.0, "width": 32.0, "weight_decay": 0.1, "label_noise": 0.2, "train_images": 100.0}
    rows = Rows(tmp_path / "generalisation.csv", generalisation.KEYS)
    generalisation.measure(run, rows)
    assert 0 < float(rows[0]["test_error"]) < 0.6
    assert all(math.isfinite(float(rows[0][name])) for name in generalisation.SUMMARIES if name != "ww_alpha")


def simulated(slopes: tuple[float, float]) -> list[dict[str, float | str]]:
    """Rows whose test error goes with every summary at each depth by one slope, and across depths by another."""
    within, across = slopes
    return [
        {"depth": depth, "net": net, "test_error": net} | dict.fromkeys(generalisation.SUMMARIES, value)
        for depth in generalisation.DEPTHS
        for net in (10 * depth + np.arange(8.0))
        for value in [within * (net - 10 * depth) + across * 10 * depth]
    ]


def test_order_within_and_across_depths_is_told_apart() -> None:
    lines = report.generalisation_table(simulated((1.0, -5.0))).splitlines()
    assert lines[0].count("depth") == 5
    for line in lines[2:]:
        assert line.count("+1.00 (+1.00 to +1.00)") == 4, "at each depth, and on average"
        assert "| -0." in line, "across depths the order is reversed"


def test_intervals_are_those_of_scipys_bootstrap() -> None:
    sample = np.random.default_rng(5).exponential(size=40)
    value, low, high = bootstrap([sample], lambda drawn: float(drawn.mean()))
    expected = stats.bootstrap([sample], np.mean, method="percentile", n_resamples=5000, rng=1).confidence_interval
    assert value == pytest.approx(sample.mean())
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.04)


def test_the_page_is_made_from_the_rows_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(tmp_path / "held_back.csv", held_back.KEYS)
    for run in held_back.runs(2):
        scores = dict.fromkeys([*MEASURES, "ww_warns", "ww_warns_others"], 0.75)
        rows.add([{**run, **scores, "ww_alpha": math.nan, "layer": "3"}])
    monkeypatch.setattr(sys, "argv", ["diagnosis", "--report", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    diagnosis.main()
    torch.set_num_threads(threads)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| FARMS alpha | 0.75 (0.75 to 0.75) |" in page
    assert "| WeightWatcher's alpha | not measured |" in page
    assert (tmp_path / "held_back.png").stat().st_size > 10_000
