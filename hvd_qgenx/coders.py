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

from hvd_qgenx import reference
from hvd_qgenx.checks import check_choice
from hvd_qgenx.quantize import Buckets

CODERS = ("fixed", "elias_gamma", "elias_delta", "elias_omega", "huffman", "elias_runs")
MAX_WORD = 15  # bits of a Huffman word
FEW, FEW_WORD = 16, 8  # up to so many symbols, an encoder's Huffman words fit a byte
_RICE_BITS = 4  # of Rice's parameter, before a bucket's runs
_MOST_RUN_BITS = 24  # that a bucket's runs take, beside two for each of its symbols


class CodeError(ValueError):
    """Bits that no encoder writes."""


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
        bits = self.width * numel or (self.depth + 2 * self.stages) * numel + _MOST_RUN_BITS * self.stages
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
                bits += share * _run_bits(self.runs, probabilities[stage] / share, share * bucket_size)
        return bits

    def encode(self, symbols: Tensor, buckets: Buckets) -> tuple[Tensor, Tensor]:
        """Bytes uint8[m] of all buckets, each starting a new byte, and their lengths in bytes, int64[B]."""
        planes = self._fixed_planes(symbols, buckets) if self.width else self._word_planes(symbols, buckets)
        return _write(planes, len(buckets.lengths))

    def decode(self, packed: Tensor, byte_lengths: Tensor, buckets: Buckets) -> Tensor:
        """Symbols int8[n]. Raises CodeError unless the bytes are what ``encode`` writes for some symbols."""
        reader = _Reader(packed, byte_lengths)
        symbols = self._read_fixed(reader, buckets) if self.width else self._read_words(reader, buckets)
        reader.finish()
        return symbols

    def _word_planes(self, symbols: Tensor, buckets: Buckets) -> list[tuple[Tensor, Tensor]]:
        """(bucket of each bit, bits): runs and signs of ones, if there are any, then the words depth by depth."""
        planes, elements = [], torch.arange(len(symbols))
        for stage in range(self.stages):
            ends = symbols[elements].abs() > stage
            planes.append(_run_plane(self.runs, ends, _counts(elements, buckets)))
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

    def _read_words(self, reader: _Reader, buckets: Buckets) -> Tensor:
        symbols, elements = torch.zeros(len(buckets.bucket_of), dtype=torch.int8), torch.arange(len(buckets.bucket_of))
        for stage in range(self.stages):
            ends = _read_runs(self.runs, reader, _counts(elements, buckets))
            inside, elements = elements[~ends], elements[ends]
            if stage:
                symbols[inside] = 1 - 2 * reader.read(buckets.bucket_of[inside]).to(torch.int8)
        passing = {"": elements}
        for _ in range(self.depth):
            passing = self._read_depth(reader, buckets, passing, symbols)
        return symbols

    def _read_depth(self, reader: _Reader, buckets: Buckets, passing: dict[str, Tensor], symbols: Tensor) -> dict:
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

    def _read_fixed(self, reader: _Reader, buckets: Buckets) -> Tensor:
        bits = reader.read(buckets.bucket_of.repeat_interleave(self.width)).view(-1, self.width).long()
        symbols = (bits << torch.arange(self.width)).sum(dim=1) - self.num_levels
        if len(symbols) and int(symbols.max()) > self.num_levels:
            raise CodeError("a symbol above the highest level")
        return symbols.to(torch.int8)


def _counts(elements: Tensor, buckets: Buckets) -> list[int]:
    """How many of ``elements`` each bucket has."""
    return torch.bincount(buckets.bucket_of[elements], minlength=len(buckets.lengths)).tolist()


def rice_parameter(inside: int, runs: int) -> int:
    """The smallest k for which 2**(k + 1) runs are no fewer than the elements inside them.

    The best one for runs of random lengths solves 2**k ln(golden ratio)**-1 = mean length: this is it within 4 %.
    """
    k = 0
    while runs << (k + 1) < inside:
        k += 1
    return k


def _run_bits(kind: str, inside: float, numel: float) -> float:
    """Expected bits of the runs for each of ``numel`` elements, each of which is in a run with that chance.

    A run of Rice takes k + 1 + q / (1 - q) bits, q = inside**(2**k), the last one inside / (1 - q), and Rice's
    parameter its own; a run of omega takes the mean over its lengths, the last one like the others.
    """
    share = 1.0 - inside
    if kind == "omega":
        lengths = range(round(numel) + 1)
        mean = sum(share * inside**n * len(elias_omega(n + 1)) for n in lengths)
        return (share + 1.0 / numel) * (mean + inside ** len(lengths) * len(elias_omega(len(lengths) + 1)))
    k = rice_parameter(round(inside * numel), round(share * numel) + 1)
    q, most = inside ** (2**k), numel / 2**k + 1.0
    last = min(inside / (1.0 - q), most) if q < 1.0 else most
    quotient = q / (1.0 - q) if q < 1.0 else 0.0
    return share * (k + 1.0 + quotient) + (last + _RICE_BITS) / numel


