"""What importing the package needs, and what it leaves alone."""

import ast
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import farms_tb
from farms_tb._moved import MOVED

PACKAGE = Path(farms_tb.__file__).parent
OPTIONAL = (
    *("lightning", "pytorch_lightning", "lightning_fabric", "wandb", "matplotlib", "pandas", "hydra", "omegaconf"),
    *("scipy", "sklearn", "neuralop", "tltorch", "torchvision", "rich", "typer", "transformers", "accelerate"),
    *("safetensors", "datasets", "huggingface_hub", "peft", "bitsandbytes", "gguf", "cupy", "lm_eval"),
)
ROOMS = ("weights", "spectra", "balancing", "sparsity", "viewing", "training", "cli")
"""In the order of the method: a room imports from those before it."""
ABOVE_ALL = (
    "options",
    "keywords",
    "presets",
    "report",
    "verdicts",
    "warnings",
    "atomic_write",
    "missing",
    "printable",
)
"""What every room may import, and what imports none."""

PUBLIC_IN_0_1 = {
    "": "EsdHistogram FARMSTempBalance FARMSTrainerCallback LayerRecord MatrixStack NoSpectrumError Report "
    "StepGroup TempBalance analyze analyze_checkpoint layer_matrices lr_ratios",
    "analysis": "analyze",
    "balance": "LayerBalancer StepGroup TempBalance",
    "callback": "FARMSTempBalance",
    "checkpoint": "analyze_checkpoint",
    "densities": "esd_density marchenko_pastur tail_density",
    "huggingface": "FARMSTrainerCallback",
    "layers": "find_layers read_stacks",
    "layerwise_step": "LayerwiseStep",
    "logs": "measurement_row",
    "matrices": "MatrixStack NoSpectrumError layer_matrices",
    "options": "AssignFunc Esd Fit check_integer",
    "page": "write_page",
    "plots": "Curve History plot_alpha_by_depth plot_alpha_curves plot_esd plot_esds plot_full_against_farms "
    "plot_ratio_curves plot_ratio_map read_history save_all",
    "plots.style": "COLOURS FAINT MARKERS depth_colours new_figure save spread styled",
    "power_law": "fit_power_law",
    "report": "EsdHistogram LayerRecord Report",
    "run_folder": "read_run_folder",
    "schedule": "Schedule",
    "temperature": "lr_ratios noise_lambda",
    "wandb_report": "build_workspace main",
}
"""By path below `farms_tb`: what the documentation, recipes and benchmarks of version 0.1 imported."""
NEEDED_BY_MODULES = {"huggingface": "transformers", "plots": "matplotlib", "callback": "lightning"}

REFUSE_OPTIONAL = f"""
import importlib.abc, importlib.machinery, sys

OPTIONAL = {OPTIONAL!r}

class Refuse(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    # Found, as torch asks of some packages whether they are there, but not to be imported.
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] in OPTIONAL else None

    def exec_module(self, module):
        raise ImportError("refused: " + module.__name__)

sys.meta_path.insert(0, Refuse())
"""


def run(code):
    """Run code in a new interpreter where none of the optional packages can be imported."""
    command = [sys.executable, "-W", "error", "-c", REFUSE_OPTIONAL + code]
    return subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120, check=False)


def test_works_with_torch_alone():
    finished = run(
        """
import torch
import farms_tb

model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Conv2d(9, 20, 3), torch.nn.Linear(40, 30))
report = farms_tb.analyze(model)
print(report)
print(farms_tb.lr_ratios(report.alphas))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
balancer = farms_tb.TempBalance(model, optimizer, exclude_first=False, assign_func="noise_aware")
sum(parameter.square().sum() for parameter in model.parameters()).backward()
optimizer.step()
balancer.step()
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & set(OPTIONAL), loaded
for name in ("FARMSTempBalance", "FARMSTrainerCallback"):
    try:
        getattr(farms_tb, name)
    except ImportError as error:
        print(error)
"""
    )
    assert finished.returncode == 0, finished.stderr
    assert "refused: lightning" in finished.stdout
    assert 'pip install "farms-tb[transformers]"' in finished.stdout


def test_without_docstrings():
    command = [sys.executable, "-OO", "-c", "import farms_tb; farms_tb.FARMSTempBalance(preset='monitor')"]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""


