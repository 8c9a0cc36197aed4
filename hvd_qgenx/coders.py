"""Codes for the symbols -s..s: fixed width, Elias gamma, delta and omega, Huffman, runs.

A codebook is a pure value. The words of a prefix code are laid out depth by depth: the first bits of all words, then
the second bits of those that have one, and so on. The size is that of the code words, to the bit, yet nothing waits
for the symbol before it. Where zeros dominate, their runs are coded in place of a word for each, and the words are
those of the other symbols; where ones then dominate, so are theirs. The fixed width code needs no words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hvd_qgenx.bitplanes import Reader, write_planes
from hvd_qgenx.checks import check_choice
from hvd_qgenx.quantize import Buckets
from hvd_qgenx.runs import MOST_BITS, read_runs, run_bits, run_plane
from hvd_qgenx.words import (
    CodeError,
    canonical_words,
    elias_delta,
    elias_gamma,
    elias_omega,
    huffman_lengths,
)

CODERS = ("fixed", "elias_gamma", "elias_delta", "elias_omega", "huffman", "elias_runs")


@dataclass(frozen=True)
class Codebook:
    """Code words, as strings of '0' and '1', of the symbols -s..s.

    ``width`` is set for the fixed code only, whose words are symbol + s in that many bits. ``runs`` says how runs of
    zeros are coded, by "rice" or "omega"; zero then has no word. ``ones`` says that among the non-zeros runs of ones
    are coded, too; then -1 and 1 have a sign of one bit where others have a word.
    """

    words: tuple[str, ...]
    width: int = 0
    runs: str = ""
    ones: bool = False

    @property
    def num_levels(self) -> int:
        return len(self.words) // 2

    @property
    def stages(self) -> int:
        """How many magnitudes, from 0 on, are coded by runs."""
        return bool(self.runs) + self.ones

    @property
    def depth(self) -> int:
        """Bits of the longest word."""
        return max(map(len, self.words))

    def most_bytes(self, numel: int) -> int:
        """The most bytes that a bucket of ``numel`` symbols takes."""
        bits = self.width * numel or (self.depth + 2 * self.stages) * numel + MOST_BITS * self.stages
        return (bits + 7) // 8

    @property
    def lengths(self) -> tuple[int, ...]:
        """Bits of each symbol's code word; zeros for the fixed code."""
        return tuple(len(word) for word in self.words)

    def expected_bits(self, probabilities: Sequence[float], bucket_size: int) -> float:
        """Expected bits for each symbol, if magnitudes 0..s fall at random with these probabilities; an upper estimate.

        sum_m p_m (|word(m)| + |word(-m)|) / 2, and the runs' of each stage.
        """
        s = self.num_levels
        words = (self.lengths[s + m] + self.lengths[s - m] for m in range(s + 1))
        bits = self.width or sum(p * both / 2 for p, both in zip(probabilities, words, strict=True))
        for stage in range(self.stages):
            share = sum(probabilities[stage:])
            if share:
                bits += share * run_bits(self.runs, probabilities[stage] / share, share * bucket_size)
        return bits

    def encode(self, symbols: Tensor, buckets: Buckets) -> tuple[Tensor, Tensor]:
        """Bytes uint8[m] of all buckets, each starting a new byte, and their lengths in bytes, int64[B]."""
        planes = self._fixed_planes(symbols, buckets) if self.width else self._word_planes(symbols, buckets)
        return write_planes(planes, len(buckets.lengths))

    def decode(self, packed: Tensor, byte_lengths: Tensor, buckets: Buckets) -> Tensor:
        """Symbols int8[n]. Raises CodeError unless the bytes are what ``encode`` writes for some symbols."""
        reader = Reader(packed, byte_lengths)
        symbols = self._read_fixed(reader, buckets) if self.width else self._read_words(reader, buckets)
        reader.finish()
        return symbols

    def _word_planes(self, symbols: Tensor, buckets: Buckets) -> list[tuple[Tensor, Tensor]]:
        """(bucket of each bit, bits): runs and signs of ones, if there are any, then the words depth by depth."""
        planes, elements = [], torch.arange(len(symbols))
        for stage in range(self.stages):
            ends = symbols[elements].abs() > stage
            planes.append(run_plane(self.runs, ends, _counts(elements, buckets)))
            inside, elements = elements[~ends], elements[ends]
            if stage:
                planes.append((buckets.bucket_of[inside], symbols[inside] < 0))
        for depth in range(self.depth):
            elements = elements[torch.tensor(self.lengths)[symbols[elements].long() + self.num_levels] > depth]
            bits = torch.tensor([word[depth : depth + 1] == "1" for word in self.words])
            planes.append((buckets.bucket_of[elements], bits[symbols[elements].long() + self.num_levels]))
        return planes

    @cached_property
    def _leaves(self) -> dict[str, int]:
        """The symbol of each word."""
        s = self.num_levels
        return {word: i - s for i, word in enumerate(self.words) if abs(i - s) >= self.stages}

    def _read_words(self, reader: Reader, buckets: Buckets) -> Tensor:
        symbols, elements = torch.zeros(len(buckets.bucket_of), dtype=torch.int8), torch.arange(len(buckets.bucket_of))
        for stage in range(self.stages):
            ends = read_runs(self.runs, reader, _counts(elements, buckets))
            inside, elements = elements[~ends], elements[ends]
            if stage:
                symbols[inside] = 1 - 2 * reader.read(buckets.bucket_of[inside]).to(torch.int8)
        passing = {"": elements}
        for _ in range(self.depth):
            passing = self._read_depth(reader, buckets, passing, symbols)
        return symbols

    def _read_depth(self, reader: Reader, buckets: Buckets, passing: dict[str, Tensor], symbols: Tensor) -> dict:
        """The next bit of the elements that pass each prefix; sets the symbols of those whose words end there."""
        elements = torch.cat(list(passing.values())).sort().values
        bits = torch.zeros(len(symbols), dtype=torch.bool)
        bits[elements] = reader.read(buckets.bucket_of[elements]).bool()
        longer = {}
        for prefix, part in passing.items():
            for word, found in ((prefix + "0", part[~bits[part]]), (prefix + "1", part[bits[part]])):
                if word in self._leaves:
                    symbols[found] = self._leaves[word]
                elif any(leaf.startswith(word) for leaf in self._leaves):
                    longer[word] = found
                elif len(found):
                    raise CodeError("a code word that does not exist")
        return longer

    def _fixed_planes(self, symbols: Tensor, buckets: Buckets) -> list[tuple[Tensor, Tensor]]:
        """One plane, in which each element has all its bits in turn, lowest first."""
        codes = symbols.long() + self.num_levels
        bits = ((codes[:, None] >> torch.arange(self.width)) & 1).bool().view(-1)
        return [(buckets.bucket_of.repeat_interleave(self.width), bits)]

    def _read_fixed(self, reader: Reader, buckets: Buckets) -> Tensor:
        bits = reader.read(buckets.bucket_of.repeat_interleave(self.width)).view(-1, self.width).long()
        symbols = (bits << torch.arange(self.width)).sum(dim=1) - self.num_levels
        if len(symbols) and int(symbols.max()) > self.num_levels:
            raise CodeError("a symbol above the highest level")
        return symbols.to(torch.int8)


