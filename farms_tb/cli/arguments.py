"""Arguments and options that several commands have.

The options of the measurement are not written here: `takes_spectrum_options` makes them of `SpectrumOptions`, so
that the command line, the callbacks and `analyze` cannot drift apart.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from farms_tb.cli.messages import complaints
from farms_tb.cli.output import Format
from farms_tb.keywords import resolved
from farms_tb.options import SpectrumOptions
from farms_tb.presets import PRESETS, with_preset

MODEL_HELP = (
    "A file of weights (safetensors, torch state dict, Lightning checkpoint), a Hugging Face directory; the "
    "folder of a run, for its last checkpoint; a model of torchvision or timm (resnet18, "
    "timm:vit_base_patch16_224); or module:function, called without arguments."
)
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Null = Annotated[
    bool, typer.Option("--null", help="Also measure each layer in random order (permutation null), for z.")
]
Key = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Where the weights lie in a file that holds more: ema, params, ..."),
]
Base = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The weights that an adapter of PEFT (a folder) is merged onto, a file."),
]
Pretrained = Annotated[
    bool,
    typer.Option("--pretrained", help="Trained weights for models of torchvision and timm; else random ones."),
]
Filter = Annotated[
    list[str] | None,
    typer.Option(
        "--filter", metavar="PATTERN", help="Only layers with such a name (shell-style, may be repeated)."
    ),
]
OutputFormat = Annotated[
    Format | None, typer.Option("--format", help="Of the result. Default: by the ending of --output, else table.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the result there, not to stdout.")
]
Device = Annotated[str, typer.Option(help="Where eigenvalues are computed: cpu, cuda, cuda:1.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 where some layer has no alpha.")]

_PRESET = inspect.Parameter(
    "preset",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Measure as a published method does: {', '.join(PRESETS)}."),
    ],
)


def takes_spectrum_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of `SpectrumOptions`; it gets them together as `options`.

    Names, types, defaults and help come from the dataclass and its docstring, where they are written once.

    Args:
        command: a function with a keyword argument `options`.

    Returns:
        The function for Typer, with one keyword argument for each field in place of `options`.
    """
    added = list(_options_of(SpectrumOptions))

    @functools.wraps(command)
    def wrapper(preset: Any, context: typer.Context, **values: Any) -> None:
        with complaints():
            given = {parameter.name: values.pop(parameter.name) for parameter in added}
            if preset is not None:
                # Typer passes every option: those that were not typed must not hide the preset's.
                given = {name: value for name, value in given.items() if _was_typed(context, name)}
            options = resolved(SpectrumOptions, None, with_preset(preset, {}, given))
        command(options=options, **values)

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "options"]
    own += [_PRESET, inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    # Typer reads both to learn which options there are.
    wrapper.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    return wrapper


def _was_typed(context: typer.Context, name: str) -> bool:
    """Return whether a user has given an option on the command line."""
    source = context.get_parameter_source(name)
    # By name: the class is that of click, or of Typer's own copy of it.
    return source is not None and source.name == "COMMANDLINE"


def _options_of(cls: type) -> Iterator[inspect.Parameter]:
    """Yield a parameter for each field of a dataclass, annotated as an option of the command line."""
    described, types = _described_attributes(cls), get_type_hints(cls)
    for field in fields(cls):
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[types[field.name], typer.Option(help=described.get(field.name))],
        )


def _described_attributes(cls: type) -> dict[str, str]:
    """Return what a class's docstring says of each attribute, with `other_option` written as --other-option."""
    attributes = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {5}.+)*)", attributes, flags=re.MULTILINE)
    return {name: _as_help(text) for name, text in found}


def _as_help(text: str) -> str:
    """Return a few words of a docstring as help: one line, which names options as one types them."""
    one_line = " ".join(text.split())
    one_line = re.sub(r"`(\w+)`", lambda match: "--" + match[1].replace("_", "-"), one_line).replace("`", "")
    return one_line[0].upper() + one_line[1:]
