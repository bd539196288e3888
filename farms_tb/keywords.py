"""The options as keyword arguments of the public entry points.

An entry point is written as

    @takes_options(SpectrumOptions)
    def analyze(model, *, spectrum: SpectrumOptions | None = None, **options: Unpack[SpectrumKeywords]) -> Report:
        spectrum = resolved(SpectrumOptions, spectrum, options)

mypy reads names and types from the `TypedDict`. All else that a user or a tool sees comes from the dataclasses of
`farms_tb.options`: the decorator gives the function a signature with every option (for `help`, LightningCLI and
Hydra), appends their documentation, and refuses misspelt names. A test compares the `TypedDict`s with the
dataclasses.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any, TypedDict, TypeVar, get_type_hints

from farms_tb.options import (
    AssignFunc,
    Collapsed,
    Esd,
    Fit,
    Kind,
    LoggingOptions,
    Metric,
    Norms,
    Precision,
    RatioOptions,
    ScheduleOptions,
    Solver,
    SpectrumOptions,
    XAxis,
)
from farms_tb.warnings import warn_once

REMOVED: Mapping[str, str] = {
    "max_overhead": "layers are measured whenever every_n_epochs or every_n_steps says; set these instead",
    "timings_file": "measuring no longer depends on the clock; set every_n_epochs or every_n_steps instead",
}
"""Options of callbacks in earlier versions, and what to do without them."""

_ARGUMENTS: Mapping[type, str] = {
    SpectrumOptions: "spectrum",
    RatioOptions: "ratios",
    ScheduleOptions: "schedule",
    LoggingOptions: "logging",
}

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", SpectrumOptions, RatioOptions, ScheduleOptions, LoggingOptions)


class SpectrumKeywords(TypedDict, total=False):
    """The fields of `SpectrumOptions`."""

    esd: Esd
    fit: Fit
    aspect_ratio: float
    window: int
    windows_per_dim: int
    window_step: int | None
    xmin_pos: float
    filter_zeros: bool
    relative_cutoff: float
    min_eigenvalues: int
    precision: Precision
    solver: Solver
    memory_mb: int
    threads: int | None


class RatioKeywords(TypedDict, total=False):
    """The fields of `RatioOptions`."""

    assign_func: AssignFunc
    lr_min_ratio: float
    lr_max_ratio: float
    sigmoid_min: float
    sigmoid_max: float
    sigmoid_tau: float
    ratio_levels: int | None
    metric: Metric
    exclude_first: bool
    exclude_last: bool
    exclude: Sequence[str]
    balance: Sequence[Kind]
    norms: Norms
    collapsed: Collapsed


class ScheduleKeywords(TypedDict, total=False):
    """The fields of `ScheduleOptions`."""

    every_n_epochs: int
    every_n_steps: int | None
    lag_steps: int


class LoggingKeywords(TypedDict, total=False):
    """The fields of `LoggingOptions`."""

    log: bool
    histogram_every_n: int | None
    table_every_n: int | None
    x_axis: XAxis | None


class BalancingKeywords(SpectrumKeywords, RatioKeywords, total=False):
    """What `TempBalance` takes."""


class CallbackKeywords(BalancingKeywords, ScheduleKeywords, LoggingKeywords, total=False):
    """What the trainers' callbacks take."""


def resolved(cls: type[T], given: T | None, keywords: Mapping[str, Any]) -> T:
    """Return the options of one class: those of the object, or the defaults, overridden by the keywords.

    Args:
        cls: class of the options.
        given: an object of that class, or None.
        keywords: values by name; names of other classes' options are left to them.

    Raises:
        TypeError: `given` is not of that class, or a value has the wrong type.
        ValueError: a value is out of range.
    """
    base = cls() if given is None else given
    if not isinstance(base, cls):
        raise TypeError(
            f"{_ARGUMENTS[cls]} must be {cls.__name__}(...), got {given!r} of type {type(given).__name__}; "
            "options can also be given by name"
        )
    defaults = vars(cls())
    named = {name: value for name, value in keywords.items() if name in defaults}
    if given is not None and len(named) == len(defaults):
        # LightningCLI passes every parameter, also those that nobody set: their defaults must not hide the object.
        named = {name: value for name, value in vars(cls(**named)).items() if value != defaults[name]}
    return replace(base, **named)


