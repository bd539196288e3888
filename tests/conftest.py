"""Each test starts from one seed, with nothing warned about yet."""

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from farms_tb import warnings as warning
from recipes.real.files import missing

torch.set_num_threads(1)
# A shell starts commands in the background deaf to Ctrl-C, and what the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Property tests draw the same examples everywhere, those of every night others.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("nightly", max_examples=10_000, deadline=None, print_blob=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(config, items):
    """Leave what takes minutes to `make test-nightly`, and what needs real models to where there are some."""
    if config.getoption("--hypothesis-profile") != "nightly":
        skip(items, "nightly", "takes minutes: make test-nightly")
    absent = missing()
    if absent:
        skip(items, "real", f"needs real models: make real ({len(absent)} files are missing, such as {absent[0]})")


def skip(items, marker, reason):
    """Skip the tests of a marker."""
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    warning._said.clear()


@pytest.fixture(autouse=True, scope="session")
def nothing_is_left():
    """Tests write into folders of their own, and not where Lightning writes when it is told no folder."""
    before = left_by_lightning()
    yield
    assert left_by_lightning() == before


def left_by_lightning():
    """Return what is in the folders that Lightning makes in the working directory."""
    return [path for name in ("checkpoints", "lightning_logs") for path in sorted(Path(name).glob("**/*"))]
