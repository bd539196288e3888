"""The workspace of a run: its specification, as it would be sent, from keys that a real run logged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

pytest.importorskip("wandb_workspaces")
pytest.importorskip("matplotlib")

from lightning.pytorch.loggers import WandbLogger

from farms_tb import FARMSTempBalance
from farms_tb.training import wandb_workspace as wandb_report
from farms_tb.training.wandb_workspace import build_workspace, main
from tests.helpers import LIGHTNING_NOISE, Module, fit
from tests.training.test_logging import LAYERS
from tests.training.test_wandb import OfflineRun

# What the package says of its use of pydantic.
pytestmark = [*LIGHTNING_NOISE, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
RUN = "team/project/abc123"
FEW = {"epoch", "farms/alpha_mean", "farms_alpha/00_a.b", "farms_alpha/01_c", "farms_ratio/00_a.b"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: Any) -> Iterator[set[str]]:
    """The keys in the summary of a run."""
    folder = tmp_path_factory.mktemp("wandb")
    logger = WandbLogger(project="tests", save_dir=folder, offline=True)
    fit(
        Module(),
        [FARMSTempBalance(histogram_every_n=2, table_every_n=5, assign_func="tb_linear_map")],
        logger=logger,
    )
    return {key for key, *_ in OfflineRun(folder).summary}


def sections(keys: Iterable[str], **options: Any) -> dict[str, list[Any]]:
    """The panels of each section, as JSON would have them."""
    model = build_workspace(RUN, keys, **options)._to_model().model_dump(by_alias=True, exclude_none=True)
    found = model["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in found}


def shown_in(found: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The configuration of each panel, without its random id."""
    return {name: [panel["config"] for panel in panels] for name, panels in found.items()}


def test_every_section_has_its_panels_in_order_of_depth(keys: set[str]) -> None:
    found = sections(keys)
    each = ["alpha", "ratio", "learning rate", "rank share"]
    assert list(found) == ["mean over layers", *each, "ESD", "table and pictures"]
    titles = {name: [panel["config"].get("chartTitle") for panel in panels] for name, panels in found.items()}
    assert titles["mean over layers"] == ["alpha_mean", "alpha_std", "ratio_mean"]
    for name in each:
        assert titles[name] == [f"{name} of every layer", *LAYERS]
    assert titles["ESD"] == LAYERS
    table, *pictures = found["table and pictures"]
    assert "'farms/report'" in str(table["config"])
    media = [panel["config"]["mediaKeys"] for panel in pictures]
    assert media == [["farms/alpha_curves"], ["farms/ratio_map"], ["farms/alpha_by_depth"]]


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_metric_of_the_user_that_looks_alike_changes_nothing(keys: set[str], prefix: str) -> None:
    own = {f"{prefix}{key}" for key in keys}
    with_others = {*own, "a_farms/area", "z_farms_alpha/03_north"}
    assert shown_in(sections(with_others)) == shown_in(sections(own))


def test_one_panel_has_every_layer(keys: set[str]) -> None:
    config = sections(keys)["alpha"][0]["config"]
    expected = [f"farms_alpha/{depth:02d}_{layer}" for depth, layer in enumerate(LAYERS)]
    assert config["metrics"] == expected
    assert config["xAxis"] == "epoch"
    assert config["overrideSeriesTitles"] == {f"abc123:{key}": key.split("_", 2)[2] for key in expected}
    colours = [config["overrideColors"][f"abc123:{key}"]["color"] for key in expected]
    assert len(set(colours)) == len(LAYERS)
    brightness = [sum(bytes.fromhex(colour[1:])) for colour in colours]
    assert brightness == sorted(brightness), "dark at the input"


def test_every_panel_shows_what_was_logged(keys: set[str]) -> None:
    for panels in sections(keys).values():
        for panel in panels:
            shown = panel["config"].get("metrics", []) + panel["config"].get("mediaKeys", [])
            assert set(shown) <= keys


def test_the_workspace_is_of_the_one_run() -> None:
    (runs,) = build_workspace(RUN, FEW)._to_model().model_dump(by_alias=True)["spec"]["section"]["runSets"]
    (only,) = runs["filters"]["filters"]
    assert (only["key"]["name"], only["op"], only["value"]) == ("name", "=", "abc123")


@pytest.mark.parametrize(
    ("prefix", "more", "x_axis", "expected"),
    [
        ("", {"trainer/global_step"}, "step", "trainer/global_step"),
        ("train/", {"train/global_step"}, "step", "train/global_step"),
        ("train/", set(), "epoch", "train/epoch"),
        ("mine-", set(), "epoch", "mine-epoch"),
    ],
)
def test_prefix_and_x_axis(prefix: str, more: set[str], x_axis: Any, expected: str) -> None:
    """Hugging Face's Trainer puts `train/` before every key, a logger what the user likes."""
    found = sections(iter({prefix + key for key in FEW} | more), x_axis=x_axis)
    assert list(found) == ["mean over layers", "alpha", "ratio"]
    assert {panel["config"]["xAxis"] for panels in found.values() for panel in panels} == {expected}
    assert found["alpha"][1]["config"]["metrics"] == [f"{prefix}farms_alpha/00_a.b"]


def test_dry_run_sends_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Were it to be sent, it would need an account."""
    monkeypatch.setattr(wandb_report, "_logged_keys", lambda path: list(FEW))
    main([RUN, "--dry-run"])
    assert capsys.readouterr().out.splitlines() == [
        "team/project: FARMS abc123, against epoch",
        "  mean over layers",
        "    alpha_mean",
        "  alpha",
        "    alpha of every layer",
        "    a.b",
        "    c",
        "  ratio",
        "    ratio of every layer",
        "    a.b",
    ]


@pytest.mark.parametrize(
    ("run", "message"),
    [("project/abc123", "a run is named ENTITY/PROJECT/RUN_ID"), (RUN, f"{RUN} has no farms/ metrics")],
)
def test_mistakes(
    run: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wandb_report, "_logged_keys", lambda path: ["loss"])
    with pytest.raises(SystemExit):
        main([run])
    assert message in capsys.readouterr().err
