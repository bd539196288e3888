"""Generates parts of the site from the code: a hook of MkDocs, see `mkdocs.yml`.

A line `<!-- generated: NAME ARGUMENTS -->` on a page is replaced by the result of the function of that name in
`GENERATED`, so that tables of options, commands and experiments always agree with the code. Formulas become
MathML, which browsers render by themselves: no script, no font, no network.
"""

from __future__ import annotations

import ast
import html
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
EXPERIMENTS = ROOT / "conf" / "experiment"
HELP_WIDTH = 88

_MARKER = re.compile(r"^<!-- generated: (\w+)(.*?) -->$", flags=re.MULTILINE)
_LINK_UP = re.compile(r"\[([^]]+)\]\((\.\./[^)#]+)[^)]*\)")
_COMMAND = re.compile(r"python -m \S+ \S+|[\w.]+=\S*\w(?: [\w.]+=\S*\w)*(?: -m)?")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_config(config: Any) -> Any:
    """Add the pages of results to the navigation."""
    results = next(part["Results"] for section in config.nav for part in _parts(section) if "Results" in part)
    results += [str(path.relative_to(DOCS)) for path in results_pages()]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what is generated; of links to files that are not on the site, leave the words."""

    def fill(marker: re.Match[str]) -> str:
        try:
            return GENERATED[marker[1]](*marker[2].split())
        except (KeyError, StopIteration) as error:
            raise PluginError(f"{page.file.src_path}: {marker[0]}: {error!r}") from error

    def shorten(link: re.Match[str]) -> str:
        target = (DOCS / page.file.src_path).parent / link[2]
        return link[0] if target.resolve().is_relative_to(DOCS) else link[1]

    return _LINK_UP.sub(shorten, _MARKER.sub(fill, markdown))


def on_page_content(content: str, **_: Any) -> str:
    """Set the formulas."""

    def mathml(formula: re.Match[str]) -> str:
        display = "block" if formula[1] == "div" else "inline"
        return convert(html.unescape(formula[2]).strip(), display=display)

    return _FORMULA.sub(mathml, content)


class Option(NamedTuple):
    """An option as its docstring describes it."""

    default: str
    description: str


@cache
def option_classes() -> dict[str, griffe.Class]:
    """Return the dataclasses of options in `farms_tb.options`, by name."""
    module = griffe.load("farms_tb.options", search_paths=[ROOT])
    return {name: found for name, found in module.classes.items() if name.endswith("Options")}


@cache
def options() -> dict[str, Option]:
    """Return every option by name: from the dataclasses, and those that the Lightning callback alone has."""
    found = _callback_options()
    for made in option_classes().values():
        described = _section(made, griffe.DocstringSectionKind.attributes)
        for name, text in described.items():
            found[name] = Option(str(made[name].value), text)
    return found


def _callback_options() -> dict[str, Option]:
    callback = griffe.load("farms_tb.training.lightning", search_paths=[ROOT])["FARMSTempBalance"]
    described = _section(callback, griffe.DocstringSectionKind.parameters)
    defaults = {parameter.name: str(parameter.default) for parameter in callback["__init__"].parameters}
    return {name: Option(defaults.get(name, ""), text) for name, text in described.items()}


def _section(documented: griffe.Object, kind: griffe.DocstringSectionKind) -> dict[str, str]:
    """Return what one section of a docstring says, by the names of its entries."""
    if documented.docstring is None:
        return {}
    sections = documented.docstring.parse("google")
    return {entry.name: entry.description for part in sections if part.kind is kind for entry in part.value}


def options_table(*names: str) -> str:
    """Return a table of options: name, default, meaning."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for name in names:
        option = options()[name]
        text = " ".join(option.description.split()).replace("|", r"\|")
        lines.append(f'| <code id="{name}">{name}</code> | `{option.default}` | {text[0].upper()}{text[1:]} |')
    return "\n".join(lines)


def metrics_table() -> str:
    """Return a table of the metrics of a layer: name, meaning, when it is known."""
    from farms_tb.viewing.words import METRICS, OF_THE_NULL

    lines = ["| metric | what it tells | known |", "|---|---|---|"]
    for name, words in METRICS.items():
        lines.append(f"| `{name}` | {words} | {'with a null' if name in OF_THE_NULL else 'always'} |")
    return "\n".join(lines)


