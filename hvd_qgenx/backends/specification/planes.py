"""Planes of bits, one after another in each bucket, and buckets one after another in bytes; and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_qgenx.backends.specification.rounding import counting
from hvd_qgenx.words import CodeError


def write_planes(planes: list[tuple[Tensor, Tensor]], num_buckets: int) -> tuple[Tensor, Tensor]:
    """Puts planes one after another in each bucket, and buckets one after another at byte boundaries."""
    counts = [torch.bincount(owner, minlength=num_buckets) for owner, _ in planes]
    bit_lengths = torch.stack(counts).sum(dim=0)
    byte_lengths = (bit_lengths + 7) // 8
    # Buckets start at bytes, so that they can be written and read apart.
    cursor = 8 * (byte_lengths.cumsum(0) - byte_lengths)
    bits = torch.zeros(8 * int(byte_lengths.sum()), dtype=torch.uint8, device="cpu")
    for (owner, values), count in zip(planes, counts, strict=True):
        bits[_positions(owner, count, cursor)] = values.to(torch.uint8)
        cursor += count
    return pack_bits(bits), byte_lengths


def _positions(owner: Tensor, count: Tensor, cursor: Tensor) -> Tensor:
    """Where elements, sorted by their bucket ``owner``, lie if each bucket's run starts at its cursor."""
    first = count.cumsum(0) - count
    return counting(len(owner)) + (cursor - first)[owner]


class Reader:
    """Reads planes in the order in which ``write_planes`` put them, never past the end of a bucket."""

    def __init__(self, packed: Tensor, byte_lengths: Tensor):
        self.bits = unpack_bits(packed)
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
        # Before anything is read: a length is the sender's word.
        if bool((self.cursor + count > self.end).any()):
            raise CodeError("a bucket whose code words pass its end")
        bits = self.bits[_positions(owner, count, self.cursor)]
        self.cursor = self.cursor + count
        return bits

    def finish(self) -> None:
        # A whole byte too many, or a bit set in the padding, is nothing that an encoder writes.
        rest = self.end - self.cursor
        if bool((rest >= 8).any()) or bool(self.bits[_positions(*_counted(rest), self.cursor)].any()):
            raise CodeError("a bucket with bits behind its code words")


def _counted(count: Tensor) -> tuple[Tensor, Tensor]:
    """The owner of each of ``count`` things, and ``count``."""
    return torch.repeat_interleave(counting(len(count)), count), count


def pack_bits(bits: Tensor) -> Tensor:
    """uint8[ceil(m / 8)] from uint8[m] of zeros and ones, the first bit lowest."""
    padded = torch.zeros(-(-len(bits) // 8) * 8, dtype=torch.uint8, device="cpu")
    padded[: len(bits)] = bits
    return (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor) -> Tensor:
    """uint8[8 m] of zeros and ones from uint8[m]."""
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1).view(-1)
