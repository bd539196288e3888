"""Real processes that train one model: the same ratios on all of them, and none left waiting."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from farms_tb import analyze
from tests import distributed_runs
from tests.children import start
from tests.helpers import Module, assert_same_state, make_net

SECONDS = 120


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def run(job: str, folder: Path, number: int = 2) -> tuple[list[int | None], list[str]]:
    """Run `job` on several processes; return their exit codes and what they said."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(number)}
    said = [folder / f"{rank}.txt" for rank in range(number)]
    processes = [
        start(
            distributed_runs.work,
            (job, rank, folder),
            {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            said[rank],
            fresh=job == "loop",
        )
        for rank in range(number)
    ]
    try:
        for process in processes:
            process.join(SECONDS)
        return [process.exitcode for process in processes], [file.read_text(encoding="utf-8") for file in said]
    finally:
        for process in processes:
            process.kill()


def results(job: str, folder: Path, number: int = 2) -> list[Any]:
    codes, said = run(job, folder, number)
    assert codes == [0] * number, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(number)]


def check_loop(found: dict[str, Any]) -> None:
    """Shared among processes, the measurement is bitwise identical to that of one process."""
    assert all(shared == alone for shared, alone in found["ratios"])
    assert len({str(shared) for shared, _ in found["ratios"]}) == 3
    net = make_net()
    net.load_state_dict(found["weights"])
    assert analyze(net).alphas == found["alphas"]


def check_sharded(found: dict[str, Any]) -> None:
    """Weights that lie in parts on several processes are measured and stepped as the whole model is."""
    assert all(sharded == whole for sharded, whole in found["ratios"])
    assert {0.5, 1.5} <= set(found["ratios"][-1][0].values())
    assert len(found["nulls"][0]) == 5
    assert found["nulls"][0] == found["nulls"][1]
    for sharded, whole in zip(found["sharded"], found["whole"], strict=True):
        torch.testing.assert_close(sharded, whole)


def test_plain_loop_under_ddp(tmp_path: Path) -> None:
    first, second = results("loop", tmp_path)
    assert_same_state(first, second)
    check_loop(first)


needs_fsdp2 = pytest.mark.skipif(torch.__version__ < "2.7", reason="FSDP2 of torch 2.6 needs a GPU")


@needs_fsdp2
def test_fsdp2(tmp_path: Path) -> None:
    first, second = results("sharded", tmp_path)
    assert_same_state(first, second)
    check_sharded(first)


@needs_fsdp2
def test_fsdp2_with_adapters(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    first, second = results("sharded adapters", tmp_path)
    assert_same_state(first, second)
    check_sharded(first)
    assert not any("lora" in name for name in first["ratios"][0][0])


@needs_fsdp2
def test_four_processes(tmp_path: Path) -> None:
    first, *others = results("loop and sharded", tmp_path, 4)
    for other in others:
        assert_same_state(first, other)
    check_loop(first["loop"])
    check_sharded(first["sharded"])


def test_lightning_ddp(tmp_path: Path) -> None:
    first, second = results("lightning", tmp_path)
    assert first["rows"], "rank zero logs"
    assert not second["rows"], "the others don't"
    first.pop("rows"), second.pop("rows")
    assert_same_state(first, second)
    module = Module()
    module.load_state_dict(first["weights"])
    assert analyze(module).alphas == first["alphas"]
    assert {0.5, 1.5} <= set(first["ratios"].values())


@pytest.mark.parametrize("job", ["loop that breaks", "lightning that breaks"])
def test_failure_on_one_process_stops_both(job: str, tmp_path: Path) -> None:
    codes, (first, second) = run(job, tmp_path)
    # Not always 1: gloo may abort a process that ends while the other one is gone already.
    assert all(codes), first + second
    assert "measuring the layers failed on 1 of 2 ranks, elsewhere: see the output of other ranks" in first
    assert "measuring the layers failed on 1 of 2 ranks, on this rank 1: planned failure" in second