def option_reference() -> str:
    """Return the markers by which mkdocstrings documents each dataclass of options, under its public path."""
    public = griffe.load("farms_tb", search_paths=[ROOT]).exports or ()
    paths = [f"farms_tb.{name}" if name in public else f"farms_tb.options.{name}" for name in option_classes()]
    return "\n\n".join(f"::: {path}" for path in paths)


def commands() -> list[str]:
    """Return the names of the commands of `farms-tb`."""
    import typer

    from farms_tb.cli.app import app

    return list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def command_help(name: str) -> str:
    """Return what `farms-tb NAME --help` prints."""
    from typer.testing import CliRunner

    from farms_tb.cli.app import app

    width = {"terminal_width": HELP_WIDTH, "max_content_width": HELP_WIDTH}
    result = CliRunner().invoke(app, [name, "--help"], prog_name="farms-tb", **width)
    if result.exit_code:
        raise KeyError(name)
    return f"```text\n{result.output.strip()}\n```"


def experiments() -> Iterator[tuple[str, str]]:
    """Yield name and description of each experiment, from the head of its file."""
    for path in sorted(EXPERIMENTS.rglob("*.yaml"), key=lambda path: (path.parent, path.name)):
        if not path.name.startswith("_"):
            yield str(path.relative_to(EXPERIMENTS).with_suffix("")), _head(path)


def experiments_table(folder: str = "") -> str:
    """Return a table of the experiments in one folder of `conf/experiment`."""
    rows = [(name, text) for name, text in experiments() if name.rpartition("/")[0] == folder]
    lines = [f"| `{name}` | {text} |" for name, text in rows]
    if not lines:
        raise KeyError(folder)
    return "\n".join(["| experiment | what it runs |", "|---|---|", *lines])


def _head(path: Path) -> str:
    """Return the comment below the command at the head of a file of settings."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    _, _, text = "\n".join(comment).partition("\n\n")
    text = " ".join(text.split()).replace("|", r"\|")
    return _COMMAND.sub(r"`\g<0>`", text)


def modules_table(folder: str) -> str:
    """Return a table of the modules in a folder, with the first line of each module's docstring."""
    found = {path.name: _first_line(path) for path in sorted((ROOT / folder).glob("*.py"))}
    found |= {f"{path.parent.name}/": _first_line(path) for path in sorted((ROOT / folder).glob("*/__init__.py"))}
    rows = [f"| `{name}` | {text} |" for name, text in found.items() if text and not name.startswith("_")]
    if not rows:
        raise KeyError(folder)
    return "\n".join(["| module | what it holds |", "|---|---|", *rows])


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def targets_table() -> str:
    """Return a table of the make targets, from what `make help` prints."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = re.findall(r'^\t@echo "((?:make| ) .*)"$', makefile, flags=re.MULTILINE)
    # A long target stands on a line of its own, its words on the next.
    text = re.sub(r"\n\s+", "  ", "\n".join(lines))
    rows = [
        f"| `{target}` | {words} |" for target, words in re.findall(r"^(make \S+)\s+(.*)$", text, re.MULTILINE)
    ]
    return "\n".join(["| target | what it does |", "|---|---|", *rows])


def results_pages() -> list[Path]:
    """Return the pages of results."""
    return sorted((DOCS / "results").glob("**/README.md"))


def results_list() -> str:
    """Return a list of the pages of results."""
    return "\n".join(f"- [{_title(path)}]({path.relative_to(DOCS).as_posix()})" for path in results_pages())


def _title(path: Path) -> str:
    heading = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return heading[1] if heading else path.parent.name


def _parts(section: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the named parts of a section of the navigation."""
    content = next(iter(section.values()))
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


GENERATED: dict[str, Callable[..., str]] = {
    "options": options_table,
    "metrics": metrics_table,
    "option_reference": option_reference,
    "command": command_help,
    "experiments": experiments_table,
    "modules": modules_table,
    "targets": targets_table,
    "results": results_list,
}
