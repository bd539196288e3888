"""What goes wrong by the user's hand ends in one sentence and exit status 2; old names say the new ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from recipes.command import sentence, user_errors
from recipes.config import build
from recipes.data.tokens import load_tokenizer
from recipes.errors import RecipeError
from recipes.finetune.reading import Source, read_split
from recipes.old_names import current_overrides, current_settings
from recipes.study import programs
from recipes.train import main, train
from tests.recipes.recipe_runs import TINY_UNET, compose_settings

Settings = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run, and damaged ones, in a folder that is no run's."""
    folder = tmp_path_factory.mktemp("checkpoints")
    data = f"paths.data_dir={folder}/data"
    train(compose_settings(*TINY_UNET, "logger=csv", "balancing=off", f"paths.run_dir={folder}/run", data))
    whole = (folder / "run/checkpoints/last.ckpt").read_bytes()
    (folder / "whole.ckpt").write_bytes(whole)
    (folder / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(folder / "whole.ckpt") as archive:
        largest = archive.read(max(archive.infolist(), key=lambda member: member.file_size))
    flipped = bytearray(whole)
    flipped[whole.index(largest) + len(largest) // 2] ^= 1
    (folder / "flipped.ckpt").write_bytes(flipped)
    (folder / "text.ckpt").write_text("not a checkpoint\n", encoding="utf-8")
    return folder


def _command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Run the command; return what it prints as an error."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["recipes.train", *overrides])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr().err
    assert stopped.value.code == 2, printed
    assert "Traceback" not in printed
    return printed


def test_wandb_that_cannot_be_reached_says_how_to_go_on() -> None:
    from wandb.errors import CommError

    told = sentence(CommError("Failed to get resume status"))
    assert told is not None
    assert "resume status" in told
    assert "logger.wandb.offline=true" in told
    assert sentence(ZeroDivisionError("a fault of the program")) is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("balancing.exclude=[nowhere]",), ("balancing", "nowhere")),
        (("balancing.colour=red",), ("balancing.colour",)),
        (("+balancing.colour=red",), ("balancing", "colour")),
        (("balancing=fulll",), ("balancing/fulll", "placebo")),
        (("balancing.lr_min_ratio=3",), ("lr_min_ratio", "lr_max_ratio")),
        (("trainer.max_epocs=3",), ("max_epocs", "mean trainer.max_epochs?")),
        (("task.monitor=val/los",), ("task.monitor=val/los", "val/loss")),
        (("modle.net.width=8",), ("modle", "mean model?")),
        (("trainer.max_epochs=-3",), ("max_epochs", "-3")),
        (("trainer.max_epochs=abc",), ("trainer.max_epochs", "whole number", "abc")),
        (("trainer.check_val_every_n_epoch=0",), ("trainer.check_val_every_n_epoch", "at least 1")),
        (("trainer.accumulate_grad_batches=0",), ("trainer.accumulate_grad_batches", "at least 1")),
        (("seed=-1",), ("seed", "whole number", "-1")),
        (("seed=1.5",), ("seed", "whole number", "1.5")),
        (("seed=true",), ("seed", "whole number", "True")),
        (("seed=99999999999",), ("seed", "at most 4294967295")),
        (("arms.farms.lr=nan",), ("lr", "finite number", "nan")),
        (("arms.farms.lr=-1",), ("lr", "finite number", "-1")),
        (("arms.farms.lr=null",), ("lr", "finite number", "None")),
        (("optimizer.weight_decay=nan",), ("optimizer.weight_decay", "finite number")),
        (("scheduler.T_max=0",), ("scheduler.T_max", "at least 1")),
        (("data.batch_size=0",), ("data.batch_size", "at least 1")),
        (("data.shuffle_seed=null",), ("data.shuffle_seed", "whole number")),
        (("data.train_size=abc",), ("data.train_size", "whole number")),
        (("threads=true",), ("threads", "whole number")),
        (("name=[1]",), ("name", "folder")),
        (("name=../elsewhere",), ("name", "folder", "elsewhere")),
        (("paths.run_dir=null", "ckpt_path=[a]"), ("ckpt_path", "path of a checkpoint")),
        (("paths.run_dir=''",), ("paths.run_dir", "folder")),
        (("paths.run_dir=null", "paths.output_dir=null"), ("paths.output_dir", "folder")),
        (("balancing=null",), ("group", "string")),
        (("trainer.accelerator=tpuu",), ("tpuu", "cpu")),
        (("experiment=nope",), ("experiment/nope", "darcy_unet")),
        (("data._target_=recipes.data.Nothing",), ("recipes.data.Nothing",)),
        (("ckpt_path={folder}/nothing.ckpt",), ("nothing.ckpt", "not a file")),
        (("ckpt_path={folder}/text.ckpt",), ("text.ckpt", "checkpoint")),
        (("ckpt_path={folder}/cut.ckpt",), ("cut.ckpt", "cut short")),
        (("ckpt_path={folder}/flipped.ckpt",), ("flipped.ckpt", "checksum")),
        (("ckpt_path={folder}/whole.ckpt", "model.net.width=8"), ("another network", "net.encoders")),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes_end_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    checkpoints: Path,
    overrides: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    folders = (f"paths.run_dir={tmp_path}/run", f"paths.data_dir={checkpoints}/data", "~callbacks.progress")
    asked = [override.format(folder=checkpoints) for override in overrides]
    printed = _command_line(monkeypatch, capsys, *TINY_UNET, "logger=csv", *folders, *asked)
    assert all(word in printed for word in words), printed
    assert printed.count("error:") == 1


@pytest.mark.skipif(bool(find_spec("hydra_plugins.hydra_ray_launcher")), reason="the launcher is installed")
def test_a_launcher_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = _command_line(monkeypatch, capsys, "sweep=seeds", "hydra/launcher=ray")
    assert "pip install 'farms-tb[launchers,cluster]'" in printed


def test_a_run_of_a_sweep_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By its overrides; the run after it is done all the same."""
    folders = (f"paths.output_dir={tmp_path}/runs", f"paths.data_dir={tmp_path}/data", "~callbacks.progress")
    asked = (
        "hydra.mode=MULTIRUN",
        f"ckpt_path={tmp_path}/nothing.ckpt,null",
        "balancing=off",
        "debug=one_batch",
        "logger=csv",
    )
    printed = _command_line(monkeypatch, capsys, *TINY_UNET, *folders, *asked)
    assert "job with overrides: [" in printed
    assert f"'ckpt_path={tmp_path}/nothing.ckpt'" in printed
    assert printed.count("error:") == 1
    assert len(list(tmp_path.glob("runs/darcy_unet/*/summary.json"))) == 1


def test_missing_data_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folders = (f"paths.run_dir={tmp_path}/run", f"paths.data_dir={tmp_path}/data", "logger=csv", "trainer=cpu")
    printed = _command_line(monkeypatch, capsys, "experiment=sciml/darcy_fno", "data.beta=0.1", *folders)
    assert "2D_DarcyFlow_beta0.1_Train.hdf5" in printed


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (RecipeError("no"), 2), (PermissionError(13, "no", "file"), 2)],
)
def test_exit_status(error: BaseException, status: int) -> None:
    with pytest.raises(SystemExit) as stopped, user_errors():
        raise error
    assert stopped.value.code == status


def test_a_package_that_is_missing_is_named() -> None:
    said = sentence(ModuleNotFoundError("No module named 'h5py'", name="h5py"))
    assert said is not None
    assert "h5py" in said
    assert "pip install" in said
    assert sentence(ModuleNotFoundError("No module named 'recipes.nothing'", name="recipes.nothing")) is None


@pytest.mark.parametrize(
    ("package", "extra"), [("transformers", "transformers"), ("timm", "baselines"), ("h5py", "recipes")]
)
def test_the_extra_that_is_named_has_the_package(package: str, extra: str) -> None:
    part = {"_target_": f"{__name__}.needs", "package": package}
    with pytest.raises(RecipeError, match=rf"part: .*farms-tb\[{extra}\]"):
        build(OmegaConf.create({"part": part}), "part")
    about = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(rf"^{extra} = \[(.*?)\]$", about, flags=re.MULTILINE | re.DOTALL)
    assert f'"{package}>=' in listed


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'somebodys'", name="somebodys"),
        ImportError("cannot import name 'nothing' from 'transformers'", name="transformers"),
        ImportError("another CUDA"),
    ],
    ids=str,
)
def test_no_extra_is_named_that_would_not_help(error: ImportError) -> None:
    part = OmegaConf.create({"part": {"_target_": f"{__name__}.fails", "error": "${error:}"}})
    OmegaConf.register_new_resolver("error", lambda: error, replace=True)
    with pytest.raises(RecipeError, match="part: ") as raised:
        build(part, "part")
    assert str(error) in str(raised.value)
    assert "pip install" not in str(raised.value) + str(sentence(error))


def fails(error: ImportError) -> None:
    raise error


def test_a_class_whose_package_is_missing_names_the_extra(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "reads_hdf5.py").write_text("import h5py\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(RecipeError, match=r"(?s)data=darcy: .*h5py.*pip install 'farms-tb\[recipes\]'"):
        train(settings("data._target_=reads_hdf5.Fields", "logger=csv"))


def needs(package: str) -> None:
    raise ModuleNotFoundError(f"No module named '{package}'", name=package)


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("transformers", lambda folder: build(compose_settings("experiment=tiny_lm"), "model.net")),
        ("transformers", lambda folder: load_tokenizer(str(folder), vocabulary=64)),
        ("datasets", lambda folder: read_split(Source("sst2", folder, hub=False), "train")),
    ],
    ids=["model", "tokenizer", "texts"],
)
def test_a_package_that_is_needed_late_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    package: str,
    use: Callable[[Path], object],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match="2"), user_errors():
        use(tmp_path)
    assert re.search(rf"{package}.* pip install .*\[{package}\]", capsys.readouterr().err)


def test_a_package_that_is_broken_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("another CUDA")

    monkeypatch.setattr(programs, "import_module", broken)
    with pytest.raises(RecipeError, match=r"study.program=finetune .*ImportError: another CUDA"):
        programs.load_program("finetune")


def test_every_program_says_what_is_missing_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['rich'] = None")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    command = [sys.executable, "-m", "recipes.train", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "the recipes need rich: pip install --editable '.[recipes]'\n"


def test_ctrl_c_that_the_trainer_has_handled_keeps_its_status() -> None:
    def stop_as_the_trainer_does() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    with pytest.raises(SystemExit) as stopped, user_errors():
        stop_as_the_trainer_does()
    assert stopped.value.code == 130


@pytest.mark.parametrize("error", [ValueError("a fault"), TypeError("a fault"), KeyError("a fault")])
def test_faults_of_the_program_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match="a fault"), user_errors():
        raise error


def test_every_error_keeps_its_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECIPES_FULL_ERROR", "1")
    with pytest.raises(RecipeError), user_errors():
        raise RecipeError("no")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("farms=full", ["balancing=full"]),
        ("farms=farms,off", ["balancing=farms,off"]),
        ("farms.lr_max_ratio=1.9", ["balancing.lr_max_ratio=1.9"]),
        ("+farms.x=1", ["+balancing.x=1"]),
        ("experiment=sciml/darcy_beta0.1_fno", ["experiment=sciml/darcy_fno", "data.beta=0.1"]),
        ("experiment=sciml/darcy_beta100_unet", ["experiment=sciml/darcy_unet", "data.beta=100"]),
        ("experiment=sciml/cfd2d_fno_1of40", ["experiment=sciml/cfd2d_fno", "data.fraction=1/40"]),
    ],
)
def test_old_names_on_the_command_line(settings: Settings, old: str, new: list[str]) -> None:
    overrides, (note,) = current_overrides([old])
    assert overrides == new
    assert " ".join(new) in note
    if "," not in old and "+" not in old:
        settings(*overrides)


@pytest.mark.parametrize("same", ["balancing=full", "experiment=farms/cifar100_vgg16", "arms.farms.lr=1", "-m"])
def test_current_names_pass_unchanged(same: str) -> None:
    assert current_overrides([same]) == ([same], [])


def _of_an_earlier_release(cfg: DictConfig) -> DictConfig:
    """Return settings as they were saved before `farms` became `balancing`."""
    saved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(saved, dict)
    options = saved.pop("balancing")
    del options["arm"]
    return OmegaConf.create({**saved, "farms": {**options, "max_overhead": None, "timings_file": None}})


def test_settings_of_an_earlier_release_train_with_a_warning(settings: Settings, tmp_path: Path) -> None:
    options = ("balancing=full", "logger=csv", f"paths.run_dir={tmp_path}/run")
    cfg = _of_an_earlier_release(settings(*TINY_UNET, *options))
    with pytest.warns(FutureWarning, match="balancing"):
        assert train(cfg)["arm"] == "full"


def test_a_run_of_an_earlier_release_resumes(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings(*TINY_UNET, "logger=csv", "trainer.max_epochs=1", "scheduler=constant")
    train(cfg)
    folder = Path(cfg.paths.run_dir)
    OmegaConf.save(_of_an_earlier_release(cfg), folder / "config.yaml", resolve=True)
    resume = f"ckpt_path={folder}/checkpoints/last.ckpt"
    train(settings(*TINY_UNET, "logger=csv", "scheduler=constant", resume))
    assert "other settings" not in capsys.readouterr().out


def test_settings_without_a_callback_are_those_of_the_arm_off() -> None:
    assert current_settings({"arm": "off", "farms": None})["balancing"] == {"arm": "off"}


def test_a_placebo_of_an_earlier_release_is_an_option_now() -> None:
    old = {"balancing": {"_target_": "recipes.placebo.PlaceboTempBalance", "arm": "placebo", "placebo_seed": 7}}
    new = {"_target_": "farms_tb.FARMSTempBalance", "arm": "placebo", "permute": 7}
    assert current_settings(old)["balancing"] == new
