"""Code words, as strings of '0' and '1': Elias' of the positive integers, Huffman's of counts; lengths of runs."""

from __future__ import annotations

from collections.abc import Sequence

MAX_WORD = 15  # bits of a Huffman word
RICE_BITS = 4  # of Rice's parameter, before a bucket's runs
MOST_RUN_BITS = 24  # that a bucket's runs take, beside two for each of its elements
FEW, FEW_WORD = 16, 8  # up to so many symbols, an encoder's Huffman words fit a byte


class CodeError(ValueError):
    """Bits that no encoder writes."""


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
    # A symbol that did not occur may occur later, and must have a word then.
    singles: list[tuple[int, tuple[int, ...]]]
    singles = sorted((max(int(count), 1), (index,)) for index, count in enumerate(counts))
    packages = singles
    for _ in range((FEW_WORD if len(counts) <= FEW else MAX_WORD) - 1):
        pairs = [(a + b, c + d) for (a, c), (b, d) in zip(packages[::2], packages[1::2], strict=False)]
        # sorted is stable: of equal weights, symbols come before pairs and lower before higher.
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
    # In units of the longest word, so that Kraft's sum stays in integers.
    longest = max(lengths)
    if sum(1 << (longest - length) for length in lengths) > 1 << longest:
        raise CodeError("code lengths that break Kraft's inequality")
    words, code, previous = [""] * len(lengths), -1, 0
    for length, index in sorted((length, index) for index, length in enumerate(lengths)):
        # Growing appends zeros: longer words follow all shorter ones.
        code = (code + 1) << (length - previous)
        previous = length
        words[index] = f"{code:0{length}b}" if length else ""
    return tuple(words)


def rice_parameter(inside: int, runs: int) -> int:
    """The smallest k for which 2**(k + 1) runs are no fewer than the elements inside them.

    The best one for runs of random lengths solves 2**k ln(golden ratio)**-1 = mean length: this is it within 4 %.
    """
    k = 0
    while runs << (k + 1) < inside:
        k += 1
    return k


def run_bits(kind: str, inside: float, numel: float) -> float:
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
    return share * (k + 1.0 + quotient) + (last + RICE_BITS) / numel
