"""The image sets: reading, splitting, augmenting, and what is said when files are missing or damaged."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from PIL import Image
from torch.utils.data import RandomSampler
from torchvision import transforms
from torchvision.datasets.utils import calculate_md5
from torchvision.transforms import functional as per_image

from recipes.data import tinyimagenet
from recipes.data.augment import crop_and_flip, draw_crops
from recipes.data.digits import DigitsData
from recipes.data.image_sets import IMAGE_SETS, Archive
from recipes.data.images import ImageData, Images
from recipes.errors import RecipeError
from tests.recipes.fake_images import TEST, TRAIN, colour, write_fashion_mnist, write_svhn, write_tiny_imagenet

NAMES = list(IMAGE_SETS)


def reference(image: torch.Tensor, crop: list[int], padding: int) -> torch.Tensor:
    """Torchvision's functions, one image at a time, as RandomCrop and RandomHorizontalFlip call them."""
    top, left, mirrored = crop
    out = per_image.crop(per_image.pad(image, [padding]), top, left, *image.shape[-2:])
    return per_image.hflip(out) if mirrored else out


@pytest.mark.parametrize(("shape", "padding"), [((3, 32, 32), 4), ((1, 5, 9), 2), ((3, 6, 6), 0)])
def test_crops_and_flips_are_torchvisions(shape: tuple[int, ...], padding: int) -> None:
    """Each possible crop, mirrored and not, bitwise."""
    edges = range(2 * padding + 1)
    crops = torch.tensor([[top, left, mirrored] for top in edges for left in edges for mirrored in (0, 1)])
    images = torch.randint(0, 256, (len(crops), *shape), dtype=torch.uint8)
    expected = torch.stack([reference(x, crop, padding) for x, crop in zip(images, crops.tolist(), strict=True)])
    assert torch.equal(crop_and_flip(images, crops, padding), expected)


def test_crops_are_drawn_evenly() -> None:
    """All 9 * 9 * 2 outcomes as often as chance has it: chi-square of 161 degrees of freedom, five sigma."""
    count, outcomes = 200_000, 162
    top, left, mirrored = draw_crops(count, 4, seed=3).unbind(1)
    seen = torch.bincount((top * 9 + left) * 2 + mirrored, minlength=outcomes)
    assert len(seen) == outcomes
    chi_square = ((seen - count / outcomes) ** 2 / (count / outcomes)).sum()
    assert abs(float(chi_square) - 161) < 5 * (2 * 161) ** 0.5


