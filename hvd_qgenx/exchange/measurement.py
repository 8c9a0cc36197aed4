"""What the network between these ranks takes, measured with small messages and equal on all ranks."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from hvd_qgenx.exchange.cost import LEAST_PART_BYTES, Choice, Line, Network, Way, Work, choose, explain
from hvd_qgenx.exchange.message import Envelope, Messenger
from hvd_qgenx.transports import Pending

#: On a link the first message is as long as the burst that links commonly let through at once.
_FIRST_LINK_BYTES, _MOST_BYTES = 2**18, 2**23
_TINY_BYTES = 64
#: A message that takes this long is large enough: latency and the clock are a small share of it. Several of them must
#: fit into half a second.
_ENOUGH_SECONDS, _MANY_LATENCIES = 0.015, 5
_KINDS = {"allreduce": "allreduce", "allgather": "allgather", "two_phase": "alltoall"}
_LOGGER = logging.getLogger("hvd_qgenx")

Start = Callable[[int], Pending]


class Meter:
    """Times collectives. All ranks do the same in the same order, decided by numbers that all ranks have.

    Args:
        messenger: of the optimizer or compressor that wants to know; what is sent is counted there.
        step: how many exchanges it has made.
    """

    def __init__(self, messenger: Messenger, step: int):
        self.messenger, self.transport = messenger, messenger.transport
        self.envelope = Envelope(messenger.communication.number, step, "measurement")

    def slowest(self, values: Sequence[float]) -> list[float]:
        """The largest over all ranks of each value; ranks leave it at about the same time."""
        own = torch.tensor(values, dtype=torch.float64, device="cpu")
        _, bodies = self.messenger.gather(self.envelope, own.view(torch.uint8))
        return torch.stack([body.clone().view(torch.float64) for body in bodies]).amax(dim=0).tolist()

    def seconds(self, action: Callable[[], object]) -> float:
        """Of the slowest rank, for what all of them start at about the same time."""
        self.slowest([0.0])
        start = time.perf_counter()
        action()
        return self.slowest([time.perf_counter() - start])[0]

    def work(self, rehearsal: Callable[[], Work]) -> Work:
        """Of the slowest rank, while all of them are at it."""
        self.slowest([0.0])
        return Work(*self.slowest(astuple(rehearsal())))

    def network(self, kinds: Collection[str]) -> Network:
        """Lines of the collectives, and what overlaps.

        Args:
            kinds: what is asked for beside the allgather: "alltoall", "allreduce", "overlap". Of what is not asked
                for, the allgather's line, or 1, is said, and means nothing.
        """
        ranks = self.transport.size
        size, allgather = self._ladder()
        # An allgather passes ranks - 1 of its messages through a link, so this is as many bytes on the link.
        whole = size * ranks
        alltoall = self._line(self._alltoall, whole) if "alltoall" in kinds else allgather
        allreduce, allreduce16 = (
            self._line(self._allreduce(dtype), whole // 2) if "allreduce" in kinds else allgather
            for dtype in (torch.float32, torch.float16)
        )
        overlap = self._overlap(size, allgather.seconds(size)) if "overlap" in kinds else 1.0
        return Network(ranks, allgather, alltoall, allreduce, allreduce16, overlap)

    def _ladder(self) -> tuple[int, Line]:
        """A message large enough to be timed, and the allgather's line."""
        size = max(_FIRST_LINK_BYTES // max(self.transport.size - 1, 1), _TINY_BYTES)
        enough = max(_ENOUGH_SECONDS, _MANY_LATENCIES * self._tiny(self._allgather))
        while size < _MOST_BYTES and not self._takes(size, enough):
            size *= 2
        return size, self._line(self._allgather, size)

    def _takes(self, size: int, seconds: float) -> bool:
        """Twice, since a core that is busy elsewhere can make any message late."""
        return all(self._time(self._allgather, size) >= seconds for _ in range(2))

    def _line(self, start: Start, size: int) -> Line:
        tiny = self._tiny(start)
        return Line(tiny, max(self._steady(start, size) - tiny, 0.0) / size)

    def _tiny(self, start: Start) -> float:
        """Seconds of a tiny message, the shortest of a few: whatever else happens makes one late and never early."""
        return min(self._time(start, _TINY_BYTES * self.transport.size) for _ in range(3))

    def _steady(self, start: Start, size: int) -> float:
        """The median of a few messages, one after another, of the slowest rank.

        Links may let a burst of bytes through at once when they have rested: the first message uses that up.
        """
        self.slowest([0.0])
        marks = []
        for _ in range(5):
            start(size).wait()
            marks.append(time.perf_counter())
        return self.slowest([statistics.median(end - begin for begin, end in pairwise(marks))])[0]

    def _time(self, start: Start, size: int) -> float:
        return self.seconds(lambda: start(size).wait())

    def _allgather(self, size: int) -> Pending:
        return self._watched(self.transport.allgather(self._bytes(size), "hvd_qgenx.measurement.allgather"))

    def _alltoall(self, size: int) -> Pending:
        ranks = self.transport.size
        splits = torch.full((ranks,), size // ranks, dtype=torch.int32, device="cpu")
        messages = self._bytes(size // ranks * ranks)
        return self._watched(self.transport.alltoall(messages, splits, "hvd_qgenx.measurement.alltoall"))

    def _allreduce(self, dtype: torch.dtype) -> Start:
        name = f"hvd_qgenx.measurement.{dtype}"
        return lambda size: self._watched(self.transport.allreduce(self._bytes(size // 4 * 4).view(dtype), name, True))

    def _watched(self, pending: Pending) -> Pending:
        return self.messenger.watch(pending, lambda: "the measurement of the network")

    def _bytes(self, size: int) -> Tensor:
        return self.messenger.communication.count(torch.zeros(size, dtype=torch.uint8, device="cpu"))

    def _overlap(self, size: int, wire: float) -> float:
        """The share of work that hides behind a message under way; 1 where ranks have cores to spare.

        (wire + work - both at once) / the shorter of them, for work about as long as a message of ``size`` takes.
        """
        vector = torch.ones(2**16, dtype=torch.float32, device="cpu")
        rounds = max(round(wire / self.seconds(lambda: _repeat(vector, 100)) * 100), 1)
        work = self.seconds(lambda: _repeat(vector, rounds))
        both = [self.seconds(lambda: _at_once(self._allgather(size), vector, rounds)) for _ in range(2)]
        return min(max((wire + work - sum(both) / 2) / min(wire, work), 0.0), 1.0)


def measure_and_choose(
    messenger: Messenger, step: int, rehearsals: Mapping[Way, Callable[[], Work]], numel: int,
    in_parts: bool = True, tokens: bool = False,
) -> Choice:  # fmt: skip
    """The choice among ways to exchange ``numel`` coordinates; the same on all ranks, and logged by the first.

    Every rank decides by the same numbers: those of the slowest rank. It takes about half a second, on slow links too.

    Args:
        rehearsals: of every way what a rank sends and computes, from the most exact way to the least.
        numel: where ranks say different numbers, the largest counts.
        in_parts, tokens: as of ``cost.choose``.
    """
    meter, sent = Meter(messenger, step), messenger.communication.bytes_sent
    numel = int(meter.slowest([numel])[0])
    kinds = {_KINDS[way.plan] for way in rehearsals} - {"allgather"}
    if in_parts and numel * 4 >= 2 * LEAST_PART_BYTES:
        kinds.add("overlap")
    network = meter.network(kinds)
    works = {way: meter.work(rehearsal) for way, rehearsal in rehearsals.items()}
    decide = partial(choose, network, numel=numel, in_parts=in_parts, tokens=tokens)
    choice = decide(works)
    communication = messenger.communication
    communication.measurement_bytes += communication.bytes_sent - sent
    communication.bytes_sent = sent
    if messenger.transport.rank == 0:
        alone = {way: decide({way: work}) for way, work in works.items()}
        _LOGGER.info("%s", explain(network, alone, numel, choice))
    return choice


def _repeat(vector: Tensor, rounds: int) -> None:
    for _ in range(rounds):
        vector.mul_(1.0)


def _at_once(pending: Pending, vector: Tensor, rounds: int) -> None:
    _repeat(vector, rounds)
    pending.wait()
