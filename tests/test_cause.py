"""The benchmark of the causes: it looks at a training without changing it, and what it says adds up."""

from __future__ import annotations

import csv
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

pytest.importorskip("transformers")

from benchmarks.cause import __main__ as cause
from benchmarks.cause import report
from benchmarks.cause.bytes import loss_by_frequency
from benchmarks.cause.runs import SETTINGS, TYPES, matrices_of, train
from benchmarks.cause.steps import BATCHES, Steps, signal_share
from recipes.parts import Parts
from tests.helpers import LIGHTNING_NOISE

pytestmark = LIGHTNING_NOISE


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Put torch's threads back, of which the trainings take one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def short(tmp_path: Path) -> list[str]:
    """Settings of a training of three steps on a small text."""
    text = tmp_path / "text.txt"
    words = ["alpha", "layer", "rate", "of", "the", "a", "step", "window", "eigenvalue", "norm"]
    text.write_text(" ".join(random.Random(0).choices(words, k=9000)))
    sizes = ["data.val_bytes=4096", "data.test_bytes=4096", "data.length=32", "model.net.depth=2"]
    return [f"data.path={text}", *sizes, "trainer.max_steps=3", "scheduler.num_warmup_steps=1"]


def weights(parts: Parts) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in parts.model.named_parameters()}


class TestSignalShare:
    def test_is_that_of_a_known_mean_and_noise(self) -> None:
        generator = torch.Generator().manual_seed(0)
        mean, noise = torch.full((50_000,), 0.5, dtype=torch.float64), 1.5
        gradients = mean + noise * torch.randn(40, 50_000, generator=generator, dtype=torch.float64)
        squares = float(gradients.square().sum(1).mean())
        found = signal_share(gradients.sum(0), squares, 40)
        assert found == pytest.approx(0.5**2 / (0.5**2 + noise**2), abs=2e-3)

    def test_is_one_without_noise(self) -> None:
        gradient = torch.tensor([3.0, -4.0])
        assert signal_share(5 * gradient, 25.0, 5) == pytest.approx(1.0)


class TestSteps:
    def test_change_nothing_of_the_training(self, short: list[str]) -> None:
        plain = weights(train("AdamW, both faster", 1, *short))
        watched = weights(train("AdamW, both faster", 1, *short, callback=Steps(1, (0, 1, 2))))
        for name, value in plain.items():
            assert torch.equal(value, watched[name]), name

    def test_say_what_a_step_did(self, short: list[str]) -> None:
        watch = Steps(1, (1,))
        after = train("AdamW", 1, *short, "trainer.max_steps=2", callback=watch)
        # The same settings, so that warm-up and decay are those of two steps; the weights after the first one.
        before: dict[str, torch.Tensor] = {}

        class Keep(Steps):
            def on_train_batch_end(self, trainer, module, *rest):  # type: ignore[no-untyped-def]
                if trainer.global_step == 1:
                    before.update({name: value.detach().clone() for name, value in module.named_parameters()})

        train("AdamW", 1, *short, "trainer.max_steps=2", callback=Keep(1, ()))
        now = weights(after)
        tokens, following = after.data.datasets["train"].tensors
        drawn, size = torch.Generator().manual_seed(1), after.data.batch_size
        batches = [torch.randint(len(tokens), (size,), generator=drawn) for _ in range(BATCHES)]

        def loss(values: dict[str, torch.Tensor]) -> float:
            with torch.no_grad():
                logits = [functional_call(after.model, values, (tokens[chosen],)) for chosen in batches]
                pairs = zip(logits, batches, strict=True)
                return fmean(
                    float(functional.cross_entropy(found.flatten(0, 1), following[chosen].flatten()))
                    for found, chosen in pairs
                )

        assert [row["type"] for row in watch.rows] == list(TYPES)
        for row in watch.rows:
            names = [f"net.{name}" for name in matrices_of(after.model.net)[str(row["type"])]]
            moved = math.sqrt(sum(float((now[name] - before[name]).square().sum()) for name in names))
            size = math.sqrt(sum(float(before[name].square().sum()) for name in names))
            assert row["relative_step"] == pytest.approx(moved / size, rel=1e-4)
            for factor in (1, 4):
                moved_alone = {name: before[name] + factor * (now[name] - before[name]) for name in names}
                gain = loss(before) - loss(before | moved_alone)
                assert row[f"gain_{factor}"] == pytest.approx(gain, rel=1e-2, abs=1e-5)
            assert row["step"] == 2

    def test_every_matrix_has_a_type(self, short: list[str]) -> None:
        net = train("AdamW", 1, *short, "trainer.max_steps=1").model.net
        named = [name for names in matrices_of(net).values() for name in names]
        assert sorted(named) == sorted(name for name, value in net.named_parameters() if value.ndim == 2)


