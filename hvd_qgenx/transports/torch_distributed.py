"""torch.distributed's collectives on a process group: Gloo, or NCCL with its messages on the GPU.

Its allgather wants equal lengths, and its receivers must know what comes. So lengths are agreed: eight bytes of every
rank go before each message. A thread does that, in the order in which operations were started, so that starting one
waits for nobody.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from hvd_qgenx.transports import Patience, Pending, Transport
from hvd_qgenx.transports.waiting import seconds

BACKENDS = ("gloo", "nccl")
_GROUPS: Any = (dist.ProcessGroup, *([dist.ProcessGroupGloo] if dist.is_gloo_available() else []))
_MADE: Counter[str] = Counter()

Finish = Callable[[], Tensor]


class _Operation(Pending):
    """Something that the thread starts, in its turn; ``start`` then says how its result is waited for."""

    def __init__(self, start: Callable[[], tuple[dist.Work, Finish]], post: Callable[[_Operation], None]):
        self._start, self._post, self._is_started = start, post, threading.Event()
        self._is_posted = False
        self._work: dist.Work | None = None
        self._finish: Finish | None = None
        self._error: BaseException | None = None

    def begin(self) -> None:
        self._is_posted = True
        self._post(self)

    @property
    def begun(self) -> bool:
        return self._is_posted

    def run(self) -> None:
        """Starts it; on the thread."""
        try:
            self._work, self._finish = self._start()
        except BaseException as error:  # whatever it is, it belongs to the one that waits
            self._error = error
        del self._start
        self._is_started.set()

    def done(self) -> bool:
        return self._is_started.is_set() and (self._work is None or self._work.is_completed())

    def wait(self) -> Tensor:
        self._is_started.wait()
        if self._error:
            raise self._error
        assert self._work and self._finish
        self._work.wait()
        return self._finish()


class TorchTransport(Transport):
    """The ranks of a process group, or of what ``own_group`` made; None is all of them.

    All ranks must start operations in the same order: torch.distributed knows no names. It joins none, so lanes are all
    alike.

    Args:
        timeout: seconds after which a wait raises, see ``waiting.seconds``; torch's own timeout may come first.

    Raises:
        RuntimeError: if torch.distributed is not initialized.
        ValueError: if it is no group, or neither Gloo's nor NCCL's.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | dist.ProcessGroupGloo | None = None, timeout: float | None = None
    ):
        self.patience = Patience(seconds("timeout", timeout))
        check_initialized()
        group: Any = dist.group.WORLD if process_group is None else process_group
        self.process_group = group
        if not self.included and group is not dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"process_group must be a torch.distributed.ProcessGroup, got {process_group!r}")
        self._queue: queue.SimpleQueue[_Operation | None] | None = None
        self.device = _device(group) if self.included else torch.device("cpu")

    @property
    def size(self) -> int:
        return self.process_group.size() if self.included else 1

    @property
    def rank(self) -> int:
        return self.process_group.rank()

    @property
    def global_rank(self) -> int:
        return dist.get_rank()

    @property
    def members(self) -> list[int]:
        if not isinstance(self.process_group, dist.ProcessGroup):
            return super().members  # of what ``own_group`` made, torch does not know the ranks
        return dist.get_process_group_ranks(self.process_group)

    @property
    def included(self) -> bool:
        return isinstance(self.process_group, _GROUPS)

    def check_started(self) -> None:
        check_initialized()

    def allgather(self, message: Tensor, name: str, lane: int = 0) -> Pending:
        return _Operation(lambda: self._start_allgather(message), self._post)

    def alltoall(self, messages: Tensor, splits: Tensor, name: str) -> Pending:
        return _Operation(lambda: self._start_alltoall(messages, splits), self._post)

    def allreduce(self, vector: Tensor, name: str, mean: bool, predivide: float = 1.0) -> Pending:
        return _Operation(lambda: self._start_allreduce(vector, mean, predivide), self._post)

    # ---- what the thread does ----------------------------------------------------------------------------------------

    def _post(self, operation: _Operation) -> None:
        if self._queue is None:
            self._queue = queue.SimpleQueue()
            threading.Thread(target=_run, args=(self._queue,), name="hvd_qgenx.transport", daemon=True).start()
            weakref.finalize(self, self._queue.put, None)
        self._queue.put(operation)

    def _start_allgather(self, message: Tensor) -> tuple[dist.Work, Finish]:
        lengths = self._lengths(torch.tensor([len(message)], dtype=torch.int64, device="cpu"))
        longest = max(lengths)
        padded = message if len(message) == longest else torch.nn.functional.pad(message, (0, longest - len(message)))
        gathered = torch.empty(longest * self.size, dtype=torch.uint8, device=self.device)
        work = self.process_group._allgather_base(gathered, self._here(padded))
        return work, lambda: _unpadded(gathered, lengths).to(message.device)

    def _start_alltoall(self, messages: Tensor, splits: Tensor) -> tuple[dist.Work, Finish]:
        given = splits.tolist()
        coming = self._lengths(splits.to(torch.int64))[self.rank :: self.size]
        received = torch.empty(sum(coming), dtype=torch.uint8, device=self.device)
        work = self.process_group.alltoall_base(received, self._here(messages), coming, given)
        return work, lambda: received.to(messages.device)

    def _start_allreduce(self, vector: Tensor, mean: bool, predivide: float) -> tuple[dist.Work, Finish]:
        if predivide != 1.0:
            vector.mul_(1.0 / predivide)
        moved = self._here(vector)
        work = self.process_group.allreduce([moved])
        # One factor after the sum, and a product, not a quotient, as Horovod has it: so bits can be equal.
        after = predivide / self.size if mean else predivide

        def finish() -> Tensor:
            total = moved if after == 1.0 else moved.mul_(after)
            return total if moved is vector else vector.copy_(total)

        return work, finish

    def _lengths(self, own: Tensor) -> list[int]:
        """The numbers of all ranks, in rank order."""
        numbers = torch.empty(self.size * len(own), dtype=torch.int64, device=self.device)
        self.process_group._allgather_base(numbers, self._here(own)).wait()
        return numbers.tolist()

    def _here(self, tensor: Tensor) -> Tensor:
        """Where the backend wants it."""
        return tensor.to(self.device)


