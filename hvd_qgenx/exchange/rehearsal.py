"""An exchange without a network: what a rank sends and computes, by the very code that will do it."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from hvd_qgenx.exchange.cost import Work
from hvd_qgenx.exchange.exchange import Exchange
from hvd_qgenx.transports import Pending, Transport

#: Coordinates: half a millisecond for each payload, and about as much where vectors are only copied.
CODED, COPIED = 2**18, 2**21
_ROUNDS = 5


class _Echo(Pending):
    """So many copies of a message; made when they are waited for, as work that is not the rank's own."""

    def __init__(self, message: Tensor, copies: int):
        self.message, self.copies = message, copies

    def done(self) -> bool:
        return True

    def wait(self) -> Tensor:
        return self.message.repeat(self.copies) if self.copies > 1 else self.message


class Rehearsal(Transport):
    """This rank as the first of ``ranks`` that all send what it sends. Nothing travels."""

    def __init__(self, ranks: int):
        self._ranks = ranks

    @property
    def size(self) -> int:
        return self._ranks

    @property
    def rank(self) -> int:
        return 0

    @property
    def global_rank(self) -> int:
        return 0

    @property
    def included(self) -> bool:
        return True

    def check_started(self) -> None:
        """There is nothing to start."""

    def allgather(self, message: Tensor, name: str, lane: int = 0) -> Pending:
        return _Echo(message, self._ranks)

    def alltoall(self, messages: Tensor, splits: Tensor, name: str) -> Pending:
        return _Echo(messages[: int(splits[0])], self._ranks)

    def allreduce(self, vector: Tensor, name: str, mean: bool, predivide: float = 1.0) -> Pending:
        return _Echo(vector, 1)


def rehearse(exchange: Exchange, numel: int, unit: int = 1, keep: bool = False) -> Work:
    """What an exchange over a ``Rehearsal`` sends and computes for normal coordinates.

    Args:
        numel: coordinates, about.
        unit: coordinates that are not cut further into shards; shards are of equal lengths here, since all ranks' mean
            is this rank's.
        keep: whether all ranks' own vectors are kept, as Algorithm 1 needs them.
    """
    numel = _even(numel, exchange.transport.size * unit)
    vector = torch.randn(numel, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    exchange.describe(["rehearsal"], [torch.float32], [numel])
    exchange.settle()
    rounds = [_round(exchange, vector.clone(), keep) for _ in range(1 + _ROUNDS)][1:]  # the first one makes the buffers
    # The shortest: it is over before anybody else wants the core. So is what a rank does in an exchange, for the most
    # part, since it has waited before; the average of a busy machine would be several times as long.
    seconds, encode, decode, sent, again = min(rounds)
    overhead = max(seconds - encode - decode, 0.0)
    return Work((sent - again) / numel, encode / numel, decode / numel, overhead, again / numel)


def _even(numel: int, shards: int) -> int:
    """About ``numel`` coordinates, in shards of equally many pieces, and pieces of equally many units."""
    units = max(numel // shards, 1)
    return shards * (units // 32 * 32 if units > 32 else units)


def _round(exchange: Exchange, vector: Tensor, keep: bool) -> tuple[float, ...]:
    """Seconds without waiting, those of encoding and decoding, bytes sent, and bytes sent in a second phase."""
    count = exchange.communication
    before = (*count.seconds.values(), count.bytes_sent, count.second_phase_bytes)
    start = time.perf_counter()
    exchange.collect(exchange.submit(exchange.fuse([vector]), "step", keep=keep), ["rehearsal"])
    seconds = time.perf_counter() - start
    after = (*count.seconds.values(), count.bytes_sent, count.second_phase_bytes)
    encode, wait, decode, sent, again = (now - then for now, then in zip(after, before, strict=True))
    return seconds - wait, encode, decode, sent, again
