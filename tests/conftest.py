"""Each test starts from one seed, with nothing warned about yet; property tests draw the same examples everywhere."""

import pytest
import torch
from hypothesis import settings

from farms_tb import warning

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    warning._said.clear()
