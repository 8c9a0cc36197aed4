"""The plan "allgather": every rank's payload travels to all ranks, which decode and add them in rank order."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvd_qgenx.backends import Drawn
from hvd_qgenx.codec import Codec
from hvd_qgenx.drift import Sums
from hvd_qgenx.exchange.message import (
    ENVELOPE_BYTES,
    DisagreementError,
    Envelope,
    Messenger,
    compare,
    room_for,
    seal,
    split,
)
from hvd_qgenx.exchange.plan import Codecs, Flight, Outgoing, Plan
from hvd_qgenx.payload import PayloadError, bound, peek
from hvd_qgenx.transports import Pending
from hvd_qgenx.transports.waiting import kept


class Allgather(Plan):
    """(K - 1) payloads reach every rank; each is rounded once. Right for few ranks, and the only plan by which every
    rank learns every other's own vector."""

    def start(self, codecs: Codecs, outgoing: Outgoing) -> AllgatherFlight:
        codec, part = codecs.own, outgoing.envelope.part
        most = bound(outgoing.layout, codec.codebook, inline=True)
        buffer = self.buffers.take(f"allgather.{part}", most, outgoing.device)
        with self.messenger.communication.measure("encode"):
            drawn = codec.encode_segments(outgoing.segments, outgoing.layout, outgoing.key, buffer[ENVELOPE_BYTES:])
        payload = buffer[ENVELOPE_BYTES : ENVELOPE_BYTES + drawn.size]
        term = outgoing.term(payload) if outgoing.term else 0.0
        message = seal(replace(outgoing.envelope, term=term, sums=Sums.of(codec, drawn)), buffer, drawn.size)
        return AllgatherFlight(codec, self.messenger, self.messenger.start(message, part), drawn)

    def withdraw(self, envelope: Envelope) -> None:
        if not envelope.phase:  # there is no other
            self.messenger.start(seal(envelope, room_for(0), 0), envelope.part)

    def meet(self, envelope: Envelope) -> None:
        self.messenger.gather(envelope, torch.zeros(0, dtype=torch.uint8, device="cpu"))


class PayloadFlight(Flight):
    """A flight that ends in payloads, the same ones on all ranks."""

    @property
    @abstractmethod
    def arrived(self) -> Arrived:
        """These payloads; waits for them when first asked."""

    def terms(self) -> list[float]:
        return self.arrived.terms

    def sums(self) -> list[Sums]:
        return [envelope.sums for envelope in self.arrived.envelopes]

    def coordinates(self) -> int:
        return sum(map(sum, self.arrived.sizes))


@dataclass(frozen=True)
class AllgatherFlight(PayloadFlight):
    """Payloads on their way to all ranks."""

    codec: Codec
    messenger: Messenger
    pending: Pending
    drawn: Drawn

    def landed(self) -> list[Envelope]:
        return self._messages[0]

    def advance(self) -> None:
        """There is one phase."""

    def sizes(self) -> tuple[int, ...]:
        return self.arrived.common_sizes()

    def collect(self, targets: Sequence[Tensor], factor: float) -> tuple[bool, ...]:
        arrived = self.arrived
        with self.messenger.communication.measure("decode"):
            return arrived.mean_into(targets, factor)

    @kept
    def _messages(self) -> tuple[list[Envelope], list[Tensor]]:
        return split(self.messenger.wait(self.pending), self.messenger.transport.members)

    @kept
    def arrived(self) -> Arrived:
        """All ranks' payloads; waits for them when first asked."""
        envelopes, payloads = self._messages
        members = self.messenger.transport.members
        compare(envelopes, members)
        return Arrived(self.codec, envelopes, payloads, members)


