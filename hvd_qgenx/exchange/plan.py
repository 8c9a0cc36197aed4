"""A plan: which messages carry the coded vectors of all ranks, and in which order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_qgenx.backends import Drawn, device_of
from hvd_qgenx.codec import Codec
from hvd_qgenx.drift import Sums
from hvd_qgenx.exchange.message import ENVELOPE_BYTES, Envelope, Messenger, room_for
from hvd_qgenx.key import Key
from hvd_qgenx.layout import Layout

_CPU = torch.device("cpu")


class Buffers:
    """Buffers that are kept from one exchange to the next, by name; made anew when more room is needed."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._floats: dict[str, Tensor] = {}

    def take(self, name: str, body_bytes: int, device: torch.device = _CPU) -> Tensor:
        """A buffer for a message with a body of up to so many bytes, which ``device`` can copy to by itself; what it
        held is gone."""
        buffer = self._kept.get(name)
        if buffer is None or len(buffer) < ENVELOPE_BYTES + body_bytes:
            buffer = self._kept[name] = room_for(body_bytes, pinned=device.type == "cuda")
        return buffer

    def take_floats(self, name: str, numel: int, device: torch.device = _CPU) -> Tensor:
        """A float32 vector of so many coordinates on ``device``; what it held is gone."""
        vector = self._floats.get(name)
        if vector is None or len(vector) < numel or vector.device != device:
            vector = self._floats[name] = torch.empty(numel, dtype=torch.float32, device=device)
        return vector[:numel]

    def clear(self) -> None:
        """Gives all memory back; for a vector that is cut otherwise."""
        self._kept.clear()
        self._floats.clear()


@dataclass(frozen=True)
class Outgoing:
    """What a rank is about to send of a vector, or of a part of it.

    Attributes:
        segments: vectors where they lie; those that this rank lacks are empty.
        whole: how they are cut on a rank that lacks none, the same on all ranks.
        key: what the draws depend on.
        envelope: of the message.
        term: makes the envelope's term from the payload, if there is to be one.
    """

    segments: Sequence[Tensor]
    whole: Layout
    key: Key
    envelope: Envelope
    term: Callable[[Tensor], float] | None = None

    @property
    def device(self) -> torch.device:
        """Where the vectors lie."""
        return device_of(self.segments, _CPU)

    @property
    def layout(self) -> Layout:
        """How the vectors that are there are cut."""
        return self.whole.of(list(map(Tensor.numel, self.segments)))


class Codecs(NamedTuple):
    """Of every rank's own vectors, and of their mean where a plan rounds that again."""

    own: Codec
    mean: Codec


class Flight(ABC):
    """A vector, or a part of it, that is under way."""

    #: What was drawn of this rank's own vectors; and of the mean that it owned, once that was sent.
    drawn: Drawn
    mean_drawn: Drawn | None = None

    @abstractmethod
    def landed(self) -> list[Envelope]:
        """What all ranks' messages of the first phase say of themselves, not compared yet; waits for them."""

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
    def sums(self) -> list[Sums]:
        """What all ranks' roundings came to, in rank order; waits for them."""

    @abstractmethod
    def coordinates(self) -> int:
        """How many all ranks' messages hold, the same number on all of them; waits for them."""

    @abstractmethod
    def collect(self, targets: Sequence[Tensor], factor: float) -> tuple[bool, ...]:
        """Overwrites the targets with the means times ``factor``; says which of them are NaN throughout."""


class Plan(ABC):
    """How coded vectors get to all ranks. A plan is a room beside ``allgather``, and an entry of ``coded.PLANS``."""

    def __init__(self, messenger: Messenger, buffers: Buffers):
        self.messenger, self.buffers = messenger, buffers

    @abstractmethod
    def start(self, codecs: Codecs, outgoing: Outgoing) -> Flight:
        """Encodes and sends; returns at once."""

    def groups(self, segments: Sequence[Tensor], whole: Layout) -> list[Sequence[Tensor]]:
        """What of a part is encoded at once, in the order in which that is done; ``whole`` as of ``Outgoing``."""
        return [segments]

    @abstractmethod
    def withdraw(self, envelope: Envelope) -> None:
        """Sends an envelope alone in place of the message of its part and phase; waits for nothing."""

    @abstractmethod
    def meet(self, envelope: Envelope) -> None:
        """Sends an envelope alone in place of part 0, so that ranks that send theirs learn it; waits for them.

        Raises:
            DisagreementError: unless all ranks do the same.
        """
