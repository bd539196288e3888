"""Which solver is chosen on a GPU, looked at without one."""

import time
from pathlib import Path

import pytest
import torch

from farms_tb.spectra import solvers

GPU = torch.device("xpu")  # of which nobody asks the name


@pytest.fixture(autouse=True)
def trials(monkeypatch, tmp_path):
    """Sizes that were tried; the CPU is the fastest."""
    trials = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    new_process()
    monkeypatch.setattr(solvers, "_fastest", lambda device, dtype, size, threads: trials.append(size) or "cpu")
    yield trials
    new_process()


def choose(size, dtype=torch.float32, threads=2):
    return solvers.fastest_solver(GPU, dtype, size, threads)


def only_file():
    (file,) = solvers.cache_folder().iterdir()
    return file


def new_process():
    """Forget what is kept in memory."""
    solvers._choice.cache_clear()


def test_each_size_is_tried_once(trials):
    assert {choose(size) for size in (5, 16, 17, 30, 512, 512)} == {"cpu"}
    choose(512, torch.float64)
    assert trials == [16, 32, 512, 512]


def test_choices_outlast_the_process(trials, monkeypatch):
    choose(100)
    new_process()
    monkeypatch.setattr(solvers, "_fastest", lambda *_: "torch")
    assert choose(100) == "cpu"
    assert choose(200) == "torch"
    new_process()
    assert (choose(100), choose(200)) == ("cpu", "torch")


def test_another_version_is_tried_anew(trials, monkeypatch):
    choose(100)
    new_process()
    monkeypatch.setattr(torch, "__version__", "99.0")
    choose(100)
    assert trials == [128, 128]


@pytest.mark.parametrize("content", ["", "[1]", "abacus", "\x00"])
def test_a_broken_file_or_a_solver_that_is_gone_is_written_anew(trials, content):
    choose(100)
    only_file().write_text(content)
    new_process()
    assert choose(100) == "cpu"
    assert trials == [128, 128]
    assert only_file().read_text() == "cpu"


def test_another_number_of_threads_is_tried_anew(trials):
    assert {choose(100, threads=threads) for threads in (1, 8, 8)} == {"cpu"}
    assert trials == [128, 128]


def test_of_processes_that_try_at_once_the_first_decides(monkeypatch):
    def slower(*where):
        new_process()
        monkeypatch.setattr(solvers, "_fastest", lambda *where: "torch")
        assert choose(100) == "torch"  # what another process does meanwhile
        new_process()
        return "cpu"

    monkeypatch.setattr(solvers, "_fastest", slower)
    assert choose(100) == "torch"
    new_process()
    assert choose(100) == "torch"


def test_no_file_can_be_written(trials, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert (choose(100), choose(100)) == ("cpu", "cpu")
    assert trials == [128]


def test_there_is_no_home(trials, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert (choose(100), choose(100)) == ("cpu", "cpu")
    assert trials == [128]


def test_the_default_place(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert solvers.cache_folder() == Path.home() / ".cache" / "farms_tb" / "solvers"


class TestTrial:
    @pytest.fixture(autouse=True)
    def _real(self, trials, monkeypatch):
        monkeypatch.undo()

    def test_the_fastest_of_those_that_work(self, monkeypatch):
        def slow(matrices, threads):
            time.sleep(0.02)
            return torch.linalg.eigvalsh(matrices)

        def broken(matrices, threads):
            raise RuntimeError("no such library")

        monkeypatch.setattr(solvers, "SOLVERS", {"torch": slow, "cupy": broken, "cpu": solvers._torch})
        for dtype in (torch.float32, torch.float64, torch.complex64):
            assert solvers._fastest(torch.device("cpu"), dtype, 16, 1) == "cpu"

    def test_the_cpu_may_use_the_threads_that_it_will_have(self, monkeypatch):
        seen = []

        def solve(matrices, threads):
            seen.append(threads)
            return torch.linalg.eigvalsh(matrices)

        monkeypatch.setattr(solvers, "SOLVERS", {"cpu": solve})
        solvers._fastest(torch.device("cpu"), torch.float32, 16, 7)
        assert set(seen) == {7}

    def test_none_works(self, monkeypatch):
        # The error is then raised where the model's own matrices are solved.
        monkeypatch.setattr(solvers, "SOLVERS", {"cupy": lambda matrices, threads: matrices.nothing})
        assert solvers._fastest(torch.device("cpu"), torch.float32, 16, 1) == "torch"


def test_on_the_cpu_in_parts(monkeypatch):
    half = torch.randn(50, 20, 20)
    matrices = half @ half.mT
    whole = solvers._cpu(matrices)
    monkeypatch.setattr(solvers, "_CPU_WORK", 3 * 20**3)
    assert torch.equal(solvers._cpu(matrices), whole)
    assert torch.equal(solvers.SOLVERS["torch"](matrices, 1), whole)
