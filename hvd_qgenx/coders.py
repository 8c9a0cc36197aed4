"""Codes for the magnitudes 0..s of symbols: fixed width, Elias gamma, delta and omega, Huffman, runs of zeros.

A codebook is a pure value. A prefix code is laid out in bit planes: its tree is walked node by node, breadth first, and
each node stores, for the elements that pass it, which way they go; the signs of the non-zeros follow. The size is that
of the code words, to the bit, yet nothing waits for the symbol before it. Where zeros dominate, their runs are coded in
place of a word for each, and the planes hold the other elements alone. The fixed width code needs no tree.
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

CODERS = ("fixed", "elias_gamma", "elias_delta", "elias_omega", "huffman", "elias_runs")
MAX_WORD = 15  # a Huffman word and its sign fit 16 bits
_RICE_BITS = 4  # of Rice's parameter, before a bucket's runs
_MOST_RUN_BITS = 24  # that a bucket's runs take, beside two for each of its symbols


class CodeError(ValueError):
    """Bits that no encoder writes."""


@dataclass(frozen=True)
class Codebook:
    """Code words, as strings of '0' and '1', of the magnitudes 0..s; a sign bit follows for each non-zero.

    ``width`` is set for the fixed code only, whose words are symbol + s in that many bits, signs included. ``runs``
    says how runs of zeros are coded, by "rice" or "omega"; zero then has no word, and the one given is not used.
    """

    words: tuple[str, ...]
    width: int = 0
    runs: str = ""

    def most_bytes(self, numel: int) -> int:
        """The most bytes that a bucket of ``numel`` symbols takes."""
        longest = max(map(len, self.words)) + 1
        bits = self.width * numel or longest * numel + (2 * numel + _MOST_RUN_BITS if self.runs else 0)
        return (bits + 7) // 8

    @property
    def lengths(self) -> tuple[int, ...]:
        """Bits of each magnitude's code word, without the sign; zeros for the fixed code."""
        return tuple(len(word) for word in self.words)

    def run_bits(self, zero_share: float, bucket_size: int) -> float:
        """Expected bits that runs take for each symbol, if zeros fall at random with this share; an upper estimate.

        A run of Rice takes k + 1 + q / (1 - q) bits, q = zero_share**(2**k), one of omega the mean over its lengths.
        There is one run more than non-zeros, and Rice's parameter, in each bucket.
        """
        share = 1.0 - zero_share
        runs = share * bucket_size + 1.0
        if self.runs == "omega":
            lengths = range(bucket_size + 1)
            mean = sum(share * zero_share**n * len(elias_omega(n + 1)) for n in lengths)
            return runs * (mean + zero_share ** len(lengths) * len(elias_omega(len(lengths) + 1))) / bucket_size
        k = rice_parameter(round(zero_share * bucket_size), round(share * bucket_size) + 1)
        q = zero_share ** (2**k)
        quotient = q / (1.0 - q) if q < 1.0 else 0.0
        return (_RICE_BITS + runs * (k + 1.0 + min(quotient, bucket_size / 2**k / runs + 1.0))) / bucket_size

    @cached_property
    def leaves(self) -> dict[str, int]:
        """The magnitude of each word."""
        return {word: index for index, word in enumerate(self.words) if index or not self.runs}

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """The inner nodes of the tree, as prefixes, breadth first."""
        prefixes = {word[:depth] for word in self.leaves for depth in range(len(word))}
        return tuple(sorted(prefixes, key=lambda prefix: (len(prefix), prefix)))

    def encode(self, symbols: Tensor, buckets: Buckets) -> tuple[Tensor, Tensor]:
        """Bytes uint8[m] of all buckets, each starting a new byte, and their lengths in bytes, int64[B]."""
        planes = self._fixed_planes(symbols, buckets) if self.width else self._tree_planes(symbols, buckets)
        return _write(planes, len(buckets.lengths))

    def decode(self, packed: Tensor, byte_lengths: Tensor, buckets: Buckets) -> Tensor:
        """Symbols int8[n]. Raises CodeError unless the bytes are what ``encode`` writes for some symbols."""
        reader = _Reader(packed, byte_lengths)
        symbols = self._read_fixed(reader, buckets) if self.width else self._read_tree(reader, buckets)
        reader.finish()
        return symbols

    def _tree_planes(self, symbols: Tensor, buckets: Buckets) -> list[tuple[Tensor, Tensor]]:
        """(bucket of each bit, bits): runs, if zeros have no words, then each node, then the signs."""
        magnitude, nonzero = symbols.abs().long(), symbols.nonzero().view(-1)
        planes = [_run_plane(self.runs, symbols, buckets)] if self.runs else []
        passing = {"": nonzero if self.runs else torch.arange(len(symbols))}
        for node in self.nodes:
            elements = passing.pop(node)
            right = self._goes_right(node)[magnitude[elements]]
            planes.append((buckets.bucket_of[elements], right))
            passing[node + "0"], passing[node + "1"] = elements[~right], elements[right]
        return [*planes, (buckets.bucket_of[nonzero], symbols[nonzero] < 0)]

    def _goes_right(self, node: str) -> Tensor:
        """bool[s + 1]: whether a magnitude's word continues ``node`` with a one."""
        return torch.tensor([word.startswith(node + "1") for word in self.words])

    def _read_tree(self, reader: _Reader, buckets: Buckets) -> Tensor:
        elements = torch.arange(len(buckets.bucket_of))
        if self.runs:
            elements = _read_runs(self.runs, reader, buckets)
        symbols = torch.zeros(len(buckets.bucket_of), dtype=torch.int8)
        symbols[elements] = self.leaves.get("", 0)
        passing = {"": elements}
        for node in self.nodes:
            elements = passing.pop(node)
            right = reader.read(buckets.bucket_of[elements]).bool()
            for child, part in ((node + "0", elements[~right]), (node + "1", elements[right])):
                if child in self.leaves:
                    symbols[part] = self.leaves[child]
                elif child in self.nodes:
                    passing[child] = part
                elif len(part):
                    raise CodeError("a code word that does not exist")
        nonzero = symbols.nonzero().view(-1)
        negative = reader.read(buckets.bucket_of[nonzero]).bool()
        symbols[nonzero[negative]] *= -1
        return symbols

    def _fixed_planes(self, symbols: Tensor, buckets: Buckets) -> list[tuple[Tensor, Tensor]]:
        """One plane, in which each element has all its bits in turn, lowest first."""
        codes = symbols.long() + len(self.words) - 1
        bits = ((codes[:, None] >> torch.arange(self.width)) & 1).bool().view(-1)
        return [(buckets.bucket_of.repeat_interleave(self.width), bits)]

    def _read_fixed(self, reader: _Reader, buckets: Buckets) -> Tensor:
        bits = reader.read(buckets.bucket_of.repeat_interleave(self.width)).view(-1, self.width).long()
        symbols = (bits << torch.arange(self.width)).sum(dim=1) - (len(self.words) - 1)
        if len(symbols) and int(symbols.max()) >= len(self.words):
            raise CodeError("a symbol above the highest level")
        return symbols.to(torch.int8)


