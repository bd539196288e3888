"""Each test starts from one seed, with nothing warned about yet."""

import pytest
import torch
from hypothesis import settings

from farms_tb import warning

torch.set_num_threads(1)
# Property tests draw the same examples everywhere, those of every night others.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("nightly", max_examples=10_000, deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    warning._said.clear()
