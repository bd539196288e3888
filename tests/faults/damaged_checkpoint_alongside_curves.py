"""A damaged state of the callback in a checkpoint must not hide the curves of its run folder.

The curves are in metrics.csv, the state only adds to them. Right: `farms-tb report` and `watch` exit with 0,
whatever is in place of the report, the ratios or the options. Second inputs: the same in `plot`, a state that
is no dict at all, and a number in summary.json that no float can hold.
"""

import tempfile
from pathlib import Path

import torch
from typer.testing import CliRunner

from farms_tb.cli.app import app

SOUND = {"version": 2, "options": {"esd": "farms"}, "ratios": {"a": 1.0}, "report": {}}
DAMAGES = {
    "report is a list": {**SOUND, "report": [1]},
    "record is a number": {**SOUND, "report": {"a": 3}},
    "ratios are a number": {**SOUND, "ratios": 3},
    "options are a tuple": {**SOUND, "options": ()},
    "permutation null is text": {**SOUND, "report": {"a": {"null_mean": "x", "null_std": "y"}}},
    "permutation null has no spread": {**SOUND, "report": {"a": {"null_mean": 2.0, "null_std": 0.0}}},
    "state is a list": [1, 2],
    "state is None": None,
}
COMMANDS = (["report"], ["watch", "--once"], ["plot"])


def check(case: str, folder: Path, commands: tuple[list[str], ...]) -> None:
    for command, *flags in commands:
        result = CliRunner().invoke(app, [command, str(folder), *flags])
        assert result.exit_code == 0, f"{case}, {command}: {result.exception!r} {result.output}"


def run_folder(state: object, parent: str) -> Path:
    folder = Path(tempfile.mkdtemp(dir=parent))
    (folder / "metrics.csv").write_text("epoch,step,farms/alpha/a\n0,0,2\n1,1,2\n")
    checkpoint = {
        "epoch": 1,
        "global_step": 1,
        "state_dict": {"a.weight": torch.randn(20, 20)},
        "callbacks": {"FARMSTempBalance": {"balancer": state}},
    }
    torch.save(checkpoint, folder / "last.ckpt")
    return folder


with tempfile.TemporaryDirectory() as parent:
    for number, (case, state) in enumerate(DAMAGES.items()):
        # Pictures take the longest, and are drawn for two of the damages alone.
        check(case, run_folder(state, parent), COMMANDS if number in (0, 6) else COMMANDS[:2])
    folder = run_folder(SOUND, parent)
    (folder / "summary.json").write_text('{"test": {"score": 1' + "0" * 400 + "}}")
    check("a number beyond floats in summary.json", folder, COMMANDS[:2])
