"""Sweeps on a Ray cluster that is started on this machine, and the job script that starts one under SLURM."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.study.records import read_records
from tests.recipes.recipe_runs import TINY_STUDY
from tests.recipes.test_recipe_engine import ROOT, Nodes, free_port, kill_tree, wait_for_nodes

TINY = (
    *("experiment=digits_resnet18", "debug=one_batch", "trainer=cpu", "model.net.width=4", "threads=1"),
    *("data.train_size=64", "data.val_size=20", "data.test_size=20", "logger=csv", "~callbacks.pictures"),
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A node of one core, started in another folder than the sweeps."""
    pytest.importorskip("ray")
    pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    nodes = Nodes(tmp_path_factory.mktemp("node"))
    try:
        nodes.start_head()
        wait_for_nodes(nodes, 1)
        yield nodes
    finally:
        nodes.stop()


def sweep(folder: Path, address: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run a sweep from the command line, with its output folder given as a path relative to the current folder."""
    command = [sys.executable, "-m", "recipes.train", *TINY, *overrides]
    return subprocess.run(
        [*command, f"paths.output_dir={os.path.relpath(folder, ROOT)}", f"paths.data_dir={folder}/data"],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def results(folder: Path) -> dict[int, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Return each seed's summary, without times and paths, and the best weights."""
    found = {}
    for file in folder.glob("digits_resnet18/*/summary.json"):
        summary = json.loads(file.read_text(encoding="utf-8"))
        for name in ("seconds", "best_checkpoint"):
            del summary[name]
        checkpoint = torch.load(file.parent / "checkpoints/best.ckpt", weights_only=True)
        found[summary["seed"]] = (summary, checkpoint["state_dict"])
    return found


@pytest.mark.cluster
def test_a_sweep_gives_what_it_gives_without_ray(cluster: Nodes, tmp_path: Path) -> None:
    seeds = ("sweep=seeds", "seeds='1,2'")
    done = sweep(tmp_path / "ray", cluster.address, *seeds, "hydra/launcher=ray")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ConfigStore schema" not in done.stderr
    plain = sweep(tmp_path / "basic", "", *seeds)
    assert plain.returncode == 0, plain.stdout + plain.stderr
    found, expected = results(tmp_path / "ray"), results(tmp_path / "basic")
    assert found.keys() == expected.keys() == {1, 2}
    for seed, (summary, weights) in expected.items():
        assert found[seed][0] == summary
        torch.testing.assert_close(found[seed][1], weights, rtol=0, atol=0)


@pytest.mark.cluster
def test_a_run_that_fails_is_named(cluster: Nodes, tmp_path: Path) -> None:
    """By its overrides; the run after it is done all the same."""
    failed = sweep(
        tmp_path, cluster.address, "hydra.mode=MULTIRUN", "balancing.lr_min_ratio=3,0.5", "hydra/launcher=ray"
    )
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "job with overrides: [" in failed.stderr
    assert "'balancing.lr_min_ratio=3'" in failed.stderr
    assert "error: balancing: " in failed.stderr
    assert "Traceback" not in failed.stderr
    assert results(tmp_path).keys() == {43}


@pytest.mark.cluster
def test_no_cluster(cluster: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_NUM_REDIS_GET_RETRIES", "1")  # Ray would try for minutes
    failed = sweep(tmp_path, "127.0.0.1:1", "sweep=seeds", "hydra/launcher=ray")
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "error: Failed to connect to Ray cluster" in failed.stderr


SRUN = """#!/bin/bash
# Starts a node of one core on this machine, whichever SLURM would take.
while [[ $1 == --* ]]; do shift; done
small=(--num-gpus=0 --object-store-memory=80000000 --node-ip-address=127.0.0.1)
[[ $* == *--head* ]] && small+=(--include-dashboard=false)
echo $$ >> "$(dirname "$0")/pids"
exec "$@" "${small[@]}"
"""
SCONTROL = """#!/bin/bash
[[ $* == "show hostnames node[1-2]" ]] && printf '127.0.0.1\\nnode2\\n'
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Path]:
    """A folder with stand-ins for two commands of SLURM; the nodes that they start are killed at the end."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "pids").touch()
    yield tmp_path
    for pid in (tmp_path / "pids").read_text(encoding="utf-8").split():
        kill_tree(int(pid))


def job_script() -> str:
    """Return the script of the documentation that starts Ray in a SLURM job."""
    page = (ROOT / "docs/machines.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH .*?)```", page, re.DOTALL)
    return str(script)


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_job_script_runs_a_study_on_all_nodes(slurm: Path) -> None:
    pytest.importorskip("ray")
    settings = [
        *TINY_STUDY,
        'study.arms=["off"]',
        "study.seeds=2",
        "study.grid=[1]",
        f"study.folder={slurm}/study",
    ]
    script = job_script().replace("6379", str(free_port())).replace("study=small", shlex.join(settings))
    script += "until ray status | tee /dev/stderr | grep -q '/2.0 CPU'; do sleep 2; done\n"
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "1"}
    environment = {**os.environ, **job, "PATH": f"{slurm}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (slurm / "log").open("w", encoding="utf-8") as log:  # a pipe would stay open as long as the nodes live
        command = ["bash", "-eu", "-c", script]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
    assert done.returncode == 0, (slurm / "log").read_text(encoding="utf-8")
    assert sorted(job.seed for job in read_records(slurm / "study/digits_resnet18")) == [1, 2]
