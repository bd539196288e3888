"""Cells of metrics.csv that are no plain numbers must not end `farms-tb report`, `watch` or `plot`.

Right: they are passed over, or an error names the file. Second inputs: a step of 5,000 digits, a NUL, bytes
that are not UTF-8, two columns of one name, and a file with nothing but a head.
"""

import tempfile
from pathlib import Path

from typer.testing import CliRunner

from farms_tb.cli.app import app

HEAD = "epoch,step,farms/alpha/a,farms/ratio/a\n"
FILES = {
    "an infinite step": HEAD + "0,inf,2,1\n",
    "a cell of 200 kB": HEAD + "0,0,2," + "1" * 200_000 + "\n",
    "a layer named ²": "epoch,step,farms/alpha/²\n0,0,2\n",
    "NaN": HEAD + "0,0,2,1\n1,1,nan,1\n",
    "text": HEAD + "0,0,abc,1\n",
    "a step of 5,000 digits": HEAD + "0," + "9" * 5000 + ",2,1\n",
    "a NUL": HEAD + "0,0,2,\0\n1,1,2,1\n",
    "not UTF-8": HEAD.encode() + b"0,0,2,\xff\xfe\n1,1,2,1\n",
    "a name twice": "epoch,step,farms/alpha/a,farms/alpha/a\n0,0,2,3\n1,1,2,3\n",
    "a head alone": HEAD,
    "nothing": "",
    "an open quote": HEAD + '0,0,"2,1\n1,1,2,1\n',
}

for name, content in FILES.items():
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metrics.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        for command in (["report", folder], ["watch", folder, "--once"]):
            result = CliRunner().invoke(app, command)
            crashed = result.exception is not None and not isinstance(result.exception, SystemExit)
            assert not crashed, f"{name}, {command[0]}: {result.exception!r}"
            # The message may be wrapped at the width of the terminal.
            words = result.output.replace("\n", "")
            assert result.exit_code == 0 or "metrics.csv" in words or Path(folder).name in words, (name, words)
