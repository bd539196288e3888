"""Names, files and folders that somebody else made, given to the commands."""

from __future__ import annotations

import csv
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from farms_tb.cli.app import app

EVIL = "\x1b]0;pwned\x07\x1b[2J\x1b]52;c;cm0gLXJm\x07\x9b2J\x1b]8;;http:x\x1b\\\x9d0;x\x9c\u202e\b"
NET = "tests.cli.test_cli:net"
SEQUENCES = ("\x1b]", "\x1b[2J", "\x1b\\", "\x9b", "\x9c", "\x9d", "\x07", "\u202e", "\b")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def in_terminal(*arguments: Any) -> str:
    """Return all that a command writes to a terminal."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "farms_tb.cli", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=follower, stderr=follower, close_fds=True)
    os.close(follower)
    output = b""
    try:
        while piece := os.read(leader, 65536):
            output += piece
    except OSError:
        pass  # Linux says so where a terminal has been left
    os.close(leader)
    process.wait(100)
    return output.decode(errors="replace")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Weights, an index and a run whose names hold a terminal's commands."""
    save_file({f"{EVIL}.weight": torch.randn(20, 20)}, tmp_path / "m.safetensors")
    index = {"weight_map": {"a": f"{EVIL}.safetensors"}}
    (tmp_path / "n.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text(f"epoch,step,farms/alpha/{EVIL}\n0,0,2.0\n1,1,2.1\n")
    return tmp_path


COMMANDS = (
    ["analyze", "m.safetensors"],
    ["analyze", "m.safetensors", "--format", "csv"],
    ["analyze", "m.safetensors", "--format", "json"],
    ["analyze", "n.safetensors.index.json"],
    ["analyze", f"{EVIL}.pt"],
    ["compare", "m.safetensors", "m.safetensors"],
    ["watch", "run", "--once"],
    ["watch", "run", "--once", "--filter", "x"],
    ["plot", "m.safetensors", "--layer", EVIL, "--format", "svg"],
    ["plot", "m.safetensors", "--layer", "x"],
    ["report", "run"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{number}-{c[0]}" for number, c in enumerate(COMMANDS)])
def test_no_sequence_of_a_terminal_gets_through(
    hostile: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hostile)
    shown = run(*command)
    assert not any(sequence in shown.output for sequence in SEQUENCES), shown.output
    assert shown.output


@pytest.mark.filterwarnings("ignore:.*forkpty")
@pytest.mark.parametrize("command", [["analyze", "m.safetensors"], ["watch", "run", "--once"]])
def test_nor_to_a_real_one(hostile: Path, command: list[str]) -> None:
    shown = in_terminal(command[0], hostile / command[1], *command[2:])
    assert "pwned" in shown  # as text
    assert not any(sequence in shown for sequence in SEQUENCES)


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "=cmd()", "9" * 5000, "层"])
@pytest.mark.parametrize("form", ["csv", "json", "parquet", "table"])
def test_any_name_can_be_written(tmp_path: Path, name: str, form: str) -> None:
    torch.save({f"{name}.weight": torch.randn(20, 20)}, tmp_path / "m.pt")
    result = run("analyze", tmp_path / "m.pt", "--format", form, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    if form == "csv":
        with (tmp_path / "out").open(newline="", encoding="utf-8") as file:
            (row,) = csv.DictReader(file)
        assert row["layer"].isprintable()
        assert row["alpha"]
    elif form == "json":
        assert json.loads((tmp_path / "out").read_text())["layers"][0]["layer"] == name


@pytest.mark.parametrize("shape", [(2**31, 2**31), (2**30, 2**30, 2)], ids=["matrix", "convolution"])
def test_a_tensor_that_claims_to_be_huge_is_listed(tmp_path: Path, shape: tuple[int, ...]) -> None:
    held = {"a.weight": torch.randn(20, 20), "b.weight": torch.ones(1).expand(shape)}
    torch.save(held, tmp_path / "m.pt")
    result = run("analyze", tmp_path / "m.pt", "--format", "json")
    assert result.exit_code == 0, result.output
    measured, huge = json.loads(result.stdout)["layers"]
    assert measured["alpha"]
    assert "damaged" in huge["status"]


def test_an_empty_tensor_that_claims_huge_sides_is_listed(tmp_path: Path) -> None:
    entries = {
        "a.weight": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        "b.weight": {"dtype": "F32", "shape": [20, 20], "data_offsets": [0, 1600]},
    }
    header = json.dumps(entries).encode()
    content = len(header).to_bytes(8, "little") + header + torch.randn(400).numpy().tobytes()
    (tmp_path / "m.safetensors").write_bytes(content)
    result = run("analyze", tmp_path / "m.safetensors", "--format", "json")
    assert result.exit_code == 0, result.output
    assert [row["alpha"] is None for row in json.loads(result.stdout)["layers"]] == [True, False]


def make_run(folder: Path, alpha: float = 2.0) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(f"epoch,step,farms/alpha/a\n0,0,{alpha}\n")
    state = {"options": {}, "ratios": {"a": 1.0}, "report": {}}
    checkpoint = {
        "epoch": 0,
        "global_step": 1,
        "state_dict": {"a.weight": torch.randn(20, 20)},
        "callbacks": {"FARMSTempBalance": {"balancer": state}},
    }
    torch.save(checkpoint, folder / "last.ckpt")
    return folder


def test_analyze_takes_the_last_checkpoint_of_a_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    os.utime(folder / "last.ckpt", (2e9, 2e9))
    torch.save({"b.weight": torch.randn(20, 20)}, folder / "older.ckpt")
    result = run("analyze", folder, "--format", "json")
    assert result.exit_code == 0, result.output
    assert [row["layer"] for row in json.loads(result.stdout)["layers"]] == ["a"]
    assert "last checkpoint, last.ckpt" in " ".join(result.stderr.split())
    (folder / "last.ckpt").unlink()
    (folder / "older.ckpt").unlink()
    result = run("analyze", folder)
    assert result.exit_code == 2
    assert "without a checkpoint" in " ".join(result.stderr.split())


def test_a_run_that_was_copied_has_the_same_last_checkpoint(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    early = torch.load(folder / "last.ckpt", weights_only=True)
    torch.save({**early, "global_step": 0, "state_dict": {"b.weight": torch.randn(20, 20)}}, folder / "early.ckpt")
    os.utime(folder / "early.ckpt", (2e9, 2e9))
    result = run("analyze", folder, "--format", "json")
    assert result.exit_code == 0, result.output
    assert [row["layer"] for row in json.loads(result.stdout)["layers"]] == ["a"]


def test_a_folder_with_several_runs_asks_which(tmp_path: Path) -> None:
    for name in ("first", "second"):
        make_run(tmp_path / name)
    for command in (["analyze"], ["report"], ["plot"], ["watch", "--once"]):
        result = run(command[0], tmp_path, *command[1:])
        assert result.exit_code == 2, command
        assert result.stdout == ""
        said = " ".join(result.stderr.split())
        assert "several runs" in said
        assert str(tmp_path / "first") in said
        assert str(tmp_path / "second") in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_compare_takes_runs_too(tmp_path: Path) -> None:
    result = run("compare", make_run(tmp_path / "first"), make_run(tmp_path / "second"))
    assert result.exit_code == 0, result.output
    assert result.stderr.count("last checkpoint") == 2


def test_watch_says_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,farms/alpha/a\n0,0,nan\n1,1,1e308\n2,2,-1e308\n")
    result = run("watch", tmp_path, "--once")
    assert result.exit_code == 0, result.output
    assert "'nan' as alpha of 'a'" in " ".join(result.stdout.split())


def test_no_minus_before_zero(tmp_path: Path) -> None:
    weight = torch.randn(60, 60)
    torch.save({"a.weight": weight}, tmp_path / "a.pt")
    torch.save({"a.weight": weight * (1 + 1e-6 * torch.rand(60, 60))}, tmp_path / "b.pt")
    for models in (("a.pt", "b.pt"), ("b.pt", "a.pt")):
        assert "-0.0" not in run("compare", *(tmp_path / model for model in models)).stdout


def test_key_is_for_files(tmp_path: Path) -> None:
    for command in (["analyze", NET], ["compare", NET, NET]):
        result = run(*command, "--key", "ema")
        assert result.exit_code == 2
        assert "--key" in result.stderr
