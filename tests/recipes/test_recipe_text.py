"""Text as bytes, and a small language model trained on it."""

from __future__ import annotations

import abc
import bdb
import csv
import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recipes.data.text import ByteTextData
from recipes.errors import RecipeError
from recipes.models.language import ByteLlama
from recipes.train import train
from tests.helpers import LIGHTNING_NOISE
from tests.recipes.recipe_runs import compose_settings

pytestmark = LIGHTNING_NOISE


def text_of(loader: object) -> tuple[Tensor, Tensor]:
    batches = list(loader)  # type: ignore[call-overload]
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))  # type: ignore[return-value]


def test_windows_are_the_text_and_targets_come_a_byte_later(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(200)))
    data = ByteTextData(f"{tmp_path}/text.txt", length=10, val_bytes=31, test_bytes=40, batch_size=3)
    data.setup("fit")
    inputs, targets = text_of(data.val_dataloader())
    assert inputs.flatten().tolist() == list(range(129, 159))
    assert torch.equal(targets, inputs + 1)
    trained_on, _ = text_of(data.train_dataloader())
    assert trained_on.flatten().sort().values.tolist() == list(range(120))
    tested, _ = text_of(data.test_dataloader())
    assert tested.flatten().tolist() == list(range(160, 190))


def test_files_of_a_folder_are_read_in_order(tmp_path: Path) -> None:
    for name, content in {"b.txt": b"b" * 40, "a.txt": b"a" * 40, "c.md": b"c" * 40}.items():
        (tmp_path / name).write_bytes(content)
    data = ByteTextData(str(tmp_path), length=4, val_bytes=10, test_bytes=10, train_bytes=45)
    data.setup("fit")
    trained_on, _ = text_of(data.train_dataloader())
    assert set(trained_on.flatten().tolist()) == {ord("a"), ord("b"), ord("\n")}


def test_pythons_own_modules_are_a_text() -> None:
    """Whole and in the order of their names, as the interpreter's `inspect` has them."""
    data = ByteTextData("python", length=64, batch_size=512, val_bytes=1000, test_bytes=1000)
    data.setup("fit")
    windows = data.datasets["train"].tensors[0].flatten().tolist()
    text = bytes(windows)
    places = [text.find(inspect.getsource(module).encode()[:200]) for module in (abc, bdb, csv, dataclasses)]
    assert -1 not in places
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"path": "nowhere"}, RecipeError, "nowhere is no file"),
        ({"length": 0}, ValueError, "data.length must be a whole number of at least 1"),
        ({"val_bytes": 1000}, RecipeError, "data.val_bytes=1000"),
        ({"train_bytes": 300}, RecipeError, "data.train_bytes=300"),
        ({"length": 50, "val_bytes": 20}, RecipeError, "data.length=50"),
    ],
)
def test_bad_settings(options: dict, error: type[Exception], words: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"x" * 300)
    settings = {"path": str(tmp_path), "length": 8, "val_bytes": 50, "test_bytes": 50, **options}
    with pytest.raises(error, match=words):
        ByteTextData(**settings).setup("fit")


@pytest.mark.parametrize("arm", ["farms", "off"])
def test_a_language_model_learns(arm: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    overrides = ["experiment=tiny_lm", f"data.path={tmp_path}/text.txt", "data.length=32", "data.val_bytes=500"]
    overrides += ["data.test_bytes=500", "data.batch_size=16", "model.net.width=32", "model.net.hidden=64"]
    overrides += ["model.net.depth=2", "trainer.limit_train_batches=15", "trainer.max_steps=30", "trainer=cpu"]
    overrides += [
        "trainer.max_epochs=2",
        "logger=csv",
        "scheduler.num_warmup_steps=5",
        f"balancing={arm}",
        f"paths.output_dir={tmp_path}/runs",
    ]
    if arm == "farms":
        overrides.append("balancing.every_n_steps=10")
    scores = train(compose_settings(*overrides))["test"]
    assert scores["test/loss"] < 2.7, "bytes of equal probability have ln 256 = 5.5"


def test_the_initial_embedding_alone_has_another_size() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    usual = dict(ByteLlama(width=32, hidden=64, depth=1).named_parameters())
    torch.manual_seed(0)
    larger = dict(ByteLlama(width=32, hidden=64, depth=1, embedding_std=0.1).named_parameters())
    embedding = "llama.model.embed_tokens.weight"
    torch.testing.assert_close(larger[embedding], 5 * usual[embedding])
    assert float(larger[embedding].detach().std()) == pytest.approx(0.1, rel=0.05)
    assert all(torch.equal(value, larger[name]) for name, value in usual.items() if name != embedding)
    with pytest.raises(ValueError, match="embedding_std"):
        ByteLlama(embedding_std=0.0)