class Arrived:
    """All ranks' payloads of one exchange."""

    def __init__(self, codec: Codec, envelopes: list[Envelope], payloads: list[Tensor], ranks: Sequence[int]):
        self.codec, self.envelopes, self.payloads, self.ranks = codec, envelopes, payloads, ranks
        self._decoded_factor: float | None = None
        peeked = [peek(payload) for payload in payloads]
        self.sizes = [sizes for sizes, _ in peeked]
        for rank, (_, book) in zip(ranks, peeked, strict=True):
            if book != peeked[0][1]:
                self._blame_payloads()
                raise DisagreementError(
                    f"ranks disagree: rank {ranks[0]} coded with codebook {peeked[0][1]:016x}, "
                    f"rank {rank} with codebook {book:016x}; one of them has a stale state: "
                    "load the same one on all ranks"
                )

    def _blame_payloads(self) -> None:
        """Raises PayloadError if what looks like a disagreement is a damaged payload."""
        for payload in self.payloads:
            self.codec.parse(payload)

    @property
    def terms(self) -> list[float]:
        """All ranks' terms, in rank order."""
        return [envelope.term for envelope in self.envelopes]

    def common_sizes(self, known: Sequence[int] | None = None) -> tuple[int, ...]:
        """Coordinates of each section on the ranks that have it; 0 where no rank has it.

        Args:
            known: what these are where they are there, to be believed rather than a payload.

        Raises:
            DisagreementError: if two ranks have a section of different sizes, or different numbers of sections.
            PayloadError: if they have others than those known.
        """
        sizes = self._common_sizes()
        if known is not None and not (len(sizes) == len(known) and all(map(_is_there_or_not, sizes, known))):
            self._blame_payloads()
            raise PayloadError(f"payload: sizes are {sizes[:8]}, expected {tuple(known[:8])}")
        return sizes

    def _common_sizes(self) -> tuple[int, ...]:
        if all(sizes == self.sizes[0] for sizes in self.sizes):
            return self.sizes[0]
        counts = {len(sizes) for sizes in self.sizes}
        found = [{size for size in sizes if size} for sizes in zip(*self.sizes, strict=False)]
        if len(counts) > 1 or any(len(sizes) > 1 for sizes in found):
            self._blame_payloads()
            raise DisagreementError(f"ranks disagree on tensors: {sorted(counts)} of {list(map(sorted, found))[:8]}")
        return tuple(next(iter(sizes), 0) for sizes in found)

    def mean_into(self, targets: Sequence[Tensor], factor: float = 1.0) -> tuple[bool, ...]:
        """Overwrites one target for each section; says which are NaN throughout."""
        return self.codec.decode_sections(self.payloads, targets, None, factor)

    def decode_in_order(self, targets: Sequence[Tensor], factor: float) -> tuple[bool, ...]:
        """Overwrites one target for each section, if all ranks have the same ones; says which are NaN.

        Whether section i of every rank is the same tensor is for the caller to find out, see ``decoded_as``.
        """
        if any(sizes != self.sizes[0] for sizes in self.sizes):
            return ()
        self._decoded_factor = factor
        return spoil(targets, self.mean_into(targets, factor))

    def decoded_as(self, section: int, sections: Sequence[int], factor: float) -> bool:
        """Whether ``decode_in_order`` has put the mean of these sections times this factor into that target."""
        return self._decoded_factor == factor and all(other == section for other in sections)

    def mean_of(self, sections: Sequence[int], target: Tensor, factor: float) -> bool:
        """Overwrites the target with the mean of section ``sections[rank]`` of every rank; says whether it is NaN."""
        found = [sizes[section : section + 1] for sizes, section in zip(self.sizes, sections, strict=True)]
        if any(size != found[0] or not size for size in found):
            pairs = zip(self.ranks, found, strict=True)
            seen = ", ".join(f"rank {rank} has {size[0] if size else 'none'}" for rank, size in pairs)
            raise DisagreementError(f"ranks disagree on the coordinates of one tensor: {seen}")
        places = [[section] for section in sections]
        return spoil([target], self.codec.decode_sections(self.payloads, [target], places, factor))[0]


def _is_there_or_not(size: int, known: int) -> bool:
    return size in (0, known)


def spoil(targets: Sequence[Tensor], broken: tuple[bool, ...]) -> tuple[bool, ...]:
    """A tensor of which any coordinate is not finite is NaN throughout."""
    for target, is_broken in zip(targets, broken, strict=True):
        if is_broken:
            target.fill_(torch.nan)
    return broken
