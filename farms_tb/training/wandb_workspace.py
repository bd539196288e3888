"""A W&B workspace that shows a run layer by layer, in order of depth.

    python -m farms_tb.wandb_report ENTITY/PROJECT/RUN_ID --dry-run

W&B's own workspace has a panel for each layer, sorted by name. This one also has all layers in one panel, coloured
by depth, and opens on it. Needs the extra `workspace`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from farms_tb.options import XAxis
from farms_tb.training.metrics import TABLE

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

__all__ = ["build_workspace", "main"]

_KEY = re.compile(r"(?P<prefix>.*?)farms(_(?P<metric>alpha|ratio|lr|z|esd))?/(\d+_)?(?P<name>.+)")
_SECTIONS = {"alpha": "alpha", "ratio": "ratio", "lr": "learning rate", "z": "z-score", "esd": "ESD"}
_PICTURES = ("farms/alpha_curves", "farms/ratio_map", "farms/alpha_by_depth")


def build_workspace(path: str, keys: Iterable[str], *, x_axis: XAxis = "epoch") -> Workspace:
    """Build the workspace of a run, without saving it: `build_workspace(...).save()` sends it to W&B.

    Sections: the aggregates; alpha, ratio, learning rate, z-score and ESD, each with a panel for a layer in order
    of depth, the first three and the z-score behind one panel of all layers; the table and the pictures. What was
    not logged is left out.

    Args:
        path: `entity/project/run_id`.
        keys: what the run logged, say the keys of its summary.
        x_axis: what the curves are plotted against.

    Returns:
        The workspace.

    Raises:
        ImportError: the extra `workspace` is not installed.
        ValueError: the path is not of that form, or nothing of the callback is among the keys.
    """
    entity, project, run_id = _split(path)
    metrics = sorted(keys)
    found = {key: match for key in metrics if (match := _KEY.fullmatch(key))}
    if not found:
        raise ValueError(f"{path} has no farms/ metrics: train with FARMSTempBalance() and a WandbLogger")
    workspaces = _package()
    prefix = next(iter(found.values()))["prefix"]
    steps = "train/global_step" if "train/global_step" in metrics else "trainer/global_step"
    x = f"{prefix}epoch" if x_axis == "epoch" else steps
    layers = {
        metric: {key: match["name"] for key, match in found.items() if match["metric"] == metric}
        for metric in _SECTIONS
    }
    aggregates = {key: match["name"] for key, match in found.items() if match["metric"] is None}
    media = [key for key in (f"{prefix}{name}" for name in (TABLE, *_PICTURES)) if key in aggregates]
    scalars = {key: name for key, name in aggregates.items() if key not in media}
    sections = [_section("mean over layers", _line_plots(scalars, x))]
    for metric, title in _SECTIONS.items():
        overview = [] if metric == "esd" else [_all_layers(layers[metric], title, run_id, x)]
        sections.append(_section(title, [*overview, *_line_plots(layers[metric], x)] if layers[metric] else []))
    sections.append(_section("table and pictures", _media(media)))
    sections = [section for section in sections if section.panels]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=f"FARMS {run_id}",
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=x),
        runset_settings=workspaces.RunsetSettings(filters=[workspaces.Metric("ID") == run_id]),
    )


def _package() -> Any:
    try:
        from wandb_workspaces import workspaces
    except ImportError as error:
        raise ImportError('a workspace needs wandb-workspaces: pip install "farms-tb[workspace]"') from error
    return workspaces


def _split(path: str) -> tuple[str, str, str]:
    parts = path.split("/")
    if len(parts) != 3 or not all(parts):
        raise ValueError(f"a run is named ENTITY/PROJECT/RUN_ID, as in the address of its page, got {path!r}")
    return parts[0], parts[1], parts[2]


def _section(name: str, panels: list[Any]) -> Section:
    from wandb_workspaces.workspaces import Section

    return Section(name=name, panels=panels, is_open=name in ("alpha", "ratio"))


def _line_plots(keys: dict[str, str], x: str) -> list[Any]:
    from wandb_workspaces.reports.v2 import LinePlot

    return [LinePlot(title=name, x=x, y=[key]) for key, name in keys.items()]


def _all_layers(keys: dict[str, str], title: str, run_id: str, x: str) -> Any:
    """Return one panel with a line for each layer, dark at the input and bright at the output."""
    from matplotlib.colors import to_hex
    from wandb_workspaces.reports.v2 import LinePlot

    from farms_tb.viewing.plots.style import depth_colours

    colours = depth_colours(list(keys))
    return LinePlot(
        title=f"{title} of every layer",
        x=x,
        y=list(keys),
        line_titles={f"{run_id}:{key}": name for key, name in keys.items()},
        line_colors={f"{run_id}:{key}": to_hex(colours[key]) for key in keys},
    )


def _media(keys: list[str]) -> list[Any]:
    from wandb_workspaces.reports.v2 import MediaBrowser, WeavePanelSummaryTable

    return [
        WeavePanelSummaryTable(table_name=key)
        if key.endswith(TABLE)
        else MediaBrowser(title=key.rpartition("/")[2], media_keys=[key])
        for key in keys
    ]


def describe(workspace: Workspace) -> str:
    """Return the sections of a workspace and the panels in them, in words."""
    lines = [f"{workspace.entity}/{workspace.project}: {workspace.name}, against {workspace.settings.x_axis}"]
    for section in workspace.sections:
        lines.append(f"  {section.name}")
        for panel in section.panels:
            shown: Any = panel
            lines.append(f"    {getattr(shown, 'title', None) or shown.table_name}")
    return "\n".join(lines)


def _logged_keys(path: str) -> list[str]:
    import wandb

    try:
        run: Any = wandb.Api().run(path)
    except (wandb.errors.Error, ValueError) as error:
        raise ValueError(
            f"can't read the run {path} from W&B, where `wandb sync` puts offline runs: {error}"
        ) from error
    return list(run.summary.keys())


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the workspace of a run and save it to W&B, or say what it would be."""
    parser = argparse.ArgumentParser(
        prog="python -m farms_tb.wandb_report",
        description="Build a W&B workspace of a run, layers by depth.",
    )
    parser.add_argument("run", metavar="ENTITY/PROJECT/RUN_ID")
    parser.add_argument("--x-axis", choices=["epoch", "step"], default="epoch", help="default: epoch")
    parser.add_argument("--dry-run", action="store_true", help="print sections and panels, send nothing")
    options = parser.parse_args(arguments)
    try:
        _package()
        _split(options.run)
        workspace = build_workspace(options.run, _logged_keys(options.run), x_axis=options.x_axis)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    if options.dry_run:
        print(describe(workspace))
    else:
        print(workspace.save().url)


if __name__ == "__main__":
    main()