def takes_options(*classes: type[Any]) -> Callable[[F], F]:
    """Give a function or a class all options of some dataclasses as keyword arguments.

    The function, or the class's `__init__`, ends in `**options`. It gets a `__signature__` and `__annotations__`
    with the options' names, types and defaults in the place of `**options`, its docstring gets their documentation
    at the end of the section Args, and calls with an unknown option raise a `TypeError` that names the nearest.

    Args:
        classes: dataclasses whose docstrings describe each field in a section Attributes.
    """

    def decorate(decorated: F) -> F:
        if isinstance(decorated, type):
            setattr(decorated, "__init__", _with_options(decorated.__init__, decorated.__name__, classes))  # type: ignore[misc] # noqa: B010
            decorated.__doc__ = _documented(decorated.__doc__, classes)
            return decorated
        wrapper = _with_options(decorated, decorated.__name__, classes)
        wrapper.__doc__ = _documented(decorated.__doc__, classes)
        return wrapper

    return decorate


def _with_options(function: F, name: str, classes: tuple[type[Any], ...]) -> F:
    """Wrap a function: real signature, and an error for unknown options."""
    signature = inspect.signature(function)
    own = [
        parameter.replace(annotation=_evaluated(parameter.annotation, function))
        for parameter in signature.parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    returned = _evaluated(signature.return_annotation, function)
    options = {option.name: option for cls in classes for option in _parameters(cls)}
    known = [*(parameter.name for parameter in own), *options]

    @functools.wraps(function)
    def wrapper(*args: Any, **keywords: Any) -> Any:
        if ScheduleOptions in classes:
            keywords = _without_removed(keywords, name)
        for keyword in keywords:
            if keyword not in known:
                raise TypeError(_unknown(name, keyword, known, classes))
        return function(*args, **keywords)

    parameters = [*own, *options.values()]
    wrapper.__signature__ = signature.replace(parameters=parameters, return_annotation=returned)  # type: ignore[attr-defined]
    annotated = {parameter.name: parameter.annotation for parameter in parameters}
    annotated["return"] = returned
    wrapper.__annotations__ = {
        key: value for key, value in annotated.items() if value is not inspect.Parameter.empty
    }
    return wrapper  # type: ignore[return-value]


def _parameters(cls: type[Any]) -> list[inspect.Parameter]:
    """Return the fields of a dataclass as keyword-only parameters."""
    hints = get_type_hints(cls)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(cls)
    ]


def _evaluated(annotation: Any, function: Callable[..., Any]) -> Any:
    """Return an annotation of a function as a type, for tools that read signatures."""
    if not isinstance(annotation, str):
        return annotation
    return eval(annotation, function.__globals__)  # type: ignore[attr-defined]


def _documented(docstring: str | None, classes: tuple[type[Any], ...]) -> str:
    """Append the description of each option to the section Args of a docstring."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    if "Args:" not in lines:
        raise ValueError("a docstring needs a section Args, for the options to be added to")
    end = lines.index("", lines.index("Args:")) if "" in lines[lines.index("Args:") :] else len(lines)
    described = [line for cls in classes for line in _attributes(cls).splitlines()]
    return "\n".join([*lines[:end], *described, *lines[end:], ""])


def _attributes(cls: type[Any]) -> str:
    """Return the section Attributes of a dataclass's docstring."""
    found = re.search(r"^Attributes:\n((?: {4}.*\n?)+)", inspect.getdoc(cls) or "", flags=re.MULTILINE)
    assert found is not None, f"{cls.__name__} has no section Attributes"
    return found[1].rstrip()


def _without_removed(keywords: dict[str, Any], name: str) -> dict[str, Any]:
    """Drop the options of earlier versions, with a warning where one was in use."""
    for removed, instead in REMOVED.items():
        if keywords.get(removed) is not None:
            warn_once(f"{name} no longer has the option {removed}: {instead}", ScheduleOptions)
    return {keyword: value for keyword, value in keywords.items() if keyword not in REMOVED}


def _unknown(name: str, keyword: str, known: list[str], classes: tuple[type[Any], ...]) -> str:
    """Say that there is no such option, which is the nearest, and where the options are documented."""
    nearest = get_close_matches(keyword, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    homes = [cls for cls in classes if nearest and nearest[0] in {field.name for field in fields(cls)}]
    listed = " and ".join(f"help(farms_tb.{cls.__name__})" for cls in homes or classes)
    return f"{name} has no option {keyword!r}{hint} The options are described in {listed}"
