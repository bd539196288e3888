"""Make a data file in PDEBench's layout, for where its own can't be downloaded.

    python -m recipes.generate darcy                   2D_DarcyFlow_beta1.0_Train.hdf5, 10 000 samples
    python -m recipes.generate darcy beta=0.1 resolution=64 samples=1000 family=grf
    python -m recipes.generate cfd1d samples=100       1D_CFD_Rand_Eta0.01_Zeta0.01_periodic_Train.hdf5
    python -m recipes.generate cfd1d points=128 eta=0.1 zeta=0.1 file=flows.hdf5

`conf/generate_darcy.yaml` and `conf/generate_cfd1d.yaml` list the settings. The file goes to the folder where the
recipes look for PDEBench's own, `<paths.data_dir>/pdebench`. A stopped run leaves `<file>.part`; the same command
goes on from there.

Exits with status 2 and one message when a setting, a folder or a file is at fault.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

from recipes.command import hand_over_hydras_errors, user_errors
from recipes.config import CONFIG_DIR
from recipes.data.download import FOLDER
from recipes.errors import RecipeError

with user_errors():  # of a package that is missing
    from recipes.generate.files import Spec
    from recipes.generate.run import KINDS, Job, generate

__all__ = ["main", "read_settings"]


def read_settings(kind: str, cfg: DictConfig) -> tuple[Spec, Job]:
    """Turn the composed settings into what is made and how.

    Args:
        kind: One of `KINDS`.
        cfg: The settings of `conf/generate_<kind>.yaml`, with the overrides of the command line.

    Returns:
        Which samples, and how many of them go where.

    Raises:
        RecipeError: A setting is of the wrong type or out of its range.
    """
    try:
        spec = _typed(KINDS[kind], cfg)
        folder = Path(cfg.paths.data_dir) / FOLDER
        file = Path(cfg.file) if cfg.file else folder / spec.file_name
        if file.suffix == ".png":
            raise RecipeError(
                f"file={file}: that is the name of the picture of the samples; choose {file.stem}.hdf5"
            )
        return spec, _typed(Job, cfg, file=file)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{error.full_key}: {str(error.msg).splitlines()[0]}") from error
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _typed(kind: type[Any], cfg: DictConfig, **given: Any) -> Any:
    """Build a dataclass from the settings of its fields' names, converted to the fields' types."""
    schema = OmegaConf.structured(kind)
    OmegaConf.set_readonly(schema, False)
    chosen = {field.name: cfg[field.name] for field in fields(kind) if field.name not in given}
    return OmegaConf.to_object(OmegaConf.merge(schema, chosen, given))


def run(kind: str, cfg: DictConfig) -> None:
    """Make the file and draw its first samples; say how to go on where that was stopped.

    Args:
        kind: One of `KINDS`.
        cfg: The composed settings.

    Raises:
        RecipeError: A setting, a folder or a file is at fault.
    """
    console = Console()
    spec, job = read_settings(kind, cfg)
    try:
        generate(spec, job, console)
    except KeyboardInterrupt:
        console.print("[yellow]stopped; the same command goes on from here[/yellow]")
        raise
    made = [str(job.file)]
    if cfg.preview:
        from recipes.generate.preview import draw_preview  # workers import this module, and need no matplotlib

        draw_preview(job.file, job.file.with_suffix(".png"))
        made.append(str(job.file.with_suffix(".png")))
    console.print(f"made {escape(' and '.join(made))}", soft_wrap=True)


def main() -> None:
    """Run from the command line; show the user's mistakes without a traceback."""
    kind = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    hand_over_hydras_errors()
    with user_errors():
        wanted = f"say what to make: python -m recipes.generate {'|'.join(KINDS)} [setting=value ...]"
        if kind in ("-h", "--help"):
            print(f"{wanted}; darcy --help lists the settings")
            return
        if kind not in KINDS:
            raise RecipeError(f"{wanted}, got {kind!r}" if kind else wanted)

        @hydra.main(config_path=CONFIG_DIR, config_name=f"generate_{kind}", version_base="1.3")
        def task(cfg: DictConfig) -> None:
            """Make one data file with the composed settings."""
            run(kind, cfg)

        task()


if __name__ == "__main__":
    main()
