"""Planes of bits, one behind another in each bucket, and buckets one behind another in bytes; and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_qgenx import reference
from hvd_qgenx.words import CodeError


def write_planes(planes: list[tuple[Tensor, Tensor]], num_buckets: int) -> tuple[Tensor, Tensor]:
    """Puts planes one behind another in each bucket, and buckets one behind another at byte boundaries."""
    counts = [torch.bincount(owner, minlength=num_buckets) for owner, _ in planes]
    bit_lengths = torch.stack(counts).sum(dim=0)
    byte_lengths = (bit_lengths + 7) // 8
    cursor = 8 * (byte_lengths.cumsum(0) - byte_lengths)
    bits = torch.zeros(8 * int(byte_lengths.sum()), dtype=torch.uint8)
    for (owner, values), count in zip(planes, counts, strict=True):
        bits[_positions(owner, count, cursor)] = values.to(torch.uint8)
        cursor += count
    return reference.pack_bits(bits), byte_lengths


def _positions(owner: Tensor, count: Tensor, cursor: Tensor) -> Tensor:
    """Where elements, sorted by their bucket ``owner``, lie if each bucket's run starts at its cursor."""
    first = count.cumsum(0) - count
    return torch.arange(len(owner)) + (cursor - first)[owner]


class Reader:
    """Reads planes in the order in which ``write_planes`` put them, never past the end of a bucket."""

    def __init__(self, packed: Tensor, byte_lengths: Tensor):
        self.bits = reference.unpack_bits(packed)
        self.end = 8 * byte_lengths.cumsum(0)
        self.cursor = self.end - 8 * byte_lengths

    def bit(self, bucket: int) -> int:
        """The next bit of one bucket."""
        at = int(self.cursor[bucket])
        if at >= int(self.end[bucket]):
            raise CodeError("a bucket whose code words pass its end")
        self.cursor[bucket] += 1
        return int(self.bits[at])

    def read(self, owner: Tensor) -> Tensor:
        """The next bit of the bucket of each owner, which are sorted."""
        count = torch.bincount(owner, minlength=len(self.cursor))
        if bool((self.cursor + count > self.end).any()):
            raise CodeError("a bucket whose code words pass its end")
        bits = self.bits[_positions(owner, count, self.cursor)]
        self.cursor = self.cursor + count
        return bits

    def finish(self) -> None:
        rest = self.end - self.cursor
        if bool((rest >= 8).any()) or bool(self.bits[_positions(*_counted(rest), self.cursor)].any()):
            raise CodeError("a bucket with bits behind its code words")


def _counted(count: Tensor) -> tuple[Tensor, Tensor]:
    """The owner of each of ``count`` things, and ``count``."""
    return torch.repeat_interleave(torch.arange(len(count)), count), count
