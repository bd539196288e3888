"""Compose settings and run recipes at toy size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from recipes.data.download import FOLDER
from tests.recipes.fake_images import write_cifar, write_fashion_mnist, write_svhn, write_tiny_imagenet
from tests.recipes.pdebench_files import write_published
from tests.recipes.recipe_runs import compose_settings


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Toy networks lose time to threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _clean_process() -> Iterator[None]:
    """Undo what Hydra, Lightning and W&B leave in the process: its settings, seeds and environment."""
    environment = dict(os.environ)
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., DictConfig]:
    """Compose settings whose output and data go under `tmp_path`."""

    def make(*overrides: str) -> DictConfig:
        return compose_settings(f"paths.output_dir={tmp_path}/runs", f"paths.data_dir={tmp_path}/data", *overrides)

    return make


@pytest.fixture(autouse=True)
def _no_debian_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """FashionMNIST is as good as not installed, also where Debian's package is."""
    monkeypatch.setattr("recipes.data.fashion.DEBIAN", Path("/nowhere"))


@pytest.fixture(scope="session")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The papers' image sets as tiny files, not to be written to."""
    folder = tmp_path_factory.mktemp("images")
    write_cifar(folder)
    write_svhn(folder)
    write_fashion_mnist(folder / "FashionMNIST/raw", packed=False)
    write_tiny_imagenet(folder)
    return folder


@pytest.fixture
def fake_images(image_files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the tiny image sets, whose checksums torchvision takes for the real ones."""
    for module in ("cifar", "svhn"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).exists()
        )
    monkeypatch.setattr("torchvision.datasets.svhn.download_url", lambda *args, **options: None)
    return image_files


@pytest.fixture(scope="session")
def _pdebench_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("pdebench"))


@pytest.fixture
def fake_pdebench(tmp_path: Path, _pdebench_files: Path) -> Path:
    """PDEBench's files of twenty random samples on small grids, where `settings` looks for them."""
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / FOLDER).symlink_to(_pdebench_files / FOLDER)
    return tmp_path / "data"
