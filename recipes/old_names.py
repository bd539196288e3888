"""Names that settings had before: they work for one more release, with a warning that says what to write."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from farms_tb.keywords import REMOVED

__all__ = ["current_overrides", "current_settings"]

_PLACEBO = "recipes.placebo.PlaceboTempBalance"  # a callback of its own, now the option `permute`
_DARCY = re.compile(r"experiment=sciml/darcy_beta(?P<beta>[\d.]+)_(?P<net>fno|unet)")
_FLOW = re.compile(r"experiment=sciml/cfd2d_fno_1of(?P<part>\d+)")


def current_overrides(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Translate the old names in a command line.

    Args:
        overrides: The arguments; those that are no settings pass unchanged.

    Returns:
        The arguments under their current names, and for each that changed what to write.
    """
    current: list[str] = []
    notes = []
    for old in overrides:
        new = _current(old)
        current += new
        if new != [old]:
            notes.append(f"{old} is now {' '.join(new)}; the old name goes with the next release")
    return current, notes


def _current(override: str) -> list[str]:
    """Return what an argument is written as now: itself where it is no old name, else one or two settings."""
    if re.match(r"[~+]*farms[.=]", override):
        return [override.replace("farms", "balancing", 1)]
    darcy = _DARCY.fullmatch(override)
    if darcy:
        return [f"experiment=sciml/darcy_{darcy['net']}", f"data.beta={darcy['beta']}"]
    flow = _FLOW.fullmatch(override)
    if flow:
        return ["experiment=sciml/cfd2d_fno", f"data.fraction=1/{flow['part']}"]
    return [override]


def current_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return composed settings, also of an earlier release, with their current names.

    Args:
        settings: The settings as plain values.

    Returns:
        The settings with `balancing` in place of `farms`, without the callback's options that are gone.
    """
    current = dict(settings)
    if "balancing" not in current and "farms" in current:
        options = current.pop("farms") or {}
        kept = {name: value for name, value in options.items() if name not in REMOVED}
        current["balancing"] = {**kept, "arm": current.get("arm", "farms")}
    balancing = current.get("balancing")
    if isinstance(balancing, Mapping) and balancing.get("_target_") == _PLACEBO:
        kept = {name: value for name, value in balancing.items() if name != "placebo_seed"}
        permute = balancing.get("placebo_seed")
        current["balancing"] = {**kept, "_target_": "farms_tb.FARMSTempBalance", "permute": permute}
    return current
