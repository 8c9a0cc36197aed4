"""A communication hook for DistributedDataParallel.

    state = hvd_qgenx.ddp.QGenXState(bits=4)
    ddp_model.register_comm_hook(state, hvd_qgenx.ddp.qgenx_hook)

DDP hands over its buckets as backward fills them, and cuts them anew after the first iteration. What is sent does not
depend on that: parameters, in the model's order, are cut into parts of a size of their own, and a part is encoded and
sent as soon as the buckets with its parameters are there. Another thread waits for parts, decodes them into the
buckets, and completes the futures that DDP waits for. In the first backward, and where levels are fitted, all of it
happens there, after the last bucket.
"""

# No `from __future__ import annotations`: DDP compares the hook's annotations with types.
import logging
import queue
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import hvd_qgenx.exchange.coded as coded
from hvd_qgenx.adaptation import Settings
from hvd_qgenx.checks import check_choice, check_integer, check_named_parameters, check_type
from hvd_qgenx.codec import as_segment, check_gradient
from hvd_qgenx.communication import Communication
from hvd_qgenx.exchange import PLANS, StreamedExchange
from hvd_qgenx.exchange.allgather import spoil
from hvd_qgenx.exchange.plan import Flight
from hvd_qgenx.levels import Levels
from hvd_qgenx.transports.torch_distributed import TorchTransport, check_initialized, own_group

_LOGGER = logging.getLogger("hvd_qgenx")
#: States of each process group in the order in which they were made, by which its ranks notice that they use others.
_MADE: Counter[str] = Counter()
TensorFuture = torch.futures.Future[torch.Tensor]


@dataclass
class _Bucket:
    """One of DDP's buckets: its flat gradient, which the mean replaces, and the promise to DDP."""

    buffer: Tensor
    parameters: list[Tensor]
    promise: Any
    #: Parts that have not been decoded yet.
    missing: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, bucket: Any) -> "_Bucket":
        buffer = check_gradient(bucket.buffer())
        devices: Any = [buffer.device] if buffer.is_cuda else None
        return cls(buffer, bucket.parameters(), torch.futures.Future(devices=devices))

    def gradients(self) -> Sequence[Tensor]:
        """Flat, one for each parameter: views of the buffer."""
        return self.buffer.split([p.numel() for p in self.parameters])


class _Backward:
    """What a backward has brought so far: buckets, and of all parameters, in the model's order, their gradients."""

    def __init__(self, count: int, buckets: Sequence[_Bucket] = (), is_streamed: bool = False):
        self.buckets = list(buckets)
        #: Whether parts are sent as they are there; decided once, since the last part's landing may make levels due.
        self.is_streamed = is_streamed
        self.gradients: list[Tensor | None] = [None] * count
        #: What is encoded of a gradient, and decoded into: itself, if it is float32 on the CPU.
        self.segments: list[Tensor | None] = [None] * count
        self.flights: dict[int, Flight] = {}
        self.landed = 0
        self.broken = [False] * count

    def segment(self, index: int) -> Tensor:
        found = self.segments[index]
        if found is None:
            gradient = self.gradients[index]
            assert gradient is not None
            found = self.segments[index] = as_segment(gradient)
        return found

    def is_there(self, indices: Iterable[int]) -> bool:
        return all(self.gradients[index] is not None for index in indices)

    def give_back(self, indices: Iterable[int]) -> None:
        """Means that were not decoded into the bucket itself go there."""
        for index in indices:
            gradient, segment = self.gradients[index], self.segment(index)
            assert gradient is not None
            spoil([segment], (self.broken[index],))
            if segment.data_ptr() != gradient.data_ptr():
                gradient.copy_(segment.view(gradient.shape))


