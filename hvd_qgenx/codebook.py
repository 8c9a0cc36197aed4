"""Codebooks: what two ranks must share to understand each other, levels and the code words of symbols -s..s.

Pure values: moving bits is the backends' work. The words of a prefix code are laid out depth by depth: the first bits
of all words, then the second bits of those that have one, and so on. Where zeros dominate, their runs are coded in
place of a word for each, and the words are those of the other symbols; where ones then dominate, so are theirs. The
fixed width code needs no words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hvd_qgenx.checks import check_choice
from hvd_qgenx.levels import Levels
from hvd_qgenx.words import (
    MOST_RUN_BITS,
    canonical_words,
    elias_delta,
    elias_gamma,
    elias_omega,
    huffman_lengths,
    run_bits,
)

CODERS = ("fixed", "elias_gamma", "elias_delta", "elias_omega", "huffman", "elias_runs")


@dataclass(frozen=True)
class Code:
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
        # Runs take up to two bits for each element that ends one, beside the words.
        bits = self.width * numel or (self.depth + 2 * self.stages) * numel + MOST_RUN_BITS * self.stages
        return (bits + 7) // 8

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Bits of each symbol's code word; zeros for the fixed code."""
        return tuple(len(word) for word in self.words)

    def expected_bits(self, probabilities: Sequence[float], bucket_size: int) -> float:
        """Expected bits for each symbol, if magnitudes 0..s fall at random with these probabilities; an upper estimate.

        sum_m p_m (|word(m)| + |word(-m)|) / 2, and the runs' of each stage.
        """
        s = self.num_levels
        both = [self.lengths[s + m] + self.lengths[s - m] for m in range(s + 1)]
        words = sum(p * pair / 2 for p, pair in zip(probabilities, both, strict=True))
        bits = float(self.width) or words
        for stage in range(self.stages):
            share = sum(probabilities[stage:])
            if share:
                bits += share * run_bits(self.runs, probabilities[stage] / share, share * bucket_size)
        return bits


@dataclass(frozen=True)
class Codebook:
    """Levels and the code of the symbols that name them, under the coder's name."""

    coder: str
    levels: Levels
    code: Code

    @cached_property
    def hash(self) -> int:
        """64 bits of SHA-256 over coder, levels and code lengths: equal if and only if decoders agree."""
        levels = np.asarray(self.levels.values, "<f4").tobytes()
        # The zero byte ends the name: no coder and levels can read as another pair.
        content = self.coder.encode() + b"\0" + levels + bytes(self.code.lengths)
        return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")

    def __str__(self) -> str:
        return f"{self.coder} {self.levels.num_levels} {self.hash:016x}"


def make_code(coder: str, num_levels: int, counts: Sequence[int] | None = None) -> Code:
    """The code of ``coder`` for the symbols -num_levels..num_levels.

    Args:
        coder: one of ``CODERS``. Elias codes give the symbol m the word of |m| + 1, then its sign.
        counts: num_levels + 1 non-negative integers, how often each magnitude occurs; for Huffman only. Both signs of
            a magnitude count half.
    """
    check_choice("coder", coder, CODERS)
    if coder == "fixed":
        return Code(("",) * (2 * num_levels + 1), width=fixed_width(num_levels))
    if coder == "huffman":
        if counts is None:
            raise ValueError("counts must be given for the coder 'huffman'")
        return huffman(_signed_lengths(counts))
    runs = coder == "elias_runs"
    elias = {"elias_gamma": elias_gamma, "elias_delta": elias_delta}.get(coder, elias_omega)
    # Elias codes begin at 1, magnitudes at 0; where zeros are runs, at 1 as well.
    words = [elias(magnitude + 1 - runs) for magnitude in range(runs, num_levels + 1)]
    zero, others = ("", words) if runs else (words[0], words[1:])
    negative, positive = ([word + sign for word in others] for sign in "10")
    return Code((*reversed(negative), zero, *positive), runs="omega" if runs else "")


def _signed_lengths(counts: Sequence[int]) -> tuple[int, ...]:
    """Code lengths of -s..s: 0 for zeros and 1 for both ones if their runs are coded, else Huffman's."""
    # Half of a magnitude's count for each sign: doubling the zero keeps integers.
    if not _dominates(counts):
        return huffman_lengths([*counts[:0:-1], 2 * counts[0], *counts[1:]])
    # With a single positive level every non-zero is a one, and needs its sign alone.
    ones = len(counts) > 2 and _dominates(counts[1:])
    others = counts[2:] if ones else counts[1:]
    lengths = huffman_lengths([*reversed(others), *others])
    inside = (1, 0, 1) if ones else (0,)
    return (*lengths[: len(others)], *inside, *lengths[len(others) :])


def _dominates(counts: Sequence[int]) -> bool:
    """Whether the first is more than four in five: a word of one bit each would be a fifth more than runs take."""
    return 5 * counts[0] > 4 * sum(counts)


def huffman(lengths: Sequence[int]) -> Code:
    """The canonical code of the lengths of -s..s; a zero for 0 says that zeros are coded as runs, ones for -1 and 1
    where there are further symbols say that ones are, too.

    Raises:
        CodeError: if the lengths break Kraft's inequality.
    """
    s = len(lengths) // 2
    if lengths[s]:
        return Code(canonical_words(lengths))
    # A complete code never has two words of one bit beside others, so these say runs.
    ones = s > 1 and lengths[s - 1] == lengths[s + 1] == 1
    least = 2 if ones else 1
    words = canonical_words([*lengths[: s + 1 - least], *lengths[s + least :]])
    inside = ("1", "", "0") if ones else ("",)
    return Code((*words[: s + 1 - least], *inside, *words[s + 1 - least :]), runs="rice", ones=ones)


def fixed_width(num_levels: int) -> int:
    """Bits that name 2 num_levels + 1 symbols."""
    return (2 * num_levels).bit_length()
