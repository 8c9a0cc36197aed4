"""Horovod's collectives on a process set."""

from __future__ import annotations

import time

import horovod.torch as hvd
from torch import Tensor

from hvd_qgenx.transports import Pending, Transport

_POLL_SECONDS = 1e-4


def start() -> int:
    """Connects this process with the others, unless it is; returns its rank among all."""
    hvd.init()
    return hvd.rank()


class _Handle(Pending):
    """A handle of Horovod's; its own wait spins, and takes the core that a slower rank needs to arrive."""

    def __init__(self, handle: int):
        self.handle = handle

    def done(self) -> bool:
        return hvd.poll(self.handle)

    def wait(self) -> Tensor:
        while not self.done():
            time.sleep(_POLL_SECONDS)
        result = hvd.synchronize(self.handle)
        return result[0] if isinstance(result, tuple) else result  # alltoall adds the lengths


class HorovodTransport(Transport):
    """The ranks of a process set; None is all of them."""

    def __init__(self, process_set=None):
        self.process_set = hvd.global_process_set if process_set is None else process_set

    @property
    def size(self) -> int:
        return self.process_set.size() if self.included else 1

    @property
    def rank(self) -> int:
        return self.process_set.rank()

    @property
    def global_rank(self) -> int:
        return hvd.rank()

    @property
    def included(self) -> bool:
        return self.process_set.included()

    def check_started(self) -> None:
        if not hvd.is_initialized():
            raise RuntimeError("Horovod is not initialized: call horovod.torch.init() first")

    def allgather(self, message: Tensor, name: str) -> Pending:
        return _Handle(hvd.allgather_async(message, name=name, process_set=self.process_set))

    def alltoall(self, messages: Tensor, splits: Tensor, name: str) -> Pending:
        return _Handle(hvd.alltoall_async(messages, splits, name=name, process_set=self.process_set))

    def allreduce(self, vector: Tensor, name: str, mean: bool, predivide: float = 1.0) -> Pending:
        handle = hvd.allreduce_async_(
            vector,
            name=name,
            op=hvd.Average if mean else hvd.Sum,
            prescale_factor=1.0 / predivide,
            postscale_factor=predivide,
            process_set=self.process_set,
        )
        return _Handle(handle)
