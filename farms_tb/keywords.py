"""The options as keyword arguments of the public entry points.

Every entry point takes each option by name as well as in an options object, `analyze(model, window=64)` as well as
`analyze(model, spectrum=SpectrumOptions(window=64))`, without repeating forty parameters in its signature and its
docstring. At run time everything comes from the dataclasses of `farms_tb.options`: `takes_options` puts their
fields into the signature that `help`, LightningCLI and Hydra read, and into the docstring, and refuses misspelt
names. A type checker cannot follow that, so each dataclass has a `TypedDict` here with the same names and types,
for `**options: Unpack[...]`; tests/test_options.py compares the two.

    @takes_options(SpectrumOptions)
    def analyze(model, *, spectrum: SpectrumOptions | None = None, **options: Unpack[SpectrumKeywords]) -> Report:
        spectrum = resolved(SpectrumOptions, spectrum, options)
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any, TypedDict, TypeVar, get_type_hints

from farms_tb.options import (
    Adapters,
    AssignFunc,
    BlockMean,
    Collapsed,
    Esd,
    Favor,
    Fit,
    Kind,
    LoggingOptions,
    Metric,
    Normalize,
    Norms,
    Precision,
    RatioOptions,
    ScheduleOptions,
    Solver,
    SpectrumOptions,
    Target,
    Unit,
    XAxis,
    as_plain,
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
    embeddings: bool
    adapters: Adapters
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
    favor: Favor
    normalize: Normalize | None
    exclude_heads: bool
    fixed: Mapping[str, float] | Sequence[tuple[str, float]]
    unit: Unit
    blocks: Sequence[str]
    block_mean: BlockMean
    permute: int | None
    target: Target
    decay_follows_lr: bool


class ScheduleKeywords(TypedDict, total=False):
    """The fields of `ScheduleOptions`."""

    every_n_epochs: int
    every_n_steps: int | None
    lag_steps: int
    measurements_per_epoch: int | None
    start: float | str
    until: float | str
    ramp_steps: int


class LoggingKeywords(TypedDict, total=False):
    """The fields of `LoggingOptions`."""

    log: bool
    histogram_every_n: int | None
    table_every_n: int | None
    verdicts: bool
    x_axis: XAxis | None


class BalancingKeywords(SpectrumKeywords, RatioKeywords, total=False):
    """What `TempBalance` takes."""


class CallbackKeywords(BalancingKeywords, ScheduleKeywords, LoggingKeywords, total=False):
    """What the trainers' callbacks take."""


def resolved(cls: type[T], given: T | None, keywords: Mapping[str, Any]) -> T:
    """Return the options of one class: those of the object, or the defaults, overridden by the keywords.

    Args:
        cls: class of the options.
        given: an object of that class; None for the defaults.
        keywords: values by name; names of other classes' options are left to them.

    Returns:
        Checked options of that class, a new object.

    Raises:
        TypeError: `given` is not of that class, or a value has the wrong type.
        ValueError: a value is out of range.
    """
    names = {field.name for field in fields(cls)}
    named = {name: value for name, value in keywords.items() if name in names}
    if given is None:
        return cls(**named)
    if not isinstance(given, cls):
        raise TypeError(
            f"{_ARGUMENTS[cls]} must be {cls.__name__}(...), got {given!r} of type {type(given).__name__}; "
            "options can also be given by name"
        )
    return replace(given, **without_defaults(cls, named))