def _rice(run: int, k: int) -> str:
    """run >> k zeros, a one, then the k low bits, lowest first. Source: Golomb (1966), Rice (1979)."""
    return "0" * (run >> k) + "1" + "".join(str(run >> bit & 1) for bit in range(k))


def _last_rice(run: int, k: int) -> str:
    """The run up to a bucket's end: ceil(run / 2**k) zeros, with which no shorter run begins."""
    return "0" * -(-run >> k)


def _run_plane(kind: str, ends: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The runs before each element that ends one, and before a bucket's end unless such an element is its last."""
    owners, bits = [], []
    for bucket, part in enumerate(ends.split(counts)):
        places = part.nonzero().view(-1).tolist()
        runs = [place - before - 1 for before, place in zip([-1, *places], places, strict=False)]
        left = len(part) - 1 - (places[-1] if places else -1)
        text = _omega_runs(runs, left) if kind == "omega" else _rice_runs(runs, left, len(part) - len(places))
        text = text if len(part) else ""
        owners += [bucket] * len(text)
        bits += map(int, text)
    return torch.tensor(owners, dtype=torch.int64), torch.tensor(bits, dtype=torch.bool)


def _omega_runs(runs: list[int], left: int) -> str:
    return "".join(elias_omega(run + 1) for run in [*runs, *[left] * (left > 0)])


def _rice_runs(runs: list[int], left: int, inside: int) -> str:
    k = rice_parameter(inside, len(runs) + 1)
    return f"{k:0{_RICE_BITS}b}"[::-1] + "".join(_rice(run, k) for run in runs) + _last_rice(left, k)


def _read_runs(kind: str, reader: _Reader, counts: list[int]) -> Tensor:
    """bool[sum of counts]: which elements end a run, of so many in each bucket."""
    parts = [torch.zeros(count, dtype=torch.bool) for count in counts]
    for bucket, ends in enumerate(parts):
        k = sum(reader.bit(bucket) << bit for bit in range(_RICE_BITS)) if kind == "rice" and len(ends) else 0
        place = 0
        while place < len(ends):
            left = len(ends) - place
            run = _read_omega(reader, bucket) - 1 if kind == "omega" else _read_rice(reader, bucket, k, left)
            if run > left:
                raise CodeError("a bucket whose code words pass its end")
            ends[place + run : place + run + 1] = True
            place += run + 1
        found = int(ends.sum())
        if kind == "rice" and k != rice_parameter(len(ends) - found, found + 1):
            raise CodeError("a Rice parameter that no encoder writes")
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


def _read_rice(reader: _Reader, bucket: int, k: int, left: int) -> int:
    """A run; ``left`` is the one up to the bucket's end, and no other may be as long."""
    quotient = 0
    while quotient << k < left:
        if reader.bit(bucket):
            run = (quotient << k) + sum(reader.bit(bucket) << bit for bit in range(k))
            return run if run < left else left + 1
        quotient += 1
    return left


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
    """Code lengths of an optimal prefix code for integer counts, among those with no word above ``MAX_WORD`` bits, or
    ``FEW_WORD`` for at most ``FEW`` symbols; ties go by index.

    A count of zero is taken as one, so that every symbol has a word. One symbol alone has the empty word. Packages:
    the lightest symbols are paired, the pairs merged with the symbols and paired again, as often as a word may have
    bits; a symbol's length is the number of the first 2 n - 2 packages of the last merge that hold it.
    Source: Larmore and Hirschberg, "A fast algorithm for optimal length-limited Huffman codes", 1990.
    """
    singles = sorted((max(int(count), 1), (index,)) for index, count in enumerate(counts))
    packages = singles
    for _ in range((FEW_WORD if len(counts) <= FEW else MAX_WORD) - 1):
        pairs = [(a + b, c + d) for (a, c), (b, d) in zip(packages[::2], packages[1::2], strict=False)]
        packages = sorted(singles + pairs, key=lambda package: package[0])
    lengths = [0] * len(counts)
    for _, members in packages[: 2 * len(counts) - 2]:
        for index in members:
            lengths[index] += 1
    return tuple(lengths)


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
