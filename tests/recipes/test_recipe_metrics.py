"""PDEBench's error measures against closed forms and slow numpy references, by batches and by processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes.metrics import (
    FieldErrors,
    boundary_rmse,
    conserved_error,
    fourier_rmse,
    max_error,
    nrmse,
    nrmse_by_channel,
    relative_l2,
    relative_l2_by_sample,
    rmse,
)
from tests.spectra.test_distributed import free_port

ROOT = Path(__file__).resolve().parents[2]
SPACES = [(48,), (33,), (32, 48), (17, 30)]
NAMES = ("rmse", "nrmse", "relative_l2", "crmse", "max_error", "brmse", "frmse_low", "frmse_mid", "frmse_high")


def fields(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(shape, generator=generator) + 1
    return target + 0.3 * torch.randn(shape, generator=generator), target


def slow_scores(prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Every score, one sample and channel after the other, in float64."""
    samples, channels = prediction.shape[:2]
    found: dict[str, list[list[float]]] = {name: [] for name in NAMES}
    for sample in range(samples):
        row: dict[str, list[float]] = {name: [] for name in NAMES}
        for channel in range(channels):
            u = target[sample, channel].astype(float)
            e = prediction[sample, channel].astype(float) - u
            row["rmse"].append(math.sqrt(sum(x * x for x in e.flat) / e.size))
            row["nrmse"].append(row["rmse"][-1] / math.sqrt(sum(x * x for x in u.flat) / u.size))
            row["crmse"].append(sum(e.flat) / e.size)
            row["max_error"].append(max(abs(x) for x in e.flat))
            row["brmse"].append(slow_boundary(e))
            for name, value in zip(("low", "mid", "high"), slow_bands(e), strict=True):
                row[f"frmse_{name}"].append(value)
        error, size = (x.astype(float).ravel() for x in (prediction[sample] - target[sample], target[sample]))
        row["relative_l2"].append(math.sqrt((error @ error) / (size @ size)))
        for name, values in row.items():
            found[name].append(values)
    scores = {name: float(np.mean(values)) for name, values in found.items()}
    scores["crmse"] = float(np.mean(np.sqrt(np.mean(np.square(found["crmse"]), axis=0))))
    scores["max_error"] = float(np.mean(np.max(found["max_error"], axis=0)))
    return scores


def slow_boundary(e: np.ndarray) -> float:
    """PDEBench's formulas for one and two dimensions, written out."""
    if e.ndim == 1:
        return math.sqrt((e[0] ** 2 + e[-1] ** 2) / 2)
    nx, ny = e.shape
    total = sum(e[0, j] ** 2 + e[-1, j] ** 2 for j in range(ny)) + sum(
        e[i, 0] ** 2 + e[i, -1] ** 2 for i in range(nx)
    )
    return math.sqrt(total / (2 * nx + 2 * ny))


def slow_bands(e: np.ndarray) -> list[float]:
    """RMSE of the error filtered to each band, in physical space."""
    modes = np.fft.fftn(e)
    bands = []
    for low, high in ((0, 4), (5, 12), (13, math.inf)):
        kept = np.zeros_like(modes)
        for index in np.ndindex(*e.shape):
            wave = [i if i <= n / 2 else i - n for i, n in zip(index, e.shape, strict=True)]
            if low <= math.floor(math.hypot(*wave)) <= high:
                kept[index] = modes[index]
        bands.append(math.sqrt(np.mean(np.abs(np.fft.ifftn(kept)) ** 2)))
    return bands


@pytest.mark.parametrize("space", SPACES)
def test_all_scores_against_a_slow_reference(space: tuple[int, ...]) -> None:
    prediction, target = fields(3, 2, *space)
    metric = FieldErrors()
    metric.update(prediction, target)
    scores = {name: float(value) for name, value in metric.compute().items()}
    assert scores == pytest.approx(slow_scores(prediction.numpy(), target.numpy()), rel=1e-5)


