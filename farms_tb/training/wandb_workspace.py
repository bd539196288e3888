"""A W&B workspace that shows a run layer by layer, in order of depth.

    python -m farms_tb.training.wandb_workspace ENTITY/PROJECT/RUN_ID --dry-run

W&B's own workspace has a panel for each layer, sorted by name. This one also has all layers in one panel, coloured
by depth, and opens on it. Needs the extra `workspace`.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farms_tb.missing import cannot_import
from farms_tb.options import XAxis
from farms_tb.training.metrics import TABLE

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

__all__ = ["build_workspace", "main"]

_SECTIONS = {
    "alpha": "alpha",
    "ratio": "ratio",
    "lr": "learning rate",
    "z": "z-score",
    "effect": "effect",
    "rank_share": "rank share",
    "adapter_change": "change by adapters",
    "esd": "ESD",
}
_KEY = re.compile(rf"(?P<prefix>.*?)farms(_(?P<metric>{'|'.join(_SECTIONS)}))?/(\d+_)?(?P<name>.+)")
_PICTURES = ("farms/alpha_curves", "farms/ratio_map", "farms/alpha_by_depth")


@dataclass(frozen=True)
class _Logged:
    """What a run logged of the callback, sorted by where it is shown.

    Attributes:
        layers: for each metric of `_SECTIONS`, the layers' names by key, in order of depth.
        scalars: names of the aggregates by key.
        media: keys of the table and the pictures.
        epoch_key: key of the number of completed epochs.
        step_key: key of the number of optimizer steps.
    """

    layers: dict[str, dict[str, str]]
    scalars: dict[str, str]
    media: list[str]
    epoch_key: str
    step_key: str

    @classmethod
    def of(cls, keys: Iterable[str]) -> _Logged | None:
        """Sort the keys of a run; None where nothing of the callback is among them."""
        metrics = sorted(keys)
        matches = {key: match for key in metrics if (match := _KEY.fullmatch(key))}
        if not matches:
            return None
        layers: dict[str, dict[str, str]] = {metric: {} for metric in _SECTIONS}
        aggregates: dict[str, str] = {}
        # The logger's prefix. Other metrics of the user may look alike, such as `my_farms/area`.
        prefix = Counter(match["prefix"] for match in matches.values()).most_common(1)[0][0]
        for key, match in matches.items():
            if match["prefix"] == prefix:
                group = aggregates if match["metric"] is None else layers[match["metric"]]
                group[key] = match["name"]
        possible = [f"{prefix}{name}" for name in (TABLE, *_PICTURES)]
        media = [key for key in possible if key in aggregates]
        for key in media:
            del aggregates[key]
        step_key = "train/global_step" if "train/global_step" in metrics else "trainer/global_step"
        return cls(layers, aggregates, media, f"{prefix}epoch", step_key)


def build_workspace(path: str, keys: Iterable[str], *, x_axis: XAxis = "epoch") -> Workspace:
    """Build the workspace of a run, without saving it: `build_workspace(...).save()` sends it to W&B.

    Sections: the aggregates; each metric of a layer, such as alpha, with a panel for a layer in order of depth,
    and, but for the ESD, one of all layers before them; the table and the pictures. What was not logged is left
    out.

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
    logged = _Logged.of(keys)
    if logged is None:
        raise ValueError(f"{path} has no farms/ metrics: train with FARMSTempBalance() and a WandbLogger")
    workspaces = _package()
    x = logged.epoch_key if x_axis == "epoch" else logged.step_key
    sections = [_section("mean over layers", _line_plots(logged.scalars, x))]
    for metric, title in _SECTIONS.items():
        panels = _line_plots(logged.layers[metric], x)
        if panels and metric != "esd":
            panels.insert(0, _all_layers(logged.layers[metric], title, run_id, x))
        sections.append(_section(title, panels))
    sections.append(_section("table and pictures", _media(logged.media)))
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
    """Import `wandb_workspaces`, or raise an `ImportError` that names the extra."""
    try:
        from wandb_workspaces import workspaces
    except ImportError as error:
        raise ImportError(cannot_import("a workspace", error, 'pip install "farms-tb[workspace]"')) from error
    return workspaces


def _split(path: str) -> tuple[str, str, str]:
    """Return entity, project and id of a run, or raise a `ValueError` for a path of another form."""
    parts = path.split("/")
    if len(parts) != 3 or not all(parts):
        raise ValueError(f"a run is named ENTITY/PROJECT/RUN_ID, as in the address of its page, got {path!r}")
    return parts[0], parts[1], parts[2]


def _section(name: str, panels: list[Any]) -> Section:
    """Return a section; those of alpha and ratio are open when the page is."""
    from wandb_workspaces.workspaces import Section

    return Section(name=name, panels=panels, is_open=name in ("alpha", "ratio"))


def _line_plots(keys: dict[str, str], x: str) -> list[Any]:
    """Return a panel with one curve for each key, titled by its name."""
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
    """Return a panel for each key of the table and the pictures."""
    from wandb_workspaces.reports.v2 import MediaBrowser, WeavePanelSummaryTable

    panels: list[Any] = []
    for key in keys:
        if key.endswith(TABLE):
            panels.append(WeavePanelSummaryTable(table_name=key))
        else:
            title = key.rpartition("/")[2]
            panels.append(MediaBrowser(title=title, media_keys=[key]))
    return panels


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
    """Ask W&B for the keys in a run's summary, or raise a `ValueError` that says why it cannot be read."""
    import wandb

    try:
        run: Any = wandb.Api().run(path)
    except (wandb.errors.Error, ValueError) as error:
        raise ValueError(
            f"can't read the run {path} from W&B, where `wandb sync` puts offline runs: {error}"
        ) from error
    return list(run.summary.keys())


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the workspace of a run and save it to W&B, or print what it would be.

    Args:
        arguments: arguments of the command line; None for those of this process.

    Raises:
        SystemExit: wrong arguments, a run that W&B does not have, or the extra `workspace` is not installed; after
            a message on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="python -m farms_tb.training.wandb_workspace",
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
