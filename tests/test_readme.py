"""The README is short and its Python runs; its links and the tests that the guarantees name exist."""

from __future__ import annotations

import ast
import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

# What the first example calls the user's own: a module, its data, and Lightning.
USERS_OWN = """
import lightning as L, torch
from torch import nn

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                                 nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    def training_step(self, x, _):
        return nn.functional.mse_loss(self.net(x), x.sum(1, keepdim=True).sin())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

module, data = Net(), torch.utils.data.DataLoader(torch.randn(128, 16), 32)
"""


def test_readme_is_a_screen_and_a_half() -> None:
    assert len(README.splitlines()) <= 120


def test_readme_has_examples() -> None:
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("code", [USERS_OWN + BLOCKS[0], BLOCKS[1]], ids=["lightning", "analyze"])
def test_readme_example_runs(code: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "alpha" in result.stdout


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), f"{page}: {link}"


class TestTasks:
    """What pages say of all tasks together is what the page of the tasks has measured."""

    page = (ROOT / "docs" / "results" / "tasks" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| ([^|]+) \| (\d+) \| ([^|]+%\)) \| [^|]+ \| (\d+) \| (\d+) \|$",
        page.partition("With the rates of the searches in all tasks:")[0],
        flags=re.MULTILINE,
    )

    def test_the_table_of_the_readme(self) -> None:
        shown = re.findall(r"^\| [^|]+ \| (\d+) \| ([^|]+%\)) \| (\d+) \| (\d+) \|$", README, flags=re.MULTILINE)
        assert len(shown) == 6
        assert set(shown) <= {row[1:] for row in self.rows}

    @pytest.mark.parametrize(
        "page", ["README.md", "docs/index.md", "docs/limits.md", "docs/results/tasks/README.md"]
    )
    def test_counts(self, page: str) -> None:
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        with (ROOT / "docs" / "results" / "tasks" / "tasks.csv").open(encoding="utf-8", newline="") as file:
            tasks = {row["task"] for row in csv.DictReader(file)}
        maps = [row for row in self.rows if row[0].startswith(("papers' maps", "shrunk effects"))]
        assert len(maps) == 5
        expected = {"small tasks": len(tasks), "comparisons": sum(int(row[1]) for row in maps)}
        said = re.findall(r"(\d+) (small tasks|comparisons)", text)
        assert said
        assert all(int(count) == expected[what] for count, what in said)


# How the table calls what a test is skipped without.
NEEDS = {
    "transformers": "transformers",
    "wandb": "W&B",
    "mkdocs": "mkdocs",
    "matplotlib": "matplotlib",
    "timm": "timm",
    "pytorch_optimizer": "pytorch-optimizer",
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "gguf": "gguf",
    "datasets": "datasets",
    "lm_eval": "lm-eval",
    "torchao": "torchao",
    "llmcompressor": "llm-compressor",
    "playwright": "Chromium",
}


def skips(file: str, name: str) -> tuple[str, set[str]]:
    """Return the code of a test, or of a whole file, and the packages without which it is skipped."""
    code = (ROOT / file).read_text(encoding="utf-8")
    tree = ast.parse(code)
    of_the_file = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    named = [
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name
    ]
    needed = "\n".join(ast.unparse(node) for node in of_the_file + named)
    return needed if name else code, set(re.findall(r"importorskip\(['\"](\w+)", needed))


class TestGuarantees:
    """The table of promises, `docs/guarantees.md`."""

    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (?!promise|---)(.+?) \| (.+) \| (.+?) \|$", text.partition("## Not supported")[0], flags=re.MULTILINE
    )

    def test_every_named_test_exists(self) -> None:
        assert len(self.rows) > 50
        for promise, tests, _ in self.rows:
            assert re.search("`(tests/|make |python -m )", tests), f"nothing tests: {promise}"
        for file, *names in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?(?:::(\w+))?`", self.text):
            inside: ast.Module | ast.ClassDef = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            for name in filter(None, names):
                found = {
                    node.name: node for node in inside.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))
                }
                assert name in found, f"{file} has no {name} there"
                inside = found[name] if isinstance(found[name], ast.ClassDef) else inside

    def test_what_a_promise_needs_is_said(self) -> None:
        """A test that is skipped without a package or a GPU may not be said to run everywhere."""
        for promise, tests, runs in self.rows:
            for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?", tests):
                code, packages = skips(file, name)
                for package in packages:
                    assert NEEDS[package] in runs, f"{promise} needs {package}"
                if "mark.gpu" in code:
                    assert "GPU never run" in runs, promise
