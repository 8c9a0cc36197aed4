"""Every rank runs the same tests in the same order, under horovodrun."""

import horovod.torch as hvd
import pytest
import torch

hvd.init()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1000 + hvd.rank())
