"""Fine-tuning in a study, with a tiny random BERT and made files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from recipes.errors import RecipeError
from recipes.finetune.__main__ import main as finetune_main
from recipes.study.__main__ import main
from recipes.study.cells import Cell, load_study
from recipes.study.records import Job, Record, read_records
from recipes.study.runner import check_cell
from tests.recipes.tiny_language import made_task, reviews, write_model, write_rows, write_sst2

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT

SMALL = (
    *("experiment=model_balancing/glue", "data.task=sst2", "data.fraction=0.5", "data.val_size=30"),
    *("model.length=32", "training.num_train_epochs=3", "training.use_cpu=true", "threads=1"),
    *("measuring_threads=1", "training.per_device_train_batch_size=8", "training.metric_for_best_model=macro_f1"),
)
STUDY = ("study.program=finetune", 'study.arms=["off",model_balancing]', "study.seeds=2", "study.grid=[1]")
MEASURED = "+balancing.min_eigenvalues=5"
PERMUTED = "+study.variants={permuted: ['balancing=model_balancing', '+balancing.permute=\\${seed}']}"
TIMES = ("seconds", "train_seconds", "callback_seconds")


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("tiny") / "bert")


@pytest.fixture
def settings(tiny_bert: str, tmp_path: Path) -> list[str]:
    """Settings of a small run, whose data are there; 300 test sentences tell scores apart."""
    write_sst2(tmp_path / "data")
    rows = [{"sentence": text, "label": label} for text, label in reviews(300, seed=5)]
    write_rows(tmp_path / "data" / "glue" / "sst2" / "validation.jsonl", rows)
    return [f"paths.data_dir={tmp_path / 'data'}", f"model.path={tiny_bert}", *SMALL]


@pytest.fixture
def cell(settings: list[str], tmp_path: Path) -> Iterator[Callable[..., Cell]]:
    """Compose a study of one cell."""

    def make(*overrides: str) -> Cell:
        GlobalHydra.instance().clear()
        return load_study([*settings, *STUDY, f"study.folder={tmp_path}/study", *overrides]).cells[0]

    return make


def facts_of(cell: Cell, arm: str, evaluations: int = 1, *, seed: int = 1, lr: float = 1e-3) -> dict[str, Any]:
    """Do a run in this process, as an engine's process does it."""
    from recipes.study.one_run import run_quietly

    found, _ = run_quietly((cell.settings(Job(arm, "final", seed, lr)), evaluations))
    return found


