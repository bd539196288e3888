"""Tokenised text: from files and data sets to windows, once; and a LLaMA trained on it."""

from __future__ import annotations

import json
import math
import os
import sysconfig
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from recipes.data.tokens import PartShuffle, TokenData
from recipes.errors import RecipeError
from recipes.models.language import Pretrained
from recipes.train import train
from tests.helpers import LIGHTNING_NOISE
from tests.recipes.recipe_runs import TINY_LLAMA
from tests.recipes.tokenizers import END, WORDS, write_llama, write_tokenizer

pytestmark = LIGHTNING_NOISE

DOCUMENTS = [[2 + (7 * document + word) % (WORDS - 2) for word in range(40)] for document in range(5)]
TOKENS = [token for document in DOCUMENTS for token in [*document, END]]
SIZES = {"vocabulary": 64, "length": 10, "val_tokens": 31, "test_tokens": 40, "batch_size": 3}


def words(document: list[int]) -> str:
    return " ".join(f"w{number:02d}" for number in document)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    """Options of `TokenData` for a folder with a file for each document."""
    for number, document in enumerate(DOCUMENTS):
        (tmp_path / "texts" / str(number)).mkdir(parents=True)
        (tmp_path / "texts" / str(number) / "text.txt").write_text(words(document))
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    return {"tokenizer": str(tokenizer), "path": str(tmp_path / "texts"), "cache_dir": tmp_path / "tokens"}


def prepared(**options: Any) -> TokenData:
    data = TokenData(**{**SIZES, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def joined(loader: object) -> tuple[Tensor, Tensor]:
    batches = list(loader)  # type: ignore[call-overload]
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))  # type: ignore[return-value]


def test_windows_are_the_documents_one_after_the_other(sources: dict[str, Any]) -> None:
    data = prepared(**sources)
    inputs, targets = joined(data.val_dataloader())
    assert inputs.flatten().tolist() == TOKENS[40:70]
    assert targets.flatten().tolist() == TOKENS[41:71]
    trained_on, _ = joined(data.train_dataloader())
    assert sorted(trained_on.flatten().tolist()) == sorted(TOKENS[71:][: len(trained_on) * 10])
    assert len(trained_on) == (len(TOKENS) - 71 - 1) // 10
    tested, _ = joined(data.test_dataloader())
    assert tested.flatten().tolist() == TOKENS[:30]


