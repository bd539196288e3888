"""The site builds without a warning, is complete, has no dead link, and its Python runs."""

from __future__ import annotations

import ast
import html
import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from html.parser import HTMLParser
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args
from urllib.parse import unquote, urlsplit

import pytest
import typer
from filelock import FileLock

import farms_tb
import farms_tb.options
from farms_tb import sparsity
from farms_tb.cli.app import app
from farms_tb.viewing import page, plots
from tests.viewing.test_page import browser  # noqa: F401

pytest.importorskip("mkdocs")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


class Page(HTMLParser):
    """What a page of the site links to, loads and can be linked at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.add(values.get("id") or "")
        target = values.get("href") if tag in ("a", "link") else values.get("src")
        if target:
            (self.links if tag == "a" else self.loads).append(target)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once, also where several processes run the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
            environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
            result = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
            )
            assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Page]:
    return {
        path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"
    }


def test_links_and_anchors_resolve(pages: dict[Path, Page]) -> None:
    checked = 0
    for path, content in pages.items():
        for link in content.links + content.loads:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in pages and parts.fragment != "__skip":
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {link}"
            checked += 1
    assert checked > 500


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, content in pages.items():
        assert [load for load in content.loads if urlsplit(load).scheme not in ("", "data")] == [], path.name
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_every_page_is_in_the_navigation(site: Path, pages: dict[Path, Page]) -> None:
    index = site / "index.html"
    linked = {(index.parent / urlsplit(link).path).resolve() for link in pages[index].links}
    assert pages.keys() - linked <= {index}


def test_every_option_is_explained(site: Path, pages: dict[Path, Page]) -> None:
    text = (site / "options.html").read_text(encoding="utf-8")
    defaults = {field.name: field.default for made in option_classes() for field in fields(made)}
    shown = re.findall(r'<code id="(\w+)">\1</code></td>\s*<td><code>(.*?)</code></td>\s*<td>(.+?)</td>', text)
    assert len(shown) > 30
    assert defaults.keys() <= {name for name, _, _ in shown}
    for name, default, _ in shown:
        if name in defaults:
            assert ast.literal_eval(html.unescape(default)) == defaults[name], name
        assert name in pages[site / "options.html"].ids


def option_classes() -> list[type]:
    """Return the dataclasses whose fields are the options of every entry point."""
    return [
        made for name, made in vars(farms_tb.options).items() if name.endswith("Options") and is_dataclass(made)
    ]


def test_every_option_object_has_a_reference(pages: dict[Path, Page], site: Path) -> None:
    ids = pages[site / "api" / "options.html"].ids
    names = [made.__name__ for made in option_classes()]
    assert len(names) >= 2
    for name in names:
        assert {f"farms_tb.{name}", f"farms_tb.options.{name}"} & ids, name


@pytest.mark.parametrize(
    ("api_page", "names"),
    [
        ("measuring", ("analyze", "analyze_checkpoint")),
        ("sparsity", ("allocate", "plan_from_report")),
        ("balancing", ("FARMSTempBalance", "FARMSTrainerCallback", "TempBalance", "lr_ratios")),
    ],
)
def test_entry_points_show_every_option(site: Path, api_page: str, names: tuple[str, ...]) -> None:
    """Also those that a decorator puts in the place of `**options`, which the code alone does not show."""
    text = (site / "api" / f"{api_page}.html").read_text(encoding="utf-8")
    sections = dict(re.findall(r'<h2 id="farms_tb\.(?:sparsity\.)?(\w+)"(.*?)(?=<h2 |\Z)', text, flags=re.DOTALL))
    for name in names:
        home = sparsity if api_page == "sparsity" else farms_tb
        parameters = set(inspect.signature(getattr(home, name)).parameters)
        assert parameters <= set(re.findall(r"<b><code>(\w+)</code></b>", sections[name])), name
        assert "Unpack" not in sections[name]


def test_every_choice_of_a_map_is_on_the_page_of_the_maths() -> None:
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    for name in (*get_args(farms_tb.options.AssignFunc), "median", "goodness-of-fit", "xmin_peak"):
        assert name in text


def test_every_command_and_its_options_are_shown(site: Path) -> None:
    text = (site / "command-line.html").read_text(encoding="utf-8")
    shown = dict(re.findall(r'<h2 id="(\w+)">(.*?)</pre>', text, flags=re.DOTALL))
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert shown.keys() == commands.keys()
    for name, command in commands.items():
        assert f"Usage: farms-tb {name} " in shown[name]
        for parameter in command.params:
            for name_of_it in parameter.opts if parameter.param_type_name == "option" else [parameter.metavar]:
                assert name_of_it in shown[name], f"{name} {name_of_it}"


def test_every_public_name_is_documented(pages: dict[Path, Page]) -> None:
    ids = set().union(*(content.ids for content in pages.values()))
    names = {f"farms_tb.{name}" for name in (*farms_tb.__all__, "FARMSTrainerCallback")}
    names |= {f"farms_tb.sparsity.{name}" for name in sparsity.__all__}
    names |= {f"farms_tb.viewing.plots.{name}" for name in plots.__all__} | {
        f"farms_tb.viewing.page.{name}" for name in page.__all__
    }
    assert names - ids == set()


def test_every_experiment_and_result_is_listed(site: Path) -> None:
    listed = "".join((site / name).read_text(encoding="utf-8") for name in ("recipes.html", "study.html"))
    folder = ROOT / "conf" / "experiment"
    names = [str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml") if p.name[0] != "_"]
    assert len(names) > 30
    for name in names:
        assert re.search(rf"<td><code>{re.escape(name)}</code></td>\s*<td>\w", listed), name
    results = (site / "results.html").read_text(encoding="utf-8")
    for path in (DOCS / "results").rglob("README.md"):
        assert f'href="{path.parent.relative_to(DOCS).as_posix()}/index.html"' in results


def test_everything_that_is_logged_is_on_the_page_of_logs() -> None:
    text = (DOCS / "logging.md").read_text(encoding="utf-8")
    keys = set(re.findall(r"`(farms\w*/\w+)", inspect.getdoc(farms_tb.FARMSTempBalance) or ""))
    assert {"farms/alpha", "farms/lambda"} <= keys
    for key in keys:
        assert key in text, key


def test_formulas_are_set(site: Path) -> None:
    text = (site / "method.html").read_text(encoding="utf-8")
    formulas = (DOCS / "method.md").read_text(encoding="utf-8").count("$$") // 2
    assert text.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') == formulas > 5
    assert not re.search(r"arithmatex|\\frac|\\text|\$", text.partition("<article")[2].partition("</article>")[0])


def test_search_works_from_disk_and_without_a_network(site: Path, browser: Any) -> None:  # noqa: F811
    tab = browser.new_page()
    requested: list[str] = []
    tab.on("request", lambda request: requested.append(request.url))
    tab.goto((site / "index.html").as_uri())
    # Key by key: the theme listens for keys, so that filling the field at once may pass unseen.
    tab.locator(".md-search__input").press_sequentially("Marchenko", delay=20)
    tab.locator(".md-search-result__item a[href*='method.html']").first.wait_for(timeout=30_000)
    assert [url for url in requested if urlsplit(url).scheme not in ("file", "data", "blob")] == []
    tab.close()


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = spec_from_file_location("generated", DOCS / "generated.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "marker",
    ["option esd", "options esdd", "command analyse", "experiments no_such_folder", "modules no_such_folder"],
)
def test_a_mistake_in_a_marker_stops_the_build(hook: ModuleType, marker: str) -> None:
    from mkdocs.exceptions import PluginError

    with pytest.raises(PluginError, match=rf"some\.md: <!-- generated: {marker} -->"):
        hook.on_page_markdown(f"A page.\n\n<!-- generated: {marker} -->\n", page=_page("some.md"))


def test_links_to_files_off_the_site_stay_words(hook: ModuleType) -> None:
    text = "[a](../../guarantees.md#the-step) [b](../../../README.md#install) [c](table.csv)"
    shown = hook.on_page_markdown(text, page=_page("results/study/README.md"))
    assert shown == "[a](../../guarantees.md#the-step) b [c](table.csv)"


def _page(path: str) -> SimpleNamespace:
    return SimpleNamespace(file=SimpleNamespace(src_path=path))


@pytest.mark.slow
def test_python_of_the_pages_runs(tmp_path: Path) -> None:
    """Each page from top to bottom, in one process and an empty folder."""
    sources = [path for path in sorted(DOCS.rglob("*.md")) if "```python" in path.read_text(encoding="utf-8")]
    assert len(sources) >= 9
    if not (find_spec("transformers") and find_spec("peft")):
        sources.remove(DOCS / "transformers.md")
    result = subprocess.run(
        [sys.executable, "-c", RUN_PAGES, *map(str, sources)],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\nran ") == len(sources)


RUN_PAGES = r"""
import re, sys, warnings
warnings.simplefilter("ignore")
for path in sys.argv[1:]:
    text = open(path, encoding="utf-8").read()
    names = {"__name__": "__main__"}
    for block in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        # With the lines before it, so that a traceback points into the page.
        code = "\n" * text[: block.start(1)].count("\n") + block[1]
        exec(compile(code, path, "exec"), names)
    print("\nran", path)
"""
