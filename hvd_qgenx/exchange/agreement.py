"""What ranks agree on before they exchange: settings, parameters, and how far each of them is."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_qgenx.exchange.message import DisagreementError, Envelope, Messenger
from hvd_qgenx.transports import Pending


def start(messenger: Messenger, lines: Sequence[str], position: Sequence[int]) -> Pending:
    """Sends a description, and how far this rank is, for ``agree``."""
    text = "\n".join([json.dumps(position), *lines])
    return messenger.start_body(Envelope(messenger.communication.number, 0, "agreement"), _tensor(text.encode()))


def agree(messenger: Messenger, started: Pending) -> list[list[int]]:
    """Compares a description, line by line, with those of all ranks; returns the positions of all ranks.

    Raises:
        DisagreementError: on every rank, naming the first line that differs.
    """
    _, bodies = messenger.finish(started)
    described = [body.numpy().tobytes().decode().split("\n") for body in bodies]
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


_FINGERPRINT_BYTES = 8


def fingerprint(tensor: Tensor) -> bytes:
    """8 bytes of a hash of all coordinates, by their bits."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(values.numpy().data, digest_size=_FINGERPRINT_BYTES).digest()


def compare_replicas(
    messenger: Messenger, envelope: Envelope, fingerprints: Sequence[bytes], names: Sequence[str]
) -> None:
    """Compares what ranks hold, tensor by tensor.

    Raises:
        DisagreementError: on every rank, naming the first tensor that differs, and its ranks by what they hold.
    """
    _, bodies = messenger.gather(envelope, _tensor(b"".join(fingerprints)))
    held = [body.numpy().tobytes() for body in bodies]
    if all(other == held[0] for other in held):
        return
    for index, name in enumerate(names):
        groups: dict[bytes, list[int]] = {}
        for rank, all_of_it in zip(messenger.transport.members, held, strict=True):
            place = slice(index * _FINGERPRINT_BYTES, (index + 1) * _FINGERPRINT_BYTES)
            groups.setdefault(all_of_it[place], []).append(rank)
        if len(groups) > 1:
            parted = " and ".join(f"rank{'s' * (len(one) > 1)} {', '.join(map(str, one))}" for one in groups.values())
            raise DisagreementError(
                f"replicas are not equal after exchange {envelope.step}: {name} differs between {parted}; broadcast "
                "one rank's parameters, and on unlike processors set ATEN_CPU_CAPABILITY alike"
            )


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
