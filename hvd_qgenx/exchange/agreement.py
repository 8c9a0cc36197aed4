"""What ranks agree on before they exchange: settings, parameters, and how far each of them is."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_qgenx.exchange.message import DisagreementError, Envelope, Messenger


def agree(messenger: Messenger, lines: Sequence[str], position: Sequence[int]) -> list[list[int]]:
    """Compares a description, line by line, with those of all ranks; returns the positions of all ranks.

    Raises:
        DisagreementError: on every rank, naming the first line that differs.
    """
    text = "\n".join([json.dumps(position), *lines])
    bodies = _gather(messenger, "agreement", text.encode())
    described = [body.decode().split("\n") for body in bodies]
    members = messenger.transport.members
    for rank, (_, *other) in zip(members, described, strict=True):
        _compare_lines(described[0][1:], other, members[0], rank)
    return [json.loads(first) for first, *_ in described]


def share_state(messenger: Messenger, leader: int, state: dict) -> dict:
    """The state of rank ``leader``, on all ranks: numbers, words, lists and tensors."""
    written = io.BytesIO()
    if messenger.transport.rank == leader:
        torch.save(state, written)
    return torch.load(io.BytesIO(_gather(messenger, "state", written.getvalue())[leader]), weights_only=True)


def leader_of(positions: Sequence[Sequence[int]]) -> int:
    """The rank that has made most exchanges and iterations and fitted most codebooks; of equals, the lowest."""
    return max(range(len(positions)), key=lambda rank: (positions[rank][:3], -rank))


def _gather(messenger: Messenger, stage: str, body: bytes) -> list[bytes]:
    _, bodies = messenger.gather(Envelope(messenger.communication.number, 0, stage), _tensor(body))
    return [other.numpy().tobytes() for other in bodies]


def _tensor(body: bytes) -> Tensor:
    nothing = torch.zeros(0, dtype=torch.uint8, device="cpu")  # which torch.frombuffer refuses to make
    return torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else nothing


def _compare_lines(first: list[str], other: list[str], leader: int, rank: int) -> None:
    for mine, theirs in zip(first, other, strict=False):
        if mine != theirs:
            raise DisagreementError(f"ranks disagree: rank {leader} has {mine}, rank {rank} has {theirs}")
    if len(first) != len(other):
        raise DisagreementError(
            f"ranks disagree: rank {leader} describes {len(first)} things, rank {rank} {len(other)}"
        )
