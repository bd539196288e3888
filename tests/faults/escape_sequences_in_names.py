"""Names in files must not reach the terminal with control characters.

A terminal obeys escape sequences: they set its title, clear it, write to the clipboard. Right: no output of
`farms-tb` holds ESC, BEL or a C1 control character of a name, neither on a terminal nor in CSV. Second inputs:
hyperlinks (OSC 8), the C1 controls that introduce a sequence in one character, and marks that turn the
direction of writing.
"""

import json
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

NAMES = {
    "title, clear, clipboard": "\x1b]0;pwned\x07\x1b[2J\x1b]52;c;cm0gLXJm\x07",
    "hyperlink, C1 CSI and OSC, direction": "\x1b]8;;http://x\x1b\\pwned\x1b]8;;\x1b\\\x9b2J\x9d0;pwned\x9c\u202e\r\b",
}
FORBIDDEN = {
    "an operating system command": b"\x1b]",
    "clear the screen": b"\x1b[2J",
    "BEL": b"\x07",
    "C1 CSI": "\x9b".encode(),
    "C1 OSC": "\x9d".encode(),
    "right-to-left override": "\u202e".encode(),
    "backspace": b"\b",
}


def on_a_terminal(*arguments: str) -> bytes:
    """Return what `farms-tb` writes to a terminal."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "farms_tb.cli", *arguments]
    process = subprocess.Popen(command, stdout=follower, stderr=follower, close_fds=True)
    os.close(follower)
    output = b""
    try:
        while chunk := os.read(leader, 65536):
            output += chunk
    except OSError:  # the end, on Linux
        pass
    process.wait()
    os.close(leader)
    return output


def piped(*arguments: str) -> bytes:
    result = subprocess.run([sys.executable, "-m", "farms_tb.cli", *arguments], capture_output=True, check=False)
    return result.stdout + result.stderr


def check(what: str, output: bytes) -> None:
    assert output, f"{what}: no output"
    found = [name for name, sequence in FORBIDDEN.items() if sequence in output]
    assert not found, f"{what} writes {found}: {output[-2000:]!r}"


with tempfile.TemporaryDirectory() as parent:
    folder = Path(parent)
    save_file({f"{name}.weight": torch.randn(20, 20) for name in NAMES.values()}, folder / "m.safetensors")
    index = {"weight_map": {str(i): f"{name}.safetensors" for i, name in enumerate(NAMES.values())}}
    (folder / "n.safetensors.index.json").write_text(json.dumps(index))
    run = folder / "run"
    run.mkdir()
    # A carriage return would end the line of the file.
    columns = [f"farms/alpha/{name}".replace("\r", "") for name in NAMES.values()]
    (run / "metrics.csv").write_text(
        f"epoch,step,{','.join(columns)}\n0,0,2.0,2.1\n1,1,2.1,2.2\n", encoding="utf-8"
    )
    file = str(folder / "m.safetensors")
    check("analyze", on_a_terminal("analyze", file))
    check("compare", on_a_terminal("compare", file, file))
    check("an error", on_a_terminal("analyze", str(folder / "n.safetensors.index.json")))
    check("watch", on_a_terminal("watch", str(run), "--once"))
    check("CSV", piped("analyze", file, "--format", "csv"))
