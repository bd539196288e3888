"""Accuracies by lm-eval, on a task made here."""

import json
import math
import socket
import sys

import pytest
import torch

from farms_tb.sparsity import zero_shot
from tests.sparsity.models import llama
from tests.sparsity.texts import tokenizer, words

QUESTIONS = 8


def test_lm_eval_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"farms-tb\[lm-eval\]"):
        zero_shot(llama(), tokenizer(), ["arc_easy"])


@pytest.mark.parametrize("tasks", ["arc_easy", []])
def test_tasks_are_a_list_of_names(tasks):
    with pytest.raises(TypeError, match="list of names"):
        zero_shot(llama(), tokenizer(), tasks)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Write a task of multiple choice with its data, and return the folder and the questions."""
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {
            "query": words(6, seed=number),
            "choices": [words(3, seed=number + 50), words(3, seed=number + 90)],
            "gold": 0,
        }
        for number in range(QUESTIONS)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "made_here",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "made.yaml").write_text(json.dumps(task))  # JSON is YAML
    absent = {**task, "task": "absent", "dataset_path": "lab/absent"}
    absent.pop("dataset_kwargs")
    (folder / "absent.yaml").write_text(json.dumps(absent))
    (folder / "group.yaml").write_text(json.dumps({"group": "several", "task": ["made_here"]}))
    (folder / "tagged.yaml").write_text(json.dumps({**task, "task": "tagged", "tag": "some"}))
    return folder, rows


def right(model: torch.nn.Module, row: dict[str, object]) -> bool:
    """Whether the first choice is the likelier continuation of the question."""
    sums = []
    for choice in row["choices"]:
        question, answer = ([int(word[1:]) for word in text.split()] for text in (row["query"], choice))
        ids = torch.tensor([[1, *question, *answer]])
        log_probabilities = model(ids).logits[0].log_softmax(-1)
        sums.append(sum(float(log_probabilities[-len(answer) - 1 + i, word]) for i, word in enumerate(answer)))
    return sums[0] > sums[1]


@pytest.mark.filterwarnings("ignore")  # of lm-eval and datasets
def test_accuracy_is_the_share_of_likelier_answers(tasks):
    folder, rows = tasks
    model = llama().train()
    (found,) = zero_shot(model, tokenizer(), ["made_here"], task_folder=folder, batch_size=4)
    assert model.training
    share = sum(right(model.eval(), row) for row in rows) / QUESTIONS
    assert (found.task, found.accuracy, found.samples) == ("made_here", share, QUESTIONS)
    assert found.error == pytest.approx(math.sqrt(share * (1 - share) / (QUESTIONS - 1)))
    assert f"{share:.4f}" in str(found)
    (some,) = zero_shot(model, tokenizer(), ["made_here"], task_folder=folder, limit=3)
    assert some.samples == 3


@pytest.mark.filterwarnings("ignore")  # of lm-eval and datasets
def test_tasks_without_data_or_name_are_refused(tasks, monkeypatch):
    folder, _ = tasks
    sought = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: sought.append(host))
    with pytest.raises(FileNotFoundError, match="--tasks absent"):
        zero_shot(llama(), tokenizer(), ["absent"], task_folder=folder)
    assert sought == []
    with pytest.raises(ValueError, match="no task 'arc_easy'"):
        zero_shot(llama(), tokenizer(), ["made_here", "arc_easy"], task_folder=folder)


@pytest.mark.parametrize("name", ["several", "some"])
@pytest.mark.filterwarnings("ignore")  # of lm-eval and datasets
def test_groups_of_tasks_are_refused(tasks, name):
    with pytest.raises(ValueError, match=f"{name!r} is a group of tasks"):
        zero_shot(llama(), tokenizer(), ["made_here", name], task_folder=tasks[0])