def _counts(elements: Tensor, buckets: Buckets) -> list[int]:
    """How many of ``elements`` each bucket has."""
    return torch.bincount(buckets.bucket_of[elements], minlength=len(buckets.lengths)).tolist()


def codebook(coder: str, num_levels: int, counts: Sequence[int] | None = None) -> Codebook:
    """The codebook of ``coder`` for the symbols -num_levels..num_levels.

    Args:
        coder: one of ``CODERS``. Elias codes give the symbol m the word of |m| + 1, then its sign.
        counts: num_levels + 1 non-negative integers, how often each magnitude occurs; for Huffman only. Both signs of
            a magnitude count half.
    """
    check_choice("coder", coder, CODERS)
    if coder == "fixed":
        return Codebook(("",) * (2 * num_levels + 1), width=fixed_width(num_levels))
    if coder == "huffman":
        return huffman(_signed_lengths(counts))
    runs = coder == "elias_runs"
    elias = {"elias_gamma": elias_gamma, "elias_delta": elias_delta}.get(coder, elias_omega)
    words = [elias(magnitude + 1 - runs) for magnitude in range(runs, num_levels + 1)]
    zero, others = ("", words) if runs else (words[0], words[1:])
    negative, positive = ([word + sign for word in others] for sign in "10")
    return Codebook((*reversed(negative), zero, *positive), runs="omega" if runs else "")


def _signed_lengths(counts: Sequence[int]) -> tuple[int, ...]:
    """Code lengths of -s..s: 0 for zeros and 1 for both ones if their runs are coded, else Huffman's."""
    if not _dominates(counts):
        return huffman_lengths([*counts[:0:-1], 2 * counts[0], *counts[1:]])
    ones = len(counts) > 2 and _dominates(counts[1:])
    others = counts[2:] if ones else counts[1:]
    lengths = huffman_lengths([*reversed(others), *others])
    inside = (1, 0, 1) if ones else (0,)
    return (*lengths[: len(others)], *inside, *lengths[len(others) :])


def _dominates(counts: Sequence[int]) -> bool:
    """Whether the first is more than four in five: a word of one bit each would be a fifth more than runs take."""
    return 5 * counts[0] > 4 * sum(counts)


def huffman(lengths: Sequence[int]) -> Codebook:
    """The canonical code of the lengths of -s..s; a zero for 0 says that zeros are coded as runs, ones for -1 and 1
    where there are further symbols say that ones are, too.

    Raises:
        CodeError: if the lengths break Kraft's inequality.
    """
    s = len(lengths) // 2
    if lengths[s]:
        return Codebook(canonical_words(lengths))
    ones = s > 1 and lengths[s - 1] == lengths[s + 1] == 1
    least = 2 if ones else 1
    words = canonical_words([*lengths[: s + 1 - least], *lengths[s + least :]])
    inside = ("1", "", "0") if ones else ("",)
    return Codebook((*words[: s + 1 - least], *inside, *words[s + 1 - least :]), runs="rice", ones=ones)


def fixed_width(num_levels: int) -> int:
    """Bits that name 2 num_levels + 1 symbols."""
    return (2 * num_levels).bit_length()
