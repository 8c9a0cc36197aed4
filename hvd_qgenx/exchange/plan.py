"""A plan: which messages carry the coded vectors of all ranks, and in which order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hvd_qgenx.backends import Drawn
from hvd_qgenx.codec import Codec
from hvd_qgenx.exchange.message import ENVELOPE_BYTES, Envelope, Messenger, room_for
from hvd_qgenx.key import Key
from hvd_qgenx.layout import Layout


class Buffers:
    """Send buffers that are kept from one exchange to the next, by name; made anew when more room is needed."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, body_bytes: int) -> Tensor:
        """A buffer for a message with a body of up to so many bytes; what it held is gone."""
        buffer = self._kept.get(name)
        if buffer is None or len(buffer) < ENVELOPE_BYTES + body_bytes:
            buffer = self._kept[name] = room_for(body_bytes)
        return buffer


@dataclass(frozen=True)
class Outgoing:
    """What a rank is about to send of a vector, or of a part of it.

    Attributes:
        segments: vectors where they lie.
        layout: how they are cut.
        key: what the draws depend on.
        envelope: of the message.
        term: makes the envelope's term from the payload, if there is to be one.
    """

    segments: Sequence[Tensor]
    layout: Layout
    key: Key
    envelope: Envelope
    term: Callable[[Tensor], float] | None = None


class Flight(ABC):
    """A vector, or a part of it, that is under way."""

    drawn: Drawn

    @abstractmethod
    def advance(self) -> None:
        """Starts what comes after the first phase; called for every flight before any is collected."""

    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """Coordinates of each section on the ranks that have it, 0 where none has; waits until that is known."""

    @abstractmethod
    def terms(self) -> list[float]:
        """All ranks' terms, in rank order; waits for them."""

    @abstractmethod
    def collect(self, targets: Sequence[Tensor], factor: float) -> tuple[bool, ...]:
        """Overwrites the targets with the means times ``factor``; says which of them are NaN throughout."""


class Plan(ABC):
    """How coded vectors get to all ranks. A plan is a room beside ``allgather``, and an entry of ``coded.PLANS``."""

    def __init__(self, messenger: Messenger, buffers: Buffers):
        self.messenger, self.buffers = messenger, buffers

    @abstractmethod
    def start(self, codec: Codec, outgoing: Outgoing) -> Flight:
        """Encodes and sends; returns at once."""
