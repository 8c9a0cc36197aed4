"""Messages between ranks: an envelope before every body, padding to size classes, counting, comparison."""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvd_qgenx.communication import Communication
from hvd_qgenx.drift import Sums
from hvd_qgenx.identity import label_of
from hvd_qgenx.transports import Pending, Transport
from hvd_qgenx.transports.waiting import Watched

MAGIC, VERSION = b"QGXM", 2
STAGES = (
    "step", "extrapolation", "agreement", "state", "adaptation", "vectors", "refusal", "void", "measurement", "rows",
    "interrupted", "joined", "replicas",
)  # fmt: skip

# Lengths that change at every step would evict Horovod's response cache, so messages are padded to classes of this
# many significant bits: 1.6 % more bytes at worst.
_SIGNIFICANT_BITS = 6
_ENVELOPE = struct.Struct("<4sHBBQQIIHxxxxxxddd4Qdd")
_CHECKSUM_AT, _CHECKSUM = 36, struct.Struct("<I")
ENVELOPE_BYTES = _ENVELOPE.size


class DisagreementError(RuntimeError):
    """Ranks that were told, or that do, different things; raised on every rank, naming both."""


class WithdrawnError(RuntimeError):
    """This rank's device failed before all of its vectors were sent; the other ranks have learnt that it did."""


@dataclass(frozen=True)
class Envelope:
    """What the sender of a message believes this exchange to be.

    Args:
        number: of the optimizer or compressor, see ``Communication.number``.
        step: how many exchanges it has made.
        stage: the half-step, or what else the message is for; one of ``STAGES``.
        term: this rank's term of a sum.
        first: the call number of the first tensor (the drop-in's; see ``compressor``).
        part: of a vector that travels in parts.
        phase: of a plan that has two.
        sums: of this rank's roundings, see ``drift``; in the message of a part that reaches all ranks.
    """

    number: int
    step: int
    stage: str
    term: float = 0.0
    first: int = 0
    part: int = 0
    phase: int = 0
    sums: Sums = field(default=Sums())

    def pack_into(self, buffer: Tensor, size: int) -> None:
        """Writes the envelope to the start of ``buffer``, uint8, for a message of ``size`` bytes, itself included."""
        error, norm, groups, mean_error, mean_norm = self.sums
        head = bytearray(_ENVELOPE.pack(
            MAGIC, VERSION, STAGES.index(self.stage), self.phase, size, self.step, self.number, self.first,
            self.part, self.term, error, norm, *groups, mean_error, mean_norm,
        ))  # fmt: skip
        _CHECKSUM.pack_into(head, _CHECKSUM_AT, zlib.crc32(head))
        buffer[:ENVELOPE_BYTES] = torch.frombuffer(head, dtype=torch.uint8)

    def __str__(self) -> str:
        return f"exchange {self.step} ({self.stage})"


