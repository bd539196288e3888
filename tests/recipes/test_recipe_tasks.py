"""Forecasts of flows: the rollout, where gradients go, exact dynamics, and training through a real Trainer."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import farms_tb
from recipes.config import build
from recipes.errors import RecipeError
from recipes.metrics import FieldErrors
from recipes.models.unet import UNet
from recipes.tasks import FieldRegression, Forecast, rollout
from recipes.train import train
from tests.helpers import LIGHTNING_NOISE
from tests.recipes.scores_in_pair import score_in_pair, scores
from tests.spectra.test_distributed import free_port

Settings = Callable[..., DictConfig]
Pair = tuple[Tensor, Tensor]
CHANNELS, HISTORY, FUTURE = 2, 3, 4


class Shift(nn.Module):
    """The exact dynamics of `advection`: the newest frame, moved on by as many points as it moved before."""

    def forward(self, window: Tensor) -> Tensor:
        return window[:, -CHANNELS:].roll([1] * (window.ndim - 2), dims=list(range(2, window.ndim)))


def advection(samples: int, *space: int, seed: int = 0) -> Pair:
    """Smooth periodic fields that move by one point a frame along every axis: history and future."""
    generator = torch.Generator().manual_seed(seed)
    modes = torch.zeros(samples, CHANNELS, *space, dtype=torch.complex64)
    few = (slice(None), slice(None), *(slice(0, 4) for _ in space))
    modes[few] = torch.randn(modes[few].shape, dtype=torch.complex64, generator=generator)
    first = torch.fft.ifftn(modes, dim=list(range(2, 2 + len(space))), norm="forward").real
    dims = list(range(2, 2 + len(space)))
    frames = [first.roll([step] * len(space), dims=dims) for step in range(HISTORY + FUTURE)]
    truth = torch.stack(frames, dim=1)
    return truth[:, :HISTORY], truth[:, HISTORY:]


def small_net(dimension: int) -> nn.Module:
    convolution = (nn.Conv1d, nn.Conv2d)[dimension - 1]
    return nn.Sequential(
        convolution(HISTORY * CHANNELS, 5, 3, padding=1), nn.Tanh(), convolution(5, CHANNELS, 3, padding=1)
    )


def forecast(net: nn.Module, lr: float = 0.01, **options: Any) -> Forecast:
    return Forecast(net, partial(torch.optim.Adam, lr=lr), **options)


def slow_rollout(net: nn.Module, history: Tensor, steps: int) -> Tensor:
    """Sample by sample, from a list of all frames."""
    forecasts = []
    for sample in history:
        frames = list(sample)
        for _ in range(steps):
            window = torch.cat(frames[-HISTORY:])
            frames.append(net(window[None])[0])
        forecasts.append(torch.stack(frames[HISTORY:]))
    return torch.stack(forecasts)


@pytest.mark.parametrize("space", [(16,), (8, 12)])
def test_rollout_against_a_slow_reference(space: tuple[int, ...]) -> None:
    net, (history, _) = small_net(len(space)), advection(3, *space)
    with torch.no_grad():
        found = rollout(net, history, FUTURE)
        assert found.shape == (3, FUTURE, CHANNELS, *space)
        torch.testing.assert_close(found, slow_rollout(net, history, FUTURE))
        torch.testing.assert_close(rollout(net, history, 2 * FUTURE)[:, :FUTURE], found)


@pytest.mark.parametrize("space", [(16,), (8, 12)])
def test_exact_dynamics_have_no_error(space: tuple[int, ...]) -> None:
    history, future = advection(3, *space)
    task = forecast(Shift())
    assert torch.equal(task.predict((history, future)), future)
    assert not torch.equal(task.predict((history.roll(1, dims=-1), future)), future)


def gradient(task: Forecast, batch: Pair, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, float]:
    """Gradient and loss of one training step."""
    monkeypatch.setattr(task, "_log_epoch", lambda *args, **values: None)
    task.zero_grad()
    loss = task.training_step(batch, 0)
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in task.net.parameters()]), float(loss.detach())


def slow_gradient(net: nn.Module, batch: Pair, graded: int, forced: bool) -> tuple[Tensor, float]:
    """The same, each frame from a window that was made beforehand and cut off the graph where it has to be."""
    history, future = batch
    frames, loss = list(history.unbind(1)), torch.tensor(0.0)
    for step, truth in enumerate(future.unbind(1)):
        counts = step >= FUTURE - graded
        frame = net(torch.cat(frames[-HISTORY:], dim=1))
        loss = loss + (frame - truth).square().mean() * counts
        frames.append(truth if forced else (frame if counts else frame.detach()))
    grads = torch.autograd.grad(loss, list(net.parameters()))
    return torch.cat([grad.flatten() for grad in grads]), float(loss.detach())


@pytest.mark.parametrize(
    ("options", "graded", "forced"),
    [
        ({}, FUTURE, False),
        ({"unroll_steps": 1}, 1, False),
        ({"unroll_steps": 2}, 2, False),
        ({"unroll_steps": 20}, FUTURE, False),
        ({"teacher_forcing": True}, FUTURE, True),
    ],
    ids=str,
)
def test_gradients_of_training(
    options: dict[str, Any], graded: int, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, batch = small_net(1), advection(3, 16)
    found, loss = gradient(forecast(net, **options), batch, monkeypatch)
    expected, expected_loss = slow_gradient(net, batch, graded, forced)
    torch.testing.assert_close(found, expected)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    # Every choice has a gradient of its own.
    for others in ({}, {"unroll_steps": 1}, {"unroll_steps": 3}, {"teacher_forcing": True}):
        if others != options and not (others == {} and options == {"unroll_steps": 20}):
            assert not torch.allclose(gradient(forecast(net, **others), batch, monkeypatch)[0], found)


def test_no_graph_is_kept_before_the_last_frames() -> None:
    """One frame of gradients keeps as much whether one or fifty frames come before it."""

    def kept(steps: int, graded: int | None) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            rollout(net, history, steps, graded)
        return sum(sizes)

    net, (history, _) = small_net(1), advection(2, 16)
    assert kept(50, 1) == kept(1, 1) > 0
    assert kept(5, None) > 4 * kept(1, 1)
    with torch.no_grad():
        assert kept(5, None) == 0


def test_a_rollout_that_does_not_fit_says_what_to_set() -> None:
    history, _ = advection(1, 16)
    with pytest.raises(RecipeError, match=r"takes 4 channels, but 3 frames of 2 channels are 6; set task.in_ch"):
        rollout(UNet(4, CHANNELS, width=2, dimension=1), history, 1)
    with pytest.raises(RecipeError, match=r"must map \(1, 6, 16\) .* frame \(1, 2, 16\), not to \(1, 5, 16\)"):
        rollout(nn.Conv1d(6, 5, 1), history, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unroll_steps": 0}, "model.unroll_steps must be null or at least 1, got 0"),
        ({"unroll_steps": 2, "teacher_forcing": True}, "model.unroll_steps is for rollouts.*set one of them"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forecast(small_net(1), **options)


def loader(pair: Pair, batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*pair), batch_size=batch_size)


def trainer(callbacks: list[Any] | None = None, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", logger=False, callbacks=callbacks, **quiet, **options)


def with_noise(test: Any) -> Any:
    for mark in LIGHTNING_NOISE:
        test = mark(test)
    return test


@with_noise
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_score_is_logged_at_the_test(batch_size: int) -> None:
    """Whatever the batch size, those of the whole set; a second test does not see the first."""
    pair = advection(5, 16)
    task = forecast(small_net(1))
    runner = trainer()
    runner.test(task, loader(advection(3, 16, seed=7)), verbose=False)
    scores = runner.test(task, loader(pair, batch_size), verbose=False)[0]
    metric = FieldErrors()
    with torch.no_grad():
        prediction = task.predict(pair)
    metric.update(prediction.flatten(1, 2), pair[1].flatten(1, 2))
    expected = {f"test/{name}": float(value) for name, value in metric.compute().items()}
    expected["test/loss"] = float((prediction - pair[1]).square().mean((0, 2, 3)).sum())
    assert scores == pytest.approx(expected, rel=1e-4)


@with_noise
def test_static_fields_have_the_same_scores() -> None:
    inputs, targets = torch.randn(5, 2, 16, 16), torch.randn(5, 3, 16, 16)
    task = FieldRegression(nn.Conv2d(2, 3, 1), partial(torch.optim.Adam, lr=0.01))
    scores = trainer().test(task, loader((inputs, targets), 2), verbose=False)[0]
    metric = FieldErrors()
    with torch.no_grad():
        metric.update(task.net(inputs), targets)
    for name, value in metric.compute().items():
        assert scores[f"test/{name}"] == pytest.approx(float(value), rel=1e-4)
    (validated,) = trainer().validate(task, loader((inputs, targets), 2), verbose=False)
    assert set(validated) == {"val/nrmse", "val/relative_l2", "val/loss"}
    for name in ("nrmse", "relative_l2", "loss"):
        assert validated[f"val/{name}"] == pytest.approx(scores[f"test/{name}"], rel=1e-4)


@with_noise
def test_a_sample_counts_once_however_many_processes_share_the_set(tmp_path: Path) -> None:
    """Five samples on two processes: one of them sees the first sample a second time."""
    context = multiprocessing.get_context("spawn")
    port = free_port()
    pair = [context.Process(target=score_in_pair, args=(rank, port, tmp_path)) for rank in (0, 1)]
    try:
        for process in pair:
            process.start()
        alone = scores(devices=1)
        for process in pair:
            process.join(200)
        assert [process.exitcode for process in pair] == [0, 0]
    finally:
        for process in pair:
            process.kill()
    for rank in (0, 1):
        shared = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert shared.keys() == alone.keys()
        for name, expected in alone.items():
            assert shared[name] == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model=fno_cfd1d", "data.history=5"), r"5 frames of 3 .* task.in_channels=15 task.out_channels=3"),
        (
            ("model=unet_cfd1d", "task.out_channels=1"),
            r"10 frames of 3 .* task.in_channels=30 task.out_channels=3",
        ),
        (("model=fno_cfd2d",), r"model=fno_cfd2d does not fit data=pdebench_cfd1d: .* in 2D, got .* \(3, 16\)"),
        (("model=unet_cfd2d",), r"model=unet_cfd2d does not fit data=pdebench_cfd1d: .* in 2D, .* \(3, 16\)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_models_that_do_not_fit_the_flow_stop_the_run(
    settings: Settings, fake_pdebench: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(settings("data=pdebench_cfd1d", "trainer=cpu", "logger=csv", *overrides))


class OwnTrajectories(LightningDataModule):
    """Trajectories that say of themselves only what they are."""

    kind = "trajectories"

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(advection(8, 16))

    val_dataloader = test_dataloader = train_dataloader


def test_trajectories_of_ones_own_need_not_tell_their_channels(settings: Settings) -> None:
    own = ("model=unet_cfd1d", "model.net.width=4", f"task.in_channels={HISTORY * CHANNELS}", "balancing=off")
    cfg = settings("data=pdebench_cfd1d", *own, "trainer=cpu", "trainer.max_epochs=1", "logger=csv")
    cfg.data = {"_target_": f"{__name__}.OwnTrajectories"}
    with pytest.raises(RecipeError, match=f"set task.out_channels={CHANNELS}"):
        train(cfg.copy())
    cfg.task.out_channels = CHANNELS
    assert "test/nrmse" in train(cfg)["test"]


@with_noise
@pytest.mark.parametrize("options", [{}, {"unroll_steps": 2}, {"teacher_forcing": True}], ids=str)
def test_balanced_training_learns_advection(options: dict[str, Any]) -> None:
    """Through a real Trainer with the callback; the forecast beats the one that nothing moves."""
    losses: list[float] = []

    class Watch(farms_tb.FARMSTempBalance):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            losses.append(float(trainer.callback_metrics["train/loss"]))

    balancer = Watch(assign_func="tb_linear_map")
    task = forecast(UNet(HISTORY * CHANNELS, CHANNELS, width=8, dimension=1), lr=0.01, **options)
    runner = trainer([balancer], max_epochs=15, num_sanity_val_steps=0)
    runner.fit(task, loader(advection(64, 32), 16), loader(advection(8, 32, seed=1)))
    history, future = advection(16, 32, seed=2)
    scores = runner.test(task, loader((history, future)), verbose=False)[0]
    persistence = FieldErrors()
    persistence.update(history[:, -1:].expand_as(future).flatten(1, 2), future.flatten(1, 2))
    assert losses[-1] < losses[0] / 4
    assert scores["test/nrmse"] < 0.75 * float(persistence.compute()["nrmse"])
    assert len({round(ratio, 6) for ratio in balancer.ratios.values()}) > 3


def test_unets_have_the_parameters_of_the_description() -> None:
    """Counted by hand, layer by layer, for 10 frames of 3 (4) channels."""

    def count(kernel: int, upsampled: int, in_channels: int, out_channels: int) -> int:
        pairs = [(in_channels, 32), (32, 64), (64, 128), (128, 256), (256, 512)]
        encoders = sum(kernel * (i * o + o * o) + 4 * o for i, o in pairs)
        decoders = sum(upsampled * 2 * o * o + o + kernel * 3 * o * o + 4 * o for o in (256, 128, 64, 32))
        return encoders + decoders + 33 * out_channels

    for dimension, channels, expected in ((1, 3, 2_710_659), (2, 4, 7_773_796)):
        net = UNet(10 * channels, channels, width=32, dimension=dimension)
        found = sum(parameter.numel() for parameter in net.parameters())
        assert found == count(3**dimension, 2**dimension, 10 * channels, channels) == expected
        assert net(torch.randn(2, 10 * channels, *[16] * dimension)).shape == (2, channels, *[16] * dimension)


def test_unet_of_another_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fields in 1D, \(channels, \*space\), got shape \(3, 64, 64\)"):
        UNet(dimension=1).check_input((3, 64, 64))
    with pytest.raises(ValueError, match="dimension must be 1 or 2, got 3"):
        UNet(dimension=3)


FLOWS = {"cfd1d": (30, 3, (128,)), "cfd2d": (40, 4, (64, 64))}


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("kind", ["fno", "unet"])
def test_flow_models_forecast_and_have_layers(settings: Settings, kind: str, flow: str) -> None:
    in_channels, out_channels, space = FLOWS[flow]
    cfg = settings(f"model={kind}_{flow}", f"task.in_channels={in_channels}", f"task.out_channels={out_channels}")
    task = build(cfg, "model", optimizer=partial(torch.optim.Adam, lr=1e-3))
    assert isinstance(task, Forecast)
    assert task.unroll_steps == (None if kind == "fno" else 20)
    history, future = torch.randn(1, 10, out_channels, *space), torch.zeros(1, 2, out_channels, *space)
    with torch.no_grad():
        assert task.predict((history, future)).shape == future.shape
    layers = farms_tb.analyze(task).layers
    if kind == "unet":
        kernel = 3 ** len(space)
        assert len(layers) == 23  # ten in the encoders and the bottleneck, twelve in the decoders, the head
        assert layers["net.encoders.1.conv1"].shape == (kernel, 64, 32)
        assert layers["net.decoders.0.up"].shape == (2 ** len(space), 512, 256)
    else:
        spectral = {name: layer.shape for name, layer in layers.items() if layer.kind == "spectral"}
        modes = math.prod((24, 12)[-len(space) :]) if len(space) == 2 else 12
        assert spectral == {f"net.fno_blocks.convs.{index}": (modes, 20, 20) for index in range(4)}
        assert layers["net.lifting.fcs.0"].shape == (1, in_channels + len(space), 20)
        assert layers["net.projection.fcs.0"].shape == (1, 128, 20)
        assert task.net.domain_padding._padding[str(torch.Size(space))] == [2, 2] * len(space)
        assert len(layers) == 4 + 4 + 1 + 2
    unmeasured = {name for name, layer in layers.items() if layer.status != "ok"}
    assert unmeasured <= {"net.head", "net.projection.fcs.1"}  # as many eigenvalues as channels of a frame