def test_importing_changes_nothing():
    finished = run(
        """
import warnings, torch
before = (torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state(), torch.is_grad_enabled())
import farms_tb
after = (torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state(), torch.is_grad_enabled())
assert before[:2] == after[:2] and torch.equal(before[2], after[2]) and before[3] == after[3]
"""
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == finished.stderr == ""


def imported_packages(path):
    """The top-level packages that a module imports when it is imported, those for type checkers left out."""
    found = set()
    nodes = list(ast.parse(path.read_text()).body)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, (ast.Try, ast.With)):
            nodes += node.body
    return found


def imports_of(path):
    """Every module of the package that a file imports, wherever in the file, but for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "farms_tb":
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("farms_tb")}
    return found


@pytest.mark.parametrize("room", ["weights", "spectra", "balancing", "sparsity"])
def test_the_method_needs_torch_and_numpy_alone(room):
    for path in (PACKAGE / room).rglob("*.py"):
        outside = imported_packages(path) - set(sys.stdlib_module_names)
        assert outside <= {"torch", "numpy", "farms_tb"}, path


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_the_page(room):
    """Weights < spectra < balancing, sparsity < viewing < training < cli: no room imports from a later one.

    Balancing and sparsity, which both start from records, do not know each other.
    """
    later = set(ROOMS[ROOMS.index(room) + 1 :])
    if room == "sparsity":
        later.add("balancing")
    for path in (PACKAGE / room).rglob("*.py"):
        upwards = {name for name in imports_of(path) if name.split(".")[1:2] and name.split(".")[1] in later}
        assert not upwards, f"{path.relative_to(PACKAGE)} imports {upwards}"


@pytest.mark.parametrize("module", ABOVE_ALL)
def test_what_all_rooms_may_import_imports_none(module):
    imported = {name.split(".")[1] for name in imports_of(PACKAGE / f"{module}.py") if "." in name}
    assert imported <= set(ABOVE_ALL)


@pytest.mark.parametrize(
    ("package", "home"),
    [("wandb", "training"), ("matplotlib", "viewing/plots"), ("lightning", "training"), ("typer", "cli")],
)
def test_packages_are_imported_in_their_room_alone(package, home):
    for path in PACKAGE.rglob("*.py"):
        if package in imported_packages(path):
            assert path.is_relative_to(PACKAGE / home), path


def test_all_names_exist():
    assert all(isinstance(name, str) for name in farms_tb.__all__)
    assert sorted(farms_tb.__all__) == farms_tb.__all__
    for name in farms_tb.__all__:
        assert getattr(farms_tb, name) is not None


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'farms_tb' has no attribute 'FarmsTempBalance'"):
        farms_tb.FarmsTempBalance  # noqa: B018


def test_pruning_is_imported_on_first_use():
    code = "import farms_tb, sys; assert 'farms_tb.sparsity' not in sys.modules; print(farms_tb.sparsity.allocate)"
    finished = run(code)
    assert finished.returncode == 0, finished.stderr
    assert "allocate" in finished.stdout


def test_type_hints_are_announced():
    assert (PACKAGE / "py.typed").exists()


def moved_module(path):
    """Import a module of version 0.1 by its old path, if the package it needs is installed."""
    needed = NEEDED_BY_MODULES.get(path.split(".")[0])
    if needed:
        pytest.importorskip(needed)
    return importlib.import_module(f"farms_tb.{path}" if path else "farms_tb")


@pytest.mark.parametrize("path", PUBLIC_IN_0_1)
def test_names_of_version_0_1_are_found_where_they_were(path):
    module = moved_module(path)
    names = PUBLIC_IN_0_1[path].split()
    assert [name for name in names if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", MOVED)
def test_both_paths_are_the_same_module(path):
    old, new = moved_module(path), importlib.import_module(f"farms_tb.{MOVED[path]}")
    assert old is new
    assert new.__name__ == new.__spec__.name == f"farms_tb.{MOVED[path]}"


def test_both_paths_give_the_same_class():
    from farms_tb.balance import StepGroup, TempBalance
    from farms_tb.callback import FARMSTempBalance

    assert TempBalance is farms_tb.TempBalance
    assert StepGroup is farms_tb.StepGroup
    assert FARMSTempBalance is farms_tb.FARMSTempBalance
    # What a pickle of version 0.1 holds of a class: module and name.
    assert pickle.loads(b"cfarms_tb.callback\nFARMSTempBalance\n.") is farms_tb.FARMSTempBalance


@pytest.mark.parametrize("path", ["farms_tb.wandb_report", "farms_tb.training.wandb_workspace", "farms_tb.cli"])
def test_modules_that_can_be_run(path):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-W", "error", "-m", path, "--help"]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "usage" in finished.stdout.lower()
