"""What an exchange takes, as a function of measured numbers; and the choice that follows. Measures nothing itself.

The model. A collective takes ``latency + per_byte * bytes`` of what a rank hands to it: at a fixed number of ranks
that is a line for each of Horovod's, whatever it makes of the bytes. A rank's own work takes seconds per coordinate
(encode, decode) and a constant for each message. An exchange is a row of stages, by turns work and wire:

    none, fp16   encode, a tiny allgather (who has what), allreduce, decode
    allgather    encode, allgather of m bytes, decode K payloads
    two_phase    encode, alltoall of m bytes, decode K shards and encode their mean, allgather of m' / K bytes, decode

Under the drop-in the tiny message is Horovod's, of tokens, and precedes the coded ways instead.

In P parts, part i + 1 is at work while part i is on the wire: work and wire each take stage after stage, part after
part, as ``CodedExchange`` does, which gives the time of perfect overlap. Where cores are few, the wire's own copies
take the core that the codec needs. So the share of overlap that this machine gives, measured between 0 (none) and 1,
decides between that time and the sum of all stages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hvd_qgenx.layout import MAX_BUCKET_SIZE

#: Of equally fast ways, the more exact one is taken: one that takes up to this share more time counts as equally fast.
TOLERANCE = 0.05
#: float32 bytes below which no part is cut; the model's error would exceed what smaller ones can save.
LEAST_PART_BYTES = 8 * 2**20
_PARTS = (1, 2, 4, 8, 16)
#: The overlap by which parts are counted out, at least. What a part costs is known, a latency; what it saves rests on a
#: measured overlap, which comes out too low where cores are busy just then, and parts save waiting for late ranks too.
_LEAST_OVERLAP = 0.5
_PARTS_TOLERANCE = 1.02  # fewer parts, if they are expected to take next to no more time
_FLOAT32 = 4


@dataclass(frozen=True)
class Line:
    """Seconds of a collective: ``latency + per_byte * bytes`` of what a rank hands to it."""

    latency: float
    per_byte: float

    def seconds(self, size: float) -> float:
        """For so many bytes."""
        return self.latency + self.per_byte * size


@dataclass(frozen=True)
class Network:
    """What was measured between these ranks: a line for each collective.

    Attributes:
        ranks: how many.
        allgather, alltoall: of bytes; an alltoall is handed the messages to all ranks together.
        allreduce, allreduce16: of float32 and of float16 vectors, by their bytes.
        overlap: the share of the shorter of work and wire that hides behind the longer, 0 to 1.
    """

    ranks: int
    allgather: Line
    alltoall: Line
    allreduce: Line
    allreduce16: Line
    overlap: float = 1.0

    @classmethod
    def ideal(cls, ranks: int, latency: float, rate: float, overlap: float = 1.0) -> Network:
        """Of links that carry ``rate`` bytes a second and of ring collectives that cost nothing else.

        Link bytes per byte handed over: allgather K - 1, alltoall (K - 1) / K, allreduce 2 (K - 1) / K.
        """
        allgather = Line(latency, (ranks - 1) / rate)
        alltoall = Line(latency, (ranks - 1) / ranks / rate)
        allreduce = Line(latency, 2 * (ranks - 1) / ranks / rate)
        return cls(ranks, allgather, alltoall, allreduce, allreduce, overlap)


@dataclass(frozen=True)
class Work:
    """What a rank sends and computes in one exchange of ``numel`` coordinates, measured without a network.

    Attributes:
        sent: bytes per coordinate handed to the first collective.
        sent_again: bytes per coordinate handed to the second, of a plan that has two.
        encode, decode: seconds per coordinate.
        overhead: seconds of a message, whatever its length.
    """

    sent: float
    encode: float
    decode: float
    overhead: float = 0.0
    sent_again: float = 0.0


class Way(NamedTuple):
    """One way to exchange: "none", "fp16" or "qgenx" with so many bits; and "allreduce" or one of ``coded.PLANS``."""

    compression: str
    bits: int
    plan: str

    def __str__(self) -> str:
        name = f"{self.compression} {self.bits} bits" if self.bits else self.compression
        return f"{name} by {self.plan}"


class Estimate(NamedTuple):
    """Seconds that a way is expected to take, and the sums of which they are made, before any overlap."""

    seconds: float
    latency: float
    wire: float
    codec: float

    @property
    def bound(self) -> str:
        """What most of the time goes into: "latency", "wire" or "codec"."""
        return max(("latency", "wire", "codec"), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Choice:
    """What was chosen: a way, and in how many parts."""

    way: Way
    parts: int
    estimate: Estimate

    def part_bytes(self, numel: int) -> int:
        """As of ``part_bytes``."""
        return part_bytes(numel, self.parts)


def part_bytes(numel: int, parts: int) -> int:
    """float32 bytes of a part of one vector; 0 for all in one message.

    Whole buckets, of any usual size: parts are cut at buckets, and a little less each would leave a small one over.
    """
    return _FLOAT32 * MAX_BUCKET_SIZE * -(-numel // (parts * MAX_BUCKET_SIZE)) if parts > 1 else 0


class _Stage(NamedTuple):
    """Work (no line) or wire of one part."""

    work: float = 0.0
    line: Line | None = None
    size: float = 0.0

    @property
    def seconds(self) -> float:
        return self.line.seconds(self.size) if self.line else self.work


def estimate(network: Network, way: Way, work: Work, numel: int, parts: int = 1, tokens: bool = False) -> Estimate:
    """What ``numel`` coordinates in so many parts are expected to take; see the room's model.

    Args:
        tokens: whether tokens tell who has what, as under the drop-in.
    """
    stages = _STAGES[way.plan](network, way, work, numel / parts)
    if tokens == (way.plan != "allreduce"):
        stages.insert(1, _Stage(line=network.allreduce if tokens else network.allgather))
    overhead = parts * work.overhead
    lines = [stage for stage in stages if stage.line]
    latency = parts * sum(stage.line.latency for stage in lines if stage.line)
    wire = parts * sum(stage.line.per_byte * stage.size for stage in lines if stage.line)
    codec = overhead + parts * sum(stage.work for stage in stages)
    total = latency + wire + codec
    hidden = total - overhead - _pipelined(stages, parts)
    return Estimate(total - network.overlap * hidden, latency, wire, codec)


def choose(
    network: Network, works: Mapping[Way, Work], numel: int, in_parts: bool = True, tokens: bool = False
) -> Choice:
    """The fastest way for ``numel`` coordinates, and in how many parts.

    Args:
        works: in their order from the most exact way to the least; of those within ``TOLERANCE`` of the fastest the
            first is taken.
        in_parts: whether vectors may be cut; what an allreduce carries never is.
        tokens: as of ``estimate``.
    """
    found = [_in_best_parts(network, way, work, numel, in_parts, tokens) for way, work in works.items()]
    limit = (1 + TOLERANCE) * min(choice.estimate.seconds for choice in found)
    return next(choice for choice in found if choice.estimate.seconds <= limit)


def _in_best_parts(network: Network, way: Way, work: Work, numel: int, in_parts: bool, tokens: bool) -> Choice:
    """One way in as few parts as are expected to take least, if overlap is not quite as bad as measured."""
    hopeful = replace(network, overlap=max(network.overlap, _LEAST_OVERLAP))
    may_cut = in_parts and way.plan != "allreduce"
    allowed = [parts for parts in _PARTS if parts == 1 or (may_cut and numel * _FLOAT32 >= parts * LEAST_PART_BYTES)]
    seconds = {parts: estimate(hopeful, way, work, numel, parts, tokens).seconds for parts in allowed}
    parts = next(parts for parts in allowed if seconds[parts] <= _PARTS_TOLERANCE * min(seconds.values()))
    return Choice(way, parts, estimate(network, way, work, numel, parts, tokens))


def explain(network: Network, alone: Mapping[Way, Choice], numel: int, choice: Choice) -> str:
    """One line: what was chosen, why, and what else there was.

    Args:
        alone: what would have been chosen if each way had been the only one.
    """
    line, expected, overlap = network.allgather, choice.estimate, 100 * network.overlap
    parts = f" in {choice.parts} parts" if choice.parts > 1 else ""
    others = [f"{way} {1e3 * other.estimate.seconds:.3g} ms" for way, other in alone.items() if way != choice.way]
    rate = 1e-6 * (network.ranks - 1) / line.per_byte if line.per_byte else math.inf
    return (
        f"{choice.way}{parts} was chosen for {numel:,} coordinates on {network.ranks} ranks: "
        f"{1e3 * expected.seconds:.3g} ms expected, bound by {expected.bound} (latency {1e3 * expected.latency:.3g}, "
        f"wire {1e3 * expected.wire:.3g}, codec {1e3 * expected.codec:.3g} ms); "
        + (f"others: {', '.join(others)}; " if others else "")
        + f"measured: {1e3 * line.latency:.3g} ms a message, {rate:.4g} MB/s a link, {overlap:.0f} % overlap"
    )


def needs_no_measurement(plans: Sequence[str], ranks: int, numel: int) -> bool:
    """Whether all in one message by the first plan is right on any network: so small that latency alone counts, or
    without another plan and too small for parts."""
    in_one = numel * _FLOAT32 < 2 * LEAST_PART_BYTES
    return in_one and (len(plans) == 1 or (ranks - 1) * numel * _FLOAT32 < 2**18)


def link_bytes(way: Way, ranks: int, sent: float, sent_again: float = 0.0) -> float:
    """Bytes that leave a rank's link by the arithmetic of rings, for so many handed to the collectives.

    allreduce 2 (K - 1) / K of the vector, allgather K - 1 of the message, alltoall (K - 1) / K of the messages.
    """
    share = (ranks - 1) / ranks
    first = {"allreduce": 2 * share, "allgather": ranks - 1, "two_phase": share}[way.plan]
    return first * sent + (ranks - 1) * sent_again


def _allreduce(network: Network, way: Way, work: Work, numel: float) -> list[_Stage]:
    line = network.allreduce16 if way.compression == "fp16" else network.allreduce
    return [_Stage(work.encode * numel), _Stage(line=line, size=work.sent * numel), _Stage(work.decode * numel)]


def _allgather(network: Network, way: Way, work: Work, numel: float) -> list[_Stage]:
    wire = _Stage(line=network.allgather, size=work.sent * numel)
    return [_Stage(work.encode * numel), wire, _Stage(work.decode * numel)]


def _two_phase(network: Network, way: Way, work: Work, numel: float) -> list[_Stage]:
    """A rank encodes a vector and one shard, and decodes the coordinates of K shards and those of a vector."""
    share = network.ranks / (network.ranks + 1)
    mean = work.decode / 2 + work.encode * (1 - share)
    return [
        _Stage(work.encode * share * numel),
        _Stage(line=network.alltoall, size=work.sent * numel),
        _Stage(mean * numel),
        _Stage(line=network.allgather, size=work.sent_again * numel),
        _Stage(work.decode / 2 * numel),
    ]


_STAGES = {"allreduce": _allreduce, "allgather": _allgather, "two_phase": _two_phase}


def _pipelined(stages: Sequence[_Stage], parts: int) -> float:
    """Seconds of all parts where work and wire never hinder each other."""
    free = {False: 0.0, True: 0.0}  # when work, and the wire, have done what they were given
    ready = [0.0] * parts
    for stage in stages:
        is_wire = stage.line is not None
        for part in range(parts):
            free[is_wire] = ready[part] = max(ready[part], free[is_wire]) + stage.seconds
    return max(ready)
