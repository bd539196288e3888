"""`farms-tb plot` with several runs or files: what is drawn, what is said, and mistakes that cost no time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from tests.cli.test_cli import run
from tests.helpers import LIGHTNING_NOISE
from tests.runs import train_run

pytestmark = [*LIGHTNING_NOISE, pytest.mark.filterwarnings("ignore:.*(torch.jit|forkpty)")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one network, as Lightning writes them."""
    folder = tmp_path_factory.mktemp("runs")
    train_run(folder / "balanced")
    train_run(folder / "noise_aware", assign_func="noise_aware")
    return [folder / "balanced", folder / "noise_aware"]


def names(stdout: str) -> list[str]:
    return [Path(line).name for line in stdout.splitlines()]


def test_runs_are_compared_in_the_current_folder(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("plot", *runs, "--format", "svg")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == "figures/alpha_mean.svg"
    wanted = ["alpha_mean", "alpha_by_layer", "lr_ratio_spread", "metrics", "alpha_by_depth"]
    assert names(done.stdout) == [f"{name}.svg" for name in wanted]
    for path in done.stdout.splitlines():
        text = Path(path).read_text()
        assert ">balanced</text>" in text
        assert ">noise_aware</text>" in text
    # The noise-aware map has measured permutation nulls, the other has not.
    assert "Without permutation nulls (--null), and left out of pictures of these: balanced." in done.stderr
    assert not list(runs[0].rglob("figures")), "nothing is written into the runs"


def test_some_pictures_alone(runs: list[Path], tmp_path: Path) -> None:
    done = run("plot", *runs, "--only", "effect_by_depth", "--only", "metrics", "--null", "-o", tmp_path / "p")
    assert names(done.stdout) == ["effect_by_depth.png", "metrics.png"], done.output
    assert done.stderr == ""
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["effect_by_depth.png", "metrics.png"]


def test_layers_that_only_some_files_have_are_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 60), nn.Linear(60, 40))
    torch.save(net.state_dict(), tmp_path / "long.pt")
    torch.save(net[:2].state_dict(), tmp_path / "short.pt")
    done = run("plot", tmp_path / "long.pt", tmp_path / "short.pt", "-o", tmp_path, "--format", "svg")
    assert names(done.stdout) == ["alpha_by_depth.svg"]
    assert done.stderr == "Left out are layers that only some of the runs have: 2.\n"
    assert ">long.pt</text>" in (tmp_path / "alpha_by_depth.svg").read_text()


def test_files_of_different_models_have_nothing_to_compare(tmp_path: Path) -> None:
    for name, net in (("one", nn.Linear(40, 50)), ("other", nn.Sequential(nn.Linear(40, 50)))):
        torch.save(nn.ModuleDict({name: net}).state_dict(), tmp_path / f"{name}.pt")
    done = run("plot", tmp_path / "one.pt", tmp_path / "other.pt", "-o", tmp_path / "p")
    assert done.exit_code == 2
    assert "no layers in common, only some of them have one, other.0" in done.stderr
    assert not (tmp_path / "p").exists()


def test_missing_parts_are_said_by_run(runs: list[Path], tmp_path: Path) -> None:
    young = tmp_path / "young"
    young.mkdir()
    (young / "metrics.csv").write_text("epoch,farms/alpha/net.0,step\n0,2.1,0\n0,2.")
    done = run("plot", runs[0], young, "-o", tmp_path / "p")
    assert done.exit_code == 0, done.output
    assert names(done.stdout) == ["alpha_mean.png", "alpha_by_layer.png"]
    assert "young: No checkpoint" in done.stderr
    assert "young: metrics.csv ends in half a line" in done.stderr


def test_effects_and_spikes_are_drawn_where_they_are_known(runs: list[Path], tmp_path: Path) -> None:
    """Effects by permutation nulls that are measured, or that the run has saved; spikes by measured ones alone."""
    drawn = {"effect_plane.png", "esd_full.png"}
    without = run("plot", runs[0], "-o", tmp_path)
    assert not drawn & set(names(without.stdout))
    assert "Without effect_plane and esd_full: this needs permutation nulls" in without.stderr
    logged = run("plot", runs[1], "-o", tmp_path)
    assert drawn & set(names(logged.stdout)) == {"effect_plane.png"}
    assert "Without esd_full: this needs permutation nulls" in logged.stderr
    for folder in runs:
        measured = run("plot", folder, "--null", "-o", tmp_path)
        assert drawn <= set(names(measured.stdout)), measured.output
        assert "permutation nulls" not in measured.stderr


def test_effects_that_are_asked_for_and_not_known(runs: list[Path], tmp_path: Path) -> None:
    done = run("plot", runs[0], "--only", "effect_plane", "-o", tmp_path / "p")
    assert done.exit_code == 2
    assert "no data for the picture 'effect_plane'" in done.stderr
    assert "--null" in done.stderr
    assert not (tmp_path / "p").exists()


def test_a_layer_with_its_whole_matrix(runs: list[Path], tmp_path: Path) -> None:
    done = run("plot", runs[0], "--layer", "net.2", "--null", "-o", tmp_path)
    assert names(done.stdout) == ["esd_net.2.png", "esd_full_net.2.png"]


def test_no_picture_replaces_another(tmp_path: Path) -> None:
    """The picture of a layer `full_x` would have the name of that of `x` as a whole matrix."""
    layers = ("x", "full_x", "full", "a/b", "a_b")
    torch.save({f"{layer}.weight": torch.randn(60, 40) for layer in layers}, tmp_path / "w.pt")
    chosen = [argument for layer in layers for argument in ("--layer", layer)]
    wanted = ("--null", "--only", "esd_full", *chosen, "--format", "svg")
    done = run("plot", tmp_path / "w.pt", *wanted, "-o", tmp_path)
    drawn = names(done.stdout)
    assert len(set(drawn)) == len(drawn) == 1 + 2 * len(layers), done.output
    assert drawn[:4] == ["esd_full.svg", "esd_x.svg", "esd_full_x.svg", "esd_full_x_2.svg"]
    assert ">full_x</text>" in (tmp_path / "esd_full_x_2.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "no/such/run"], "no/such/run cannot be compared with the others: no such folder"),
        (["{run}", "README.md"], "README.md cannot be compared"),
        (["{run}", "{run}"], "is given twice"),
        (["{run}", "other", "--layer", "net.0"], "--layer draws the spectra of one run, got 2 runs"),
        (["{run}", "other", "--only", "esd"], "no picture 'esd': there are alpha_mean, "),
        (["{run}", "other", "--format", "gif3"], "no format of pictures '.gif3'"),
        ([f"run_{index}" for index in range(29)], "at most 28 runs"),
    ],
)
def test_mistakes(runs: list[Path], tmp_path: Path, arguments: list[str], words: str) -> None:
    done = run("plot", *(argument.format(run=runs[0]) for argument in arguments), "-o", tmp_path / "p")
    assert done.exit_code == 2
    assert words in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "p").exists()