def rice_parameter(zeros: int, runs: int) -> int:
    """The smallest k for which 2**(k + 1) runs are no fewer than the zeros in them.

    The best one for runs of random lengths solves 2**k ln(golden ratio)**-1 = mean length: this is it within 4 %.
    """
    k = 0
    while runs << (k + 1) < zeros:
        k += 1
    return k


def _rice(run: int, k: int) -> str:
    """run >> k zeros, a one, then the k low bits, lowest first. Source: Golomb (1966), Rice (1979)."""
    return "0" * (run >> k) + "1" + "".join(str(run >> bit & 1) for bit in range(k))


def _run_plane(kind: str, symbols: Tensor, buckets: Buckets) -> tuple[Tensor, Tensor]:
    """The runs of zeros before each non-zero of a bucket, and before its end unless a non-zero ends it."""
    owners, bits = [], []
    for bucket, part in enumerate(symbols.split(buckets.lengths.tolist())):
        places = part.nonzero().view(-1).tolist()
        runs = [place - before - 1 for before, place in zip([-1, *places], places, strict=False)]
        rest = len(part) - 1 - (places[-1] if places else -1)
        runs += [rest] * (rest > 0)
        k = rice_parameter(len(part) - len(places), len(places) + 1)
        words = [elias_omega(run + 1) if kind == "omega" else _rice(run, k) for run in runs]
        text = "".join(words) if kind == "omega" else f"{k:0{_RICE_BITS}b}"[::-1] + "".join(words)
        owners += [bucket] * len(text)
        bits += map(int, text)
    return torch.tensor(owners, dtype=torch.int64), torch.tensor(bits, dtype=torch.bool)


def _read_runs(kind: str, reader: _Reader, buckets: Buckets) -> Tensor:
    """int64[m]: which elements are not zero."""
    found, first = [], 0
    for bucket, length in enumerate(buckets.lengths.tolist()):
        k = sum(reader.bit(bucket) << bit for bit in range(_RICE_BITS)) if kind == "rice" else 0
        place, before = 0, len(found)
        while place < length:
            place += _read_omega(reader, bucket) - 1 if kind == "omega" else _read_rice(reader, bucket, k)
            if place > length:
                raise CodeError("a bucket whose code words pass its end")
            found += [first + place] * (place < length)
            place += 1
        nonzero = len(found) - before
        if kind == "rice" and k != rice_parameter(length - nonzero, nonzero + 1):
            raise CodeError("a Rice parameter that no encoder writes")
        first += length
    return torch.tensor(found, dtype=torch.int64)


def _read_rice(reader: _Reader, bucket: int, k: int) -> int:
    quotient = 0
    while not reader.bit(bucket):
        quotient += 1
    return (quotient << k) + sum(reader.bit(bucket) << bit for bit in range(k))


def _read_omega(reader: _Reader, bucket: int) -> int:
    n = 1
    while reader.bit(bucket):
        group = 1
        for _ in range(n):
            group = group << 1 | reader.bit(bucket)
        n = group
    return n


def _write(planes: list[tuple[Tensor, Tensor]], num_buckets: int) -> tuple[Tensor, Tensor]:
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


class _Reader:
    """Reads planes in the order in which ``_write`` put them, never past the end of a bucket."""

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
        return _zeros_as_runs(counts) if 5 * counts[0] > 4 * sum(counts) else huffman(huffman_lengths(counts))
    if coder == "elias_runs":
        return Codebook(("", *(elias_omega(magnitude) for magnitude in magnitudes[1:])), runs="omega")
    elias = {"elias_gamma": elias_gamma, "elias_delta": elias_delta, "elias_omega": elias_omega}[coder]
    return Codebook(tuple(elias(magnitude + 1) for magnitude in magnitudes))


def _zeros_as_runs(counts: Sequence[int]) -> Codebook:
    """Where more than four in five are zeros, a word of one bit for each would be a fifth more than their runs take."""
    return huffman((0, *huffman_lengths(counts[1:])))


def huffman(lengths: Sequence[int]) -> Codebook:
    """The canonical code of these lengths; 0 for the first says that zeros are coded as runs.

    Raises:
        CodeError: if the lengths break Kraft's inequality.
    """
    if lengths[0]:
        return Codebook(canonical_words(lengths))
    return Codebook(("", *canonical_words(lengths[1:])), runs="rice")


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
