"""Fine-tuning through the command, with a tiny random BERT and made files."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("peft")

from transformers import AutoModelForSequenceClassification

from farms_tb.viewing.run_folder import read_run_folder
from recipes.config import CONFIG_DIR, build
from recipes.finetune.__main__ import main
from recipes.finetune.tasks import TASKS
from recipes.real.files import FILES, checked
from recipes.train import main as train_main
from tests.recipes.tiny_language import made_task, write_model, write_sst2

pytestmark = [
    pytest.mark.filterwarnings("ignore:layers with no alpha keep the base learning rate"),  # heads of toy models
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # PEFT
]

SMALL = (
    *("model.length=32", "training.learning_rate=0.002", "training.num_train_epochs=3", "training.use_cpu=true"),
    *("training.logging_steps=1", "training.per_device_train_batch_size=8", "threads=1", "measuring_threads=1"),
)
SST2 = ("experiment=model_balancing/glue", "data.task=sst2", "data.fraction=0.5", "data.val_size=30", *SMALL)
BALANCED = ("balancing=model_balancing", "+balancing.min_eigenvalues=5")
OFF = ("balancing=off",)


class Command(Protocol):
    def __call__(self, run: str, *overrides: str) -> dict[str, Any]: ...


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("tiny") / "bert")


@pytest.fixture
def finetune(tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command, and return what its `summary.json` holds."""

    def run(name: str, *overrides: str) -> dict[str, Any]:
        folders = [f"paths.run_dir={tmp_path / name}", f"paths.data_dir={tmp_path / 'data'}"]
        if not any(override.startswith("model.path=") for override in overrides):
            folders.append(f"model.path={tiny_bert}")
        monkeypatch.setattr(sys, "argv", ["finetune", *folders, *overrides])
        main()
        summary: dict[str, Any] = json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8"))
        return summary

    return run


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("arm", [OFF, BALANCED], ids=["off", "balanced"])
def test_a_run_leaves_scores_curves_and_weights(arm: tuple[str, ...], finetune: Command, tmp_path: Path) -> None:
    write_sst2(tmp_path / "data")
    facts = finetune("run", *SST2, *arm)
    assert (facts["epochs"], facts["steps"]) == (3, 30)
    assert facts["best_score"] > 0.8, "the words give the label away"
    scores = ("accuracy", "macro_f1")
    assert {f"{kind}/{name}" for kind in ("test", "test_last") for name in scores} <= facts["test"].keys()
    rows = rows_of(tmp_path / "run")
    curve = {float(row["epoch"]): float(row["val/accuracy"]) for row in rows if row["val/accuracy"]}
    assert list(curve) == [1, 2, 3]
    assert curve[facts["best_epoch"]] == facts["best_score"] == max(curve.values())
    best = AutoModelForSequenceClassification.from_pretrained(facts["best_checkpoint"])
    assert best.num_labels == 2
    run = read_run_folder(tmp_path / "run")
    assert run.farms is not None
    assert bool(run.history.alpha) == (arm is BALANCED)
    assert (tmp_path / "run" / "report.html").exists()


