"""The package has one version, and `make test-oldest` installs the lower bounds of what the package asks for."""

import re
from pathlib import Path

import farms_tb

ROOT = Path(__file__).resolve().parents[1]
NOT_PINNED = {"pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "pre-commit", "playwright"}
NOT_PINNED |= {"timm", "peft", "bitsandbytes", "mkdocs-material", "latex2mathml", "wandb-workspaces", "gguf"}
NOT_PINNED |= {"datasets", "lm-eval", "ray", "hydra-ray-launcher", "pytorch-optimizer"}
NOT_PINNED |= {"mlflow-skinny", "sqlalchemy", "alembic"}


def test_oldest_versions_are_the_lower_bounds() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', text))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "oldest.txt").read_text(), re.MULTILINE))
    assert bounds.keys() - pins.keys() <= NOT_PINNED
    for name, bound in bounds.items():
        if name in pins:
            assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", pins[name]), name


def test_one_version() -> None:
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    changes = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation is not None
    assert changes is not None
    assert farms_tb.__version__ == citation[1] == changes[1]
