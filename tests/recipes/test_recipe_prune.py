"""`python -m recipes.prune`: the settings of the papers, and each kind of model once, tiny and random."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from farms_tb import SpectrumOptions
from farms_tb.sparsity import PruneReport, SparsityPlan, prune
from recipes.config import CONFIG_DIR
from recipes.errors import RecipeError
from recipes.prune import comparison
from recipes.prune.__main__ import main
from recipes.prune.comparison import compare_arms, epsilon_of
from tests.sparsity.models import llama
from tests.sparsity.texts import tokenizer, words

FILES = sorted((Path(CONFIG_DIR) / "experiment/prune").glob("[!_]*.yaml"))
LANGUAGE = ("llama_7b", "llama_13b", "llama2_7b", "llama2_13b", "smollm2")
IMAGES = ("vit_base", "deit_base", "convnext_base")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*alpha.*", "ignore:held at", "ignore:.*epsilon.*", "ignore:.*straight line.*", "ignore:.*stay dense.*"
)


def settings(*overrides: str) -> DictConfig:
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return compose("prune", overrides=list(overrides))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a language model, texts, and images of two classes."""
    made = tmp_path_factory.mktemp("prune")
    llama().save_pretrained(made / "llama")
    tokenizer().save_pretrained(made / "llama")
    for name, seed in (("calibration", 1), ("evaluation", 2)):
        (made / f"{name}.txt").write_text(words(400, seed))
    colours = {"cats": 60, "dogs": 200}
    for name, colour in colours.items():
        (made / "images" / name).mkdir(parents=True)
        for index in range(3):
            image = Image.new("RGB", (40, 48), (colour, 20 * index, 255 - colour))
            image.save(made / "images" / name / f"{index}.png")
    return made


def language(folder: Path, output: Path) -> tuple[str, ...]:
    return (
        f"model.path={folder}/llama",
        "model.dtype=float32",
        "calibration.documents=null",
        f"calibration.path={folder}/calibration.txt",
        "calibration.number=3",
        "calibration.length=32",
        "evaluation.documents=null",
        f"evaluation.path={folder}/evaluation.txt",
        "evaluation.length=32",
        "device=cpu",
        f"output={output}",
    )


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_experiments_are_the_promised_ones_and_say_how_to_run_them() -> None:
    assert {file.stem for file in FILES} == {*LANGUAGE, *IMAGES}
    for file in FILES:
        name = f"prune/{file.stem}"
        first, second = file.read_text(encoding="utf-8").splitlines()[:2]
        assert first == "# @package _global_"
        assert second.startswith(f"# python -m recipes.prune experiment={name}")
        assert settings(f"experiment={name}").name == name


# The papers: model, method and target; epsilon of FARMS and of AlphaPruning (whole matrices), where published.
PUBLISHED = [
    ("llama_7b", "magnitude", 0.7, 0.6, 0.3),
    ("llama_7b", "wanda", 0.85, 0.15, 0.1),
    ("llama_7b", "sparsegpt", 0.8, 0.2, 0.1),
    ("llama_13b", "magnitude", 0.75, 0.5, 0.45),
    ("llama_13b", "wanda", 0.7, 0.3, 0.3),
    ("llama_13b", "sparsegpt", 0.85, 0.25, 0.2),
    ("llama2_7b", "magnitude", 0.7, None, 0.5),
    ("llama2_7b", "sparsegpt", 0.7, None, 0.2),
    ("llama2_13b", "magnitude", 0.7, None, 0.4),
]


@pytest.mark.parametrize(("model", "method", "target", "farms", "full"), PUBLISHED)
def test_epsilon_is_the_published_one(
    model: str, method: str, target: float, farms: float | None, full: float
) -> None:
    composed = (f"experiment=prune/{model}", f"method={method}", f"target={target}")
    assert epsilon_of(settings(*composed, "measure.esd=full")) == full
    assert epsilon_of(settings(*composed, "epsilon=0.11")) == 0.11
    of_farms = settings(*composed, "measure.esd=farms")
    if farms is None:
        with pytest.raises(RecipeError, match="epsilon"):
            epsilon_of(of_farms)
    else:
        assert epsilon_of(of_farms) == farms


def test_measurements_are_those_of_the_papers() -> None:
    for model in LANGUAGE[:4]:
        spectrum = SpectrumOptions(**settings(f"experiment=prune/{model}").measure)
        positions = 15
        assert (spectrum.fit, spectrum.window, spectrum.windows_per_dim) == ("xmin_peak", 2000, positions)
        assert spectrum.esd == ("full" if model.startswith("llama2") else "farms")
    fewer = settings("experiment=prune/llama_7b", "method=magnitude")
    assert fewer.measure.windows_per_dim == 10
    for model in IMAGES:
        cfg = settings(f"experiment=prune/{model}")
        assert (cfg.measure.esd, cfg.measure.fit, cfg.epsilon, cfg.granularity) == (
            "full",
            "median",
            0.2,
            "matrix",
        )