def test_a_data_set_gives_the_same_tokens_as_files(sources: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "rows").mkdir()
    rows = "".join(json.dumps({"body": words(document)}) + "\n" for document in DOCUMENTS)
    (tmp_path / "rows" / "train.jsonl").write_text(rows)
    of_files = prepared(**sources)
    of_rows = prepared(**{**sources, "path": None, "dataset": str(tmp_path / "rows"), "column": "body"})
    for mine, other in zip(joined(of_rows.val_dataloader()), joined(of_files.val_dataloader()), strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(RecipeError, match="no column 'text'"):
        prepared(**{**sources, "path": None, "dataset": str(tmp_path / "rows")})


def test_text_is_tokenised_once_and_again_after_a_change(sources: dict[str, Any]) -> None:
    prepared(**sources)
    (file,) = sources["cache_dir"].iterdir()
    assert np.fromfile(file, np.uint16).tolist() == TOKENS
    os.utime(file, ns=(0, 0))
    prepared(**sources)
    assert file.stat().st_mtime_ns == 0
    Path(sources["path"], "0", "text.txt").write_text(words(DOCUMENTS[0][:30]))
    changed = prepared(**sources)
    assert len(list(sources["cache_dir"].iterdir())) == 2
    assert len(changed.datasets["train"]) == (len(TOKENS) - 10 - 71 - 1) // 10


def test_a_stopped_tokenisation_leaves_no_file(sources: dict[str, Any]) -> None:
    Path(sources["path"], "4", "text.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RecipeError, match=r"text\.txt is no text in UTF-8"):
        prepared(**sources)
    assert not list(sources["cache_dir"].iterdir())


def test_no_more_is_tokenised_than_needed(sources: dict[str, Any]) -> None:
    data = prepared(**sources, train_tokens=50)
    (file,) = sources["cache_dir"].iterdir()
    assert np.fromfile(file, np.uint16).tolist() == TOKENS[: 50 + 31 + 40]
    assert len(data.datasets["train"]) == 4


def test_one_test_text_whatever_is_trained_on(sources: dict[str, Any]) -> None:
    for options in ({"train_tokens": 50}, {"train_tokens": 80}, {}):
        data = prepared(**sources, **options)
        assert joined(data.test_dataloader())[0].flatten().tolist() == TOKENS[:30]
        assert joined(data.val_dataloader())[0].flatten().tolist() == TOKENS[40:70]
        windows = data.datasets["train"]
        trained = torch.cat([windows[index][0] for index in range(len(windows))]).tolist()
        assert trained == TOKENS[71 : 71 + len(trained)]


def test_text_that_is_held_out_may_be_the_end(sources: dict[str, Any]) -> None:
    """As the published runs had it, and where it was before."""
    data = prepared(**sources, held_out="end", train_tokens=50)
    assert joined(data.test_dataloader())[0].flatten().tolist() == TOKENS[50 + 31 : 50 + 31 + 30]
    assert joined(data.val_dataloader())[0].flatten().tolist() == TOKENS[50:80]
    assert [data.datasets["train"][index][0].tolist() for index in (0, 3)] == [TOKENS[:10], TOKENS[30:40]]


def test_large_vocabularies_have_wider_tokens(sources: dict[str, Any]) -> None:
    data = prepared(**{**sources, "vocabulary": 100_000})
    (file,) = sources["cache_dir"].iterdir()
    assert np.fromfile(file, np.uint32).tolist() == TOKENS
    assert joined(data.test_dataloader())[0].flatten().tolist() == TOKENS[:30]


def test_parts_of_a_pass_go_through_everything_once() -> None:
    order = PartShuffle(12, seed=3, parts=3)
    epochs = []
    for epoch in range(6):
        order.set_epoch(epoch)
        epochs.append(list(order))
    assert [len(epoch) for epoch in epochs] == [4] * 6
    first, second = (list(chain.from_iterable(epochs[start : start + 3])) for start in (0, 3))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_a_known_text_has_a_name(sources: dict[str, Any]) -> None:
    """Python's modules, each a document; the toy tokenizer knows few of their words, but every end."""
    prepared(**{**sources, "path": "python"})
    (file,) = sources["cache_dir"].iterdir()
    modules = list(Path(sysconfig.get_path("stdlib")).glob("[!_]*.py"))
    assert (np.fromfile(file, np.uint16) == END).sum() >= len(modules) > 100


@pytest.mark.parametrize(
    ("options", "error", "words_of_it"),
    [
        ({"path": None}, RecipeError, "data.path=FILE_OR_FOLDER"),
        ({"dataset": "a/b"}, RecipeError, "set one of data.path"),
        ({"path": "/nowhere"}, RecipeError, "data.path=/nowhere is no file"),
        ({"suffix": ".md"}, RecipeError, "end in '.md'"),
        ({"path": None, "dataset": "nobody/nothing"}, RecipeError, "'nobody/nothing' is not on this machine"),
        ({"tokenizer": None}, RecipeError, "data.tokenizer=None is no folder"),
        ({"tokenizer": "t5-base"}, RecipeError, "data.tokenizer=t5-base is no folder.*nothing is downloaded"),
        ({"vocabulary": 20}, RecipeError, "set data.vocabulary=60"),
        ({"length": 0}, ValueError, "data.length must be a whole number of at least 1"),
        ({"train_tokens": -1}, ValueError, "data.train_tokens must be a whole number of at least 1"),
        ({"held_out": "middle"}, ValueError, "data.held_out must be 'start' or 'end'"),
        ({"val_tokens": 1000}, RecipeError, "data.val_tokens=1000"),
        ({"parts": 100}, RecipeError, "data.parts=100"),
    ],
)
def test_bad_settings(
    sources: dict[str, Any], options: dict[str, Any], error: type[Exception], words_of_it: str
) -> None:
    if "dataset" in options:
        pytest.importorskip("datasets")
    with pytest.raises(error, match=words_of_it):
        prepared(**{**sources, **options})


def test_bad_tokenizers(sources: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="holds no tokenizer"):
        prepared(**{**sources, "tokenizer": str(tmp_path / "empty")})
    with pytest.raises(RecipeError, match="no end-of-text token"):
        prepared(**{**sources, "tokenizer": str(write_tokenizer(tmp_path / "endless", eos=False))})


@pytest.mark.filterwarnings("ignore:layers with no alpha keep the base learning rate")  # they are narrow
@pytest.mark.parametrize("arm", ["llr", "off"])
def test_a_llama_learns(
    settings: Callable[..., DictConfig], sources: dict[str, Any], tmp_path: Path, arm: str
) -> None:
    ramp = ["balancing.ramp_steps=5"] if arm == "llr" else []
    (tmp_path / "long.txt").write_text(" ".join(words(document) for document in DOCUMENTS * 20))
    cfg = settings(
        "experiment=nano_llama_60m",
        *TINY_LLAMA,
        *(f"data.path={tmp_path}/long.txt", f"data.tokenizer={sources['tokenizer']}", f"balancing={arm}"),
        *("trainer=cpu", "logger=csv", "trainer.max_steps=40", "trainer.accumulate_grad_batches=1", "lr=1e-2"),
        *("scheduler.num_warmup_steps=4", "data.train_tokens=3000", "data.val_tokens=200"),
        *ramp,
    )
    facts = train(cfg)
    assert facts["steps"] == 40
    assert facts["test"]["test/loss"] < 0.8 * math.log(WORDS)
    if arm == "llr":
        (summary,) = (tmp_path / "runs").rglob("summary.json")
        ratios = {row["layer"]: row["ratio"] for row in json.loads(summary.read_text())["layers"]}
        assert ratios["net.llama.model.embed_tokens"] == ratios["net.llama.lm_head"] == 5
        assert (min(ratios.values()), max(ratios.values())) == (1, 5)


def test_the_training_of_a_trained_model_goes_on(
    settings: Callable[..., DictConfig], sources: dict[str, Any], tmp_path: Path
) -> None:
    """The network is the saved one, and a few steps of the experiment lower its loss."""
    from transformers import AutoModelForCausalLM

    folder = write_llama(tmp_path / "llama")
    saved = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(Pretrained(64, str(folder))(tokens), saved(tokens).logits)
    (tmp_path / "long.txt").write_text(" ".join(words(document) for document in DOCUMENTS * 20))
    cfg = settings(
        "experiment=smollm2_wikipedia",
        *(f"data.path={tmp_path}/long.txt", f"data.tokenizer={sources['tokenizer']}", "data.vocabulary=64"),
        *(f"model.net.path={folder}", "data.length=16", "data.val_tokens=200", "data.test_tokens=200"),
        *("trainer=cpu", "logger=csv", "trainer.max_steps=20", "trainer.limit_train_batches=10", "lr=1e-2"),
        *("scheduler.num_warmup_steps=2", "balancing.min_eigenvalues=10"),
    )
    facts = train(cfg)
    assert facts["steps"] == 20
    assert facts["test"]["test/loss"] < 0.9 * math.log(WORDS)


def test_a_model_saved_in_bfloat16_is_trained_in_float32(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    net = Pretrained(64, str(write_llama(tmp_path / "llama", torch.bfloat16)))
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


def test_no_model_to_go_on_with(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(RecipeError, match=r"model\.net\.path=gpt2 is no folder.*nothing is downloaded"):
        Pretrained(64, "gpt2")
    with pytest.raises(RecipeError, match="holds no causal language model"):
        Pretrained(64, str(tmp_path))
    with pytest.raises(RecipeError, match=r"knows 64 tokens.*set data\.vocabulary=64"):
        Pretrained(65, str(write_llama(tmp_path / "llama")))
