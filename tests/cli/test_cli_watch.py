"""`farms-tb watch`: curves of a run while it is being written, in a terminal and without one."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from farms_tb.cli.app import app
from farms_tb.cli.watch import Shown, sparkline, view

HEADER = "epoch,farms/alpha/0,farms/alpha/10,farms/alpha/2,farms/ratio/0,loss,step\n"
LINES = ("0,2.0,2.5,2.1,0.5,,0\n", ",,,,,0.3,4\n", "1,1.5,2.5,2.0,1.5,,8\n", "2,1.0,2.5,1.9,1.0,,16\n")


def once(folder: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["watch", str(folder), "--once", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def words(shown: str) -> str:
    """Return the text as one line, wherever the path to the folder broke it."""
    return " ".join(shown.split())


def rows_of(shown: str) -> dict[str, list[str]]:
    """Return the cells of each layer."""
    lines = [line.split() for line in shown.partition("───")[2].splitlines()[1:]]
    return {cells[0]: cells[1:] for cells in lines}


def test_curves(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(HEADER + "".join(LINES))
    shown = once(tmp_path)
    assert "epoch 2, step 16: alpha of 3 layers, 1.000 to 2.500" in shown
    # One scale for all layers: the lowest bar is 1.0, the highest 2.5.
    assert rows_of(shown) == {
        "0": ["▆▃▁", "2.000", "1.000", "-1.000"],
        "2": ["▆▆▅", "2.100", "1.900", "-0.200"],
        "10": ["███", "2.500", "2.500", "0.000"],
    }
    assert rows_of(once(tmp_path, "--ratio")) == {"0": ["▁█▅", "0.500", "1.000", "+0.500"]}
    assert list(rows_of(once(tmp_path, "--filter", "1*", "--filter", "2"))) == ["2", "10"]
    assert "no alpha of such a layer: there are 0, 2, 10" in " ".join(once(tmp_path, "--filter", "x").split())
    assert rows_of(once(tmp_path / "metrics.csv")) == rows_of(shown)


def test_lightnings_own_folders(tmp_path: Path) -> None:
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "metrics.csv").write_text(HEADER + LINES[0])
    assert "epoch 0, step 0" in once(tmp_path)
    assert "layer" in once(tmp_path), "the heading is longer than the names"


def test_in_order_of_depth_once_a_checkpoint_tells_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(HEADER + LINES[0])
    assert list(rows_of(once(tmp_path))) == ["0", "2", "10"]
    state = {"options": {}, "ratios": {"10": 1.0, "0": 1.0}, "report": {}}
    torch.save({"callbacks": {"FARMSTempBalance": {"balancer": state}}}, tmp_path / "last.ckpt")
    assert list(rows_of(once(tmp_path))) == ["10", "0", "2"]
    (tmp_path / "last.ckpt").write_bytes(b"half")
    assert list(rows_of(once(tmp_path))) == ["0", "2", "10"]


@pytest.mark.parametrize(
    "state", [None, [1], {"ratios": 3}, {"report": [1]}, {"report": {"a": 3}}, {"options": ()}]
)
def test_a_damaged_state_hides_no_curve(tmp_path: Path, state: Any) -> None:
    (tmp_path / "metrics.csv").write_text(HEADER + LINES[0])
    torch.save({"callbacks": {"FARMSTempBalance": {"balancer": state}}}, tmp_path / "last.ckpt")
    assert list(rows_of(once(tmp_path))) == ["0", "2", "10"]


def test_nothing_there_yet(tmp_path: Path) -> None:
    assert "no alpha yet" in words(once(tmp_path))
    assert "later: not there yet" in words(once(tmp_path / "later"))
    (tmp_path / "metrics.csv").write_text("")
    assert "no alpha yet" in words(once(tmp_path))
    (tmp_path / "metrics.csv").write_text("epoch,loss,step\n0,0.3,4\n")
    assert "no alpha yet" in words(once(tmp_path))


@pytest.mark.parametrize("quantity", ["alpha", "ratio"])
def test_a_file_cut_anywhere(quantity: Any, tmp_path: Path) -> None:
    """A run may be caught after any byte: what is shown are measurements that were written, or nothing."""
    whole = HEADER + "".join(LINES)
    console = Console(width=80, height=24)
    written = {f"{float(cell):.3f}" for line in LINES for cell in line.split(",")[1:5] if cell}
    for length in range(len(whole) + 1):
        (tmp_path / "metrics.csv").write_bytes(whole.encode()[:length])
        with console.capture() as capture:
            console.print(view(Shown(tmp_path, quantity), console, crop=True))
        rows = rows_of(capture.get())
        assert {cell for cells in rows.values() for cell in cells[1:3]} <= written
        assert len(rows) == 0 or length > len(HEADER + LINES[0]) - 1


def test_many_layers_and_measurements_fit_the_terminal(tmp_path: Path) -> None:
    names = [f"model.layers.{number}.self_attn.a_very_long_name.q_proj" for number in range(40)]
    rows = [f"{epoch},{','.join(str(2 + epoch / 300) for _ in names)},{epoch}\n" for epoch in range(300)]
    (tmp_path / "metrics.csv").write_text(
        f"epoch,{','.join(f'farms/alpha/{n}' for n in names)},step\n{''.join(rows)}"
    )
    for width, height in ((80, 24), (120, 30)):
        console = Console(width=width, height=height)
        with console.capture() as capture:
            console.print(view(Shown(tmp_path, "alpha"), console, crop=True))
        shown = capture.get().splitlines()
        assert len(shown) < height
        assert max(map(len, shown)) <= width
        assert "2.000  2.997  +0.997" in capture.get()
        assert "more layers: choose by --filter" in shown[-1]
    assert len(rows_of(once(tmp_path))) == 40


@pytest.mark.parametrize("levels", ["▁▂▃▄▅▆▇█", "_.-~=+*#"])
def test_sparklines(levels: str) -> None:
    assert sparkline([3.0], 3.0, 3.0, 10, levels) == levels[0]
    rising = sparkline([float(n) for n in range(1000)], 0, 999, 8, levels)
    assert rising == levels
    assert len(sparkline([1.0] * 7, 0, 1, 10, levels)) == 7


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *arguments: str, columns: int = 80, lines: int = 24) -> None:
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "farms_tb.cli", *arguments],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment,
            start_new_session=True,
        )
        os.close(follower)
        self.output = b""
        self._leader = leader
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while piece := os.read(self._leader, 65536):
                self.output += piece
        except OSError:
            pass  # Linux says so where a terminal has been left

    def wait_for(self, words: str, seconds: float = 100) -> None:
        self._until(lambda: words in self.text, seconds, words)

    def _until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what!r} in {self.text[-2000:]!r}"
            time.sleep(0.02)

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.output.decode(errors="replace"))

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.close()

    def close(self) -> int:
        try:
            return self.process.wait(150)
        finally:
            self.process.kill()
            self._reader.join()
            os.close(self._leader)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str, **size: int) -> Terminal:
        opened.append(Terminal(*arguments, **size))
        return opened[-1]

    yield start
    for each in opened:
        if each.process.poll() is None:
            each.process.kill()
            each.close()


def test_in_a_terminal_from_nothing_to_the_end(tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    folder = tmp_path / "run"
    shown = terminal("watch", str(folder), "--every", "0.1", columns=250)
    shown.wait_for("run: not there yet")
    assert b"\x1b[?1049h" in shown.output  # a screen of its own, as pagers have
    folder.mkdir()
    with (folder / "metrics.csv").open("w") as file:
        file.write(HEADER + LINES[0])
        file.flush()
        shown.wait_for("epoch 0, step 0")
        file.write(LINES[2][:-3])
        file.flush()
        time.sleep(0.3)
        assert "step 8" not in shown.text
        file.write(LINES[2][-3:])
        file.flush()
        shown.wait_for("epoch 1, step 8")
    assert shown.interrupt() == 0
    left = shown.output.rpartition(b"\x1b[?1049l")[2].decode()
    assert "epoch 1, step 8" in left  # the last state stays on the terminal
    assert "Traceback" not in shown.text


def test_interrupting_analyze_in_a_terminal(terminal: Callable[..., Terminal]) -> None:
    """The bar goes to the terminal, and Ctrl-C leaves the table of what was measured."""
    shown = terminal("analyze", SLOW)
    shown.wait_for("1/41")
    assert shown.interrupt() == 130
    assert "Not all layers were measured: interrupted at " in shown.text
    assert re.search(r"\n0 +(1x64x64 +)?2\.\d\d\d ", shown.text)


def test_interrupting_what_writes_a_file(tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    """What was measured is kept, under a name that says that it is not all."""
    shown = terminal("analyze", SLOW, "-o", str(tmp_path / "a.json"))
    shown.wait_for("1/41")
    assert shown.interrupt() == 130
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial.json"]
    written = json.loads((tmp_path / "a.partial.json").read_text())
    assert written["complete"] is False
    assert 1 <= len(written["layers"]) < 41


def test_interrupting_compare(terminal: Callable[..., Terminal]) -> None:
    shown = terminal("compare", SLOW, SLOW)
    shown.wait_for("1/41")
    assert shown.interrupt() == 130
    assert "nothing to compare yet" in shown.text


SLOW = "tests.cli.test_cli_watch:slow"


def slow() -> Any:
    """The first layer takes no time, the others far longer than the test waits."""
    from torch import nn

    return nn.Sequential(nn.Linear(64, 64), *(nn.Linear(1200, 1200) for _ in range(40)))
