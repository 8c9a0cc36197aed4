"""What a DistributedDataParallel module's hook keeps, and what it does with buckets."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import hvd_qgenx.exchange.coded as coded
from hvd_qgenx.adaptation import Settings
from hvd_qgenx.backends import DeviceError, failures_of
from hvd_qgenx.checks import check_choice, check_integer, check_named_parameters, check_type
from hvd_qgenx.communication import Communication
from hvd_qgenx.ddp.backward import Backward, Bucket
from hvd_qgenx.ddp.receiver import Arrival, Receiver
from hvd_qgenx.exchange import PLANS, StreamedExchange, WithdrawnError
from hvd_qgenx.exchange.plan import Flight
from hvd_qgenx.levels import Levels
from hvd_qgenx.transports.torch_distributed import TorchTransport, check_initialized, own_group

_LOGGER = logging.getLogger("hvd_qgenx")
#: States of each process group in the order in which they were made, by which its ranks notice that they use others.
_MADE: Counter[str] = Counter()
TensorFuture = torch.futures.Future[torch.Tensor]


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
        self._backward = Backward(0)
        self._failure: BaseException | None = None
        self._receiver: Receiver | None = None

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
        check_initialized()
        taken = Bucket.of(bucket)
        if dist.get_world_size(self.process_group) == 1:
            taken.deliver(taken.buffer)
            return taken.promise
        if bucket.index() == 0:
            self._backward = self._next_backward()
        backward = self._backward
        backward.buckets.append(taken)
        if self._index and backward.failure is None:
            self._place(taken)
            self._send_what_is_there(taken)
        if bucket.is_last() and backward.failure is None:
            self._end_of_buckets()
        if backward.failure is not None:
            self._give_up(backward, backward.failure)
        return taken.promise.then(_delivered)

    def _next_backward(self) -> Backward:
        settled = self._exchange is not None and self._exchange.settled
        failure = RuntimeError(f"this QGenXState has failed before: {self._failure}") if self._failure else None
        return Backward(len(self._index), is_streamed=settled and not failure, failure=failure)

    def _place(self, bucket: Bucket) -> None:
        """Sorts a bucket's gradients into the model's order."""
        for p, gradient in zip(bucket.parameters, bucket.gradients(), strict=True):
            if p not in self._index:
                raise ValueError(
                    "a QGenXState belongs to one DistributedDataParallel module: a parameter of shape "
                    f"{tuple(p.shape)} is not of the module that used it first; make another state for this one"
                )
            self._backward.gradients[self._index[p]] = gradient

    def _send_what_is_there(self, bucket: Bucket) -> None:
        """Sends the parts that were waiting for this bucket alone; in one order on all ranks, as DDP's buckets are."""
        exchange, backward = self._exchange, self._backward
        assert exchange is not None and self._receiver is not None
        if not backward.is_streamed:
            return
        indices = {self._index[p] for p in bucket.parameters}
        bucket.missing = {part for part, members in enumerate(self._members) if indices.intersection(members)}
        with self._or_withdrawn(backward):
            for part in sorted(bucket.missing, reverse=True):
                if part not in backward.flights and backward.is_there(self._members[part]):
                    flight = exchange.send(part, [backward.segment(index) for index in self._members[part]])
                    backward.flights[part] = flight
                    self._receiver.put(_Landing(self, backward, part, flight))

    @contextmanager
    def _or_withdrawn(self, backward: Backward) -> Iterator[None]:
        """What sends parts. A device that fails keeps no rank waiting.

        Its error goes the way of all others, by the futures: DDP is in no state to go on with once a hook has raised.
        """
        try:
            with failures_of("the gradients' device", falls_back=False):
                yield
        except DeviceError as error:
            self._fail(backward, WithdrawnError(str(error)))

    def _give_up(self, backward: Backward, failure: BaseException) -> None:
        """Refuses what a backward that has failed will not send any more, so that no rank waits for it."""
        if self._exchange is not None and backward.is_streamed:
            backward.is_streamed = False
            with suppress(RuntimeError):  # as where the others are gone
                # In the order in which they would have been sent: that is how torch.distributed matches them.
                parts = reversed(range(len(self._members)))
                self._exchange.withdraw(part for part in parts if part not in backward.flights)
        for bucket in backward.buckets:
            bucket.deliver(failure)

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
        self._backward = Backward(len(parameters), buckets)
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
        self._exchange, self._receiver = exchange, Receiver()
        return exchange

    # ---- on the receiver's thread ------------------------------------------------------------------------------------

    def _exchange_whole(self, backward: Backward) -> None:
        """All at once: ranks agree, or levels are fitted, and only then can anything be encoded."""
        exchange = self._exchange
        assert exchange is not None
        exchange.settle()
        with exchange.refusing():
            fused = exchange.fuse(backward.gradients)
        exchange.adapt_if_due(fused)
        collected = exchange.collect(exchange.submit(fused, "step"), self._ordered_names)
        backward.segments = collected.means
        for bucket in backward.buckets:
            backward.give_back(self._index[p] for p in bucket.parameters)
            bucket.deliver(bucket.buffer)

    def _land(self, backward: Backward, part: int, flight: Flight) -> None:
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
                    bucket.deliver(bucket.buffer)

    def _fail(self, backward: Backward, error: BaseException) -> None:
        """Every bucket that DDP still waits for gets the error; only one about a gradient's values is forgiven."""
        if not isinstance(error, FloatingPointError | Warning):
            self._failure = self._failure or error
        backward.failure = backward.failure or error
        for bucket in backward.buckets:
            bucket.deliver(backward.failure)


@dataclass(frozen=True)
class _Whole(Arrival):
    """A backward of which nothing could be sent before its end."""

    state: QGenXState
    backward: Backward

    def advance(self) -> None:
        """Nothing of it is under way yet."""

    def end(self) -> None:
        self.state._exchange_whole(self.backward)

    def fail(self, error: BaseException) -> None:
        self.state._fail(self.backward, error)


@dataclass(frozen=True)
class _Landing(Arrival):
    """A part that is under way."""

    state: QGenXState
    backward: Backward
    part: int
    flight: Flight

    def advance(self) -> None:
        assert self.state._exchange is not None
        self.state._exchange.advance(self.flight, self.part)

    def end(self) -> None:
        self.state._land(self.backward, self.part, self.flight)

    def fail(self, error: BaseException) -> None:
        self.state._fail(self.backward, error)


def _delivered(future: TensorFuture) -> Tensor:
    """What DDP gets: the bucket, or the error that the receiver met, raised."""
    value = future.value()
    if isinstance(value, BaseException):
        raise value
    return value
