"""Every rank runs the same tests in the same order, under horovodrun."""

import gc

import horovod.torch as hvd
import pytest
import torch

hvd.init()
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def frozen():
    """Every optimizer that resembles another one collects garbage; what was imported never is any."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1000 + hvd.rank())
