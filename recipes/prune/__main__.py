"""Prune a model by several allocations of sparsity, and compare.

    python -m recipes.prune experiment=prune/smollm2
    python -m recipes.prune experiment=prune/llama_7b model.path=FOLDER calibration.path=FILE evaluation.path=FILE
    python -m recipes.prune experiment=prune/vit_base model.path=FILE evaluation.path=imagenet/val

`conf/prune.yaml` holds and explains the settings. The alphas of the dense model are measured once; each arm
allocates, prunes the model anew and scores it, all at one target and one epsilon. The output folder gets
`results.csv`, a plan for each arm and the settings. Models and data are the user's; nothing is downloaded.

Exits with status 2 and one sentence when a setting, a model or data are at fault.
"""

from __future__ import annotations

import warnings

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.command import hand_over_hydras_errors, hydra_run, user_errors
from recipes.config import CONFIG_DIR
from recipes.console import make_console, warn
from recipes.prune.comparison import Row, compare_arms

__all__ = ["main"]


@hydra.main(config_path=CONFIG_DIR, config_name="prune", version_base="1.3")
def _task(cfg: DictConfig) -> None:
    """Compare with the composed settings."""
    with hydra_run():
        _compare(cfg, make_console())


def _compare(cfg: DictConfig, console: Console) -> None:
    """Show each arm's score when it is finished, then the table of all."""
    rows = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for row in compare_arms(cfg):
            console.print(f"{row['arm']}: {row['score']:.4g}")
            rows.append(row)
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        warn(console, f"warning: {message}")
    console.print(_table(rows))
    console.print(f"written to {escape(str(cfg.output))}", soft_wrap=True)


def _table(rows: list[Row]) -> Table:
    """Return the table of all arms."""
    first = rows[1]
    title = "{experiment}: {method}, target {target:g}, epsilon {epsilon:g}, alphas by {esd}".format(**first)
    table = Table("arm", "sparsity", first["metric"], f"difference from {first['arm']} (95 %)", title=title)
    for row in rows:
        difference = "" if row["difference"] is None else "{difference:+.4f} ± {interval:.4f}".format(**row)
        score = "{score:.4g} ± {error:.2g}".format(**row)
        table.add_row(row["arm"], f"{row['sparsity']:.4f}", score, difference)
    return table


def main() -> None:
    """Run from the command line; show the user's mistakes without a traceback."""
    hand_over_hydras_errors()
    with user_errors():
        _task()


if __name__ == "__main__":
    main()
