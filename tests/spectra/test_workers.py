"""Work shared among threads that each run torch single-threaded."""

import multiprocessing
import os
import threading
import warnings

import pytest
import torch

from farms_tb import analyze
from farms_tb.spectra.workers import map_on_threads, single_threaded_torch


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

    with single_threaded_torch() as threads:
        return map_on_threads(look, items, threads)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("number", [0, 1, 2, 100])
def test_results_are_in_order_and_settings_are_put_back(number):
    found = seen_by(range(number))
    assert [item for item, *_ in found] == list(range(number))
    assert {threads for _, threads, _ in found} <= {1}
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (4, 4)


@pytest.mark.usefixtures("four_threads")
def test_as_many_threads_work_as_were_asked_for():
    with single_threaded_torch(3) as threads:
        assert (torch.get_num_threads(), threads) == (1, 3)
        meeting = threading.Barrier(3)  # nobody passes alone
        map_on_threads(lambda _: meeting.wait(60), range(3), threads)
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (4, 4)


def test_one_thread_is_the_callers():
    assert {thread for *_, thread in seen_by(range(9))} == {threading.get_ident()}


@pytest.mark.usefixtures("four_threads")
def test_reports_do_not_depend_on_the_number_of_threads():
    # Sums over so many eigenvalues that torch would share them among threads.
    net = torch.nn.ModuleList([torch.nn.Linear(400, 300), torch.nn.Conv2d(90, 100, 3), torch.nn.Conv2d(20, 9, 1)])
    reports = []
    for threads in (4, 3, 2, 1):
        torch.set_num_threads(threads)
        reports.append(analyze(net, window=60, windows_per_dim=25, histogram=True))
    assert reports[0].layers["0"].num_eigenvalues > 2**15
    assert all(report == reports[0] for report in reports)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("number", [1, 50])
def test_an_error_in_a_thread_is_raised_once_no_call_runs(number):
    running = []

    def fail(item):
        running.append(item)
        try:
            raise RuntimeError("no convergence")
        finally:
            running.remove(item)

    with single_threaded_torch() as threads, pytest.raises(RuntimeError, match="no convergence"):
        map_on_threads(fail, range(number), threads)
    assert not running
    assert (torch.get_num_threads(), threads_of_a_new_thread()) == (4, 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_threads_of_its_own():
    """As the workers of a data loader are, after a measurement whose threads they do not inherit."""
    net = torch.nn.ModuleList([torch.nn.Conv2d(160, 160, 3) for _ in range(3)])
    before = analyze(net, threads=3)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork next to threads
        worker = context.Process(target=lambda: sender.send(analyze(net, threads=3).alphas))
        worker.start()
    try:
        assert receiver.poll(60), "the forked process waits for threads that it does not have"
        assert receiver.recv() == before.alphas
    finally:
        worker.kill()


def test_two_users_at_the_same_time():
    net = torch.nn.ModuleList([torch.nn.Conv2d(96, 96, 3) for _ in range(4)])
    expected, found = analyze(net, threads=1).alphas, {}

    def measure(threads):
        found[threads] = analyze(net, threads=threads).alphas

    users = [threading.Thread(target=measure, args=(threads,)) for threads in (2, 3)]
    for user in users:
        user.start()
    for user in users:
        user.join(120)
    assert found == {2: expected, 3: expected}


def test_measuring_in_inference_mode():
    net = torch.nn.Sequential(*(torch.nn.Conv2d(96, 96, 3) for _ in range(4)))
    expected = analyze(net, threads=1)
    with torch.inference_mode():
        assert analyze(net, threads=2).alphas == expected.alphas