def without_defaults(cls: type[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return options without those that nobody set, which must not hide what an object or a preset says.

    LightningCLI and Hydra pass every option. So where all options of a class are there, those at their defaults
    are left out, whatever kind of sequence or mapping they came in.

    Args:
        cls: class of the options.
        keywords: values by name; those of other classes' options stay.
    """
    defaults = as_plain(cls())
    if not defaults.keys() <= keywords.keys():
        return dict(keywords)
    kept = {}
    for name, value in keywords.items():
        plain = list(value) if isinstance(value, (tuple, Mapping)) else value
        if name not in defaults or plain != defaults[name]:
            kept[name] = value
    return kept


def takes_options(*classes: type[Any]) -> Callable[[F], F]:
    """Give a function or a class all options of some dataclasses as keyword arguments.

    The function, or the class's `__init__`, ends in `**options`. It gets a `__signature__` and `__annotations__`
    with the options' names, types and defaults in the place of `**options`, its docstring gets their documentation
    at the end of the section Args, and calls with an unknown option raise a `TypeError` that names the nearest.

    Args:
        classes: dataclasses whose docstrings describe each field in a section Attributes.

    Returns:
        A decorator. A class is changed in place, so that it can still be subclassed and pickled; a function is
        wrapped.

    Raises:
        ValueError: what is decorated has no section Args in its docstring.
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
    """Wrap a function: real signature, and an error for unknown options.

    Args:
        function: a function that ends in `**options`.
        name: what error messages call it; a class's `__init__` goes by the name of the class.
        classes: dataclasses of the options.
    """
    signature = _full_signature(function, classes)
    known = list(signature.parameters)

    @functools.wraps(function)
    def wrapper(*args: Any, **keywords: Any) -> Any:
        # Only callbacks have had options that are gone now.
        if ScheduleOptions in classes:
            keywords = _without_removed(keywords, name)
        unknown = [keyword for keyword in keywords if keyword not in known]
        if unknown:
            raise TypeError(_unknown(name, unknown[0], known, classes))
        return function(*args, **keywords)

    wrapper.__signature__ = signature  # type: ignore[attr-defined]
    wrapper.__annotations__ = _annotations(signature)
    return wrapper  # type: ignore[return-value]


def _full_signature(function: Callable[..., Any], classes: tuple[type[Any], ...]) -> inspect.Signature:
    """Return the signature of a function with every option in the place of `**options`, and types for strings."""
    # `Unpack` stands before the options alone, which are replaced, and is imported for type checkers only.
    signature = inspect.signature(function, eval_str=True, locals={"Unpack": type})
    *parameters, _ = signature.parameters.values()
    for cls in classes:
        parameters.extend(_parameters(cls))
    return signature.replace(parameters=parameters)


def _annotations(signature: inspect.Signature) -> dict[str, Any]:
    """Return a signature's types by name, as `__annotations__` holds them; parameters without one are left out."""
    annotated = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    annotated["return"] = signature.return_annotation
    return {
        name: annotation for name, annotation in annotated.items() if annotation is not inspect.Parameter.empty
    }


def _parameters(cls: type[Any]) -> list[inspect.Parameter]:
    """Return the fields of a dataclass as keyword-only parameters, with their defaults and evaluated types."""
    hints = get_type_hints(cls)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(cls)
    ]


def _documented(docstring: str | None, classes: tuple[type[Any], ...]) -> str:
    """Append the description of each option to the section Args of a docstring.

    Args:
        docstring: with a section Args, which ends at an empty line or at the end.
        classes: dataclasses of the options, in the order in which they are described.

    Raises:
        ValueError: there is no section Args.
    """
    if sys.flags.optimize > 1:  # python -OO has removed all docstrings
        return ""
    lines = inspect.cleandoc(docstring or "").splitlines()
    if "Args:" not in lines:
        raise ValueError("a docstring needs a section Args, for the options to be added to")
    # A section ends at the first empty line.
    lines.append("")
    end = lines.index("", lines.index("Args:"))
    described = [_attributes(cls) for cls in classes]
    return "\n".join([*lines[:end], *described, *lines[end:]])


def _attributes(cls: type[Any]) -> str:
    """Return the section Attributes of a dataclass's docstring."""
    found = re.search(r"^Attributes:\n((?: {4}.*\n?)+)", inspect.getdoc(cls) or "", flags=re.MULTILINE)
    assert found is not None, f"{cls.__name__} has no section Attributes"
    return found[1].rstrip()


def _without_removed(keywords: dict[str, Any], name: str) -> dict[str, Any]:
    """Drop the options of earlier versions, with a warning where one was in use.

    Configs and checkpoints of earlier versions hold all options, these too, mostly with their default None.
    """
    for removed, instead in REMOVED.items():
        if keywords.get(removed) is not None:
            warn_once(f"{name} no longer has the option {removed}: {instead}", ScheduleOptions)
    return {keyword: value for keyword, value in keywords.items() if keyword not in REMOVED}


def _unknown(name: str, keyword: str, known: list[str], classes: tuple[type[Any], ...]) -> str:
    """Return a message: there is no such option, which is the nearest, and where the options are documented."""
    homes = classes
    hint = "."
    nearest = get_close_matches(keyword, known, n=1)
    if nearest:
        hint = f"; did you mean {nearest[0]!r}?"
        homes = tuple(cls for cls in classes if nearest[0] in cls.__dataclass_fields__) or classes
    # Each package shows the names of its module `options`.
    listed = " and ".join(f"help({cls.__module__.removesuffix('.options')}.{cls.__name__})" for cls in homes)
    return f"{name} has no option {keyword!r}{hint} The options are described in {listed}"