def is_world(process_group: object) -> bool:
    """Whether it is the group of all ranks."""
    return dist.is_available() and process_group is dist.group.WORLD


def check_initialized() -> None:
    """Raises RuntimeError, saying what to call first, unless ranks are connected."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("torch.distributed is not initialized: call torch.distributed.init_process_group() first")


def own_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroupGloo:
    """Gloo among the same ranks, with an order of operations of its own; to be called by all of them.

    ``torch.distributed.new_group`` would not do: all ranks of the job must call it equally often, those outside of
    ``process_group`` too, who know nothing of this.
    """
    check_initialized()
    if not dist.is_gloo_available():
        raise RuntimeError("what is coded on the CPU travels by Gloo, which this build of torch does not have")
    group: Any = process_group or dist.group.WORLD
    _MADE[group.group_name] += 1
    store = dist.distributed_c10d._get_default_store()
    own = PrefixStore(f"hvd_qgenx/{group.group_name}/{_MADE[group.group_name]}", store)
    timeout = group._get_backend(group._device_types[0]).options._timeout  # the same patience with a rank that is gone
    return dist.ProcessGroupGloo(own, group.rank(), group.size(), timeout)


def _device(process_group: Any) -> torch.device:
    """Where the group's backend takes messages: on the CPU, where they are coded, if it can."""
    if not isinstance(process_group, dist.ProcessGroup):
        return torch.device("cpu")
    offered = dict(pair.split(":") for pair in str(dist.get_backend_config(process_group)).split(","))
    if offered.get("cpu") in BACKENDS:
        return torch.device("cpu")
    if offered.get("cuda") in BACKENDS:
        return torch.device("cuda", torch.cuda.current_device())
    raise ValueError(f"process_group must be one of Gloo's or NCCL's, which gather bytes; its backend is {offered}")


def _unpadded(gathered: Tensor, lengths: list[int]) -> Tensor:
    """Messages without what made them equally long; a copy only if they were not."""
    longest = max(lengths)
    if all(length == longest for length in lengths):
        return gathered
    rows = gathered.view(len(lengths), longest)
    return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])


def _run(operations: queue.SimpleQueue[_Operation | None]) -> None:
    while (operation := operations.get()) is not None:
        operation.run()
        del operation  # its message is not needed while the next is waited for
