"""Every rank runs the same tests in the same order, under torchrun."""

import datetime
import os

import pytest
import torch
import torch.distributed as dist

# A hang is a failure: sooner than by default, and with a word about where.
if "RANK" in os.environ:  # torchrun's; pytest also looks in here when it collects all tests
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1000 + dist.get_rank())


@pytest.fixture(scope="session", autouse=True)
def together():
    """No rank leaves while another still waits for it."""
    yield
    dist.barrier()
    dist.destroy_process_group()
