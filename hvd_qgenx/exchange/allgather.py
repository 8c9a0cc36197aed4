"""The plan "allgather": every rank's payload travels to all ranks, which decode and add them in rank order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hvd_qgenx.backends import Drawn
from hvd_qgenx.codec import Codec
from hvd_qgenx.exchange.message import ENVELOPE_BYTES, DisagreementError, Envelope, Messenger, seal
from hvd_qgenx.exchange.plan import Codecs, Flight, Outgoing, Plan
from hvd_qgenx.payload import bound
from hvd_qgenx.transports import Pending


class Allgather(Plan):
    """(K - 1) payloads reach every rank; each is rounded once. Right for few ranks, and the only plan by which every
    rank learns every other's own vector."""

    def start(self, codecs: Codecs, outgoing: Outgoing) -> AllgatherFlight:
        codec, part = codecs.own, outgoing.envelope.part
        buffer = self.buffers.take(f"allgather.{part}", bound(outgoing.layout, codec.codebook, inline=True))
        drawn = codec.encode_segments(outgoing.segments, outgoing.layout, outgoing.key, buffer[ENVELOPE_BYTES:])
        payload = buffer[ENVELOPE_BYTES : ENVELOPE_BYTES + drawn.size]
        term = outgoing.term(payload) if outgoing.term else 0.0
        message = seal(replace(outgoing.envelope, term=term), buffer, drawn.size)
        return AllgatherFlight(codec, self.messenger, self.messenger.start(message, part), drawn)


@dataclass(frozen=True)
class AllgatherFlight(Flight):
    """Payloads on their way to all ranks."""

    codec: Codec
    messenger: Messenger
    pending: Pending
    drawn: Drawn

    def advance(self) -> None:
        """There is one phase."""

    def sizes(self) -> tuple[int, ...]:
        return self.arrived.common_sizes()

    def terms(self) -> list[float]:
        return self.arrived.terms

    def collect(self, targets: Sequence[Tensor], factor: float) -> tuple[bool, ...]:
        return self.arrived.mean_into(targets, factor)

    @cached_property
    def arrived(self) -> Arrived:
        """All ranks' payloads; waits for them when first asked."""
        envelopes, payloads = self.messenger.finish(self.pending)
        return Arrived(self.codec, envelopes, payloads)


class Arrived:
    """All ranks' payloads of one exchange."""

    def __init__(self, codec: Codec, envelopes: list[Envelope], payloads: list[Tensor]):
        self.codec, self.envelopes, self.payloads = codec, envelopes, payloads
        self._means: tuple[float, list[Tensor], tuple[bool, ...]] | None = None
        headers = [codec.parse(payload) for payload in payloads]
        self.sizes = [header.layout.sizes for header in headers]
        for rank, header in enumerate(headers):
            if header.codebook_hash != headers[0].codebook_hash:
                raise DisagreementError(
                    f"ranks disagree: rank 0 coded with codebook {headers[0].codebook_hash:016x}, rank {rank} with "
                    f"codebook {header.codebook_hash:016x}; one of them has a stale state: load the same one on all "
                    "ranks"
                )

    @property
    def terms(self) -> list[float]:
        """All ranks' terms, in rank order."""
        return [envelope.term for envelope in self.envelopes]

    def common_sizes(self) -> tuple[int, ...]:
        """Coordinates of each section on the ranks that have it; 0 where no rank has it.

        Raises:
            DisagreementError: if two ranks have a section of different sizes, or different numbers of sections.
        """
        counts = {len(sizes) for sizes in self.sizes}
        if len(counts) > 1:
            raise DisagreementError(f"ranks disagree on the number of tensors: {sorted(counts)}")
        found = [{size for size in sizes if size} for sizes in zip(*self.sizes, strict=True)]
        if any(len(sizes) > 1 for sizes in found):
            raise DisagreementError("ranks disagree on the coordinates of a tensor")
        return tuple(next(iter(sizes), 0) for sizes in found)

    def mean_into(self, targets: Sequence[Tensor], factor: float = 1.0) -> tuple[bool, ...]:
        """Overwrites one target for each section; says which are NaN throughout."""
        return self.codec.decode_sections(self.payloads, targets, None, factor)

    def mean_of(self, sections: Sequence[int], factor: float = 1.0) -> tuple[Tensor, bool]:
        """The mean of section ``sections[rank]`` of every rank, and whether it is NaN throughout."""
        found = [sizes[section : section + 1] for sizes, section in zip(self.sizes, sections, strict=True)]
        if any(size != found[0] or not size for size in found):
            seen = ", ".join(f"rank {rank} has {size[0] if size else 'none'}" for rank, size in enumerate(found))
            raise DisagreementError(f"ranks disagree on the coordinates of one tensor: {seen}")
        if len(set(sections)) == 1 and all(sizes == self.sizes[0] for sizes in self.sizes):
            targets, broken = self._all_means(factor)
            return targets[sections[0]], broken[sections[0]]
        target = torch.empty(found[0][0], dtype=torch.float32, device="cpu")
        (is_broken,) = self.codec.decode_sections(self.payloads, [target], [[section] for section in sections], factor)
        return target.fill_(torch.nan) if is_broken else target, is_broken

    def _all_means(self, factor: float) -> tuple[list[Tensor], tuple[bool, ...]]:
        """Of all sections, where they are the same on all ranks; decoded at once, when first asked for."""
        if self._means is None or self._means[0] != factor:
            targets = [torch.empty(size, dtype=torch.float32, device="cpu") for size in self.sizes[0]]
            broken = self.mean_into(targets, factor)
            for target, is_broken in zip(targets, broken, strict=True):
                if is_broken:
                    target.fill_(torch.nan)
            self._means = (factor, targets, broken)
        return self._means[1:]
