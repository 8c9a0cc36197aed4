"""Fewer bytes are really handed to the collectives, counted where Horovod's extension is called."""

import horovod.torch as hvd
import pytest
import torch
from horovod.torch import mpi_ops

import hvd_qgenx
from hvd_qgenx import Compression

NUMEL = 100_000


class Meter:
    """Counts the bytes of every tensor given to Horovod's C functions."""

    def __init__(self, monkeypatch):
        self.bytes = 0
        for name in dir(mpi_ops.mpi_lib):
            if "_async_torch_" in name:
                monkeypatch.setattr(mpi_ops.mpi_lib, name, self._counting(getattr(mpi_ops.mpi_lib, name)))

    def _counting(self, function):
        def call(tensor, *arguments):
            inputs = tensor if isinstance(tensor, (list, tuple)) else [tensor]
            self.bytes += sum(t.numel() * t.element_size() for t in inputs)
            return function(tensor, *arguments)

        return call


def _parameter():
    return torch.nn.Parameter(torch.zeros(NUMEL))


@pytest.mark.parametrize(
    ("compression", "most_bits"),
    [
        (Compression.none, 32.02),
        (Compression.fp16, 16.02),
        (Compression.qgenx(bits=8, levels="uniform", coder="fixed", norm="linf"), 8.3),
        (Compression.qgenx(bits=4, levels="uniform", coder="fixed", norm="linf"), 4.3),
        (Compression.qgenx(bits=4), 3.8),
        (Compression.qgenx(bits=2, levels="uniform"), 1.3),
    ],
)
def test_the_wrapper_hands_over_no_more_bytes_than_it_says(monkeypatch, compression, most_bits):
    p = _parameter()
    optimizer = hvd_qgenx.DistributedOptimizer(torch.optim.SGD([p], lr=0.1), compression=compression)
    meter = Meter(monkeypatch)
    for _ in range(5):
        p.grad = torch.randn(NUMEL)
        optimizer.step()
    assert meter.bytes == optimizer.communication.bytes_sent
    last = optimizer.communication.bytes_sent
    p.grad = torch.randn(NUMEL)
    optimizer.step()
    # An exchange without agreement and fit; bounds are what 100,000 normal coordinates measured, plus 2 %.
    assert 8 * (optimizer.communication.bytes_sent - last) / NUMEL <= most_bits


def test_the_drop_in_hands_over_no_more_bytes_than_it_says(monkeypatch):
    p = _parameter()
    compressor = Compression.qgenx(bits=4)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p], lr=0.1), [("p", p)], compression=compressor)
    meter = Meter(monkeypatch)
    for _ in range(5):
        optimizer.zero_grad()
        (p * torch.randn(NUMEL)).sum().backward()
        optimizer.step()
    assert meter.bytes == compressor.communication.bytes_sent
    assert meter.bytes < 5 * 4 * NUMEL / 7