def size_class(size: int) -> int:
    """The smallest number of ``_SIGNIFICANT_BITS`` + 1 significant bits that is not below ``size``."""
    unit = 1 << max(size.bit_length() - 1 - _SIGNIFICANT_BITS, 4)
    return -(-size // unit) * unit


def seal(envelope: Envelope, buffer: Tensor, body_bytes: int) -> Tensor:
    """The message whose body already lies behind the envelope's place in ``buffer``, padded to its class."""
    size = ENVELOPE_BYTES + body_bytes
    envelope.pack_into(buffer, size)
    padded = buffer[: size_class(size)]
    padded[size:] = 0  # what an earlier message left there is nobody's business
    return padded


def room_for(body_bytes: int, pinned: bool = False) -> Tensor:
    """A buffer for messages of up to so many bytes of body; a GPU copies to a pinned one by itself."""
    return torch.empty(size_class(ENVELOPE_BYTES + body_bytes), dtype=torch.uint8, device="cpu", pin_memory=pinned)


def unseal(message: Tensor, rank: int) -> tuple[Envelope, Tensor, int]:
    """The envelope of a message that begins ``message``, its body, and all its bytes with the padding."""
    if len(message) < ENVELOPE_BYTES:
        raise DisagreementError(f"the message of rank {rank} has {len(message)} bytes, less than an envelope")
    head = bytearray(message[:ENVELOPE_BYTES].numpy().tobytes())
    magic, version, stage, phase, size, step, number, first, part, term, *sums = _ENVELOPE.unpack(head)
    if (magic, version) != (MAGIC, VERSION):
        raise DisagreementError(
            f"rank {rank} speaks another language: its message begins with {magic!r} version {version}, this "
            f"library's with {MAGIC!r} version {VERSION}; install one version of hvd_qgenx on all ranks"
        )
    (checksum,) = _CHECKSUM.unpack_from(head, _CHECKSUM_AT)
    _CHECKSUM.pack_into(head, _CHECKSUM_AT, 0)
    if checksum != zlib.crc32(head):
        raise DisagreementError(f"the envelope of rank {rank} is damaged: its checksum does not match its bytes")
    if stage >= len(STAGES) or not ENVELOPE_BYTES <= size <= len(message):
        raise DisagreementError(f"the envelope of rank {rank} is damaged: stage {stage}, {size} bytes")
    error, norm, *groups, mean_error, mean_norm = sums
    drawn = Sums(error, norm, tuple(groups), mean_error, mean_norm)
    envelope = Envelope(number, step, STAGES[stage], term, first, part, phase, drawn)
    return envelope, message[ENVELOPE_BYTES:size], min(size_class(size), len(message))


def split(gathered: Tensor, ranks: Sequence[int] = ()) -> tuple[list[Envelope], list[Tensor]]:
    """The messages in an allgather's output, in rank order, each found by the length in its envelope.

    Args:
        gathered: uint8[n].
        ranks: the senders' numbers in the whole job, for messages; those that are not given are counted from 0.
    """
    envelopes: list[Envelope] = []
    bodies: list[Tensor] = []
    start = 0
    while start < len(gathered):
        sender = ranks[len(bodies)] if len(bodies) < len(ranks) else len(bodies)
        envelope, body, taken = unseal(gathered[start:], sender)
        envelopes.append(envelope)
        bodies.append(body)
        start += taken
    return envelopes, bodies


def compare(envelopes: Sequence[Envelope], ranks: Sequence[int]) -> None:
    """Raises DisagreementError unless all ranks are at the same exchange.

    Args:
        envelopes: of all ranks.
        ranks: their numbers in the whole job, for the message.
    """
    if len(envelopes) != len(ranks):
        raise DisagreementError(f"{len(envelopes)} messages arrived, from {len(ranks)} ranks")
    compare_interrupted(envelopes, ranks)
    pairs = list(zip(ranks, envelopes, strict=True))
    leader, first = next((pair for pair in pairs if pair[1].stage != "joined"), pairs[0])
    for rank, other in pairs:
        # Those that agree compare words beside their envelopes, which say more than a number does.
        agree = "agreement" in (first.stage, other.stage)
        if other.number != first.number and not agree:
            raise DisagreementError(
                f"ranks use different optimizers or compressors: rank {leader} {label_of(first.number)}, "
                f"rank {rank} {label_of(other.number)}; all ranks must use them in the same order, and those that "
                "belong together need the same names and shapes, or the same name="
            )
        if other.step != first.step or not _go_together(first.stage, other.stage):
            raise DisagreementError(f"ranks are out of step: rank {leader} is at {first}, rank {rank} at {other}")
        if (other.part, other.phase) != (first.part, first.phase):
            raise DisagreementError(
                f"ranks are out of step: rank {leader} sent part {first.part} of phase {first.phase} of {first}, "
                f"rank {rank} part {other.part} of phase {other.phase}"
            )


def compare_interrupted(envelopes: Sequence[Envelope], ranks: Sequence[int]) -> None:
    """Raises DisagreementError if some ranks, but not all, were interrupted in an exchange and come back to it."""
    interrupted = [rank for rank, one in zip(ranks, envelopes, strict=True) if one.stage == "interrupted"]
    if not interrupted or len(interrupted) == len(ranks):
        return
    who = f"rank {', '.join(map(str, interrupted))} was interrupted in an exchange"
    if len({envelope.step for envelope in envelopes}) == 1:
        raise DisagreementError(f"{who} that no rank has made: it can be repeated, on all ranks")
    raise DisagreementError(
        f"{who} that the others have made: parameters may differ now, so load one state on all ranks, or start again"
    )


def _go_together(first: str, other: str) -> bool:
    """Whether these are stages of one exchange; a rank that has no data takes part in any half-step."""
    return first == other or (other == "joined" and first in ("step", "extrapolation", "void"))


class Messenger:
    """Sends messages over a transport, counts them, and compares what arrives.

    All messages of part 0 go under one name, whatever they are for: ranks that do different things then meet and can
    tell, instead of waiting for each other. Other parts of several optimizers may be under way together, so these have
    names of their own; part 0 is looked at before them.
    """

    def __init__(self, transport: Transport, communication: Communication):
        self.transport, self.communication = transport, communication
        self._under_way: list[Watched] = []
        #: What second phases travel over: another one where operations have no names and two threads start them.
        self.second = transport

    def start(self, message: Tensor, part: int = 0, phase: int = 0) -> Pending:
        """Starts an allgather of a sealed message."""
        transport = self.second if phase else self.transport
        pending = transport.allgather(self.communication.count(message, phase), self._name(part, phase), part)
        return self.watch(pending, lambda: self._exchange_of(message))

    def start_alltoall(self, messages: Tensor, lengths: Sequence[int], part: int) -> Pending:
        """Starts an alltoall of sealed messages, one for each rank, one after another."""
        splits = torch.tensor(lengths, dtype=torch.int32, device="cpu")
        pending = self.transport.alltoall(self.communication.count(messages), splits, f"{self._name(part, 0)}.shards")
        return self.watch(pending, lambda: self._exchange_of(messages))

    def start_allreduce(self, vector: Tensor, envelope: Envelope, mean: bool, predivide: float) -> Pending:
        """Starts an allreduce that belongs to the exchange of ``envelope``; overwrites ``vector``."""
        name = f"hvd_qgenx.allreduce{self._own_name(threads_only=True)}"
        pending = self.transport.allreduce(self.communication.count(vector), name, mean, predivide)
        return self.watch(pending, lambda: self._in_words(envelope))

    def _name(self, part: int, phase: int) -> str:
        own = f"{self._own_name()}.{phase}.{part}" if part or phase else self._own_name(threads_only=True)
        return f"hvd_qgenx.exchange{own}"

    def _own_name(self, threads_only: bool = False) -> str:
        """What only this optimizer's operations have in their names.

        In the main thread there is one exchange at a time, and ranks that do different things shall meet. Beside it,
        other threads may use other optimizers at the same time.
        """
        if threads_only and threading.current_thread() is threading.main_thread():
            return ""
        return f".{self.communication.number}"

    def watch(self, pending: Pending, what: Callable[[], str]) -> Watched:
        """Begins the operation; its wait says after a while what it waits for."""
        watched = Watched(pending, self.transport, what)
        self._under_way = [*(one for one in self._under_way if not one.taken), watched]
        watched.begin()
        return watched

    def _exchange_of(self, message: Tensor) -> str:
        return self._in_words(unseal(message, self.transport.global_rank)[0])

    def _in_words(self, envelope: Envelope) -> str:
        return f"{envelope} of {label_of(self.communication.number)}"

    def drain(self) -> None:
        """Waits for what an interrupted exchange has left under way, and drops it.

        Raises:
            DisagreementError: if what arrived says that a rank came back to that exchange before it had sent its part.
        """
        left, self._under_way = [one for one in self._under_way if one.begun and not one.taken], []
        for result in [one.wait() for one in left]:
            if result.dtype == torch.uint8:
                compare_interrupted(split(result)[0], self.transport.members)

    def finish(self, pending: Pending) -> tuple[list[Envelope], list[Tensor]]:
        """All ranks' envelopes and bodies. Raises DisagreementError if they are not at the same exchange."""
        members = self.transport.members
        envelopes, bodies = split(self.wait(pending), members)
        compare(envelopes, members)
        return envelopes, bodies

    def wait(self, pending: Pending) -> Tensor:
        """The result of an operation."""
        with self.communication.measure("wait"):
            return pending.wait()

    def start_body(self, envelope: Envelope, body: Tensor) -> Pending:
        """Starts an allgather of a small message, in a buffer of its own."""
        buffer = room_for(len(body))
        buffer[ENVELOPE_BYTES : ENVELOPE_BYTES + len(body)] = body
        return self.start(seal(envelope, buffer, len(body)))

    def gather(self, envelope: Envelope, body: Tensor) -> tuple[list[Envelope], list[Tensor]]:
        """All ranks' envelopes and bodies, uint8, of a message that is waited for at once."""
        return self.finish(self.start_body(envelope, body))
