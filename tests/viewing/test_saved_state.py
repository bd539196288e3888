"""Checkpoints whose state of the callback is damaged: what is affected is left out and said, the rest is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from farms_tb.spectra.permutation_null import PermutationNull
from farms_tb.viewing.page import write_page
from farms_tb.viewing.run_folder import RunFolder, read_run_folder
from farms_tb.viewing.saved_state import read_state

GOOD = {
    "version": 2,
    "options": {"esd": "farms"},
    "ratios": {"a": 1.0},
    "report": {"a": {"null_mean": 2.0, "null_std": 0.1}},
}


def run_with(folder: Path, **checkpoint: Any) -> RunFolder:
    (folder / "metrics.csv").write_text("epoch,step,farms/alpha/a\n0,0,2\n1,1,2\n")
    weights = {"a.weight": torch.randn(20, 20)}
    torch.save({"epoch": 0, "global_step": 1, "state_dict": weights, **checkpoint}, folder / "last.ckpt")
    return read_run_folder(folder)


def callbacks(state: Any) -> dict[str, Any]:
    return {"FARMSTempBalance": {"balancer": state}}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"report": [1]}, "report"),
        ({"report": {"a": 3}}, "report"),
        ({"report": {3: {}}}, "report"),
        ({"ratios": 3}, "ratios"),
        ({"options": ()}, "options"),
        ({"report": {"a": {"null_mean": "x", "null_std": "y"}}}, "permutation null"),
        ({"report": {"a": {"null_mean": 2.0, "null_std": 0.0}}}, "permutation null"),
        ({"report": {"a": {"null_mean": float("nan"), "null_std": 0.1}}}, "permutation null"),
        ({"report": {"a": {"null_mean": 2.0, "null_std": -1.0}}}, "permutation null"),
    ],
)
def test_damaged_parts(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    run = run_with(tmp_path, callbacks=callbacks({**GOOD, **change}))
    (sentence,) = run.missing
    assert "last.ckpt" in sentence
    assert part in sentence
    assert run.history.alpha["a"].values == (2.0, 2.0)
    assert run.farms is not None
    assert run.farms.layers["a"].alpha is not None
    assert write_page(run).exists()


@pytest.mark.parametrize("state", [[1], "x", 3, None])
def test_a_state_that_is_none(tmp_path: Path, state: Any) -> None:
    run = run_with(tmp_path, callbacks=callbacks(state))
    assert "balancer" in run.missing[0]
    assert run.farms is not None


def test_options_that_no_run_has(tmp_path: Path) -> None:
    """Their measurement would not be the run's: the checkpoint is passed over."""
    run = run_with(tmp_path, callbacks=callbacks({**GOOD, "options": {"fit": "best"}}))
    assert "fit must be one of" in run.missing[0]
    assert run.farms is None
    assert run.history.alpha


@pytest.mark.parametrize("when", [{"epoch": "x", "global_step": 1.5}, {"epoch": -1, "global_step": 2**80}])
def test_times_that_are_none(tmp_path: Path, when: dict[str, Any]) -> None:
    run = run_with(tmp_path, callbacks=callbacks(GOOD), **when)
    assert (run.weights_epoch, run.weights_step, run.weights) == (None, None, "last.ckpt")


def test_a_whole_state(tmp_path: Path) -> None:
    run = run_with(tmp_path, callbacks=callbacks(GOOD))
    state = read_state(tmp_path / "last.ckpt")
    assert (state.layers, state.epoch, state.step, state.damaged) == (("a",), 1, 1, ())
    assert state.nulls == {"a": PermutationNull(2.0, 0.1)}
    assert (run.weights_epoch, run.weights_step, run.missing) == (1, 1, ())
    assert run.farms is not None
    assert run.farms.layers["a"].null == (2.0, 0.1)


@pytest.mark.parametrize("odd", [None, float("nan"), "0.1", -0.1])
def test_a_null_without_a_sound_entropy_keeps_its_alpha(tmp_path: Path, odd: object) -> None:
    record = {**GOOD["report"]["a"], "null_draws": 8, "null_entropy_mean": 0.9, "null_entropy_std": odd}
    run_with(tmp_path, callbacks=callbacks({**GOOD, "report": {"a": record}}))
    assert read_state(tmp_path / "last.ckpt").nulls == {"a": PermutationNull(2.0, 0.1, 8)}
