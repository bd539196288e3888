"""Compose settings and run recipes at toy size."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

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


@pytest.fixture
def fake_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 and CIFAR-100 of forty random images, unpacked as torchvision expects them."""
    rng = np.random.default_rng(0)

    def images(count: int, classes: int, labels: str) -> dict[str, Any]:
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, labels: rng.integers(0, classes, count).tolist()}

    files: dict[str, dict[str, Any]] = {
        "cifar-100-python/train": images(40, 100, "fine_labels"),
        "cifar-100-python/test": images(16, 100, "fine_labels"),
        "cifar-100-python/meta": {"fine_label_names": [f"class {i}" for i in range(100)]},
        "cifar-10-batches-py/test_batch": images(16, 10, "labels"),
        "cifar-10-batches-py/batches.meta": {"label_names": [f"class {i}" for i in range(10)]},
    }
    for index in range(1, 6):
        files[f"cifar-10-batches-py/data_batch_{index}"] = images(8, 10, "labels")
    for name, content in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).exists())
    return tmp_path / "data"
