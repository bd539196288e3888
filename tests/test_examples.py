"""Each script of `examples/` is short and runs as its first lines say, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import without_wandb

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = [path for path in sorted(EXAMPLES.rglob("*.py")) if path.name != "__init__.py"]


def run(*command: str, folder: Path, **environment: str) -> str:
    """Run Python on this checkout's package; return what it printed."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    settings = {**without_wandb(), "PYTHONPATH": os.pathsep.join(paths), "TERM": "dumb", **environment}
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder, env=settings, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_at_most_forty_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


def test_there_are_seven() -> None:
    assert len(SCRIPTS) == 7


def test_stop_by_alpha(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    stopped, whole = run(str(EXAMPLES / "stop_by_alpha.py"), folder=tmp_path).splitlines()
    assert stopped.startswith("stop after ")
    assert int(stopped.split()[2]) < 50
    lost = float(whole.split()[-1].rstrip("%")) - float(stopped.split()[-1].rstrip("%"))
    assert lost < 2


def test_lightning_trainer(tmp_path: Path) -> None:
    printed = run(str(EXAMPLES / "lightning_trainer.py"), folder=tmp_path)
    assert "net.4: learning rate" in printed
    assert list(tmp_path.iterdir()) == []


def test_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    printed = run(str(EXAMPLES / "hugging_face.py"), folder=tmp_path)
    assert "transformer.h.1.mlp.c_fc: learning rate" in printed


def test_plain_loop(tmp_path: Path) -> None:
    printed = run(str(EXAMPLES / "plain_loop.py"), folder=tmp_path)
    assert "('11',) ratio 1.00" in printed


def test_lightning_cli(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    script, settings = (str(EXAMPLES / f"lightning_cli.{ending}") for ending in ("py", "yaml"))
    printed = run(script, "fit", "--config", settings, "--trainer.max_epochs", "1", folder=tmp_path)
    assert "net.6  1 x 64 x 64" in printed
    assert list(tmp_path.iterdir()) == []


def test_own_recipe(tmp_path: Path) -> None:
    pytest.importorskip("hydra")
    folder = EXAMPLES / "own_recipe"
    places = (f"paths.output_dir={tmp_path}", "logger=csv", "trainer.max_epochs=2")
    paths = os.pathsep.join([str(ROOT), str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    command = ("-m", "recipes.train", "--config-dir", str(folder / "conf"), "experiment=mine", *places)
    run(*command, folder=ROOT, PYTHONPATH=paths)
    (summary,) = tmp_path.glob("mine/*/summary.json")
    facts = json.loads(summary.read_text(encoding="utf-8"))
    assert (facts["name"], facts["epochs"]) == ("mine", 2)
    assert {layer["layer"] for layer in facts["layers"]} >= {"net.0.0", "net.3.0", "net.6"}


class TestAnalyzeCheckpoint:
    def test_compares_two_files_of_its_own(self, tmp_path: Path) -> None:
        lines = run(str(EXAMPLES / "analyze_checkpoint.py"), folder=tmp_path).splitlines()
        (changed,) = (line for line in lines if line.startswith("2: alpha"))
        before, after = (float(part.split()[0]) for part in changed.removeprefix("2: alpha ").split("->"))
        assert after < before - 0.3

    def test_measures_the_files_that_it_is_given(self, tmp_path: Path) -> None:
        import torch
        from torch import nn

        torch.save(nn.Sequential(nn.Linear(64, 64)).state_dict(), tmp_path / "one.pt")
        printed = run(str(EXAMPLES / "analyze_checkpoint.py"), "one.pt", folder=tmp_path)
        assert "1 x 64 x 64" in printed
        assert "->" not in printed