def test_without_a_best_epoch_the_last_one_is_tested_and_the_run_says_so(
    finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sst2(tmp_path / "data")
    facts = finetune("run", *SST2, *OFF, "training.num_train_epochs=1", "+training.eval_delay=2")
    assert facts["best_checkpoint"] is None
    assert facts["test"]["test/accuracy"] == facts["test"]["test_last/accuracy"]
    assert "no epoch is the best one" in capsys.readouterr().out


def test_a_block_has_one_ratio(finetune: Command, tmp_path: Path) -> None:
    write_sst2(tmp_path / "data")
    facts = finetune("run", *SST2, *BALANCED, "training.num_train_epochs=1")
    ratios: dict[str, set[float]] = {"layer.0.": set(), "layer.1.": set(), "classifier": set()}
    for layer in facts["layers"]:
        for place, found in ratios.items():
            if place in layer["layer"]:
                found.add(layer["ratio"])
    assert [len(found) for found in ratios.values()] == [1, 1, 1]
    assert ratios["classifier"] == {1.0}
    assert ratios["layer.0."] != ratios["layer.1."]


def test_a_run_that_was_killed_goes_on_identically(finetune: Command, tmp_path: Path) -> None:
    write_sst2(tmp_path / "data")
    run, keep = tmp_path / "run", "training.save_total_limit=3"
    whole = finetune("run", *SST2, *BALANCED, keep)
    rows = rows_of(run)
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for later in ("checkpoint-20", "checkpoint-30"):
        shutil.rmtree(run / "checkpoints" / later)
    (run / "metrics.csv").write_text("half a line")
    (run / "checkpoints" / ".last.ckpt-0123.part").write_text("half of the weights")
    resumed = finetune("run", *SST2, *BALANCED, keep, f"ckpt_path={run}/checkpoints/checkpoint-10")
    del whole["seconds"], resumed["seconds"]
    assert resumed == whole
    assert rows_of(run) == rows
    assert not list((run / "checkpoints").glob(".*.part"))
    again = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_run_that_is_resumed_after_its_last_step_keeps_its_rates(finetune: Command, tmp_path: Path) -> None:
    write_sst2(tmp_path / "data")
    whole = finetune("run", *SST2, *BALANCED)
    resumed = finetune("run", *SST2, *BALANCED, f"ckpt_path={tmp_path}/run/checkpoints/checkpoint-30")
    del whole["seconds"], resumed["seconds"]
    assert resumed == whole
    assert len({layer["ratio"] for layer in whole["layers"]}) > 1
    assert all(layer["lr"] for layer in whole["layers"])


def test_a_run_killed_in_its_first_checkpoint_can_only_be_deleted(
    finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sst2(tmp_path / "data")
    cut = tmp_path / "run" / "checkpoints" / "checkpoint-10"
    cut.mkdir(parents=True)
    (cut / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(SystemExit, match="2"):
        finetune("run", *SST2, *OFF)
    assert "delete it, as it has no checkpoint to resume from" in capsys.readouterr().err


def test_a_checkpoint_that_has_no_room(
    finetune: Command, tiny_bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights fit, the optimizer's state, which is twice as large, does not."""
    resource = pytest.importorskip("resource")
    write_sst2(tmp_path / "data")
    finetune("run", *SST2, *OFF, "training.num_train_epochs=1")
    first = tmp_path / "run" / "checkpoints" / "checkpoint-10"
    size = (Path(tiny_bert) / "model.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 // 2, limits[1]))
    try:
        with pytest.raises(SystemExit, match="2"):
            finetune("run", *SST2, *OFF, f"ckpt_path={first}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr()
    assert "the disk may be full" in said.err
    assert f"ckpt_path={first}" in " ".join(said.out.split()) + " ".join(said.err.split())


def test_a_resumed_run_keeps_its_optimizer_or_is_refused(
    finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sst2(tmp_path / "data")
    finetune("run", *SST2, *OFF)
    resume = f"ckpt_path={tmp_path}/run/checkpoints/checkpoint-30"
    for name, value in (("learning_rate", 0.5), ("weight_decay", 0.7), ("adam_beta2", 0.9)):
        setting = f"+training.{name}={value}" if name == "adam_beta2" else f"training.{name}={value}"
        with pytest.raises(SystemExit, match="2"):
            finetune("run", *SST2, *OFF, setting, resume)
        assert f"another training.{name}; repeat" in capsys.readouterr().err
    (tmp_path / "run").rename(tmp_path / "moved")
    facts = finetune("moved", *SST2, *OFF, resume.replace("/run/", "/moved/"))
    assert (tmp_path / "moved" / "checkpoints") == Path(facts["best_checkpoint"]).parent
    assert Path(facts["best_checkpoint"]).is_dir()
    assert "other settings" not in capsys.readouterr().out
    finetune("moved", *SST2, *OFF, "training.num_train_epochs=4", resume.replace("/run/", "/moved/"))
    assert "other settings under 'training'" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_refused(
    finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Trainer would go on without a part that is missing."""
    write_sst2(tmp_path / "data")
    finetune("run", *SST2, *OFF)
    newest, before = (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" for step in (30, 20))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"):
        file = newest / name
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 0x40
        for damaged in (None, whole[: len(whole) // 2], flipped):
            if damaged is flipped and name != "optimizer.pt":
                continue  # without a checksum, or so small that the byte is one that fills a gap
            file.unlink(missing_ok=True)
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(SystemExit, match="2"):
                finetune("run", *SST2, *OFF, f"ckpt_path={newest}")
            message = capsys.readouterr().err
            assert "no whole checkpoint" in message
            assert f"take {before}" in message
        file.write_bytes(whole)


def test_seeds_draw_other_examples_and_repeat(finetune: Command, tmp_path: Path) -> None:
    write_sst2(tmp_path / "data")
    brief = (*SST2, *OFF, "training.num_train_epochs=1")
    first, same, other = (finetune(f"run{i}", *brief, f"seed={seed}")["test"] for i, seed in enumerate((1, 1, 2)))
    assert first == same
    assert first["test/loss"] != other["test/loss"]


def test_lora_trains_adapters_and_head_alone(finetune: Command, tiny_bert: str, tmp_path: Path) -> None:
    write_sst2(tmp_path / "data")
    facts = finetune("run", *SST2, *BALANCED, "model.lora.rank=2", "training.num_train_epochs=2")
    assert (Path(facts["best_checkpoint"]) / "adapter_model.safetensors").exists()
    before = AutoModelForSequenceClassification.from_pretrained(tiny_bert).state_dict()
    after = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    bases = [name for name in after if name.endswith("base_layer.weight")]
    assert len(bases) == 4, "query and value of two blocks"
    for name in bases:
        own = name.replace("base_model.model.", "").replace(".base_layer", "")
        assert torch.equal(after[name], before[own])
    assert all(after[name].abs().max() > 0 for name in after if "lora_B" in name), "they begin at zero"
    ratios = {row["layer"]: row["ratio"] for row in facts["layers"]}
    assert not any("lora" in name or "base_layer" in name for name in ratios), "a layer and its adapter are one"
    assert sum(name.endswith((".query", ".value")) for name in ratios) == 4
    for block in ("layer.0.", "layer.1."):
        found = {ratio for name, ratio in ratios.items() if block in name and name.endswith((".query", ".value"))}
        assert len(found) == 1, "a ratio for each block"
        assert found != {1.0}


@pytest.mark.parametrize(
    ("metric", "greater"), [("loss", False), ("eval_loss", False), ("accuracy", True), ("macro_f1", True)]
)
def test_the_best_epoch_has_the_smallest_loss_or_the_largest_score(
    metric: str, greater: bool, tmp_path: Path
) -> None:
    GlobalHydra.instance().clear()
    overrides = [
        f"training.metric_for_best_model={metric}",
        f"training.output_dir={tmp_path}",
        "training.use_cpu=true",
    ]
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        cfg = compose("finetune", overrides)
    assert build(cfg, "training", warmup_steps=0).greater_is_better is greater


def test_an_epoch_that_is_cut_short_counts(finetune: Command, tmp_path: Path) -> None:
    write_sst2(tmp_path / "data")
    facts = finetune("run", *SST2, *OFF, "+training.max_steps=13")
    assert (facts["steps"], facts["epochs"]) == (13, 2), "an epoch has ten steps"


def test_the_best_epoch_is_tested_with_lora(finetune: Command, tmp_path: Path) -> None:
    """The scores of the best epoch do not depend on how many epochs follow it."""
    write_sst2(tmp_path / "data")
    # At a constant rate, the first epoch does not depend on how many there are. Later ones are worse on purpose.
    lora = (*SST2, *OFF, "model.lora.rank=2", "training.lr_scheduler_type=constant", "training.warmup_steps=0")
    worse = ("training.metric_for_best_model=loss", "training.greater_is_better=true")
    one = finetune("one", *lora, *worse, "training.num_train_epochs=1")
    three = finetune("three", *lora, *worse)
    assert three["best_epoch"] == 1
    assert three["test"]["test/loss"] == one["test"]["test/loss"] != three["test"]["test_last/loss"]


@pytest.mark.parametrize("task", ["stsb", "superglue_copa", "superglue_wic", "squad", "scicite"])
def test_every_kind_of_task_trains(task: str, finetune: Command, tmp_path: Path) -> None:
    made_task(tmp_path / "data", task)
    group = TASKS[task].group
    overrides = [f"experiment=model_balancing/{group}", f"data.task={task}", "data.fraction=0.5", *SMALL, *OFF]
    facts = finetune("run", *overrides, "training.num_train_epochs=1")
    assert f"test/{TASKS[task].score}" in facts["test"]
    assert facts["monitor"] == f"val/{TASKS[task].score}"


def test_evaluations_take_all_examples_where_training_drops_the_last_batch(
    finetune: Command, tmp_path: Path
) -> None:
    write_sst2(tmp_path / "data")
    brief = (*SST2, *OFF, "training.num_train_epochs=1", "training.per_device_train_batch_size=9")
    batches = ("training.per_device_eval_batch_size=7", "+training.dataloader_drop_last=true")
    facts = finetune("run", *brief, *batches)
    assert facts["steps"] == 8, "of 80 examples, 72 are trained on"
    assert facts["best_score"] * 30 == pytest.approx(round(facts["best_score"] * 30))
    assert facts["test"]["test/accuracy"] * 20 == pytest.approx(round(facts["test"]["test/accuracy"] * 20))


def test_a_question_longer_than_the_input_ends_in_a_sentence(
    finetune: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer itself stops at the first of these lengths with an error, at the second with a panic."""
    made_task(tmp_path / "data", "squad")
    squad = ("experiment=model_balancing/squad", "data.fraction=0.5", *SMALL, *OFF, "training.num_train_epochs=1")
    for length in (6, 8):
        with pytest.raises(SystemExit, match="2"):
            finetune("run", *squad, f"model.length={length}")
        error = capsys.readouterr().err
        assert f"model.length={length} leaves too little of the text next to a question of 4 tokens" in error
        assert "at least 10" in error
    assert finetune("run", *squad, "model.length=10")["epochs"] == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.score=f1", "data.score must be one of accuracy, macro_f1, matthews, loss, got f1"),
        ("data.test_size=0", "data.test_size must be null or a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings_of_documents_end_in_a_sentence(
    override: str, words: str, finetune: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        finetune("run", "experiment=newsgroups_minilm", override)
    assert words in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.parametrize("name", ["newsgroups20", "reuters8"])
def test_real_documents(name: str, finetune: Command) -> None:
    sizes = ("data.val_size=20", "data.test_size=40", "data.fraction=0.005", f"data.name={name}")
    facts = finetune("run", "experiment=newsgroups_minilm", *sizes, *SMALL, *OFF, "training.num_train_epochs=1")
    assert facts["steps"] == {"newsgroups20": 7, "reuters8": 4}[name]  # 56 and 27 documents in batches of 8


def test_documents_before_make_real(
    finetune: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = replace(FILES["newsgroups20 train"], path="nowhere")
    monkeypatch.setitem(FILES, "newsgroups20 train", missing)
    checked.cache_clear()
    with pytest.raises(SystemExit):
        finetune("run", "experiment=newsgroups_minilm")
    assert "make real" in capsys.readouterr().err


def test_lora_without_peft_names_the_extra(
    finetune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sst2(tmp_path / "data")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit):
        finetune("run", *SST2, *OFF, "model.lora.rank=2")
    assert "farms-tb[finetune]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("data.task=sst3",), "data.task must be one of sst2, mnli"),
        (("data.task=rte",), "put the files of rte"),
        (("data.fraction=0",), "data.fraction must be above 0"),
        (("data.fraction=1/0",), "data.fraction must be above 0 and .* such as 0.05 or 1/20, got 1/0"),
        (("data.fraction=null",), "data.fraction must be above 0"),
        (("data.val_size=81",), "data.val_size=81 asks for more"),
        (("data.fraction=1", "data.val_size=null"), "no example is left to choose"),
        (("data.draw=last",), "data.draw must be one of"),
        (("model.path=/no/model",), "model.hub=true"),
        (("model.lora.rank=2", "model.lora.targets=[nothing]"), "model.lora: .*target_modules"),
        (("training.eval_strategy=sometimes",), "training: .*sometimes"),
        (("+training.load_best_model_at_end=true",), "the recipe itself loads the best epoch"),
        (("training.save_strategy=no",), "set it to epoch, as training.eval_strategy is, or to best"),
        (("training.save_strategy=steps",), "set it to epoch, as training.eval_strategy is, or to best"),
        (("training.eval_strategy=no",), "set epoch or steps"),
        (
            ("training.eval_strategy=steps", "training.save_strategy=steps", "+training.save_steps=7"),
            "save_steps=7 does not save at every training.eval_steps=1; set both to the same",
        ),
        (("training.metric_for_best_model=f1",), "must be one of accuracy, macro_f1, matthews, loss, got f1"),
        (("+training.prediction_loss_only=true",), "prediction_loss_only=True: leave it out; .* needs the pred"),
        (("+training.batch_eval_metrics=true",), "batch_eval_metrics=True: leave it out"),
        (
            ("+training.dataloader_drop_last=true", "training.per_device_train_batch_size=81"),
            "a batch has 81 examples, there are 80",
        ),
        (("ckpt_path=/no/checkpoint-4",), "no whole checkpoint"),
        (("balancing.esd=fll", "balancing=farms"), "balancing: esd must be one of"),
        (("balancing.exclude=[nowhere]", "balancing=farms"), "balancing: .*nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_settings_end_in_a_sentence(
    overrides: tuple[str, ...],
    words: str,
    finetune: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_sst2(tmp_path / "data")
    with pytest.raises(SystemExit) as stopped:
        finetune("run", *SST2, *overrides)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_the_other_command_names_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "experiment=newsgroups_minilm", f"paths.output_dir={tmp_path}"])
    with pytest.raises(SystemExit):
        train_main()
    assert "python -m recipes.finetune" in capsys.readouterr().err
