"""Work shared among threads."""

import multiprocessing
import os
import threading
import warnings

import pytest
import torch

from farms_tb import analyze
from farms_tb.spectra import eigenvalues as spectra
from farms_tb.spectra.eigenvalues import ROUTES, Wanted, window_eigenvalues
from farms_tb.spectra.workers import Task, map_on_threads, one_thread, work_on_threads


@pytest.fixture
def four_threads():
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


def threads_of_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def seen_by(items):
    def look(item):
        return item, torch.get_num_threads(), threading.get_ident()

    return map_on_threads(look, items)


@pytest.mark.parametrize("number", [0, 1, 2, 100])
def test_results_are_in_order_and_settings_are_put_back(four_threads, number):
    found = seen_by(range(number))
    assert [item for item, *_ in found] == list(range(number))
    assert {threads for _, threads, _ in found} <= {1}
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (4, 4)


def test_torch_is_held_to_one_thread_but_not_what_is_shared(four_threads):
    with one_thread():
        assert torch.get_num_threads() == 1
        for number in (1, 100):
            assert {threads for _, threads, _ in seen_by(range(number))} == {1}
        meeting = threading.Barrier(4)  # nobody passes alone
        map_on_threads(lambda _: meeting.wait(60), range(4))
        assert torch.get_num_threads() == 1
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (4, 4)


def test_one_thread_is_this_one():
    assert {thread for *_, thread in seen_by(range(9))} == {threading.get_ident()}


def test_sums_do_not_depend_on_the_number_of_threads(four_threads):
    # Long ones, which torch shares among threads, and which are not those of eigenvalues alone.
    layer = torch.nn.Linear(400, 300)
    reports = []
    for threads in (4, 3, 2, 1):
        torch.set_num_threads(threads)
        reports.append(analyze(layer, window=60, windows_per_dim=25, histogram=True))
    assert reports[0].layers["weight"].num_eigenvalues > 2**15
    assert all(report == reports[0] for report in reports)


@pytest.mark.parametrize("number", [1, 50])
def test_an_error_in_a_thread_is_raised(four_threads, number):
    def fail(item):
        raise RuntimeError("no convergence")

    with pytest.raises(RuntimeError, match="no convergence"):
        map_on_threads(fail, range(number))
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (4, 4)


@pytest.mark.parametrize("memory", [1, 10, 25])
def test_memory_is_shared(four_threads, memory):
    lock, held, together = threading.Lock(), [], []

    def work(size):
        with lock:
            held.append(size)
            together.append(list(held))
        torch.randn(200, 200).inverse()
        with lock:
            held.remove(size)

        return size, []

    sizes = [1, 10, 3, 25, 7, 7, 9] * 5
    done = work_on_threads(work, [Task(size, size) for size in sizes], memory)
    assert sorted(done) == sorted(sizes)
    # Whoever needs more than there is works alone.
    assert all(sum(held) <= memory or len(held) == 1 for held in together)
    assert memory == 1 or max(map(len, together)) > 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_that_was_forked_has_threads_of_its_own():
    """As a loader's workers are, after a measurement whose threads they do not inherit."""
    net = torch.nn.Conv2d(160, 160, 3)
    before = analyze(net, threads=3)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: forking beside threads
        worker = context.Process(target=lambda: sender.send(analyze(net, threads=3).alphas))
        worker.start()
    try:
        assert receiver.poll(60), "the forked process waits for threads that it does not have"
        assert receiver.recv() == before.alphas
    finally:
        worker.kill()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_tasks_that_follow(threads):
    """Each number is followed by the two below half of it; nobody goes home while more may come."""

    def work(number):
        torch.randn(50, 50).inverse()
        below = [number // 2, number // 2 - 1] if number > 3 else []
        return number, [Task(each, cost=each) for each in below]

    def slowly(number):
        return [number, *(slowly(number // 2) + slowly(number // 2 - 1) if number > 3 else [])]

    with one_thread(threads):
        done = work_on_threads(work, [Task(40, cost=40)], 0)
    assert sorted(done) == sorted(slowly(40))


def test_the_costliest_come_first():
    assert work_on_threads(lambda item: (item, []), [Task(n, cost=n) for n in (3, 9, 1, 9.5)], 0) == [9.5, 9, 3, 1]


def test_no_thread_for_little(four_threads):
    def where(_):
        torch.randn(50, 50).inverse()
        return threading.get_ident(), []

    tasks = [Task(number, cost=1) for number in range(20)]
    assert set(work_on_threads(where, tasks, 0, worth_a_thread=20)) == {threading.get_ident()}


def test_nothing_follows_a_failure():
    begun = []

    def fail(item):
        begun.append(item)
        raise RuntimeError("no convergence")

    with pytest.raises(RuntimeError, match="no convergence"):
        work_on_threads(fail, [Task(1), Task(2)], 0)
    assert begun == [1]


def test_nothing_follows_once_something_has_failed():
    failed, done = threading.Event(), []

    def work(item):
        if item == "fails":
            raise RuntimeError("no convergence")
        done.append(item)
        assert failed.wait(60)
        return item, [Task("follows"), Task("follows, too")]

    def fail_or_work(item):
        try:
            return work(item)
        finally:
            if item == "fails":
                threading.Timer(0.2, failed.set).start()

    with one_thread(2), pytest.raises(RuntimeError, match="no convergence"):
        work_on_threads(fail_or_work, [Task("slow", cost=2), Task("fails", cost=1)], 0)
    assert done == ["slow"]


def test_work_within_work(four_threads):
    def shared(number):
        return sum(map_on_threads(lambda item: item * number, range(5)))

    assert map_on_threads(shared, range(6)) == [10 * number for number in range(6)]


def test_two_at_the_same_time(four_threads):
    """Who has all helping threads waits for something else; the other does its work alone."""
    begun, release = threading.Barrier(4), threading.Event()

    def hold(_):
        begun.wait(60)
        assert release.wait(60)

    first = threading.Thread(target=lambda: _with_threads(3, lambda: map_on_threads(hold, range(3))))
    first.start()
    begun.wait(60)
    assert _with_threads(3, lambda: map_on_threads(str, range(9))) == [str(item) for item in range(9)]
    release.set()
    first.join(60)
    assert not first.is_alive()


def _with_threads(number, function):
    with one_thread(number):
        return function()


def test_measuring_in_inference_mode():
    net = torch.nn.Sequential(*(torch.nn.Conv2d(96, 96, 3) for _ in range(4)))
    expected = analyze(net, threads=1)
    with torch.inference_mode():
        assert analyze(net, threads=2).alphas == expected.alphas


def test_memory_that_is_kept():
    """Of pieces that are used again each thread keeps no more than its share."""
    scratch = spectra._Scratch(1000)
    small, large = scratch.take("gram", (10, 10), torch.float32), scratch.take("gram", (20, 20), torch.float32)
    assert small.data_ptr() == scratch.take("gram", (5, 5), torch.float32).data_ptr()
    assert large.data_ptr() != small.data_ptr()
    assert large.shape == (20, 20)


@pytest.mark.parametrize("route", ROUTES)
def test_threads_change_no_eigenvalue(four_threads, route, monkeypatch):
    monkeypatch.setattr(spectra, "_CHUNK_WORK", 3 * 20**2 * 532)
    wanted = [Wanted(torch.randn(number, 30, size), route) for number, size in ((50, 20), (3, 30), (7, 25))]
    shared = window_eigenvalues(wanted)
    torch.set_num_threads(1)
    for one, other in zip(window_eigenvalues(wanted), shared, strict=True):
        assert torch.equal(one.values, other.values)
