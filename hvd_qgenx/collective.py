"""The collectives on a process set: counted, padded to size classes, checked to be the same exchange everywhere.

The first room that imports Horovod, and the only one that calls its collectives.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_qgenx.traffic import Communication

try:
    import horovod.torch as hvd
except ImportError as error:
    raise ImportError(
        "exchanging gradients needs Horovod with PyTorch: pip install --no-build-isolation horovod "
        "(see hvd_qgenx's README for a build that works with today's torch)"
    ) from error

# Lengths that change at every step would evict Horovod's response cache, so messages are padded to classes of this
# many significant bits: 1.6 % more bytes at worst.
_SIGNIFICANT_BITS = 6
_POLL_SECONDS = 1e-4
_RECORD = struct.Struct("<QQQQ16sd")


class DisagreementError(RuntimeError):
    """Ranks that were told, or that do, different things; raised on every rank, naming both."""


@dataclass(frozen=True)
class Record:
    """What precedes every message: its true length, and what the sender believes this exchange to be.

    Args:
        number: of the optimizer or compressor, see ``Communication.number``.
        step: how many exchanges it has made.
        stage: the half-step, or what else the message is for; 16 letters at most.
        term: this rank's term of a sum.
        first: the call number of the first tensor (the drop-in's; see ``compression``).
    """

    number: int
    step: int
    stage: str
    term: float = 0.0
    first: int = 0

    def pack(self, body: Tensor) -> Tensor:
        size = _RECORD.size + len(body)
        head = _RECORD.pack(size, self.number, self.step, self.first, self.stage.encode(), self.term)
        return torch.cat((torch.frombuffer(bytearray(head), dtype=torch.uint8), body))

    @classmethod
    def unpack(cls, message: Tensor) -> tuple[Record, Tensor]:
        _, number, step, first, stage, term = _RECORD.unpack_from(message.numpy())
        return cls(number, step, stage.rstrip(b"\0").decode(), term, first), message[_RECORD.size :]

    def __str__(self) -> str:
        return f"exchange {self.step} ({self.stage})"


def size_class(size: int) -> int:
    """The smallest number of ``_SIGNIFICANT_BITS`` + 1 significant bits that is not below ``size``."""
    unit = 1 << max(size.bit_length() - 1 - _SIGNIFICANT_BITS, 4)
    return -(-size // unit) * unit


def _split(gathered: Tensor) -> list[Tensor]:
    """The messages in an allgather's output, each found by the length at its start, without their padding."""
    messages, start = [], 0
    while start < len(gathered):
        (size,) = struct.unpack_from("<Q", gathered[start : start + 8].numpy())
        messages.append(gathered[start : start + size])
        start += size_class(size)
    return messages


def _finish(handle: int) -> Tensor:
    """The result of an operation. Horovod's own wait spins, and takes the core that a slower rank needs to arrive."""
    while not hvd.poll(handle):
        time.sleep(_POLL_SECONDS)
    return hvd.synchronize(handle)


class Group:
    """The ranks that exchange: collectives on a process set, counted, and their agreement."""

    def __init__(self, process_set=None, communication: Communication | None = None):
        self.process_set = hvd.global_process_set if process_set is None else process_set
        self.communication = communication or Communication()

    def check_started(self) -> None:
        if not hvd.is_initialized():
            raise RuntimeError("Horovod is not initialized: call horovod.torch.init() first")

    @property
    def size(self) -> int:
        return self.process_set.size() if self.included else 1

    @property
    def included(self) -> bool:
        return self.process_set.included()

    @property
    def rank(self) -> int:
        return self.process_set.rank()

    def gather(self, message: Tensor) -> list[Tensor]:
        """All ranks' messages, in rank order; each starts with its length in 8 bytes."""
        padded = torch.zeros(size_class(len(message)), dtype=torch.uint8)
        padded[: len(message)] = message
        padded = self.communication.count(padded)
        handle = hvd.allgather_async(padded, name="hvd_qgenx.exchange", process_set=self.process_set)
        return _split(_finish(handle))

    def allreduce(self, vector: Tensor, op, predivide: float) -> Tensor:
        """The mean or the sum of one vector over all ranks."""
        handle = hvd.allreduce_async(
            self.communication.count(vector),
            name="hvd_qgenx.allreduce",
            op=op,
            prescale_factor=1.0 / predivide,
            postscale_factor=predivide,
            process_set=self.process_set,
        )
        return _finish(handle)

    def gather_records(self, record: Record, body: Tensor) -> tuple[list[Record], list[Tensor]]:
        """All ranks' records and bodies. Raises DisagreementError if they are not at the same exchange."""
        pairs = [Record.unpack(message) for message in self.gather(record.pack(body))]
        for rank, (other, _) in enumerate(pairs):
            _compare_records(pairs[0][0], other, rank)
        return [record for record, _ in pairs], [body for _, body in pairs]

    def agree(self, lines: Sequence[str], position: Sequence[int]) -> list[list[int]]:
        """Compares a description, line by line, with those of all ranks; returns the positions of all ranks."""
        texts = self._gather_texts("agreement", "\n".join([json.dumps(position), *lines]))
        parts = [text.split("\n") for text in texts]
        for rank, (_, *other) in enumerate(parts):
            _compare(parts[0][1:], other, rank)
        return [json.loads(first) for first, *_ in parts]

    def share_state(self, leader: int, state: dict) -> dict:
        """The state of rank ``leader``, on all ranks."""
        text = json.dumps(state) if self.rank == leader else ""
        return json.loads(self._gather_texts("state", text)[leader])

    def _gather_texts(self, stage: str, text: str) -> list[str]:
        body = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.zeros(0).byte()
        _, bodies = self.gather_records(Record(self.communication.number, 0, stage), body)
        return [bytes(body.numpy()).decode() for body in bodies]


def _compare_records(first: Record, other: Record, rank: int) -> None:
    if other.number != first.number:
        raise DisagreementError(
            f"ranks use different optimizers or compressors: rank 0 the {first.number}. that it made, "
            f"rank {rank} its {other.number}.; all ranks must make and use them in the same order"
        )
    if (other.step, other.stage) != (first.step, first.stage):
        raise DisagreementError(f"ranks are out of step: rank 0 is at {first}, rank {rank} at {other}")


def _compare(first: list[str], other: list[str], rank: int) -> None:
    for mine, theirs in zip(first, other, strict=False):
        if mine != theirs:
            raise DisagreementError(f"ranks disagree: rank 0 has {mine}, rank {rank} has {theirs}")
    if len(first) != len(other):
        raise DisagreementError(f"ranks disagree: rank 0 describes {len(first)} things, rank {rank} {len(other)}")