class QGenXState:
    """The state of ``qgenx_hook``: settings, levels, counters. One for each DistributedDataParallel module.

    The first backward connects the module's ranks once more, so that what the hook sends does not mix with what DDP
    itself does. ``state_dict`` is equal on all ranks; a run that loads it continues with the same bits, whatever
    DDP's buckets. It can be pickled, too, without the process group.

    Args:
        process_group: the module's; None is all ranks.
        exchange: "allgather" of all ranks' payloads; or "two_phase", shards to their owners and means back, which
            codes twice, for slow links and more than three or four ranks.
        part_bytes: float32 bytes of what travels in one message.
        named_parameters: only for messages that name a parameter.
        bits, levels, coder, norm, bucket_size, rounding, min_numel, adapt_at, adapt_every, seed, nonfinite,
            statistics, rate_weight: as of ``Compression.qgenx``; ``bucket_size`` is the codec's, not DDP's.

    Raises:
        ValueError: naming the argument and what is allowed.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        bits: int = 4,
        levels: str | Levels = "adaptive",
        coder: str = "huffman",
        norm: str = "l2",
        bucket_size: int = 1024,
        rounding: str = "stochastic",
        min_numel: int = 1024,
        adapt_at: tuple[int, ...] = (0, 200, 1000, 5000),
        adapt_every: int = 10000,
        seed: int = 0,
        named_parameters: Iterable | None = None,
        nonfinite: str = "nan",
        statistics: str = "histogram",
        rate_weight: float = 0.0,
        exchange: str = "allgather",
        part_bytes: int = coded.PART_BYTES,
    ):
        if process_group is not None:
            check_type("process_group", process_group, dist.ProcessGroup)
        self.settings = Settings(
            bits=bits, levels=levels, coder=coder, norm=norm, bucket_size=bucket_size, rounding=rounding,
            min_numel=min_numel, adapt_at=adapt_at, adapt_every=adapt_every, seed=seed, nonfinite=nonfinite,
            statistics=statistics, rate_weight=rate_weight,
        )  # fmt: skip
        self.plan = check_choice("exchange", exchange, list(PLANS))
        self.part_bytes = check_integer("part_bytes", part_bytes, 1)
        named = check_named_parameters(named_parameters) if named_parameters is not None else []
        self._names = {p: name for name, p in named}
        self._begin(process_group, {})

    def _begin(self, process_group: dist.ProcessGroup | None, memory: dict) -> None:
        self.process_group = process_group
        group = "" if process_group is None else process_group.group_name
        _MADE[group] += 1
        self.communication = Communication(number=_MADE[group])
        self._memory = memory
        self._exchange: StreamedExchange | None = None
        self._index: dict[Tensor, int] = {}
        self._members: list[list[int]] = []
        self._backward = _Backward(0)
        self._failure: BaseException | None = None
        self._receiver: _Receiver | None = None

    def __repr__(self) -> str:
        return f"QGenXState({', '.join(self.settings.describe())}, exchange={self.plan!r})"

    # ---- memory ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Counters, levels and what they belong to, equal on all ranks; empty before the first backward."""
        return self._exchange.state_dict() if self._exchange else dict(self._memory)

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues exactly; ranks that load nothing take over, in the first backward, the state of those that do."""
        if self._exchange and state_dict:
            self._exchange.load_state_dict(state_dict)
        self._memory = dict(state_dict)

    def __getstate__(self) -> dict:
        _LOGGER.warning("QGenXState is saved without its process group")
        return {
            "settings": self.settings,
            "plan": self.plan,
            "part_bytes": self.part_bytes,
            "memory": self.state_dict(),
        }

    def __setstate__(self, state: dict) -> None:
        self.settings, self.plan, self.part_bytes = state["settings"], state["plan"], state["part_bytes"]
        self._names = {}
        self._begin(None, state["memory"])

    # ---- buckets -----------------------------------------------------------------------------------------------------

    def take(self, bucket: Any) -> TensorFuture:
        """Takes over a bucket and returns at once; see ``qgenx_hook``."""
        if self._failure:
            raise RuntimeError(f"this QGenXState has failed before: {self._failure}") from self._failure
        check_initialized()
        taken = _Bucket.of(bucket)
        if dist.get_world_size(self.process_group) == 1:
            taken.promise.set_result(taken.buffer)
            return taken.promise
        if bucket.index() == 0:
            is_streamed = self._exchange is not None and self._exchange.settled
            self._backward = _Backward(len(self._index), is_streamed=is_streamed)
        self._backward.buckets.append(taken)
        if self._index:
            self._place(taken)
            self._send_what_is_there(taken)
        if bucket.is_last():
            self._end_of_buckets()
        return taken.promise.then(_delivered)

    def _place(self, bucket: _Bucket) -> None:
        """Sorts a bucket's gradients into the model's order."""
        for p, gradient in zip(bucket.parameters, bucket.gradients(), strict=True):
            if p not in self._index:
                raise ValueError(
                    "a QGenXState belongs to one DistributedDataParallel module: a parameter of shape "
                    f"{tuple(p.shape)} is not of the module that used it first; make another state for this one"
                )
            self._backward.gradients[self._index[p]] = gradient

    def _send_what_is_there(self, bucket: _Bucket) -> None:
        """Sends the parts that were waiting for this bucket alone; in one order on all ranks, as DDP's buckets are."""
        exchange, backward = self._exchange, self._backward
        assert exchange is not None and self._receiver is not None
        if not backward.is_streamed:
            return
        indices = {self._index[p] for p in bucket.parameters}
        bucket.missing = {part for part, members in enumerate(self._members) if indices.intersection(members)}
        for part in sorted(bucket.missing, reverse=True):
            if part not in backward.flights and backward.is_there(self._members[part]):
                flight = exchange.send(part, [backward.segment(index) for index in self._members[part]])
                backward.flights[part] = flight
                self._receiver.put(_Landing(self, backward, part, flight))

    def _end_of_buckets(self) -> None:
        if not self._index:
            self._meet_module()
        assert self._receiver is not None
        if not self._backward.is_streamed:
            self._receiver.put(_Whole(self, self._backward))

    def _meet_module(self) -> None:
        """From the first backward's buckets, which DDP fills from the last parameter to the first."""
        buckets = self._backward.buckets
        parameters = [p for bucket in reversed(buckets) for p in bucket.parameters]
        exchange = self._connect()
        sizes = [p.numel() for p in parameters]
        lines = [f"{self._name(p, i)} of shape {tuple(p.shape)} and type {p.dtype}" for i, p in enumerate(parameters)]
        filled = [bucket.buffer.numel() for bucket in buckets]
        about = f"exchange={self.plan}, part_bytes={self.part_bytes}, DDP's buckets of {filled} coordinates"
        exchange.describe([about, *lines], [p.dtype for p in parameters], sizes)
        self._index = {p: index for index, p in enumerate(parameters)}
        self._ordered_names = [self._name(p, index) for index, p in enumerate(parameters)]
        self._members = [[piece.segment for piece in part.slices] for part in exchange.parts()]
        self._backward = _Backward(len(parameters), buckets)
        for bucket in buckets:
            self._place(bucket)

    def _name(self, p: Tensor, index: int) -> str:
        return self._names.get(p, f"parameter {index}")

    def _connect(self) -> StreamedExchange:
        """Two groups of the module's ranks: first messages start on backward's thread, second phases on our own."""
        transport = TorchTransport(own_group(self.process_group))
        exchange = StreamedExchange(
            self.settings, transport, "mean", self.plan, self.part_bytes, communication=self.communication
        )
        if self.plan == "two_phase":
            exchange.messenger.second = TorchTransport(own_group(self.process_group))
        if self._memory:
            exchange.load_state_dict(self._memory)
        self._exchange, self._receiver = exchange, _Receiver()
        return exchange

    # ---- on the receiver's thread ------------------------------------------------------------------------------------

    def _exchange_whole(self, backward: _Backward) -> None:
        """All at once: ranks agree, or levels are fitted, and only then can anything be encoded."""
        exchange = self._exchange
        assert exchange is not None
        fused = exchange.fuse(backward.gradients)
        exchange.settle()
        exchange.adapt_or_withdraw(fused)
        collected = exchange.collect(exchange.submit(fused, "step"), self._ordered_names)
        backward.segments = collected.means
        for bucket in backward.buckets:
            backward.give_back(self._index[p] for p in bucket.parameters)
            bucket.promise.set_result(bucket.buffer)

    def _land(self, backward: _Backward, part: int, flight: Flight) -> None:
        exchange, members = self._exchange, self._members[part]
        assert exchange is not None
        for index, flag in zip(members, exchange.land(flight, part, list(map(backward.segment, members))), strict=True):
            backward.broken[index] = backward.broken[index] or flag
        backward.landed += 1
        is_last = backward.landed == len(self._members)
        if is_last:
            exchange.finish(list(backward.flights.values()))
            backward.flights.clear()  # with all ranks' payloads
            exchange.report_broken(backward.broken, self._ordered_names)
        for bucket in backward.buckets:
            if part in bucket.missing:
                bucket.missing.remove(part)
                if not bucket.missing:
                    backward.give_back(self._index[p] for p in bucket.parameters)
                    bucket.promise.set_result(bucket.buffer)

    def _fail(self, backward: _Backward, error: BaseException) -> None:
        """Every bucket that DDP still waits for gets the error; only one about a gradient's values is forgiven."""
        if not isinstance(error, FloatingPointError | Warning):
            self._failure = error
        for bucket in backward.buckets:
            if not bucket.promise.done():
                bucket.promise.set_result(error)


