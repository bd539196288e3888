"""The networks, the scores and the vision data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from recipes.data.cifar import CIFARData
from recipes.data.digits import DigitsData
from recipes.errors import RecipeError
from recipes.models.resnet import SmallImageResNet
from recipes.models.unet import UNet
from recipes.models.vgg import SmallImageVGG
from recipes.tasks import nrmse, relative_l2


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_unet_is_pdebenchs() -> None:
    """Width 32: 7 762 465 parameters, counted from the description layer by layer."""
    encoders = sum(9 * (i * o + o * o) + 4 * o for i, o in ((1, 32), (32, 64), (64, 128), (128, 256), (256, 512)))
    decoders = sum(4 * 2 * o * o + o + 9 * (2 * o * o + o * o) + 4 * o for o in (256, 128, 64, 32))
    assert _parameters(UNet(1, 1, width=32)) == encoders + decoders + 32 + 1 == 7_762_465
    kinds = {type(module) for module in UNet().modules()}
    assert kinds >= {nn.Tanh, nn.BatchNorm2d, nn.MaxPool2d, nn.ConvTranspose2d}
    assert all(
        layer.bias is None
        for layer in UNet().modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
    )


def test_unet_keeps_the_grid() -> None:
    assert UNet(2, 3, width=4)(torch.randn(2, 2, 32, 16)).shape == (2, 3, 32, 16)


def test_unet_refuses_other_grids() -> None:
    with pytest.raises(ValueError, match=r"must divide by 16, got \(40, 32\)"):
        UNet(width=2)(torch.randn(1, 1, 40, 32))


@pytest.mark.parametrize("depth", [18, 34])
def test_resnet_is_torchvisions_but_for_the_stem(depth: int) -> None:
    ours = SmallImageResNet(depth, 3, 100)
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=100)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize(("depth", "layers"), [(16, 14), (19, 17)])
def test_vgg_has_one_linear_layer(depth: int, layers: int) -> None:
    model = SmallImageVGG(depth, 3, 100)
    matrices = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(matrices) == layers
    assert matrices[-1].weight.shape == (100, 512)
    small = SmallImageVGG(depth, in_channels=1, out_channels=10, width=8)
    assert small(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_vgg_refuses_small_images() -> None:
    with pytest.raises(ValueError, match=r"at least 32, got \(8, 8\).*data.image_size=32"):
        SmallImageVGG(width=8, in_channels=1)(torch.randn(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNet(width=0), "width must be positive"),
        (lambda: SmallImageResNet(depth=20), "depth must be one of 18, 34, got 20"),
        (lambda: SmallImageResNet(width=0), "width must be positive"),
        (lambda: SmallImageVGG(depth=11), "depth must be one of 16, 19, got 11"),
        (lambda: SmallImageVGG(width=0), "width must be a positive multiple of 8"),
    ],
)
def test_bad_sizes(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_scores_by_hand() -> None:
    target = torch.tensor([[[[3.0, 4.0]], [[0.0, 1.0]]]])
    error = torch.tensor([[[[0.0, 5.0]], [[0.0, 0.5]]]])
    assert float(nrmse(target + error, target)) == pytest.approx((1.0 + 0.5) / 2)
    assert float(relative_l2(target + error, target)) == pytest.approx((25.25 / 26) ** 0.5)


def test_digits_are_split_once() -> None:
    data, larger = DigitsData(train_size=500), DigitsData(train_size=1000)
    for module in (data, larger):
        module.setup("fit")
    sizes = {split: len(dataset) for split, dataset in data.datasets.items()}
    assert sizes == {"train": 500, "val": 297, "test": 500}
    assert torch.equal(data.datasets["test"].tensors[1], larger.datasets["test"].tensors[1])
    images = torch.cat([larger.datasets[split].tensors[0].flatten(1) for split in ("train", "val", "test")])
    assert len(images) == 1797
    assert next(iter(data.train_dataloader()))[0].shape == (64, 1, 8, 8)


def test_digits_enlarged() -> None:
    data = DigitsData(image_size=32)
    data.setup("fit")
    assert next(iter(data.val_dataloader()))[0].shape[1:] == data.sample_shape == (1, 32, 32)


def test_digits_too_many() -> None:
    with pytest.raises(ValueError, match="at most 1797, got 1700 \\+ 297 \\+ 500"):
        DigitsData(train_size=1700)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_validates_on_training_images(fake_cifar: Path, classes: int) -> None:
    data = CIFARData(fake_cifar, num_classes=classes, val_size=10, batch_size=6, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    train, val, test = (data.subsets[split] for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (30, 10, 16)  # type: ignore[arg-type]
    assert set(train.indices).isdisjoint(val.indices)  # type: ignore[attr-defined]
    assert torch.equal(val[0][0], val[0][0])  # not augmented
    draws = [train[0][0] for _ in range(8)]
    assert any(not torch.equal(draws[0], draw) for draw in draws)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (6, *data.sample_shape)
    assert labels.max() < classes


def test_cifar_too_small_for_its_validation_split(fake_cifar: Path) -> None:
    data = CIFARData(fake_cifar, val_size=40, num_workers=0)
    with pytest.raises(RecipeError, match=r"data\.val_size=40 leaves none of the 40 images"):
        data.setup("fit")


def test_missing_cifar(tmp_path: Path) -> None:
    data = CIFARData(tmp_path, num_classes=100, download=False)
    with pytest.raises(RecipeError, match=r"CIFAR100 is not in .*cifar-100-python\.tar\.gz.*paths\.data_dir"):
        data.prepare_data()


def test_cifar_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(
        RecipeError, match=r"could not be downloaded \(no route to host\).*cifar-10-python\.tar\.gz"
    ):
        CIFARData(tmp_path, num_classes=10).prepare_data()


@pytest.mark.parametrize(
    ("options", "message"), [({"num_classes": 7}, "10 or 100"), ({"val_size": 0}, "at least 1")]
)
def test_bad_cifar_settings(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIFARData(tmp_path, **options)  # type: ignore[arg-type]
