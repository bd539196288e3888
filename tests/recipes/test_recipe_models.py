"""The networks and the scores."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import VisionTransformer

from farms_tb import analyze
from recipes.metrics import nrmse, relative_l2
from recipes.models.resnet import SmallImageResNet
from recipes.models.unet import UNet
from recipes.models.vgg import SmallImageVGG
from recipes.models.vit import SmallImageViT
from recipes.models.wrn import WideResNet
from recipes.schedules import warmup_cosine


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


@pytest.mark.parametrize(
    ("depth", "widen", "classes", "parameters"),
    [(28, 10, 10, 36_479_194), (16, 8, 10, 10_961_370), (40, 4, 10, 8_949_210), (28, 6, 200, 13_217_944)],
)
def test_wide_resnets_have_the_published_sizes(depth: int, widen: int, classes: int, parameters: int) -> None:
    """The paper's 36.5M, 11.0M and 8.9M; WRN-28-6, which it lacks, counted by hand below."""
    with torch.device("meta"):
        net = WideResNet(depth, widen, 3, classes)
    assert _parameters(net) == parameters
    widths, blocks = [16, 16 * widen, 32 * widen, 64 * widen], depth // 6
    convolutions = 27 * 16 + sum(9 * o * (i + (2 * blocks - 1) * o) + i * o for i, o in pairwise(widths))
    norms = sum(2 * i + (2 * blocks - 1) * 2 * o for i, o in pairwise(widths)) + 2 * widths[-1]
    assert parameters == convolutions + norms + (widths[-1] + 1) * classes
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == depth - 4 + 1 + 3


def test_wide_block_by_hand() -> None:
    """The shortcut starts behind the first activation where the shape changes, else at the input."""
    net = WideResNet(depth=16, widen=2, in_channels=1, width=2).eval()
    x = torch.randn(2, 4, 8, 8)
    for block, stride in ((net.layer2[0], 2), (net.layer1[1], 1)):
        relu, conv = nn.functional.relu, nn.functional.conv2d
        first = relu(block.bn1(x))
        second = relu(block.bn2(conv(first, block.conv1.weight, stride=stride, padding=1)))
        skipped = x if stride == 1 else conv(first, block.shortcut.weight, stride=2)
        torch.testing.assert_close(block(x), skipped + conv(second, block.conv2.weight, padding=1))
    assert net(torch.randn(2, 1, 64, 64)).shape == (2, 10)


def test_vgg_refuses_small_images() -> None:
    with pytest.raises(ValueError, match=r"at least 32, got \(8, 8\).*data.image_size=32"):
        SmallImageVGG(width=8, in_channels=1)(torch.randn(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNet(width=0), "width must be positive"),
        (lambda: SmallImageResNet(depth=20), "depth must be one of 18, 34, got 20"),
        (lambda: SmallImageResNet(width=0), "width must be positive"),
        (lambda: WideResNet(depth=18), "depth must be 6n \\+ 4 .* got 18"),
        (lambda: WideResNet(widen=0), "widen and width must be positive, got 0 and 16"),
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


def test_vit_is_torchvisions() -> None:
    """With three channels the two have the same parameters and the same output for the same weights."""
    net = SmallImageViT(out_channels=100)
    reference = VisionTransformer(32, 4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=100)
    reference.load_state_dict(net.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net.eval()(images), reference.eval()(images))
    grey = SmallImageViT(image_size=28, in_channels=1)
    assert grey(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert grey.conv_proj.weight.std().item() == pytest.approx(0.25 * 0.99, rel=0.1)  # 16 inputs; ends cut off


def test_attention_of_the_vit_is_measured_as_query_key_and_value() -> None:
    net = SmallImageViT(width=96, depth=1)
    prefix = "encoder.layers.encoder_layer_0.self_attention."
    attention = [name.removeprefix(prefix) for name in analyze(net).alphas if name.startswith(prefix)]
    assert attention == ["q", "k", "v", "out_proj"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"image_size": 30}, "patch_size must divide the image's 30"), ({"heads": 5}, "heads must divide .*192")],
)
def test_sizes_of_the_vit(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmallImageViT(**options)  # type: ignore[arg-type]


def test_vit_refuses_images_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"28x28 pixels, got \(32, 32\)"):
        SmallImageViT(image_size=28).check_input((3, 32, 32))


def test_warmup_and_cosine_of_epochs() -> None:
    """Fractions of the rate worked out by hand: a line from 1/3, then (1 + cos(pi t / 4)) / 2."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = warmup_cosine(optimizer, warmup=2, total=6)
    seen = []
    for _ in range(6):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447], abs=1e-6)
    with pytest.raises(ValueError, match=r"scheduler\.warmup must be at least 1, got 0"):
        warmup_cosine(optimizer, warmup=0, total=6)
