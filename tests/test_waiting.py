"""Waiting for other ranks keeps nobody else of the process."""

import threading

import pytest
import torch

from hvd_qgenx.adaptation import Settings
from hvd_qgenx.exchange.coded import CodedExchange
from hvd_qgenx.exchange.rehearsal import Rehearsal
from hvd_qgenx.transports import Pending


class Late(Rehearsal):
    """The messages of other ranks arrive when they are let in."""

    def __init__(self, arrive: threading.Event):
        super().__init__(2)
        self.arrive, self.waits = arrive, threading.Event()

    def allgather(self, message, name, lane=0):
        return _Late(super().allgather(message, name, lane), self)

    def alltoall(self, messages, splits, name):
        return _Late(super().alltoall(messages, splits, name), self)


class _Late(Pending):
    def __init__(self, pending, transport):
        self.pending, self.transport = pending, transport

    def done(self):
        return True  # the wait itself is what lasts

    def wait(self):
        self.transport.waits.set()
        assert self.transport.arrive.wait(60)
        return self.pending.wait()


def _submitted(transport, plan):
    exchange = CodedExchange(Settings(bits=8, min_numel=1, bucket_size=64), transport, plan=plan)
    exchange.describe(["x"], [torch.float32], [256])
    flight = exchange.submit(exchange.fuse([torch.ones(256)]), "step")
    return lambda: exchange.collect(flight, ["x"])


@pytest.mark.parametrize("plan", ["allgather", "two_phase"])
def test_an_exchange_that_waits_keeps_no_other_threads_exchange_from_ending(plan):
    arrive, there = threading.Event(), threading.Event()
    there.set()
    late = Late(there)
    ends_late, ends = _submitted(late, plan), _submitted(Late(there), plan)
    late.arrive, late.waits = arrive, threading.Event()
    threads = [threading.Thread(target=end, daemon=True) for end in (ends_late, ends)]
    threads[0].start()
    assert late.waits.wait(60)
    threads[1].start()
    threads[1].join(60)
    try:
        assert not threads[1].is_alive() and threads[0].is_alive()
    finally:
        arrive.set()
        threads[0].join(60)