def test_losses_of_the_bytes_add_up_to_that_of_the_text(short: list[str]) -> None:
    parts = train("AdamW", 1, *short)
    tokens, following = parts.data.datasets["test"].tensors
    with torch.no_grad():
        logits = parts.model(tokens)
    whole = float(functional.cross_entropy(logits.flatten(0, 1), following.flatten()))
    rows = loss_by_frequency(parts)
    for role in ("input", "target"):
        chosen = [row for row in rows if row["role"] == role]
        assert sum(float(row["share"]) for row in chosen) == pytest.approx(1)
        assert sum(float(row["share"]) * float(row["loss"]) for row in chosen) == pytest.approx(whole, rel=1e-4)


def test_a_change_is_paired_over_the_seeds_that_both_have() -> None:
    rows = [
        {"setting": setting, "seed": seed, "role": "input", "group": "0 to 3", "loss": loss}
        for setting, losses in {"AdamW": [2.0, 3.0, 4.0, 9.0], "LLR": [1.9, 2.7, 3.8]}.items()
        for seed, loss in enumerate(losses)
    ]
    mean, low, high = report.change(rows, "LLR", "input", "0 to 3") or (0, 0, 0)
    assert mean == pytest.approx(-0.2)
    assert (low, high) == pytest.approx((-0.2 - 0.2484, -0.2 + 0.2484), abs=1e-3)  # t(2) 4.303 * 0.1 / sqrt(3)
    assert report.change(rows, "SGD", "input", "0 to 3") is None


def test_agreement_is_that_of_alpha_and_the_best_multiple() -> None:
    alphas = {"embedding": 1.6, "head": 1.7, "feed-forward": 1.9}
    rows = [{"step": 20.0, "alpha": alpha, "best_factor": 1 / alpha} for alpha in alphas.values()]
    assert report.agreement(rows) == pytest.approx(-1)
    rows += [{"step": 80.0, "alpha": alpha, "best_factor": alpha**2} for alpha in alphas.values()]
    rows += [{"step": 160.0, "alpha": alpha, "best_factor": 4.0} for alpha in alphas.values()]
    assert report.agreement(rows) == pytest.approx(0)  # -1, 1, and none


def test_the_benchmark_goes_on_where_it_stopped(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def run(*options: str) -> str:
        arguments = ["cause", *options, "--moments", "1", "--out", str(out), "--override", *short]
        monkeypatch.setattr(sys, "argv", arguments)
        cause.main()
        return capsys.readouterr().out

    assert "2 of 2: AdamW, seed 2" in run("--seeds", "2", "--settings", "AdamW")
    assert "1 of 2: LLR, seed 1" in run("--seeds", "2", "--settings", "AdamW", "LLR")
    page = (out / "README.md").read_text(encoding="utf-8")
    for picture in ("steps.png", "bytes.png"):
        assert f"]({picture})" in page
        assert (out / picture).stat().st_size > 5000
    with (out / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * len(TYPES)
    assert {row["setting"] for row in rows} <= set(SETTINGS)
    assert "LLR | feed-forward" in page
    # LLR's ratios grow to their values in 50 steps, of which this is the second: 1 + (5 - 1) * 2 / 50.
    assert {row["ratio"] for row in rows if row["setting"] == "LLR" and row["type"] == "embedding"} == {"1.16"}
    assert {row["ratio"] for row in rows if row["setting"] == "AdamW"} == {"1"}


@pytest.mark.parametrize("setting", ["SGD", "AdamW, head faster"])
def test_the_page_of_some_settings_has_what_can_be_said_of_them(
    setting: str, short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--seeds", "1", "--settings", setting, "--moments", "1", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["cause", *options, "--override", *short])
    cause.main()
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| {setting} | head |" in page
    assert ("](steps.png)" in page) == (setting == "SGD") == (tmp_path / "out" / "steps.png").exists()
    assert "## Bytes" not in page, "without the baseline nothing can be compared with it"
    assert "\n\n\n" not in page