@pytest.mark.parametrize("arm", ["off", "model_balancing"])
def test_a_run_is_that_of_the_command(
    arm: str, cell: Callable[..., Cell], settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command validates and saves after each epoch, the study does not: the trained weights are the same."""
    facts = facts_of(cell(MEASURED), arm, 2, seed=7, lr=4e-4)
    own = [MEASURED] if arm == "model_balancing" else []
    command = [f"balancing={arm}", "seed=7", "arms.farms.lr=4e-4", f"paths.run_dir={tmp_path}/run", *own]
    monkeypatch.setattr(sys, "argv", ["finetune", *settings, *command])
    GlobalHydra.instance().clear()
    finetune_main()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert facts["test"] == summary["test"]["test_last/macro_f1"]
    assert 0.4 < facts["test"] < 1, "a score at its end would prove little"
    assert (facts["epochs"], facts["steps"]) == (summary["epochs"], summary["steps"]) == (3, 30)
    assert facts["best_val"] <= summary["best_score"], "one of three epochs was not looked at"


def test_facts_are_what_they_say(cell: Callable[..., Cell], capfd: pytest.CaptureFixture[str]) -> None:
    balanced, off = (facts_of(cell(MEASURED), arm, 3) for arm in ("model_balancing", "off"))
    assert capfd.readouterr() == ("", "")
    fields = {
        field for field in Record.__dataclass_fields__ if field not in ("experiment", *Job._fields, "config")
    }
    assert set(off) == set(balanced) == fields
    assert (off["metric"], off["blind_error"], off["device"]) == ("macro_f1", 0.5, "cpu")
    assert (off["val_samples"], off["test_samples"]) == (30, 300)
    assert off["best_val"] >= off["val"]
    assert off["lowest_test"] >= max(off["test"], off["best_test"])
    assert (off["mean_ratio"], off["ratio_sd"], off["callback_seconds"]) == (1.0, 0.0, 0.0)
    assert balanced["mean_ratio"] != 1.0
    assert balanced["ratio_sd"] > 0
    assert balanced["callback_seconds"] > 0
    for facts in (off, balanced):
        assert 0 < facts["train_seconds"] + facts["callback_seconds"] < facts["seconds"]


def test_looking_at_epochs_changes_nothing_in_the_training(cell: Callable[..., Cell]) -> None:
    once, often = (facts_of(cell(MEASURED), "model_balancing", number) for number in (1, 3))
    assert (once["val"], once["test"], once["best_epoch"]) == (often["val"], often["test"], 3)
    assert once["best_test"] == once["lowest_test"] == once["test"]


@pytest.mark.parametrize("rank", [None, 2], ids=["all weights", "lora"])
def test_a_kept_epoch_scores_as_a_training_that_ends_there(rank: int | None, cell: Callable[..., Cell]) -> None:
    if rank is not None:
        pytest.importorskip("peft")
    lr = 6e-4 if rank is None else 5e-3  # neither epoch is perfect
    constant = (
        "training.lr_scheduler_type=constant",
        "training.warmup_steps=0",
        f"model.lora.rank={rank or 'null'}",
    )
    long, short = (
        facts_of(cell(*constant, f"training.num_train_epochs={epochs}"), "off", epochs, lr=lr) for epochs in (2, 1)
    )
    assert short["test"] != long["test"]
    ends = {1: (short["val"], short["test"]), 2: (long["val"], long["test"])}
    assert (long["best_val"], long["best_test"]) == ends[long["best_epoch"]]
    assert long["lowest_test"] == max(short["test"], long["test"])
    # Two blocks of query and value, each 64 x 2 and 2 x 64, and the head.
    assert rank is None or long["parameters"] == 2 * 2 * 2 * 64 * 2 + 64 * 2 + 2


def test_an_epoch_that_is_cut_short_is_an_epoch_of_its_own(cell: Callable[..., Cell]) -> None:
    """Ten batches an epoch: the thirteenth step is in the second one."""
    constant = ("training.lr_scheduler_type=constant", "training.warmup_steps=0")
    cut = facts_of(cell(*constant, "+training.max_steps=13"), "off", 2, lr=6e-4)
    short = facts_of(cell(*constant, "training.num_train_epochs=1"), "off", lr=6e-4)
    assert (cut["epochs"], cut["steps"], short["epochs"]) == (2, 13, 1)
    assert cut["test"] != short["test"]
    ends = {1: (short["val"], short["test"]), 2: (cut["val"], cut["test"])}
    assert (cut["best_val"], cut["best_test"]) == ends[cut["best_epoch"]]
    assert cut["lowest_test"] == max(short["test"], cut["test"])


def test_a_run_that_diverges_has_no_score(cell: Callable[..., Cell]) -> None:
    facts = facts_of(cell("training.max_grad_norm=0"), "off", lr=1e30)
    assert facts["status"] == "diverged"
    assert math.isnan(facts["test"] + facts["best_test"])


def _results(folder: Path) -> dict[Job, dict[str, Any]]:
    return {
        job: asdict(record) for job, record in read_records(folder / "study" / "model_balancing" / "sst2").items()
    }


@pytest.mark.filterwarnings("ignore")
def test_a_study_goes_on_with_what_is_missing(
    settings: list[str], cell: Callable[..., Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*settings, *STUDY, f"study.folder={tmp_path}/study", MEASURED, "study.workers=1"]
    main([*arguments, "study.evaluations=2"])
    printed = capsys.readouterr()
    assert "1 - macro F1" in printed.out
    before = _results(tmp_path)
    assert {(job.arm, job.seed) for job in before} == {(a, s) for a in ("off", "model_balancing") for s in (1, 2)}
    found = {
        job: {name: value for name, value in facts.items() if name not in TIMES} for job, facts in before.items()
    }
    for job in [job for job in found if job.seed == 2]:
        alone = facts_of(cell(MEASURED), job.arm, 2, seed=job.seed, lr=job.lr)
        assert found[job].items() >= {name: value for name, value in alone.items() if name not in TIMES}.items()

    # As after a kill: a row is missing. And an arm joins.
    folder = tmp_path / "study" / "model_balancing" / "sst2"
    rows = (folder / "results.csv").read_text().splitlines()
    (folder / "results.csv").write_text("\n".join(rows[:-1]) + "\n")
    more = [*arguments, "study.evaluations=2", PERMUTED, "study.arms=[off,model_balancing,permuted]"]
    GlobalHydra.instance().clear()
    main(["--dry-run", *more])
    assert "core-hours left" in capsys.readouterr().out
    GlobalHydra.instance().clear()
    main(more)
    after = _results(tmp_path)
    assert len(after) == 6
    lost = before.keys() - {job for job in before if after[job] == before[job]}
    assert len(lost) == 1, "the other rows are as they were, times too"
    for job in lost:
        assert {name: value for name, value in after[job].items() if name not in TIMES} == found[job]
    permuted = [facts["ratio_sd"] for job, facts in after.items() if job.arm == "permuted"]
    assert min(permuted) > 0
    effects = (folder / "effects.csv").read_text()
    GlobalHydra.instance().clear()
    main(["--report", *more])
    assert (folder / "effects.csv").read_text() == effects
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit):
        main([*more, "training.num_train_epochs=2"])
    assert "off.training.num_train_epochs was 3 and is 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["study.program=prune"], "study.program must be one of train, finetune, got 'prune'"),
        (
            ["study.program=train"],
            "model_balancing/glue is for python -m recipes.finetune: set study.program=finetune",
        ),
        (["experiment=darcy_fno"], "darcy_fno is for python -m recipes.train: set study.program=train"),
        (["experiment=study/digits_resnet18_50"], "set study.program=train"),
        (["experiment=nowhere"], "experiment=nowhere: .*experiment/nowhere"),
        (["training.learning_rate=1e-3"], r"training.learning_rate=0.001 can't be set.*arms\.farms\.lr"),
        (["+study.variants={v: ['seed=5']}"], "study.variants.v: seed=5 can't be set"),
        (["+study.variants={v: ['data.seed=5']}", "study.arms=[off,v]"], "data.seed=5 can't .*vary_data=false"),
        (["arms.farms.lr=0"], "lr=0 of the arm"),
        (["training.metric_for_best_model=loss"], "must be one of accuracy, macro_f1, got loss"),
        (["data.task=sst3"], "data.task must be one of sst2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(overrides: list[str], message: str, cell: Callable[..., Cell]) -> None:
    with pytest.raises(RecipeError, match=message):
        cell(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.task=stsb", "data.val_size=3"], "macro_f1: it needs data with classes, got a number"),
        (["data.task=rte"], "put the files of rte"),
        (["model.path=/no/model"], "model.hub=true"),
        (["training.lr_scheduler_type=sometimes"], "training: .*sometimes"),
        ([MEASURED, "+balancing.esd=fll"], "balancing: esd must be one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_that_building_shows(
    overrides: list[str], message: str, cell: Callable[..., Cell], tmp_path: Path
) -> None:
    made_task(tmp_path / "data", "stsb")
    with pytest.raises(RecipeError, match=message):
        check_cell(cell(*overrides))


def test_the_rule_of_the_best_checkpoint_is_none_of_a_studys_settings(cell: Callable[..., Cell]) -> None:
    """Studies that were begun when it was set to true go on."""
    assert cell().settings(Job("off", "final", 1, 0.1))["training"]["greater_is_better"] is True


def test_a_cell_can_be_built(cell: Callable[..., Cell]) -> None:
    check_cell(cell(MEASURED))


def test_program_of_single_cells(settings: list[str], tmp_path: Path) -> None:
    cells = ("+study.cells.digits_resnet18={}", "+study.cells.newsgroups_minilm={program: finetune}")
    study = load_study([*cells, f"study.folder={tmp_path}", "study.arms=[off,full]"])
    assert [cell.options.program for cell in study.cells] == ["train", "finetune"]
    assert study.cells[1].lr("full") == 1e-4


def test_seeds_and_rates_reach_what_they_decide(cell: Callable[..., Cell]) -> None:
    for vary_data, data_seed in ((True, 5), (False, 13)):
        found = cell(f"study.vary_data={vary_data}").settings(Job("off", "final", 5, 0.07))
        assert (found["seed"], found["training"]["seed"], found["data"]["seed"]) == (5, 5, data_seed)
        assert found["training"]["learning_rate"] == 0.07
    permuted = cell(PERMUTED, "study.arms=[off,permuted]")
    assert permuted.settings(Job("permuted", "final", 5, 0.07))["balancing"]["permute"] == 5


def test_results_do_not_depend_on_folders(cell: Callable[..., Cell]) -> None:
    here = cell()
    elsewhere = cell("paths.data_dir=/elsewhere", "paths.output_dir=/out", "training.output_dir=/checkpoints")
    assert here.identity() == elsewhere.identity()
    assert here.fingerprint("off") != cell("model.length=16").fingerprint("off")


@pytest.mark.parametrize("setting", ["training.seed=5", "+training.data_seed=5"])
def test_the_seed_is_the_studys(cell: Callable[..., Cell], setting: str) -> None:
    with pytest.raises(RecipeError, match="a study sets the seed of every run"):
        cell(setting)


@pytest.mark.filterwarnings("ignore")
def test_warnings_of_the_callback_are_told(cell: Callable[..., Cell]) -> None:
    from recipes.study.one_run import run_once

    found = cell("+balancing.min_eigenvalues=65", "training.num_train_epochs=1")  # attention has 64
    _, messages = run_once(found.settings(Job("model_balancing", "final", 1, 1e-3)))
    assert any("keep the base learning rate" in message for message in messages), messages
