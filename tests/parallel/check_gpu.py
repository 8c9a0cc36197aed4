"""Ranks with and without a GPU: rank 0 codes by the kernels of one, as the CPU runs them, the others by the core."""

import sys
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch
from ranks import loss, network, same_on_all_ranks

import hvd_qgenx
from hvd_qgenx import backends

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
from emulator import emulated


def _train(exchange, steps=3):
    model = network()
    optimizer = hvd_qgenx.DistributedOptimizer(
        hvd_qgenx.ExtraAdam(model.parameters(), lr=0.01),
        named_parameters=model.named_parameters(),
        compression=hvd_qgenx.Compression.qgenx(bits=4, adapt_at=(1,)),
        exchange=exchange,
    )
    for _ in range(steps):
        for half in (optimizer.extrapolation, optimizer.step):
            optimizer.zero_grad()
            loss(model).backward()
            half()
    return list(model.parameters()), optimizer.communication.squared_error


@pytest.mark.parametrize("exchange", ["allgather", "two_phase"])
def test_replicas_are_what_they_are_without_kernels(exchange, tmp_path):
    expected, error = _train(exchange)
    with backends.force(emulated(tmp_path) if hvd.rank() == 0 else backends.name()):
        found, measured = _train(exchange)
    assert same_on_all_ranks(found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert measured == error
