"""Every entry point takes the same options, by the same names, with the same defaults and types."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import farms_tb
from farms_tb import LoggingOptions, RatioOptions, ScheduleOptions, SpectrumOptions
from tests.helpers import LIGHTNING_NOISE, make_data

CLASSES = (SpectrumOptions, RatioOptions, ScheduleOptions, LoggingOptions)
SPECTRUM, RATIOS, SCHEDULE, LOGGING = ({field.name: field.default for field in fields(cls)} for cls in CLASSES)
HINTS = {name: hint for cls in CLASSES for name, hint in get_type_hints(cls).items()}
# `lr_ratios` has alphas alone, so its default is the map that needs no more.
MAP = {**dict(list(RATIOS.items())[:7]), "assign_func": "tb_linear_map", "favor": RATIOS["favor"], "errors": None}
OBJECTS = {"preset": None, "spectrum": None, "ratios": None, "schedule": None, "logging": None}
CALLBACK = OBJECTS | SPECTRUM | RATIOS | SCHEDULE | LOGGING
ANALYSIS = SPECTRUM | {"preset": None, "spectrum": None, "null": False, "histogram": False}


def options_of(function: Any) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
    }


@pytest.mark.parametrize(
    ("entry_point", "options"),
    [
        ("analyze", ANALYSIS),
        ("analyze_checkpoint", ANALYSIS | {"key": None, "base": None}),
        ("lr_ratios", MAP),
        ("TempBalance", SPECTRUM | RATIOS | {"preset": None, "spectrum": None, "ratios": None}),
        ("FARMSTempBalance", CALLBACK),
        ("FARMSTrainerCallback", CALLBACK),
    ],
)
def test_options_agree_and_are_documented(entry_point: str, options: dict[str, object]) -> None:
    function = getattr(farms_tb, entry_point)
    assert options_of(function) == options
    documented = inspect.getdoc(function) or ""
    for name in options:
        assert documented.count(f"\n    {name}: ") >= 1, f"{entry_point} does not document {name}"
    assert inspect.cleandoc(function.__doc__) == documented


@pytest.mark.parametrize("entry_point", ["analyze", "TempBalance", "FARMSTempBalance", "FARMSTrainerCallback"])
def test_types_are_those_of_the_dataclasses(entry_point: str) -> None:
    for parameter in inspect.signature(getattr(farms_tb, entry_point)).parameters.values():
        assert not isinstance(parameter.annotation, str), parameter
        if parameter.name in HINTS:
            assert parameter.annotation == HINTS[parameter.name]


def test_public_names_exist() -> None:
    for name in farms_tb.__all__:
        assert getattr(farms_tb, name) is not None
    assert {cls.__name__ for cls in CLASSES} <= set(farms_tb.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'FARMSTempBalanc'"):
        farms_tb.FARMSTempBalanc  # noqa: B018


RIGHT_AND_WRONG = """
import torch
from farms_tb import FARMSTempBalance, TempBalance, analyze
net = torch.nn.Linear(2, 2)
FARMSTempBalance(lr_min_ratio=0.5, esd="full", exclude=["a"], every_n_steps=None)
analyze(net, window=50, null=True).alphas
FARMSTempBalance(lr_min=0.5)
FARMSTempBalance(esd="fulll")
analyze(net, assign_func="tb_step")
TempBalance(net, torch.optim.SGD(net.parameters()), window="50")
"""


def test_mypy_sees_names_and_types(tmp_path: Path) -> None:
    """What is imported from elsewhere, torch above all, is left out: it takes minutes to read."""
    (tmp_path / "use.py").write_text(RIGHT_AND_WRONG)
    package = Path(farms_tb.__file__).parent
    read = [
        "__init__.py",
        "options.py",
        "keywords.py",
        "analysis.py",
        "balancing/loop.py",
        "training/lightning.py",
    ]
    command = [sys.executable, "-m", "mypy", "--config-file", "", "--follow-imports", "skip"]
    command += ["--cache-dir", str(tmp_path / "cache"), "use.py", *(str(package / name) for name in read)]
    done = subprocess.run(
        command, cwd=tmp_path, env={"MYPYPATH": str(package.parent)}, capture_output=True, text=True, check=False
    )
    found = [
        line.split(":")[1] for line in done.stdout.splitlines() if line.startswith("use.py") and "error" in line
    ]
    assert found == ["7", "8", "9", "10"], done.stdout + done.stderr


CONFIG = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: farms_tb.FARMSTempBalance
      init_args:
        assign_func: {assign_func}
        {option}
        exclude: [net.5]
        spectrum: {{esd: full, window: 40}}
"""


def run_cli(folder: Path, option: str, assign_func: str = "tb_linear_map") -> Any:
    from lightning.pytorch.cli import LightningCLI

    from tests.helpers import Module

    class Net(Module):
        def __init__(self) -> None:
            super().__init__(lambda params: torch.optim.SGD(params, lr=0.1))

        def train_dataloader(self) -> Any:
            return make_data()

    (folder / "config.yaml").write_text(CONFIG.format(option=option, assign_func=assign_func))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "fit", "--config", str(folder / "config.yaml")])
        return LightningCLI(Net, save_config_callback=None, seed_everything_default=0)


@pytest.mark.filterwarnings(*(mark.args[0] for mark in LIGHTNING_NOISE))
# What jsonargparse says of LightningCLI's own use of it.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:(?s).*Jsonargparse")
def test_lightning_cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jsonargparse")
    cli = run_cli(tmp_path, "lr_min_ratio: 0.7")
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, farms_tb.FARMSTempBalance)]
    assert callback.options.ratios == RatioOptions("tb_linear_map", lr_min_ratio=0.7, exclude=("net.5",))
    assert callback.options.spectrum == SpectrumOptions(esd="full", window=40)
    assert min(callback.ratios.values()) == 0.7
    for option in ("lr_min: 0.7", "lr_min_ratio: small"):
        with pytest.raises(SystemExit):
            run_cli(tmp_path, option)
        assert option.split(":")[0] in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_cli(tmp_path, "lr_min_ratio: 0.7", assign_func="linear")
    assert "assign_func" in capsys.readouterr().err


def test_hydra(tmp_path: Path) -> None:
    hydra = pytest.importorskip("hydra.utils")
    omegaconf = pytest.importorskip("omegaconf")
    config = {"_target_": "farms_tb.FARMSTempBalance", "lr_min_ratio": 0.7, "exclude": ["net.5"]}
    callback = hydra.instantiate(omegaconf.OmegaConf.create(config))
    assert callback.options.ratios == RatioOptions(lr_min_ratio=0.7, exclude=("net.5",))
    with pytest.raises(Exception, match="did you mean 'lr_min_ratio'"):
        hydra.instantiate(omegaconf.OmegaConf.create({"_target_": "farms_tb.FARMSTempBalance", "lr_min": 0.7}))