def test_by_hand() -> None:
    target = torch.tensor([[[3.0, 4.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]])
    error = torch.tensor([[[0.0, 5.0, 0.0, -2.0], [0.0, 0.5, 0.0, 0.0]]])
    prediction = target + error
    assert rmse(prediction, target).tolist() == [[pytest.approx(29**0.5 / 2), 0.25]]
    assert nrmse_by_channel(prediction, target).tolist() == [[pytest.approx(29**0.5 / 5), 0.5]]
    assert float(nrmse(prediction, target)) == pytest.approx((29**0.5 / 5 + 0.5) / 2)
    assert float(relative_l2(prediction, target)) == pytest.approx((29.25 / 26) ** 0.5)
    assert conserved_error(prediction, target).tolist() == [[0.75, 0.125]]
    assert max_error(prediction, target).tolist() == [[5.0, 0.5]]
    assert boundary_rmse(prediction, target).tolist() == [[pytest.approx(2**0.5), 0.0]]


@pytest.mark.parametrize(
    ("wave", "band"), [((4,), 0), ((5,), 1), ((12,), 1), ((13,), 2), ((3, 3), 0), ((3, 4), 1), ((5, 12), 2)]
)
def test_a_wave_lies_in_one_band(wave: tuple[int, ...], band: int) -> None:
    """An error of one wave of amplitude 2 has an RMSE of sqrt(2), all of it in the band of its length."""
    axes = torch.meshgrid(*(torch.arange(40) / 40 for _ in wave), indexing="ij")
    phase = sum(k * x for k, x in zip(wave, axes, strict=True))
    error = 2 * torch.sin(2 * torch.pi * phase + 0.3)[None, None]
    expected = torch.zeros(1, 1, 3)
    expected[..., band] = 2**0.5
    torch.testing.assert_close(fourier_rmse(error, torch.zeros_like(error)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("space", SPACES)
def test_parseval(space: tuple[int, ...]) -> None:
    prediction, target = fields(2, 3, *space)
    whole = rmse(prediction, target)
    torch.testing.assert_close(fourier_rmse(prediction, target).square().sum(-1).sqrt(), whole)


def test_time_counts_as_channels() -> None:
    """A trajectory scores the mean over its frames, but for relative L2, which is one norm over all of them."""
    prediction, target = fields(2, 3, 2, 16, 16)
    whole, frames = FieldErrors(), [FieldErrors() for _ in range(3)]
    whole.update(prediction.flatten(1, 2), target.flatten(1, 2))
    for time, metric in enumerate(frames):
        metric.update(prediction[:, time], target[:, time])
    by_frame = [metric.compute() for metric in frames]
    for name, value in whole.compute().items():
        mean = torch.stack([scores[name] for scores in by_frame]).mean()
        assert torch.allclose(value, mean) == (name != "relative_l2"), name


def test_zero_targets() -> None:
    """Met exactly they score 0, otherwise infinity; a prediction that is no number stays one."""
    zeros, ones = torch.zeros(1, 1, 8), torch.ones(1, 1, 8)
    for score in (nrmse, relative_l2):
        assert float(score(zeros, zeros)) == 0
        assert float(score(ones, zeros)) == math.inf
        assert math.isnan(score(ones * math.nan, zeros))
        assert math.isnan(score(ones * math.nan, ones))
    metric = FieldErrors()
    metric.update(torch.full((1, 2, 20), math.nan), torch.ones(1, 2, 20))
    assert all(math.isnan(value) for value in metric.compute().values())


def test_scores_of_one_sample_do_not_see_the_others() -> None:
    prediction, target = fields(4, 2, 20)
    for score in (rmse, nrmse_by_channel, relative_l2_by_sample, boundary_rmse, max_error, fourier_rmse):
        alone = torch.cat([score(prediction[i : i + 1], target[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(score(prediction, target), alone)


def test_half_precision_is_scored_in_single() -> None:
    target = torch.full((1, 1, 32), 300.0, dtype=torch.float16)  # its square overflows
    assert float(nrmse(target * 2, target)) == pytest.approx(1)
    metric = FieldErrors()
    metric.update(target.bfloat16() * 2, target)
    assert metric.compute()["frmse_low"] == pytest.approx(300)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same shape \(B, C, \*space\), got \(2, 1, 8\) and \(2, 8\)"):
        rmse(torch.zeros(2, 1, 8), torch.zeros(2, 8))


@pytest.mark.parametrize("sizes", [(7,), (1, 6), (3, 3, 1)])
def test_batch_size_does_not_matter(sizes: tuple[int, ...]) -> None:
    prediction, target = fields(7, 3, 16, 16)
    whole, parts = FieldErrors(), FieldErrors()
    whole.update(prediction, target)
    parts.update(*fields(2, 3, 8, 8, seed=9))
    parts.reset()
    for pair in zip(prediction.split(sizes), target.split(sizes), strict=True):
        parts.update(*pair)
    torch.testing.assert_close(parts.compute(), whole.compute())


WORKER = """
import sys, torch
import torch.distributed as dist
from recipes.metrics import FieldErrors

dist.init_process_group("gloo")
metric, mine = FieldErrors(), (slice(0, 2), slice(2, 7))[dist.get_rank()]
metric.update(*(fields[mine] for fields in torch.load(f"{sys.argv[1]}/fields.pt")))
torch.save(metric.compute(), f"{sys.argv[1]}/{dist.get_rank()}.pt")
dist.destroy_process_group()  # left to the end of the process, gloo's threads now and then abort it
"""


def test_two_processes_have_the_scores_of_one(tmp_path: Path) -> None:
    pair = fields(7, 3, 16)
    torch.save(pair, tmp_path / "fields.pt")
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            env={**common, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
        )
        for rank in (0, 1)
    ]
    try:
        assert [worker.wait(timeout=200) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    alone = FieldErrors()
    alone.update(*pair)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), alone.compute())
