"""The versions that `make test-oldest` installs are the lower bounds of what the package asks for."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_PINNED = {"pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "timm", "peft"}
NOT_PINNED |= {"playwright", "mkdocs-material", "latex2mathml", "wandb-workspaces"}


def test_oldest_versions_are_the_lower_bounds() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', text))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "oldest.txt").read_text(), re.MULTILINE))
    assert bounds.keys() - pins.keys() <= NOT_PINNED
    for name, bound in bounds.items():
        if name in pins:
            assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", pins[name]), name
