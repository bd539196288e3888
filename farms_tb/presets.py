"""Published methods, each as the options that reproduce it: `FARMSTempBalance(preset="llr")`.

A preset is a set of options. Those that a user gives by name override it, one by one; of those that say when to
measure, one replaces whatever the preset says of it. Where a preset differs from the code of its authors, the page
"Presets" of the documentation says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from farms_tb.keywords import resolved, without_defaults
from farms_tb.options import Options, RatioOptions, ScheduleOptions, SpectrumOptions, check_choice

Preset = Literal["farms", "tempbalance", "model_balancing", "llr", "alphadecay", "shrinkage", "monitor"]


@dataclass(frozen=True)
class Published:
    """A method and its source.

    Attributes:
        source: its paper; of a preset of this package, what it does.
        options: options by name; all others are at their defaults.
    """

    source: str
    options: Mapping[str, Any]


_SPACING = ("every_n_epochs", "every_n_steps", "measurements_per_epoch")
"""Options that say when to measure, each in place of the others."""

_WHOLE_MATRICES = {"esd": "full", "fit": "median", "collapsed": "keep"}

PRESETS: Mapping[Preset, Published] = {
    "farms": Published(
        "FARMS, Hu et al., ICML 2025, arXiv 2506.06280",
        {"esd": "farms", "fit": "median", "assign_func": "tb_linear_map", "collapsed": "keep"},
    ),
    "tempbalance": Published(
        "TempBalance, Zhou et al., NeurIPS 2023, arXiv 2312.00359",
        {**_WHOLE_MATRICES, "assign_func": "tb_linear_map"},
    ),
    "model_balancing": Published(
        "Model Balancing, Liu et al., EMNLP 2024, arXiv 2410.12178",
        {
            **_WHOLE_MATRICES,
            "xmin_pos": 1.5,
            "min_eigenvalues": 50,
            "assign_func": "tb_sigmoid",
            "sigmoid_min": 1.0,
            "sigmoid_max": 1.0,
            "sigmoid_tau": 10.0,
            "unit": "block",
            "measurements_per_epoch": 10,
        },
    ),
    "llr": Published(
        "Layer-wise learning rates (LLR), ICML 2026, arXiv 2605.22297",
        {
            **_WHOLE_MATRICES,
            "assign_func": "tb_linear_map",
            "lr_min_ratio": 1.0,
            "lr_max_ratio": 5.0,
            "exclude_first": False,
            "exclude_last": False,
            "fixed": {"embed*": 5.0, "lm_head": 5.0},
            "norms": "base",
            "every_n_steps": 50,
            "until": 0.2,
            "ramp_steps": 50,
        },
    ),
    "alphadecay": Published(
        "AlphaDecay, NeurIPS 2025, arXiv 2506.14562",
        {
            **_WHOLE_MATRICES,
            "min_eigenvalues": 50,
            "assign_func": "tb_linear_map",
            "lr_min_ratio": 2 / 3,
            "lr_max_ratio": 5.0,
            "target": "weight_decay",
            "every_n_steps": 500,
        },
    ),
    "shrinkage": Published(
        "this package's default: the map of shrunk effects", {"esd": "farms", "assign_func": "shrinkage"}
    ),
    "monitor": Published(
        "measures and logs; all ratios are 1, but for those in `fixed` and of norms that these feed",
        {"assign_func": "tb_linear_map", "lr_min_ratio": 1.0, "lr_max_ratio": 1.0},
    ),
}


def with_preset(
    preset: Preset | None, objects: Mapping[str, object], keywords: Mapping[str, Any]
) -> dict[str, Any]:
    """Return options by name: those of a preset, overridden by those that a user gave.

    Args:
        preset: its name; None for no preset.
        objects: the objects of options that the user gave, by argument; one of logging, of which no preset says
            anything, goes with every preset.
        keywords: the options that the user gave by name. Where all of a class are there, as LightningCLI and Hydra
            pass them, those at their defaults do not override.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: an unknown preset, or one together with an object of options, of which nobody can tell which
            fields were meant; or an option that contradicts one of the preset, which the message names.
    """
    if preset is None:
        return dict(keywords)
    check_choice("preset", preset, Preset)
    given = [argument for argument, value in objects.items() if value is not None and argument != "logging"]
    if given:
        raise ValueError(f"preset={preset!r} and {given[0]}= both choose options: give single options by name")
    own = dict(keywords)
    for cls in (SpectrumOptions, RatioOptions, ScheduleOptions):
        own = without_defaults(cls, own)
    of_preset = dict(PRESETS[preset].options)
    if own.get("unit") == "block":
        # Norms have the ratio of their block then.
        of_preset.pop("norms", None)
    if any(own.get(name) is not None for name in _SPACING):
        for name in _SPACING:
            of_preset.pop(name, None)
    chosen = {**of_preset, **own}
    _check(preset, chosen, of_preset.keys() - own.keys())
    return chosen


def _check(preset: Preset, chosen: Mapping[str, Any], of_preset: Collection[str]) -> None:
    """Check a preset's options together with the user's own.

    Args:
        preset: name of the preset.
        chosen: the options by name.
        of_preset: names of those that are the preset's.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: an option out of range, or two that contradict each other; the message says which of them the
            user did not give.
    """
    try:
        resolved(SpectrumOptions, None, chosen)
        resolved(RatioOptions, None, chosen)
        resolved(ScheduleOptions, None, chosen)
    except ValueError as error:
        named = [name for name in chosen if name in of_preset and f"{name}={chosen[name]!r}" in str(error)]
        if not named:
            raise
        theirs = " and ".join(f"{name}={chosen[name]!r}" for name in named)
        raise ValueError(f"{error}. preset={preset!r} sets {theirs}: give {' and '.join(named)}, too") from error


def described(preset: Preset | None, *options: Options) -> str:
    """Say which options are active, and where each comes from.

    Args:
        preset: the preset in use; None without one.
        *options: the options of each class.

    Returns:
        A line for the source, and one for each option that is not at its default or that the preset sets.
    """
    published = Published("the options of this package", {}) if preset is None else PRESETS[preset]
    lines = [f"preset: {preset or 'none'} ({published.source})"]
    chosen = {name: value for part in options for name, value in vars(part).items()}
    defaults = {name: value for part in options for name, value in vars(type(part)()).items()}
    plain = {**chosen, **_typed(published.options)}
    for name, value in chosen.items():
        if name in published.options:
            origin = "preset" if value == plain[name] else f"yours, the preset has {published.options[name]!r}"
        elif value != defaults[name]:
            origin = "yours"
        else:
            continue
        lines.append(f"  {name} = {value!r} ({origin})")
    lines.append(f"  all others at their defaults, {len(chosen) - len(lines) + 1} of {len(chosen)}")
    return "\n".join(lines)


def _typed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as the dataclasses store them: `fixed` as pairs."""
    return {name: tuple(value.items()) if isinstance(value, Mapping) else value for name, value in options.items()}
