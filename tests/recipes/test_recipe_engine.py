"""Engines: tasks that succeed, fail and die, on this machine and on a Ray cluster of two nodes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from recipes.engine import Engine, LocalEngine, Outcome, RayEngine
from recipes.errors import RecipeError
from recipes.study.records import Job, Record, read_records
from tests.recipes.recipe_runs import TINY_STUDY

ROOT = Path(__file__).parents[2]


def work(argument: Any) -> Any:
    """Do what a test asks for, in another process."""
    match argument:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            sys.exit("told to")
        case "pid":
            return os.getpid()
        case "sleep":
            time.sleep(600)
        case "gpu":
            return os.environ.get("CUDA_VISIBLE_DEVICES")
        case int():
            return argument**2
    raise RecipeError(f"cannot do {argument}")


def outcomes(engine: Engine, *arguments: Any) -> dict[Any, Outcome]:
    """Run tasks named by their arguments, at most as many at a time as there are slots."""
    waiting = list(arguments)
    found: dict[Any, Outcome] = {}
    while waiting or engine.tasks:
        while waiting and len(engine.tasks) < engine.slots:
            argument = waiting.pop(0)
            engine.submit(argument, work, argument)
        for outcome in engine.finished(timeout=5.0):
            found[outcome.task] = outcome
    return found


def check(engine: Engine) -> None:
    found = outcomes(engine, 2, "die", 3, "other", 4)
    assert [found[task].result for task in (2, 3, 4)] == [4, 9, 16]
    assert found["die"].died
    assert "died" in found["die"].failure
    assert not found["other"].died
    assert "cannot do other" in found["other"].failure


class TestLocal:
    def test_a_process_that_dies_costs_the_others_nothing(self) -> None:
        with LocalEngine(2) as engine:
            check(engine)

    def test_an_exit_in_a_task_is_a_death_of_its_process_alone(self) -> None:
        with LocalEngine(1) as engine:
            found = outcomes(engine, "exit", 3)
        assert found["exit"].died
        assert "told to" in found["exit"].failure
        assert found[3].result == 9

    def test_a_process_that_dies_between_two_tasks_is_replaced(self) -> None:
        with LocalEngine(1) as engine:
            first = outcomes(engine, "pid")["pid"].result
            process = psutil.Process(first)
            process.kill()
            while psutil.pid_exists(first):  # until its engine has noticed
                time.sleep(0.05)
            time.sleep(0.2)
            found = outcomes(engine, "pid")["pid"]
        assert not found.failure
        assert found.result != first

    def test_what_is_going_on_stops_with_the_engine(self) -> None:
        before = time.monotonic()
        with LocalEngine(1) as engine:
            engine.submit("long", work, "sleep")
            assert list(engine.finished(timeout=0.1)) == []
            assert engine.tasks == {"long"}
        assert time.monotonic() - before < 60
        assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]

    def test_gpus_are_dealt_out(self) -> None:
        with LocalEngine(2, gpus=["5", "7"]) as engine:
            engine.submit("a", work, "gpu")
            engine.submit("b", work, "gpu")
            found = []
            while engine.tasks:
                found += [outcome.result for outcome in engine.finished(timeout=5.0)]
        assert sorted(found) == ["5", "7"]

    def test_an_engine_that_has_done_its_work_leaves_no_words(self, tmp_path: Path) -> None:
        program = tmp_path / "program.py"
        program.write_text(
            "import multiprocessing\n"
            "from recipes.engine import LocalEngine\n"
            "def work(argument):\n"
            "    global lock  # as a progress bar's, which lives as long as its process\n"
            "    lock = multiprocessing.RLock()\n"
            "if __name__ == '__main__':\n"
            "    with LocalEngine(1) as engine:\n"
            "        engine.submit('a', work, None)\n"
            "        while engine.tasks:\n"
            "            list(engine.finished(timeout=5.0))\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, program], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def kill_tree(pid: int) -> None:
    """Kill a process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


class Nodes:
    """Ray's own processes, started as a user would on two machines.

    Args:
        folder: Where they are started; None for the current folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> None:
        ray = Path(sys.executable).with_name("ray")
        common = (
            "--num-cpus=1",
            "--num-gpus=0",
            "--block",
            "--disable-usage-stats",
            "--object-store-memory=80000000",
        )
        command = [str(ray), "start", *arguments, *common]
        self.processes.append(
            subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, "RAY_AUTH_MODE": "disabled"},  # whether or not this user's home holds a token
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    def start_head(self) -> None:
        port = self.address.rpartition(":")[2]
        self.start("--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false")

    def start_second(self) -> None:
        self.start(f"--address={self.address}", "--node-ip-address=127.0.0.1")

    def kill(self, place: int) -> None:
        """Kill a node as a power cut would."""
        kill_tree(self.processes[place].pid)
        self.processes[place].wait()

    def stop(self) -> None:
        """Kill all nodes that are left."""
        for place, process in enumerate(self.processes):
            if process.poll() is None:
                self.kill(place)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.stop()


def wait_for_nodes(nodes: Nodes, number: int) -> None:
    """Wait until so many nodes have joined."""
    ray = Path(sys.executable).with_name("ray")
    end = time.monotonic() + 120
    while True:
        command = [str(ray), "status", f"--address={nodes.address}"]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        if f"{number}.0 CPU" in told:
            return
        assert time.monotonic() < end, told
        time.sleep(0.5)


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore")
class TestRay:
    @pytest.fixture(autouse=True)
    def _ray(self) -> None:
        pytest.importorskip("ray")

    def test_tasks_that_fail_and_die(self, nodes: Nodes) -> None:
        nodes.start_head()
        wait_for_nodes(nodes, 1)
        with RayEngine(nodes.address) as engine:
            assert engine.slots == 1
            check(engine)

    def test_a_cluster_without_the_gpus_of_a_task(self, nodes: Nodes) -> None:
        nodes.start_head()
        wait_for_nodes(nodes, 1)
        with pytest.warns(UserWarning, match=r"no node of the cluster has the 0\.5 GPU"):
            RayEngine(nodes.address, gpus=0.5).__enter__().__exit__()

    def test_no_cluster(self) -> None:
        with (
            pytest.raises(RecipeError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 "),
            RayEngine("127.0.0.1:1"),
        ):
            pass

    @pytest.mark.timeout(900)
    def test_a_node_killed_in_mid_study_changes_no_result(self, nodes: Nodes, tmp_path: Path) -> None:
        nodes.start_head()
        wait_for_nodes(nodes, 1)
        nodes.start_second()
        wait_for_nodes(nodes, 2)

        def command(name: str, *more: str) -> list[str]:
            return [sys.executable, "-m", "recipes.study", *TINY_STUDY, f"study.folder={tmp_path / name}", *more]

        def results(name: str) -> dict[Job, Record]:
            return read_records(tmp_path / name / "digits_resnet18")

        ray = ("study.engine=ray", f"study.address={nodes.address}")
        study = subprocess.Popen(command("ray", *ray), cwd=ROOT, stdout=subprocess.DEVNULL)
        while len(results("ray")) < 2:
            assert study.poll() is None
            time.sleep(0.2)
        nodes.kill(1)
        assert study.wait() == 0
        subprocess.run(command("local", "study.workers=2"), cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        times = {"seconds": 0.0, "train_seconds": 0.0, "callback_seconds": 0.0}
        found, expected = (
            {job: replace(record, **times) for job, record in results(name).items()} for name in ("ray", "local")
        )
        assert found == expected
