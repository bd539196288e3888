"""Each script of `tests/faults/` tries one kind of fault that use has found, and exits with 0 if all is right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.children import run_script
from tests.helpers import without_wandb

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "tests" / "faults").glob("*.py"))
NEEDS = {
    "damaged_checkpoint_alongside_curves": ("typer", "matplotlib"),
    "disk_full_pictures": ("matplotlib",),
    "dollar_in_names": ("matplotlib", "tensorboard"),
    "escape_sequences_in_names": ("typer", "safetensors"),
    "file_cut_while_read": ("safetensors",),
    "fp8_scales": ("transformers", "safetensors"),
    "links_in_run_folder": ("matplotlib",),
    "lr_none": ("transformers",),
    "many_tensors_quadratic": ("safetensors",),
    "names_in_wandb": ("wandb",),
    "nested_tensor": ("typer",),
    "norms_follow": ("transformers",),
    "odd_metrics_csv": ("typer",),
    "stacked_experts_file": ("safetensors",),
    "two_writers_of_a_page": ("matplotlib",),
    "unclear_errors": ("typer",),
}
"""What a script imports beyond the package's own dependencies."""
POSIX = [
    "disk_full_pictures",
    "escape_sequences_in_names",
    "half_line_in_metrics",
    "killed_while_saving",
    "resumed_rows_twice",
    "tensor_larger_than_its_file",
    "two_writers_of_a_page",
]
"""Scripts that fork, or open a terminal."""
SLOW = [
    "damaged_checkpoint_alongside_curves",
    "disk_full_pictures",
    "dollar_in_names",
    "escape_sequences_in_names",
    "killed_while_saving",
    "many_tensors_quadratic",
    "names_in_wandb",
    "norms_follow",
    "numpy_options",
    "pickling",
    "resumed_rows_twice",
]


def marked(path: Path) -> object:
    marks = [pytest.mark.slow] if path.stem in SLOW else []
    if path.stem in POSIX:
        marks.append(pytest.mark.skipif(os.name != "posix", reason="needs fork and terminals of POSIX"))
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", [marked(path) for path in SCRIPTS])
def test_exits_with_zero(path: Path, tmp_path: Path) -> None:
    for module in NEEDS.get(path.stem, ()):
        pytest.importorskip(module)
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    code, said = run_script(path, tmp_path, {**without_wandb(), **settings}, seconds=240)
    assert code == 0, said[-6000:]


def test_there_is_a_script_for_each_name() -> None:
    names = {path.stem for path in SCRIPTS}
    assert len(names) >= 32
    assert {*NEEDS, *POSIX, *SLOW} <= names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_tries_a_second_input(path: Path) -> None:
    docstring = path.read_text(encoding="utf-8").split('"""')[1]
    assert "second input" in " ".join(docstring.lower().split())