class Recorder(LightningModule):
    """Keeps what its steps are given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen["train"].append(batch)
        return self.weight.sum() * 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["val"].append(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["test"].append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def record(data: ImageData, epochs: int = 2, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(recorder, datamodule=data)
    trainer.test(recorder, datamodule=data, verbose=False)
    return recorder


quiet = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*isinstance.treespec, LeafSpec",
    "ignore:Total length of `list`",
)


@quiet
@pytest.mark.parametrize("name", NAMES)
def test_batches_are_the_published_ones(fake_images: Path, name: str) -> None:
    """Through a real Trainer, against torchvision's transforms of single images, with the same draws."""
    data = ImageData(fake_images, name, val_size=10, batch_size=6, shuffle_seed=5)
    torch.manual_seed(0)
    recorder = record(data)
    mean, std = IMAGE_SETS[name].scaling
    finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    train, val, test = (data.datasets[split] for split in ("train", "val", "test"))
    total = 200 if name == "tinyimagenet" else TRAIN
    assert (len(train), len(val), len(test)) == (total - 10, 10, TEST)
    assert sorted([*train.indices.tolist(), *val.indices.tolist()]) == list(range(total))

    steps = -(-len(train) // 6)
    for epoch in range(2):
        batches = recorder.seen["train"][epoch * steps : (epoch + 1) * steps]
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        sampler = data.train_dataloader().sampler
        sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        data.trainer.fit_loop.epoch_progress.current.completed = epoch  # type: ignore[union-attr]
        data.trainer.fit_loop.epoch_progress.current.processed = epoch  # type: ignore[union-attr]
        crops = data._crops()
        for row, place in enumerate(sampler):
            pixels, label, _ = train[place]
            expected = finish(per_image.to_pil_image(reference(pixels, crops[place].tolist(), 4)))
            torch.testing.assert_close(images[row], expected, rtol=0, atol=1e-6)
            assert labels[row] == label
    for split in (val, test):
        images, labels = (
            torch.cat(p) for p in zip(*recorder.seen["val" if split is val else "test"], strict=True)
        )
        for row, (pixels, label) in enumerate(split[place] for place in range(len(split))):
            torch.testing.assert_close(images[row], finish(per_image.to_pil_image(pixels)), rtol=0, atol=1e-6)
            assert labels[row] == label


@quiet
def test_batches_depend_on_seed_and_epoch_alone(fake_images: Path) -> None:
    def batches(seed: int, global_seed: int) -> list[torch.Tensor]:
        torch.manual_seed(global_seed)
        data = ImageData(fake_images, "cifar10", val_size=10, batch_size=30, shuffle_seed=seed)
        return [images.sum(0) for images, _ in record(data, epochs=2).seen["train"]]  # whatever the order

    first, again, other = batches(1, 0), batches(1, 99), batches(2, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@quiet
def test_images_have_the_precision_of_the_weights(fake_images: Path) -> None:
    data = ImageData(fake_images, "cifar10", val_size=10, batch_size=30)
    images, _ = record(data, epochs=1, precision="bf16-true").seen["train"][0]
    assert images.dtype == torch.bfloat16


@quiet
def test_all_images_are_trained_on_with_no_validation_split(fake_images: Path) -> None:
    recorder = record(ImageData(fake_images, "cifar100", val_size=0, batch_size=TRAIN), epochs=1)
    assert len(recorder.seen["train"][0][1]) == TRAIN
    assert not recorder.seen["val"]


def test_a_test_is_not_shuffled(fake_images: Path) -> None:
    data = ImageData(fake_images, "svhn", val_size=10)
    data.prepare_data()
    data.setup("test")
    assert not isinstance(data.test_dataloader().sampler, RandomSampler)
    labels = torch.cat([labels for _, labels in data.test_dataloader()])
    assert labels.tolist() == [(i % 10 + 1) % 10 for i in range(TEST)]  # SVHN's file calls the digit 0 ten


# Missing and damaged files


@pytest.mark.parametrize("name", NAMES)
def test_missing_archives(tmp_path: Path, name: str) -> None:
    archive = IMAGE_SETS[name].archives[0]
    message = (
        rf"is not whole in .*data\.download=false forbids .*{archive.name} is missing \(from .*{archive.md5}\)"
    )
    with pytest.raises(RecipeError, match=message + r".*paths\.data_dir"):
        ImageData(tmp_path, name, download=False).prepare_data()


@pytest.mark.parametrize("name", NAMES)
def test_no_network(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(RecipeError, match=r"could not be downloaded \(no route to host\): .* is missing"):
        ImageData(tmp_path, name).prepare_data()


@pytest.mark.parametrize("name", NAMES)
def test_archives_cut_short(tmp_path: Path, name: str) -> None:
    archive = IMAGE_SETS[name].archives[0].name
    (tmp_path / archive).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / archive).write_bytes(b"the first half")
    with pytest.raises(RecipeError, match=f"{archive} is cut short or damaged .*delete the damaged"):
        ImageData(tmp_path, name, download=False).prepare_data()


def test_damaged_labels(tmp_path: Path, fake_images: Path) -> None:
    shutil.copytree(fake_images / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py")
    test = tmp_path / "cifar-10-batches-py/test_batch"
    content = pickle.loads(test.read_bytes())
    test.write_bytes(pickle.dumps({**content, "labels": [11, *content["labels"][1:]]}))
    with pytest.raises(RecipeError, match=r"CIFAR-10 in .* has labels outside 0 to 9"):
        ImageData(tmp_path, "cifar10", val_size=10).setup("fit")


def test_wrong_pixels(tmp_path: Path, fake_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path)
    monkeypatch.setattr("torchvision.datasets.SVHN.__init__", _wrong_svhn)
    with pytest.raises(RecipeError, match=r"SVHN in .* has images \(3, 8, 8\) of torch\.uint8, expected"):
        ImageData(tmp_path, "svhn", val_size=10).setup("fit")


def _wrong_svhn(self: Any, *args: object, **kwargs: object) -> None:
    self.data, self.labels = np.zeros((20, 3, 8, 8), np.uint8), np.zeros(20, np.int64)


def test_too_few_images_for_the_validation_split(fake_images: Path) -> None:
    with pytest.raises(RecipeError, match=rf"data\.val_size={TRAIN} leaves none of the {TRAIN} images"):
        ImageData(fake_images, val_size=TRAIN).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dataset": "cifar11"}, "one of cifar10, .*, got 'cifar11'"), ({"val_size": -1}, "at least 0, got -1")],
)
def test_bad_settings(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageData(tmp_path, **options)


# Tiny ImageNet's folder


def _sort(root: Path, folder: str = "", number: int = TEST) -> None:
    """Move some of the validation images into folders by class, as many people do."""
    rows = (root / "val/val_annotations.txt").read_text(encoding="utf-8").splitlines()
    for row in rows[:number]:
        name, wnid, *_ = row.split("\t")
        place = root / "val" / wnid / folder
        place.mkdir(parents=True, exist_ok=True)
        (root / "val/images" / name).rename(place / name)


@pytest.mark.parametrize(
    "sort", [lambda root: None, _sort, partial(_sort, folder="images", number=7), partial(_sort, folder="images")]
)
def test_tiny_imagenet_labels(tmp_path: Path, sort: Callable[[Path], object]) -> None:
    root = write_tiny_imagenet(tmp_path)
    grey = next((root / "train").glob("*/images/*.JPEG"))
    Image.open(grey).convert("L").save(grey)
    sort(root)
    tinyimagenet.prepare(tmp_path, download=False)
    for train, labels in ((True, range(200)), (False, range(0, 12 * TEST, 12))):
        images, found = tinyimagenet.read(tmp_path, train)
        assert found.tolist() == list(labels)
        assert (images.shape[1:], images.dtype) == ((64, 64, 3), np.uint8)
        error = np.abs(images.astype(int) - np.array([colour(label) for label in labels])[:, None, None])
        assert np.sort(error.max(axis=(1, 2, 3)))[-2] <= 6  # JPEG; but for the grey image


def test_tiny_imagenet_is_decoded_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_tiny_imagenet(tmp_path)
    tinyimagenet.prepare(tmp_path, download=False)
    before = tinyimagenet.read(tmp_path, train=True)[0]
    kept = tmp_path / "tiny-imagenet-200-train.npz"
    kept.write_bytes(kept.read_bytes()[:-1000])
    tinyimagenet.prepare(tmp_path, download=False)
    assert "cut short or damaged" in caplog.text
    shutil.rmtree(root)
    tinyimagenet.prepare(tmp_path, download=False)
    assert np.array_equal(tinyimagenet.read(tmp_path, train=True)[0], before)


def _zip(folder: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack the fake Tiny ImageNet as its archive, with the checksum that is asked for."""
    write_tiny_imagenet(folder)
    archive = Path(shutil.make_archive(str(into / "tiny-imagenet-200"), "zip", folder, "tiny-imagenet-200"))
    md5 = calculate_md5(str(archive))
    monkeypatch.setattr("recipes.data.tinyimagenet.MD5", md5)
    fake = replace(IMAGE_SETS["tinyimagenet"], archives=(Archive(tinyimagenet.URL, archive.name, md5),))
    monkeypatch.setitem(IMAGE_SETS, "tinyimagenet", fake)


def test_a_whole_archive_is_unpacked_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    _zip(tmp_path / "made", tmp_path / "data", monkeypatch)
    data = ImageData(tmp_path / "data", "tinyimagenet", val_size=10, download=False)
    data.prepare_data()
    data.setup("fit")
    assert len(data.datasets["train"]) == 190
    names = {path.name for path in (tmp_path / "data").iterdir()}
    kept = {"tiny-imagenet-200-train.npz", "tiny-imagenet-200-val.npz"}
    assert names == {"tiny-imagenet-200.zip", "tiny-imagenet-200", *kept}


def test_unpacking_that_breaks_off_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    _zip(tmp_path / "made", tmp_path / "data", monkeypatch)

    def half(archive: str, to: str) -> None:
        (Path(to) / "tiny-imagenet-200").mkdir()
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("recipes.data.tinyimagenet.extract_archive", half)
        with pytest.raises(RecipeError, match="no space left on device"):
            ImageData(tmp_path / "data", "tinyimagenet").prepare_data()
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"tiny-imagenet-200.zip"}
    ImageData(tmp_path / "data", "tinyimagenet").prepare_data()  # goes through the second time


def _first(root: Path, pattern: str) -> Path:
    return next(root.glob(pattern))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "wnids.txt").unlink(), r"wnids\.txt can't be read .*expected the layout of"),
        (lambda root: (root / "wnids.txt").write_text("n1\nn2\n"), r"wnids\.txt lists 2 classes, expected 200"),
        (lambda root: _first(root, "train/*/images/*.JPEG").unlink(), r"train/n\d+/images holds no images"),
        (lambda root: (root / "val/val_annotations.txt").unlink(), r"val_annotations\.txt can't be read"),
        (lambda root: (root / "val/val_annotations.txt").write_text(""), r"lacks 0 of the 0 images .*is empty"),
        (lambda root: (root / "val/images/val_3.JPEG").unlink(), r"val lacks 1 of the 16 images .*'val_3\.JPEG'"),
        (
            lambda root: (root / "val/val_annotations.txt").write_text("val_3.JPEG\tn1\t0\t0\t1\t1\n"),
            "names classes that wnids.txt lacks: n1",
        ),
        (
            lambda root: (root / "val/val_annotations.txt").write_text("val_3.JPEG n1\n"),
            r"line 1 of .*val_annotations\.txt",
        ),
        (lambda root: (root / "val/images/val_3.JPEG").write_bytes(b"\xff\xd8"), r"val_3\.JPEG can't be decoded"),
        (
            lambda root: Image.new("RGB", (32, 64)).save(root / "val/images/val_3.JPEG"),
            r"val_3\.JPEG has \(64, 32\) pixels, expected 64x64",
        ),
    ],
)
def test_other_layouts(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(write_tiny_imagenet(tmp_path))
    with pytest.raises(RecipeError, match=message):
        ImageData(tmp_path, "tinyimagenet", download=False).prepare_data()
    assert not (tmp_path / "tiny-imagenet-200-val.npz").exists()


def test_fashion_mnist_of_debians_package_needs_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packed files are unpacked once; what is there stays as it is."""
    write_fashion_mnist(tmp_path / "debian")
    write_fashion_mnist(tmp_path / "expected", packed=False)
    monkeypatch.setattr("recipes.data.fashion.DEBIAN", tmp_path / "debian")
    data = ImageData(tmp_path / "data", "fashion_mnist", val_size=10, download=False)
    data.prepare_data()
    raw = tmp_path / "data/FashionMNIST/raw"
    for file in (tmp_path / "expected").iterdir():
        assert (raw / file.name).read_bytes() == file.read_bytes()
    written = {file: file.stat().st_mtime_ns for file in raw.iterdir()}
    data.prepare_data()
    assert {file: file.stat().st_mtime_ns for file in raw.iterdir()} == written
    data.setup("fit")
    assert data.datasets["test"][0][0].shape == data.sample_shape == (1, 28, 28)


def test_fashion_mnist_without_package_and_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.data.fashion.DEBIAN", tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=r"FashionMNIST is not whole .*data\.download=false.*train-images"):
        ImageData(tmp_path, "fashion_mnist", download=False).prepare_data()


def test_a_part_of_the_training_images_is_stratified_and_drawn_by_the_seed(fake_images: Path) -> None:
    def drawn(seed: int, val_size: int = 0) -> Images:
        data = ImageData(fake_images, "fashion_mnist", val_size=val_size, seed=seed, train_size=20)
        data.setup("fit")
        assert not set(data.datasets["train"].indices.tolist()) & set(data.datasets["val"].indices.tolist())
        return data.datasets["train"]

    first, again, other = drawn(seed=1), drawn(seed=1), drawn(seed=2)
    assert torch.bincount(first.labels[first.indices]).tolist() == [2] * 10
    assert torch.equal(first.indices, again.indices)
    assert set(first.indices.tolist()) != set(other.indices.tolist())
    assert len(drawn(seed=1, val_size=8)) == 20


@pytest.mark.parametrize(
    ("size", "error", "message"), [(9, ValueError, "at least .* 10"), (41, RecipeError, "=41 of the 40")]
)
def test_a_part_that_can_not_be_drawn(fake_images: Path, size: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"data.train_size.*{message}"):
        ImageData(fake_images, "fashion_mnist", val_size=0, train_size=size).setup("fit")


# Digits


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


def test_digits_of_which_few_are_left_over() -> None:
    data = DigitsData(train_size=1000, val_size=292, test_size=500)
    data.setup("fit")
    assert len(data.datasets["train"]) == 1000


def test_digits_too_many() -> None:
    with pytest.raises(ValueError, match="at most 1797, got 1700 \\+ 297 \\+ 500"):
        DigitsData(train_size=1700)
