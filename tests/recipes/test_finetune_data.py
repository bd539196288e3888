"""What fine-tuning reads, draws and scores, and the published numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from farms_tb import FARMSTrainerCallback
from recipes.config import ARMS, CONFIG_DIR, build_balancer
from recipes.errors import RecipeError
from recipes.finetune.building import _arguments
from recipes.finetune.data import RealTexts, TaskData
from recipes.finetune.draw import draw_apart, draw_stratified
from recipes.finetune.heads import HEADS
from recipes.finetune.network import ModelOptions, load_tokens
from recipes.finetune.published import register_resolver
from recipes.finetune.tasks import TASKS
from tests.recipes.tiny_language import made_task, write_model, write_rows, write_sst2

LABELS = [0] * 70 + [1] * 20 + [2] * 7 + [3] * 3


def settings(*overrides: str) -> DictConfig:
    """Compose the settings as the command does."""
    register_resolver()
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return compose("finetune", overrides=list(overrides))


@pytest.mark.parametrize("number", [1, 7, 10, 50, 99, 100])
def test_a_draw_keeps_the_proportions_of_the_classes(number: int) -> None:
    drawn = draw_stratified(LABELS, number, seed=3)
    assert len(set(drawn)) == number
    counts = Counter(LABELS[index] for index in drawn)
    for label, total in Counter(LABELS).items():
        assert abs(counts[label] - total * number / 100) < 1


def test_a_draw_follows_from_its_seed() -> None:
    assert draw_stratified(LABELS, 20, seed=1) == draw_stratified(LABELS, 20, seed=1)
    assert draw_stratified(LABELS, 20, seed=1) != draw_stratified(LABELS, 20, seed=2)
    often = Counter(index for seed in range(400) for index in draw_stratified([0] * 10, 5, seed))
    assert all(150 < often[index] < 250 for index in range(10)), "every example is as likely as the others"


def test_examples_held_out_are_not_trained_on() -> None:
    for draw in ("stratified", "first"):
        train, held = draw_apart(LABELS, 0.3, 40, seed=1, draw=draw)  # type: ignore[arg-type]
        assert (len(train), len(held)) == (30, 40)
        assert not set(train) & set(held)
        assert (train == list(range(30))) == (draw == "first")


# datasets 4.0, the oldest that is tested, leaves the files to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv"])
def test_files_of_every_format_hold_the_same(ending: str, tmp_path: Path) -> None:
    write_sst2(tmp_path, train=40, ending=ending)
    found = TaskData("sst2", tmp_path, fraction=0.25, val_size=8).read()
    assert (len(found.train), len(found.val), len(found.test)) == (10, 8, 20)
    assert sum(row["label"] for row in found.train) in (3, 4), "a third of the sentences praises"
    write_sst2(tmp_path / "other", train=40)
    assert found == TaskData("sst2", tmp_path / "other", fraction=0.25, val_size=8).read()


def test_a_fraction_is_a_decimal_number_or_a_quotient(tmp_path: Path) -> None:
    write_sst2(tmp_path, train=40)
    assert TaskData("sst2", tmp_path, fraction="1/4").read() == TaskData("sst2", tmp_path, fraction=0.25).read()


def test_parquet_files_hold_the_same(tmp_path: Path) -> None:
    import datasets

    write_sst2(tmp_path, train=40)
    folder = tmp_path / "parquet" / "glue" / "sst2"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        source = str(tmp_path / "glue" / "sst2" / f"{split}.jsonl")
        part = datasets.Dataset.from_json(source, cache_dir=str(tmp_path / "cache"))
        part.to_parquet(folder / f"{split}-00000-of-00001.parquet")  # as the hub names them
    assert (
        TaskData("sst2", tmp_path, fraction=0.5).read()
        == TaskData("sst2", tmp_path / "parquet", fraction=0.5).read()
    )


def test_labels_in_words_become_indices(tmp_path: Path) -> None:
    made_task(tmp_path, "scicite")
    found = TaskData("scicite", tmp_path).read()
    assert found.classes == ("background", "method")
    assert {row["label"] for row in found.test} == {0, 1}
    assert (len(found.train), len(found.val), len(found.test)) == (24, 8, 8), "the published splits"


def test_columns_and_labels_that_are_missing_are_named(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_rows(tmp_path / "glue" / "rte" / f"{split}.jsonl", [{"sentence1": "a", "label": 1}])
    with pytest.raises(RecipeError, match="lacks the columns sentence2; it has sentence1, label"):
        TaskData("rte", tmp_path).read()
    write_sst2(tmp_path)
    write_rows(tmp_path / "glue" / "sst2" / "validation.jsonl", [{"sentence": "a", "label": -1}])
    with pytest.raises(RecipeError, match="validation has no labelled example"):
        TaskData("sst2", tmp_path).read()
    write_rows(tmp_path / "glue" / "sst2" / "validation.jsonl", [{"sentence": "a", "label": 7}])
    with pytest.raises(RecipeError, match="labels that no training example has"):
        TaskData("sst2", tmp_path).read()


@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_words_that_look_like_no_value_are_read_as_they_stand(ending: str, tmp_path: Path) -> None:
    texts = ["null", "NA", "n/a", "nan", "None", "007", "", "unlabelled"]
    labels = ["NA", "None", "null", "NA", "None", "null", "NA", ""]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / "domain" / "scierc" / f"{split}{ending}", rows)
    found = TaskData("scierc", tmp_path).read()
    assert found.classes == ("NA", "None", "null")
    assert [row["text"] for row in found.test] == texts[:-1]
    assert [found.classes[row["label"]] for row in found.test] == labels[:-1]


def test_a_text_that_is_null_is_refused(tmp_path: Path) -> None:
    write_sst2(tmp_path)
    rows = [{"sentence": "a", "label": 1}, {"sentence": None, "label": 0}]
    write_rows(tmp_path / "glue" / "sst2" / "validation.jsonl", rows)
    with pytest.raises(RecipeError, match=r"sst2/validation\.jsonl: the column sentence is null"):
        TaskData("sst2", tmp_path).read()


def test_nothing_is_read_from_the_hub_unless_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.hub=true"):
        TaskData("sst2", tmp_path).read()
    with pytest.raises(RecipeError, match="scicite is not on the hub"):
        TaskData("scicite", tmp_path, hub=True).read()


def test_spans_are_scored_over_all_windows_of_a_text(tmp_path: Path) -> None:
    """Logits that point at the labels score 1; at the word after the answer, they do not."""
    made_task(tmp_path, "squad")
    tokens = load_tokens(ModelOptions(write_model(tmp_path / "bert"), hub=False, length=12, lora={}))
    rows = TaskData("squad", tmp_path, fraction=0.5).read().test
    encoded = HEADS["span"].encode(rows, TASKS["squad"], tokens)
    assert len(encoded.features) > len(rows), "no text has several windows"

    def logits(name: str, shift: int = 0) -> np.ndarray:
        scores = np.zeros((len(encoded.features), 12))
        for row, feature in zip(scores, encoded.features, strict=True):
            if feature["start_positions"]:  # else the answer is in another window
                row[(feature[name] + shift) % 12] = 10
        return scores

    names = ("start_positions", "end_positions")
    right = SimpleNamespace(predictions=tuple(logits(name) for name in names))
    assert encoded.score(right) == {"exact_match": 1.0, "f1": 1.0}
    wrong = SimpleNamespace(predictions=tuple(logits(name, shift=1) for name in names))
    assert encoded.score(wrong)["exact_match"] < 0.5


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_settings(task: str) -> None:
    cfg = settings(f"experiment=model_balancing/{TASKS[task].group}", f"data.task={task}")
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    assert plain["name"] == f"model_balancing/{task}"
    assert plain["training"]["metric_for_best_model"] == TASKS[task].score


# Task, fraction and arm; learning rate, batch and strengths below and above the mean alpha.
PUBLISHED = [
    ("sst2", "0.05", "model_balancing", (2e-5, 16, 2, 1)),
    ("sst2", "0.0002", "model_balancing", (2e-5, 16, 1.25, 1.25)),
    ("mnli", "0.0005", "model_balancing", (2e-5, 16, 0.5, 0.5)),
    ("qnli", "0.0005", "off", (2e-5, 4, None, None)),
    ("qnli", "0.0005", "model_balancing", (3e-5, 8, 1.25, 1.25)),
    ("qnli", "0.05", "model_balancing", (3e-5, 32, 2, 1)),
    ("qnli", "1/20", "model_balancing", (3e-5, 32, 2, 1)),
    ("stsb", "0.2", "model_balancing", (2e-5, 16, 0.5, 0.5)),
    ("stsb", "0.3", "model_balancing", (2e-5, 16, 1, 1)),
    ("squad", "0.01", "model_balancing", (2e-5, 24, 1, 1)),
    ("chemprot", "1.0", "off", (3e-5, 16, None, None)),
]


@pytest.mark.parametrize(("more", "warmup"), [((), 60), (("+training.max_steps=100",), 6)])
def test_a_fraction_of_the_run_warms_up(more: tuple[str, ...], warmup: int, tmp_path: Path) -> None:
    cfg = settings("experiment=model_balancing/glue", f"training.output_dir={tmp_path}", *more)
    assert _arguments(cfg, 100 * cfg.training.per_device_train_batch_size).warmup_steps == warmup


@pytest.mark.parametrize("option", ["world_size", "train_batch_size"])
def test_the_warm_up_counts_the_steps_of_all_devices(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, or one with two GPUs, take half of the steps."""
    cfg = settings("experiment=model_balancing/glue", f"training.output_dir={tmp_path}", "training.use_cpu=true")
    batch = cfg.training.per_device_train_batch_size
    twice = 2 if option == "world_size" else 2 * batch
    monkeypatch.setattr(f"transformers.TrainingArguments.{option}", property(lambda args: twice))
    assert _arguments(cfg, 100 * batch).warmup_steps == 30


