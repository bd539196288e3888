"""Errors of the trainers' room that no other test of it reaches."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("wandb_workspaces")

import wandb

from farms_tb.training.wandb_workspace import main


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what wandb_workspaces says of its use of pydantic
def test_a_run_of_wandb_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an account nothing is asked of the network."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    try:
        with pytest.raises(SystemExit):
            main(["team/project/run"])
    finally:
        wandb.teardown()  # it would keep the environment of this test
    assert "can't read the run team/project/run" in capsys.readouterr().err