@dataclass(frozen=True)
class _Whole:
    state: QGenXState
    backward: _Backward

    def advance(self) -> None:
        """Nothing of it is under way yet."""

    def end(self) -> None:
        self.state._exchange_whole(self.backward)


@dataclass(frozen=True)
class _Landing:
    state: QGenXState
    backward: _Backward
    part: int
    flight: Flight

    def advance(self) -> None:
        self.flight.advance()

    def end(self) -> None:
        self.state._land(self.backward, self.part, self.flight)


_Item = _Whole | _Landing


class _Receiver:
    """A thread that waits for what was sent, in the order of sending; what comes after a first phase starts first."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=_receive, args=(self._queue,), name="hvd_qgenx.receiver", daemon=True).start()
        weakref.finalize(self, self._queue.put, None)

    def put(self, item: _Item) -> None:
        self._queue.put(item)


def _receive(arriving: queue.SimpleQueue) -> None:
    under_way: deque[_Whole | _Landing] = deque()
    while True:
        try:
            item = arriving.get(block=not under_way)
        except queue.Empty:
            ended = under_way.popleft()
            _guarded(ended, ended.end)
            del ended
            continue
        if item is None:
            return
        _guarded(item, item.advance)
        under_way.append(item)
        del item


def _guarded(item: _Item, action: Callable[[], None]) -> None:
    try:
        action()
    except BaseException as error:  # whatever it is, DDP's thread must learn of it
        item.state._fail(item.backward, error)


def _delivered(future: TensorFuture) -> Tensor:
    """What DDP gets: the bucket, or the error that the receiver met, raised."""
    value = future.value()
    if isinstance(value, BaseException):
        raise value
    return value


def qgenx_hook(state: QGenXState, bucket: dist.GradBucket) -> TensorFuture:  # type: ignore[name-defined]
    """The mean over ranks of a bucket's gradients, coded on the wire; for ``register_comm_hook``.

    Returns:
        A future of the bucket's own buffer, overwritten by the mean. It never waits for the network.

    Raises:
        TypeError: if it is not DistributedDataParallel that calls.

    Example:
        >>> ddp_model.register_comm_hook(QGenXState(bits=4), qgenx_hook)
    """
    if not isinstance(bucket, dist.GradBucket):  # type: ignore[attr-defined]
        raise TypeError(
            "qgenx_hook is for DistributedDataParallel, which hands over a GradBucket; FullyShardedDataParallel and "
            f"others are not supported: it got a {type(bucket).__name__}"
        )
    check_type("state", state, QGenXState)
    return state.take(bucket)
