"""Draw runs of `experiment=grokking_mlp` in one picture, and write their curves.

    python -m recipes.train experiment=grokking_mlp paths.run_dir=runs/decay
    python -m recipes.train experiment=grokking_mlp optimizer.weight_decay=0 paths.run_dir=runs/no_decay
    python -m recipes.grokking runs/decay runs/no_decay --out docs/results/grokking

Writes `grokking.png` and `grokking.csv`. Exits with status 2 and one sentence when a folder is not of such a run.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from omegaconf import OmegaConf

from recipes.command import user_errors
from recipes.console import make_console
from recipes.folder import CONFIG_FILE
from recipes.grokking.picture import draw_runs, read_run


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(prog="python -m recipes.grokking", description="Draw grokking runs")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, one a column")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for grokking.png and grokking.csv")
    options = parser.parse_args()
    with user_errors():
        runs = [read_run(folder, _title(folder)) for folder in options.runs]
        options.out.mkdir(parents=True, exist_ok=True)
        draw_runs(runs, options.out / "grokking.png")
        rows = [row for run in runs for row in run.rows()]
        with (options.out / "grokking.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
            )
        make_console().print(f"written to {options.out}")


def _title(folder: Path) -> str:
    """Return what tells a run from the others: its initial weights and its decay."""
    path = folder / CONFIG_FILE
    if not path.exists():
        return folder.name
    cfg = OmegaConf.load(path)
    decay, scale = (OmegaConf.select(cfg, key) for key in ("optimizer.weight_decay", "model.net.init_scale"))
    return f"initial weights x {scale:g}, decay {decay:g}"


if __name__ == "__main__":
    main()
