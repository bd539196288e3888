"""From texts to calibration batches, without a network."""

import json
import socket
import sys

import pytest
import torch

from farms_tb.sparsity import prune
from farms_tb.sparsity.calibration import (
    calibration_batches,
    checked_batches,
    dataset_texts,
    document_batches,
    random_tokens,
    tokens_of_text,
    tokens_of_texts,
)
from tests.sparsity.models import VOCABULARY, llama, uniform_plan
from tests.sparsity.texts import tokenizer, words


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def test_files_are_tokenised_as_a_whole(tmp_path):
    texts = [words(30), words(20, seed=1)]
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / name).write_text(text, encoding="utf-8")
    both = tokens_of_text([tmp_path / "a", tmp_path / "b"], tokenizer())
    assert both.tolist() == [1, *ids_of(texts[0]), *ids_of(texts[1])], "the first token comes once"
    assert tokens_of_text(str(tmp_path / "a"), tokenizer()).tolist() == [1, *ids_of(texts[0])]
    seen = []
    tokens_of_texts(["a", "", "b"], lambda text: seen.append(text) or {"input_ids": [3]})
    assert seen == ["a\n\n\n\nb"]


def test_files_without_text_are_refused(tmp_path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="empty is empty"):
        tokens_of_text(tmp_path / "empty", tokenizer())
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        tokens_of_text(tmp_path / "binary", tokenizer())
    with pytest.raises(FileNotFoundError):
        tokens_of_text(tmp_path / "absent", tokenizer())


def test_one_text_is_no_list_of_texts():
    with pytest.raises(TypeError, match=r"several texts.*\[text\]"):
        tokens_of_texts("one text", lambda text: {"input_ids": list(text.encode())})


def test_sequences_are_consecutive_without_overlap():
    tokens = torch.arange(95)
    batches = calibration_batches(tokens, number=4, length=10, seed=2)
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert rows.shape == (4, 10)
    assert (rows[:, :1] % 10 == 0).all()
    assert torch.equal(rows - rows[:, :1], torch.arange(10).expand(4, 10))
    assert rows[:, 0].unique().numel() == 4
    again = calibration_batches(tokens, number=4, length=10, seed=2)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in again]), rows)
    assert len(calibration_batches(tokens, number=100, length=10)) == 9
    with pytest.raises(ValueError, match="too short: 95 tokens"):
        calibration_batches(tokens, length=96)


def test_windows_come_from_long_documents_alone():
    documents = [words(number, seed=number) for number in (12, 40, 5, 41, 60, 11, 13)]
    batches = document_batches(documents, tokenizer(), number=3, length=20, seed=1)
    begun = set()
    for batch in batches:
        window = batch["input_ids"]
        assert window.shape == (1, 20)
        text = " ".join(f"w{token:02d}" for token in window[0].tolist())
        begun |= {place for place, document in enumerate(documents) if text in f"w01 {document}"}
    assert begun == {1, 3, 4}
    again = document_batches(documents, tokenizer(), number=3, length=20, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    with pytest.raises(ValueError, match="3 of 7 documents"):
        document_batches(documents, tokenizer(), number=4, length=20)


def test_made_tokens_are_seeded_and_of_the_vocabulary():
    tokens = random_tokens(VOCABULARY, 4000, seed=3)
    assert torch.equal(tokens, random_tokens(VOCABULARY, 4000, seed=3))
    assert not torch.equal(tokens, random_tokens(VOCABULARY, 4000, seed=4))
    assert tokens.unique().tolist() == list(range(VOCABULARY))


def test_calibration_for_another_model_is_refused_before_pruning():
    model = llama()
    plan = uniform_plan(model, 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = calibration_batches(random_tokens(5 * VOCABULARY, 200), number=2, length=20)
    with pytest.raises(ValueError, match="tokenised for another model"):
        prune(model, plan, "wanda", calibration=batches)
    with pytest.raises(ValueError, match="too short"):
        prune(model, plan, "wanda", calibration=[{"input_ids": torch.empty(1, 0, dtype=torch.int64)}])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Bring a data set into the cache of `datasets`, as a download leaves it there: `lab/tiny`."""
    datasets = pytest.importorskip("datasets")
    lines = [words(9), "", words(7, seed=1)]
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.load_dataset(str(folder))
    (tmp_path / "cache" / "tiny").rename(tmp_path / "cache" / "lab___tiny")
    return lines


def test_data_sets_are_read_from_the_cache(cached, tmp_path):
    assert list(dataset_texts("lab/tiny", split="test")) == cached
    assert list(dataset_texts(str(tmp_path / "tiny"), split="test")) == cached
    tokens = tokens_of_texts(dataset_texts("lab/tiny", split="test"), tokenizer())
    assert tokens.tolist() == [1, *ids_of(cached[0]), *ids_of(cached[2])]


def test_data_sets_are_never_fetched(cached, monkeypatch):
    import datasets
    import huggingface_hub.constants

    sought = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: sought.append(host))
    with pytest.raises(FileNotFoundError, match=r"datasets.load_dataset\('lab/absent', 'small'\)"):
        dataset_texts("lab/absent", split="test", config="small")
    assert sought == []
    assert not datasets.config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(ValueError, match="no column 'body': it has text"):
        dataset_texts("lab/tiny", split="test", column="body")
    with pytest.raises(ValueError, match="train"):
        dataset_texts("lab/tiny", split="train")


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"farms-tb\[datasets\]"):
        dataset_texts("lab/tiny", split="test")


def test_batches_go_to_the_device_of_the_model():
    batches = [{"input": torch.zeros(2, 4), "flags": {"mask": torch.ones(2)}, "name": "a"}]
    (moved,) = checked_batches(torch.nn.Linear(4, 4, device="meta"), batches, required=True)
    assert moved["input"].is_meta
    assert moved["flags"]["mask"].is_meta
    assert moved["name"] == "a"
