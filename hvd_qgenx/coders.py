"""Prefix codes for the magnitudes 0..s of symbols: fixed width, Elias gamma, delta and omega, Huffman.

A codebook is a pure value. A prefix code is laid out in bit planes: its tree is walked node by node, breadth first, and
each node stores, for the elements that pass it, which way they go; the signs of the non-zeros follow. The size is that
of the code words, to the bit, yet nothing waits for the symbol before it. The fixed width code needs no tree.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hvd_qgenx import reference
from hvd_qgenx.checks import check_choice
from hvd_qgenx.quantize import Buckets

CODERS = ("fixed", "elias_gamma", "elias_delta", "elias_omega", "huffman")
MAX_WORD = 15  # a Huffman word and its sign fit 16 bits


class CodeError(ValueError):
    """Bits that no encoder writes."""


@dataclass(frozen=True)
class Codebook:
    """Code words, as strings of '0' and '1', of the magnitudes 0..s; a sign bit follows for each non-zero.

    ``width`` is set for the fixed code only, whose words are symbol + s in that many bits, signs included.
    """

    words: tuple[str, ...]
    width: int = 0

    @property
    def max_bits(self) -> int:
        """The most bits that one symbol takes, its sign included."""
        return self.width or max(len(word) + (index > 0) for index, word in enumerate(self.words))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Bits of each magnitude's code word, without the sign; empty for the fixed code."""
        return tuple(len(word) for word in self.words)

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """The inner nodes of the tree, as prefixes, breadth first."""
        prefixes = {word[:depth] for word in self.words for depth in range(len(word))}
        return tuple(sorted(prefixes, key=lambda prefix: (len(prefix), prefix)))

    def encode(self, symbols: Tensor, buckets: Buckets) -> tuple[Tensor, Tensor]:
        """Bytes uint8[m] of all buckets, each starting a new byte, and their lengths in bytes, int64[B]."""
        planes = self._fixed_planes(symbols) if self.width else self._tree_planes(symbols)
        return _write(planes, buckets)

    def decode(self, packed: Tensor, byte_lengths: Tensor, buckets: Buckets) -> Tensor:
        """Symbols int8[n]. Raises CodeError unless the bytes are what ``encode`` writes for some symbols."""
        reader = _Reader(packed, byte_lengths, buckets)
        symbols = self._read_fixed(reader, buckets) if self.width else self._read_tree(reader, buckets)
        reader.finish()
        return symbols

    def _tree_planes(self, symbols: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(elements, bits) of each node, then of the signs."""
        magnitude = symbols.abs().long()
        passing, planes = {"": torch.arange(len(symbols))}, []
        for node in self.nodes:
            elements = passing.pop(node)
            right = self._goes_right(node)[magnitude[elements]]
            planes.append((elements, right))
            passing[node + "0"], passing[node + "1"] = elements[~right], elements[right]
        nonzero = magnitude.nonzero().view(-1)
        return [*planes, (nonzero, symbols[nonzero] < 0)]

    def _goes_right(self, node: str) -> Tensor:
        """bool[s + 1]: whether a magnitude's word continues ``node`` with a one."""
        return torch.tensor([word.startswith(node + "1") for word in self.words])

    def _read_tree(self, reader: _Reader, buckets: Buckets) -> Tensor:
        leaves = {word: index for index, word in enumerate(self.words)}
        inner = set(self.nodes)
        symbols = torch.full((len(buckets.bucket_of),), leaves.get("", 0), dtype=torch.int8)
        passing = {"": torch.arange(len(symbols))}
        for node in self.nodes:
            elements = passing.pop(node)
            right = reader.read(elements).bool()
            for child, part in ((node + "0", elements[~right]), (node + "1", elements[right])):
                if child in inner:
                    passing[child] = part
                elif child in leaves:
                    symbols[part] = leaves[child]
                elif len(part):
                    raise CodeError("a code word that does not exist")
        nonzero = symbols.nonzero().view(-1)
        negative = reader.read(nonzero).bool()
        symbols[nonzero[negative]] *= -1
        return symbols

    def _fixed_planes(self, symbols: Tensor) -> list[tuple[Tensor, Tensor]]:
        """One plane, in which each element has all its bits in turn, lowest first."""
        elements = torch.arange(len(symbols)).repeat_interleave(self.width)
        codes = symbols.long() + len(self.words) - 1
        return [(elements, ((codes[:, None] >> torch.arange(self.width)) & 1).bool().view(-1))]

    def _read_fixed(self, reader: _Reader, buckets: Buckets) -> Tensor:
        elements = torch.arange(len(buckets.bucket_of)).repeat_interleave(self.width)
        bits = reader.read(elements).view(-1, self.width).long()
        symbols = (bits << torch.arange(self.width)).sum(dim=1) - (len(self.words) - 1)
        if len(symbols) and int(symbols.max()) >= len(self.words):
            raise CodeError("a symbol above the highest level")
        return symbols.to(torch.int8)


def _write(planes: list[tuple[Tensor, Tensor]], buckets: Buckets) -> tuple[Tensor, Tensor]:
    """Puts planes one behind another in each bucket, and buckets one behind another at byte boundaries."""
    owners = [buckets.bucket_of[elements] for elements, _ in planes]
    counts = [torch.bincount(owner, minlength=len(buckets.lengths)) for owner in owners]
    bit_lengths = torch.stack(counts).sum(dim=0)
    byte_lengths = (bit_lengths + 7) // 8
    cursor = 8 * (byte_lengths.cumsum(0) - byte_lengths)
    bits = torch.zeros(8 * int(byte_lengths.sum()), dtype=torch.uint8)
    for (_, values), owner, count in zip(planes, owners, counts, strict=True):
        bits[_positions(owner, count, cursor)] = values.to(torch.uint8)
        cursor += count
    return reference.pack_bits(bits), byte_lengths


def _positions(owner: Tensor, count: Tensor, cursor: Tensor) -> Tensor:
    """Where elements, sorted by their bucket ``owner``, lie if each bucket's run starts at its cursor."""
    first = count.cumsum(0) - count
    return torch.arange(len(owner)) + (cursor - first)[owner]


class _Reader:
    """Reads planes in the order in which ``_write`` put them, never past the end of a bucket."""

    def __init__(self, packed: Tensor, byte_lengths: Tensor, buckets: Buckets):
        self.bits = reference.unpack_bits(packed)
        self.buckets = buckets
        self.end = 8 * byte_lengths.cumsum(0)
        self.cursor = self.end - 8 * byte_lengths

    def read(self, elements: Tensor) -> Tensor:
        owner = self.buckets.bucket_of[elements]
        count = torch.bincount(owner, minlength=len(self.cursor))
        if bool((self.cursor + count > self.end).any()):
            raise CodeError("a bucket whose code words pass its end")
        bits = self.bits[_positions(owner, count, self.cursor)]
        self.cursor = self.cursor + count
        return bits

    def finish(self) -> None:
        if bool((self.end - self.cursor >= 8).any()):
            raise CodeError("a bucket with bytes behind its code words")


def codebook(coder: str, num_levels: int, counts: Sequence[int] | None = None) -> Codebook:
    """The codebook of ``coder`` for the magnitudes 0..num_levels.

    Args:
        coder: one of ``CODERS``. Elias codes give magnitude m the word of m + 1.
        counts: num_levels + 1 non-negative integers, how often each magnitude occurs; for Huffman only.
    """
    check_choice("coder", coder, CODERS)
    magnitudes = range(num_levels + 1)
    if coder == "fixed":
        return Codebook(("",) * (num_levels + 1), width=fixed_width(num_levels))
    if coder == "huffman":
        return Codebook(canonical_words(huffman_lengths(counts)))
    elias = {"elias_gamma": elias_gamma, "elias_delta": elias_delta, "elias_omega": elias_omega}[coder]
    return Codebook(tuple(elias(magnitude + 1) for magnitude in magnitudes))


def fixed_width(num_levels: int) -> int:
    """Bits that name 2 num_levels + 1 symbols."""
    return (2 * num_levels).bit_length()


def elias_gamma(n: int) -> str:
    """floor(log2 n) zeros, then n in binary: 2 floor(log2 n) + 1 bits; n >= 1. Source: Elias (1975)."""
    binary = f"{n:b}"
    return "0" * (len(binary) - 1) + binary


def elias_delta(n: int) -> str:
    """The gamma word of n's number of bits, then n's bits without the leading one. Source: Elias (1975)."""
    binary = f"{n:b}"
    return elias_gamma(len(binary)) + binary[1:]


def elias_omega(n: int) -> str:
    """A zero, preceded while n > 1 by n in binary, n becoming its number of bits less one. Source: Elias (1975)."""
    word = "0"
    while n > 1:
        binary = f"{n:b}"
        word, n = binary + word, len(binary) - 1
    return word


def huffman_lengths(counts: Sequence[int]) -> tuple[int, ...]:
    """Code lengths of an optimal prefix code for integer counts, none above ``MAX_WORD``; ties go by index.

    A count of zero is taken as one, so that every symbol has a word. While a word would be too long, counts are
    halved, which flattens the code. One symbol alone has the empty word.
    """
    counts = [max(int(count), 1) for count in counts]
    while max(lengths := _tree_depths(counts)) > MAX_WORD:
        counts = [count // 2 + 1 for count in counts]
    return tuple(lengths)


def _tree_depths(counts: Sequence[int]) -> list[int]:
    """Merges the two lightest trees until one is left; each merge puts its symbols one bit deeper."""
    depths = [0] * len(counts)
    trees = [(count, index, (index,)) for index, count in enumerate(counts)]
    heapq.heapify(trees)
    for order in range(len(counts), 2 * len(counts) - 1):
        light, heavy = heapq.heappop(trees), heapq.heappop(trees)
        members = light[2] + heavy[2]
        for index in members:
            depths[index] += 1
        heapq.heappush(trees, (light[0] + heavy[0], order, members))
    return depths


def canonical_words(lengths: Sequence[int]) -> tuple[str, ...]:
    """Words of the canonical code: shorter first, then by index, each the one before plus one.

    Raises:
        CodeError: if the lengths break Kraft's inequality.
    """
    longest = max(lengths)
    if sum(1 << (longest - length) for length in lengths) > 1 << longest:
        raise CodeError("code lengths that break Kraft's inequality")
    words, code, previous = [""] * len(lengths), -1, 0
    for length, index in sorted((length, index) for index, length in enumerate(lengths)):
        code = (code + 1) << (length - previous)
        previous = length
        words[index] = f"{code:0{length}b}" if length else ""
    return tuple(words)
