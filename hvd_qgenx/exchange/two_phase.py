"""The plan "two_phase": shards travel to their owners, who average them and send the mean to all ranks.

1. A part is cut into as many shards as there are ranks; every rank encodes each shard for its owner (alltoall).
2. The owner decodes K payloads of its shard and averages them in float32.
3. It encodes the mean under a finer codec, and all means travel to all ranks (allgather).
4. Every rank, the owner too, decodes the same payloads, so that replicas stay bit-identical.

2 (K - 1) / K payloads' worth of bytes pass a link, against K - 1 of an allgather. The second rounding is independent of
the first and without bias too, so the mean is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hvd_qgenx.backends import Drawn
from hvd_qgenx.drift import Sums
from hvd_qgenx.exchange.allgather import Arrived, PayloadFlight
from hvd_qgenx.exchange.message import ENVELOPE_BYTES, Envelope, compare, room_for, seal, size_class, split
from hvd_qgenx.exchange.plan import Codecs, Outgoing, Plan
from hvd_qgenx.layout import Layout, Part
from hvd_qgenx.payload import bound
from hvd_qgenx.transports import Pending
from hvd_qgenx.transports.waiting import kept


def fine_bits(bits: int, ranks: int) -> int:
    """The width of the second rounding: at most 8, and fine enough to keep what averaging gains.

    The mean's own variance falls with the ranks, down to 1 / K of one rank's where these are independent; each bit
    quarters the second rounding's. bits + 1 + log4(K / 2), rounded up, keeps the sum of both near the first alone: one
    bit more costs a tenth more bytes, and gains 2 % where ranks are independent.
    """
    more, gained = 1, 2
    while gained < ranks:
        more, gained = more + 1, 4 * gained
    return min(bits + more, 8)


class TwoPhase(Plan):
    """Right for many ranks and slow links: bytes do not grow with the ranks, and each rank decodes two payloads' worth
    of coordinates rather than K."""

    def start(self, codecs: Codecs, outgoing: Outgoing) -> TwoPhaseFlight:
        return TwoPhaseFlight(self, codecs, outgoing)

    def groups(self, segments: Sequence[Tensor], whole: Layout) -> list[Sequence[Tensor]]:
        return [shard.cut(segments) for shard in whole.shards(self.messenger.transport.size)]

    def withdraw(self, envelope: Envelope) -> None:
        if envelope.phase:
            self.messenger.start(seal(envelope, room_for(0), 0), envelope.part, phase=1)
        else:
            self._send_alone(envelope)

    def meet(self, envelope: Envelope) -> None:
        members = self.messenger.transport.members
        compare(split(self.messenger.wait(self._send_alone(envelope)), members)[0], members)

    def _send_alone(self, envelope: Envelope) -> Pending:
        ranks, message = self.messenger.transport.size, seal(envelope, room_for(0), 0)
        return self.messenger.start_alltoall(message.repeat(ranks), [len(message)] * ranks, envelope.part)


class TwoPhaseFlight(PayloadFlight):
    """Shards on their way to their owners, then means on their way to all."""

    def __init__(self, plan: TwoPhase, codecs: Codecs, outgoing: Outgoing):
        self.messenger, self.buffers, self.outgoing = plan.messenger, plan.buffers, outgoing
        self.codec, self.fine = codecs
        self.part, self.rank = outgoing.envelope.part, self.messenger.transport.rank
        self.shards = outgoing.whole.shards(self.messenger.transport.size)
        self.drawn, self._pending = self._send_shards()
        self._arrived: Arrived | None = None

    def _send_shards(self) -> tuple[Drawn, Pending]:
        buffer = self.buffers.take(f"shards.{self.part}", sum(map(self._room, self.shards)), self.outgoing.device)
        lengths, start, drawn = [], 0, []
        for rank, shard in enumerate(self.shards):
            one, message = self._encode_shard(rank, shard, buffer[start:])
            drawn.append(one)
            lengths.append(len(message))
            start += len(message)
        return _total(drawn), self.messenger.start_alltoall(buffer[:start], lengths, self.part)

    def _room(self, shard: Part) -> int:
        return size_class(ENVELOPE_BYTES + bound(shard.layout, self.codec.codebook, inline=True))

    def _encode_shard(self, rank: int, shard: Part, buffer: Tensor) -> tuple[Drawn, Tensor]:
        segments = shard.cut(self.outgoing.segments)
        key = self.outgoing.key.within(part=self.part, shard=rank)
        layout = shard.layout.of(list(map(Tensor.numel, segments)))
        with self.messenger.communication.measure("encode"):
            drawn = self.codec.encode_segments(segments, layout, key, buffer[ENVELOPE_BYTES:])
        return drawn, seal(self.outgoing.envelope, buffer, drawn.size)

    def landed(self) -> list[Envelope]:
        return self._messages[0]

    @kept
    def _messages(self) -> tuple[list[Envelope], list[Tensor]]:
        """All ranks' payloads of the shard that this rank owns."""
        return split(self.messenger.wait(self._pending), self.messenger.transport.members)

    def advance(self) -> None:
        """Averages the shard that this rank owns and sends the mean."""
        envelopes, payloads = self._messages
        members = self.messenger.transport.members
        compare(envelopes, members)
        arrived = Arrived(self.codec, envelopes, payloads, members)
        sizes = arrived.common_sizes(self.shards[self.rank].layout.sizes)
        vector = self.buffers.take_floats(f"mean.{self.part}", sum(sizes), self.outgoing.device)
        means = list(vector.split(list(sizes)))
        with self.messenger.communication.measure("decode"):
            arrived.mean_into(means)
        self._pending = self._send_mean(means)

    def _send_mean(self, means: Sequence[Tensor]) -> Pending:
        shard, key = self.shards[self.rank], self.outgoing.key.within(phase=1, part=self.part, shard=self.rank)
        layout = shard.layout.of(list(map(Tensor.numel, means)))
        most = bound(shard.layout, self.fine.codebook, inline=True)
        buffer = self.buffers.take(f"means.{self.part}", most, self.outgoing.device)
        with self.messenger.communication.measure("encode"):
            self.mean_drawn = self.fine.encode_segments(means, layout, key, buffer[ENVELOPE_BYTES:])
        # This message is the one that reaches all ranks, so it tells of both roundings.
        sums = Sums.of(self.codec, self.drawn, self.mean_drawn)
        message = seal(replace(self.outgoing.envelope, phase=1, sums=sums), buffer, self.mean_drawn.size)
        return self.messenger.start(message, self.part, phase=1)

    @property
    def arrived(self) -> Arrived:
        """The means of all shards; waits for them when first asked."""
        if self._arrived is None:
            envelopes, payloads = self.messenger.finish(self._pending)
            self._arrived = Arrived(self.fine, envelopes, payloads, self.messenger.transport.members)
        return self._arrived

    def sizes(self) -> tuple[int, ...]:
        there = [False] * len(self.outgoing.whole.sizes)
        for shard, sizes in zip(self.shards, self.arrived.sizes, strict=True):
            for piece, size in zip(shard.slices, sizes, strict=True):
                there[piece.segment] = there[piece.segment] or size > 0
        return tuple(size if found else 0 for size, found in zip(self.outgoing.whole.sizes, there, strict=True))

    def collect(self, targets: Sequence[Tensor], factor: float) -> tuple[bool, ...]:
        arrived = self.arrived
        with self.messenger.communication.measure("decode"):
            return self._decode(arrived, targets, factor)

    def _decode(self, arrived: Arrived, targets: Sequence[Tensor], factor: float) -> tuple[bool, ...]:
        broken = [False] * len(targets)
        for shard, payload in zip(self.shards, arrived.payloads, strict=True):
            pieces = shard.cut(targets)
            flags = self.fine.decode_sections([payload], pieces, None, factor)
            for piece, flag in zip(shard.slices, flags, strict=True):
                broken[piece.segment] = broken[piece.segment] or flag
        return tuple(broken)


def _total(drawn: Sequence[Drawn]) -> Drawn:
    """What was drawn of all shards together."""
    return Drawn(
        sum(one.size for one in drawn),
        torch.stack([one.counts for one in drawn]).sum(dim=0),
        sum(one.squared_error for one in drawn),
        sum(one.squared_norm for one in drawn),
        (),
    )