@pytest.mark.parametrize("model", LANGUAGE)
def test_language_models_are_pruned_and_compared(folder: Path, tmp_path: Path, model: str) -> None:
    cfg = settings(f"experiment=prune/{model}", *language(folder, tmp_path))
    found = list(compare_arms(cfg))
    arms = ["dense", "uniform", "depth", "alpha", "shrinkage"]
    assert [row["arm"] for row in found] == [row["arm"] for row in rows_of(tmp_path)] == arms
    dense, uniform, *others = found
    assert dense["sparsity"] == 0
    assert dense["score"] == pytest.approx(97, rel=0.2), "a random model knows nothing of 97 words"
    for row in (uniform, *others):
        assert row["sparsity"] == pytest.approx(0.7, abs=1e-3)
    for row in others:
        ratio = torch.tensor(row["score"] / uniform["score"]).log()
        assert row["difference"] == pytest.approx(float(ratio), abs=1e-6)
        assert SparsityPlan.load(tmp_path / f"plan_{row['arm']}.json").method == row["arm"]


def test_magnitude_gets_no_data_next_to_a_search(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would run them through each arm's model for output errors that no table shows."""
    given = []

    def noted(*arguments: Any, calibration: Any = None) -> PruneReport:
        given.append(calibration)
        return prune(*arguments, calibration=calibration)

    monkeypatch.setattr(comparison, "prune", noted)
    chosen = ("experiment=prune/smollm2", *language(folder, tmp_path), "method=magnitude", "target=0.5")
    arms = ("arms=[uniform,search]", "epsilon=0.2", "evaluations=1", "calibration.number=12")
    list(compare_arms(settings(*chosen, *arms)))
    assert given == [None, None]


VIT = ("img_size=32", "patch_size=8", "embed_dim=32", "depth=3", "num_heads=2", "num_classes=2")
CONVNEXT = ("depths=[2,2,2,2]", "dims=[16,16,32,32]", "num_classes=2")


def images(folder: Path, output: Path, model: str) -> tuple[str, ...]:
    """Settings of a tiny network; the file of its weights is made."""
    return (
        f"experiment=prune/{model}",
        *(f"+model.net.{size}" for size in (CONVNEXT if model == "convnext_base" else VIT)),
        f"model.path={output}/weights.pth",
        f"evaluation.path={folder}/images",
        f"calibration.path={folder}/images",
        "images.size=32",
        "images.resize=32",
        "images.workers=0",
        "device=cpu",
        f"output={output}",
    )


@pytest.mark.parametrize(
    ("model", "method"), [*((model, "magnitude") for model in IMAGES), ("deit_base", "wanda")]
)
def test_image_classifiers_are_pruned_and_compared(folder: Path, tmp_path: Path, model: str, method: str) -> None:
    pytest.importorskip("timm")
    cfg = settings(*images(folder, tmp_path, model), f"method={method}")
    torch.manual_seed(3)
    network = instantiate(cfg.model.net, _convert_="all")()
    torch.save({"model": network.state_dict()}, tmp_path / "weights.pth")
    dense, uniform, *others = list(compare_arms(cfg))
    assert [row["arm"] for row in others] == ["depth", "alpha"]
    assert dense["score"] in {count / 6 for count in range(7)}
    for row in (uniform, *others):
        assert row["sparsity"] == pytest.approx(0.5, abs=1e-3)
    plan = SparsityPlan.load(tmp_path / "plan_alpha.json")
    assert len(set(plan.sparsity.values())) > len({layer.block for layer in plan.layers.values()})
    assert not any("head" in name or "conv_dw" in name for name in plan.sparsity)


@pytest.mark.parametrize("kind", ["list.pth", "none.pth", "cut.pth", "damaged.safetensors"])
def test_a_file_without_weights_is_named(folder: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("timm")
    file = tmp_path / kind
    if kind in ("damaged.safetensors", "cut.pth"):
        file.write_bytes(b"x" * 100)
    else:
        torch.save([1, 2] if kind == "list.pth" else {"state_dict": None}, file)
    cfg = settings(*images(folder, tmp_path, "vit_base"), f"model.path={file}")
    with pytest.raises(RecipeError, match=f"model.path=.*{kind} does not fit"):
        list(compare_arms(cfg))


class _Nan(nn.Module):
    """Knows the class of every image, the first one, but for the outputs that are NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = nn.Parameter(torch.tensor([float("nan"), 0.0]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.outputs.expand(len(images), 2)


def test_outputs_that_are_nan_are_misses(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    cfg = settings(*images(folder, tmp_path, "vit_base"))
    with pytest.warns(UserWarning, match="6 of 6 images have outputs that are NaN"):
        score = instantiate(cfg.task, _convert_="all").score(_Nan())
    assert score.value == 0


class _First(nn.Module):
    """Two outputs; says that every image is of the first class."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.outputs.expand(len(images), 2)


def test_a_class_without_images_keeps_its_number(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    shutil.copytree(folder / "images/dogs", tmp_path / "some/dogs")
    cfg = settings(*images(folder, tmp_path, "vit_base"), f"evaluation.path={tmp_path / 'some'}")
    with pytest.raises(RecipeError, match=r"1 folders .* 2 outputs.*empty folder"):
        instantiate(cfg.task, _convert_="all").score(_First())
    (tmp_path / "some/cats").mkdir()
    assert instantiate(cfg.task, _convert_="all").score(_First()).value == 0
    shutil.rmtree(tmp_path / "some/dogs")
    with pytest.raises(RecipeError, match=r"evaluation\.path: .* no images"):
        list(compare_arms(cfg))


def test_a_folder_with_results_of_other_settings_is_left_alone(folder: Path, tmp_path: Path) -> None:
    chosen = ("experiment=prune/smollm2", *language(folder, tmp_path), "method=magnitude")
    list(compare_arms(settings(*chosen, "arms=[uniform,depth]", "target=0.5", "epsilon=0.2")))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RecipeError, match=r"output=.* results of other settings.* arms.*another output"):
        next(compare_arms(settings(*chosen, "arms=[uniform]", "target=0.5", "epsilon=0.2")))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    list(compare_arms(settings(*chosen, "arms=[uniform,depth]", "target=0.5", "epsilon=0.2")))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "experiment=prune"),
        (("experiment=prune/llama_7b",), "model.path"),
        (("experiment=prune/llama_7b", "model.path=/nowhere"), "/nowhere is not a folder"),
        (("experiment=prune/vit_base",), "model.path"),
        (("experiment=prune/vit_base", "model.path=w.pth"), "evaluation.path"),
        (("experiment=prune/vit_base", "model.path=w.pth", "evaluation.path=/nowhere"), "/nowhere"),
        (("experiment=prune/llama_7b", "{language}", "calibration.path=null"), "calibration.path"),
        (("experiment=prune/llama_7b", "{language}", "calibration.length=9999"), "9999"),
        (("experiment=prune/llama_7b", "{language}", "model.dtype=int3"), "model.dtype"),
        (("experiment=prune/llama_7b", "{language}", "arms=[alpha,beta]"), "beta"),
        (("experiment=prune/llama_7b", "{language}", "target=0.66"), "epsilon"),
        (("experiment=prune/llama_7b", "{language}", "device=cuda:77"), "cuda:77"),
        # Told before the weights, which are not there, are asked for.
        (("experiment=prune/llama_7b", "model.path=/nowhere", "target=2", "epsilon=0.2"), "target"),
        (("experiment=prune/llama_7b", "model.path=/nowhere", "measure.fit=best"), "measure: fit"),
        (("experiment=prune/vit_base", "{images}"), "weights.pth"),
        (("experiment=prune/vit_base", "{images}", "arms=[search]"), "search goes by the model's loss"),
    ],
)
def test_mistakes_end_in_one_sentence(
    folder: Path,
    tmp_path: Path,
    overrides: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a traceback, and with status 2."""
    many = {"{language}": language(folder, tmp_path), "{images}": images(folder, tmp_path, "vit_base")[1:]}
    arguments = [single for text in overrides for single in many.get(text, (text,))]
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["prune", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("error:") == 1
    assert "Traceback" not in printed


def test_the_command_prints_a_table(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    GlobalHydra.instance().clear()
    options = ("experiment=prune/smollm2", *language(folder, tmp_path), "arms=[uniform,shuffled]")
    monkeypatch.setattr(sys, "argv", ["prune", *options, "method=magnitude"])
    main()
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "difference from uniform" in printed
    assert str(tmp_path) in printed
    assert (tmp_path / "config.yaml").exists()


def test_networks_of_torchvision_are_built_without_downloads() -> None:
    other = ("model.net._target_=torchvision.models.vit_b_16", "~model.net.model_name")
    make = instantiate(settings("experiment=prune/vit_base", *other).model.net, _convert_="all")
    with torch.device("meta"):
        assert make().num_classes == 1000
