"""What the pictures of predictions show, and that a test leaves them in its folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from matplotlib.image import imread
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recipes import pictures
from recipes.metrics import nrmse
from recipes.pictures import PredictionPictures
from recipes.plots import channel_names, plot_error_growth, plot_fields, plot_flow_1d, plot_flow_2d
from recipes.tasks import FieldRegression, Forecast, ImageClassification
from tests.helpers import LIGHTNING_NOISE


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    truth = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return truth, truth + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(1))


def drawn(figure: Any) -> list[tuple[np.ndarray, tuple[float, float]]]:
    """Each image's values, horizontal axis first, and the range of its colours."""
    return [(np.asarray(image.get_array()).T, image.get_clim()) for axes in figure.axes for image in axes.images]


def assert_row(images: list[Any], truth: Tensor, prediction: Tensor, scale: Tensor, errors: Tensor) -> None:
    """Truth and prediction share the truth's scale; the error's is even around zero."""
    for (values, limits), expected in zip(images, (truth, prediction), strict=False):
        np.testing.assert_allclose(values, expected)
        assert limits == pytest.approx((float(scale.min()), float(scale.max())))
    values, limits = images[2]
    np.testing.assert_allclose(values, prediction - truth)
    assert limits == pytest.approx((-float(errors.abs().max()), float(errors.abs().max())))


def test_fields_in_rows() -> None:
    truth, prediction = pair(3, 8, 12)
    inputs = torch.rand(3, 8, 12)
    figure = plot_fields(inputs, truth, prediction, title="a title")
    images = drawn(figure)
    for row in range(3):
        np.testing.assert_allclose(images[4 * row][0], inputs[row])
        assert_row(images[4 * row + 1 :], truth[row], prediction[row], truth, prediction - truth)
        score = (prediction[row] - truth[row]).norm() / truth[row].norm()
        assert figure.axes[4 * row + 3].get_xlabel() == f"relative L2 {score:.2g}"
    # Older matplotlib has no public way to read it.
    assert figure._suptitle.get_text() == "a title"


def test_1d_flow_in_space_and_time() -> None:
    truth, prediction = pair(6, 3, 16)
    figure = plot_flow_1d(truth, prediction)
    images = drawn(figure)
    for row in range(3):
        scale, errors = truth[:, row], prediction[:, row] - truth[:, row]
        assert_row(images[3 * row :], truth[:, row], prediction[:, row], scale, errors)
        profiles = [line.get_ydata() for line in figure.axes[4 * row + 3].lines]
        for line, expected in zip(
            profiles, [x[t, row] for t in (0, 2, 5) for x in (truth, prediction)], strict=True
        ):
            np.testing.assert_allclose(line, expected)
    assert [figure.axes[4 * row].get_ylabel().splitlines()[0] for row in range(3)] == ["density", "pressure", "Vx"]
    assert [text.get_text() for text in figure.axes[11].get_legend().texts] == ["step 1", "step 3", "step 6"]


@pytest.mark.parametrize("channels", [1, 4])
def test_2d_flow_frame_by_frame(channels: int) -> None:
    truth, prediction = pair(9, channels, 8, 12)
    figure = plot_flow_2d(truth, prediction)
    images = drawn(figure)
    chosen = [0, 3, 5, 8]
    for channel in range(channels):
        frames, forecasts = truth[chosen, channel], prediction[chosen, channel]
        for column in range(4):
            shown = images[12 * channel + column : 12 * (channel + 1) : 4]
            assert_row(shown, frames[column], forecasts[column], frames, forecasts - frames)
    assert [figure.axes[column].get_title() for column in range(4)] == ["step 1", "step 4", "step 6", "step 9"]


def test_what_is_not_finite_or_flat_is_drawn(tmp_path: Path) -> None:
    truth, prediction = torch.zeros(5, 3, 16), torch.zeros(5, 3, 16)
    prediction[2:] = torch.nan
    prediction[1] = torch.inf
    plot_flow_1d(truth, prediction, tmp_path / "1.png")
    plot_error_growth(torch.zeros(5, 3), torch.ones(5, 3), tmp_path / "2.png", names=("a", "b", "c"))
    assert imread(tmp_path / "1.png").std() > 0


def test_names_of_channels() -> None:
    assert channel_names(4, 2) == ("density", "pressure", "Vx", "Vy")
    assert channel_names(3, 1) == ("density", "pressure", "Vx")
    assert channel_names(3, 2) == ("channel 1", "channel 2", "channel 3")


def pictures_left(tmp_path: Path, task: Any, *batches: Tensor) -> set[str]:
    """Names of the pictures that a test leaves."""
    callback = PredictionPictures(tmp_path, title="a run")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[callback], **quiet)
    trainer.test(task, DataLoader(TensorDataset(*batches), batch_size=2), verbose=False)
    return {path.name for path in tmp_path.iterdir()}


def with_noise(test: Any) -> Any:
    for mark in LIGHTNING_NOISE:
        test = mark(test)
    return test


OPTIMIZER = partial(torch.optim.SGD, lr=0.1)


@with_noise
@pytest.mark.parametrize("space", [(16,), (8, 8)])
def test_a_test_of_flows_leaves_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: tuple[int, ...]
) -> None:
    """The growth of the error is that of the whole set, in however many batches."""
    given: dict[str, Tensor] = {}

    def spy(errors: Tensor, baseline: Tensor, *args: Any, **options: Any) -> Any:
        given.update(errors=errors, baseline=baseline)
        return plot_error_growth(errors, baseline, *args, **options)

    monkeypatch.setattr(pictures, "plot_error_growth", spy)
    channels = len(space) + 2
    convolution = (nn.Conv1d, nn.Conv2d)[len(space) - 1]
    task = Forecast(convolution(2 * channels, channels, 1), OPTIMIZER)
    history, future = torch.randn(5, 2, channels, *space), torch.randn(5, 3, channels, *space)
    assert pictures_left(tmp_path, task, history, future) == {"predictions.png", "error_growth.png"}
    with torch.no_grad():
        forecast = task.predict((history, future))
    for name, fields in (("errors", forecast), ("baseline", history[:, 1:].expand_as(future))):
        scores = [[nrmse(fields[:, t, c, None], future[:, t, c, None]) for c in range(channels)] for t in range(3)]
        torch.testing.assert_close(given[name], torch.tensor(scores))


@with_noise
def test_a_test_of_static_fields_leaves_a_picture(tmp_path: Path) -> None:
    task = FieldRegression(nn.Conv2d(1, 1, 1), OPTIMIZER)
    assert pictures_left(tmp_path, task, torch.randn(5, 1, 8, 8), torch.randn(5, 1, 8, 8)) == {"predictions.png"}


@with_noise
def test_a_test_of_images_leaves_none(tmp_path: Path) -> None:
    task = ImageClassification(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 3, OPTIMIZER)
    assert pictures_left(tmp_path, task, torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])) == set()