@pytest.mark.parametrize(("task", "fraction", "arm", "expected"), PUBLISHED)
def test_published_numbers(task: str, fraction: str, arm: str, expected: tuple[float | None, ...]) -> None:
    experiment = f"experiment=model_balancing/{TASKS[task].group}"
    cfg = settings(experiment, f"data.task={task}", f"data.fraction={fraction}", f"balancing={arm}")
    training = cfg.training
    strengths = (cfg.balancing.get("sigmoid_min"), cfg.balancing.get("sigmoid_max"))
    assert (training.learning_rate, training.per_device_train_batch_size, *strengths) == expected
    assert (training.num_train_epochs, training.warmup_steps, training.weight_decay) == (10, 0.06, 0.1)
    assert (training.max_grad_norm, training.lr_scheduler_type, cfg.seeds) == (1.0, "linear", "13,37,43")


@pytest.mark.parametrize("strength", [0.5, 1.0, 1.25])
def test_the_arm_has_the_options_of_the_preset(strength: float) -> None:
    given = [f"+arms.model_balancing.{name}={strength}" for name in ("sigmoid_min", "sigmoid_max")]
    callback = build_balancer(
        settings("balancing=model_balancing", *given, "threads=null", "measuring_threads=null")
    )
    preset = FARMSTrainerCallback(preset="model_balancing", sigmoid_min=strength, sigmoid_max=strength)
    assert callback.options == preset.options


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "off"])
def test_every_arm_builds_the_callback_of_this_trainer(arm: str) -> None:
    callback = build_balancer(settings(f"balancing={arm}"))
    assert isinstance(callback, FARMSTrainerCallback)
    assert callback.options.ratios.exclude_heads == (arm != "model_balancing")


def test_real_texts_need_a_number_to_hold_out() -> None:
    with pytest.raises(RecipeError, match=r"data\.val_size must be a whole number of at least 0, got None"):
        RealTexts(val_size=None)  # type: ignore[arg-type]
