"""Draw runs of `experiment=grokking_mlp` in one picture, and write their curves.

    python -m recipes.train experiment=grokking_mlp paths.run_dir=runs/decay
    python -m recipes.train experiment=grokking_mlp optimizer.weight_decay=0 paths.run_dir=runs/no_decay
    python -m recipes.grokking runs/decay runs/no_decay --out docs/results/grokking

Writes `grokking.png` and `grokking.csv`. Exits with status 2 and one sentence when a folder is not of such a run.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.markup import escape
from yaml import YAMLError  # type: ignore[import-untyped]

from farms_tb.atomic_write import atomic_path
from recipes.command import user_errors
from recipes.console import make_console
from recipes.errors import RecipeError
from recipes.folder import CONFIG_FILE
from recipes.grokking.picture import Curves, draw_runs, read_run


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(prog="python -m recipes.grokking", description="Draw grokking runs")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, one a column")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for grokking.png and grokking.csv")
    options = parser.parse_args()
    with user_errors():
        titles = [_title(folder) for folder in options.runs]
        runs = []
        for folder, title in zip(options.runs, titles, strict=True):
            of_several = titles.count(title) > 1  # seeds of one setting
            runs.append(read_run(folder, f"{title}, {folder.name}" if of_several else title))
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            draw_runs(runs, options.out / "grokking.png")
            _write_rows(runs, options.out / "grokking.csv")
        except OSError as error:
            raise RecipeError(f"--out {options.out} can't be written to ({error})") from error
        make_console().print(f"written to {escape(str(options.out))}")


def _write_rows(runs: Sequence[Curves], target: Path) -> None:
    """Write the curves as CSV, a row for each measurement of a run."""
    rows = [row for run in runs for row in run.rows()]
    with atomic_path(target) as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def _title(folder: Path) -> str:
    """Return what tells a run from the others: its initial weights and its decay."""
    path = folder / CONFIG_FILE
    if not path.exists():
        return folder.name
    try:
        cfg = OmegaConf.load(path)
        decay, scale = (OmegaConf.select(cfg, key) for key in ("optimizer.weight_decay", "model.net.init_scale"))
        return f"initial weights x {scale:g}, decay {decay:g}"
    except (OSError, TypeError, ValueError, YAMLError, OmegaConfBaseException) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(f"{path} is not that of a run of experiment=grokking_mlp ({reason})") from error


if __name__ == "__main__":
    main()
