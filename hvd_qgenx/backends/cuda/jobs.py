"""What kernels are told: the structures of csrc/gpu/jobs.h, in the same order, and a codebook's tables."""

from __future__ import annotations

from ctypes import (
    Structure,
    c_double,
    c_float,
    c_int,
    c_longlong,
    c_uint,
    c_ushort,
    c_void_p,
)  # fmt: skip
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np

from hvd_qgenx.codebook import Code, Codebook
from hvd_qgenx.levels import MAX_LEVELS, Levels
from hvd_qgenx.words import MAX_WORD

TILE, ROW_BYTES, WARPS, MOST_WARPS, COPIES = 1024, 32 * 48 + 32, 4, 16, 64
MOST_INTERVALS = 8
NEGATIVE, MISSING = 128, 128  # bits of a symbol's name; minus zero is what no word stands for
_NUM_RUNS = {"": 0, "rice": 1, "omega": 2}
_FEW_LEVELS, _FEW_BITS, _SMALLEST_GAP = 7, 8, 2.0**-90
_BIN_START, _BIN_SHIFT, _FIRST_BIN, _NUM_BINS = np.float32(2.0**-12), 18, 115 << 5, 400


class Book(Structure):
    _fields_ = [
        ("symbols", c_void_p),
        ("values", c_void_p),
        ("bins", c_void_p),
        ("levels", c_float * (MAX_LEVELS + 1)),
        ("gaps", c_float * (MAX_LEVELS + 1)),
        ("num_levels", c_int),
        ("uniform", c_int),
        ("draw_bits", c_int),
        ("width", c_int),
        ("depth", c_int),
        ("shortest", c_int),
        ("runs", c_int),
        ("ones", c_int),
        ("more", c_uint * _FEW_BITS),
        ("below", c_uint * _FEW_BITS * _FEW_BITS),
        ("num_intervals", c_int * (MAX_WORD + 1)),
        ("intervals", c_int * 2 * MOST_INTERVALS * (MAX_WORD + 1)),
        ("words", c_ushort * 256),
    ]


#: A bucket: csrc/gpu/jobs.h's ``Bucket``.
BUCKET = np.dtype(
    [("position", "<i8"), ("offset", "<i8"), ("segment", "<i4"), ("count", "<i4"), ("number", "<i4"), ("unused", "<i4")]
)


class EncodeJob(Structure):
    _fields_ = [
        ("book", Book),
        ("buckets", c_void_p),
        ("segments", c_void_p),
        ("num_buckets", c_longlong),
        ("norms", c_void_p),
        ("lengths", c_void_p),
        ("codes", c_void_p),
        ("sums", c_void_p),
        ("counts", c_void_p),
        ("key", c_uint * 2),
        ("stride", c_int),
        ("linf", c_int),
        ("norms_known", c_int),
        ("warps", c_int),
    ]


class GatherJob(Structure):
    _fields_ = [
        ("codes", c_void_p),
        ("ends", c_void_p),
        ("lengths", c_void_p),
        ("out", c_void_p),
        ("num_buckets", c_longlong),
        ("stride", c_int),
    ]


ADD, FINISH = 1, 2


class DecodeJob(Structure):
    _fields_ = [
        ("book", Book),
        ("buckets", c_void_p),
        ("segments", c_void_p),
        ("num_buckets", c_longlong),
        ("data", c_void_p),
        ("num_words", c_longlong),
        ("ends", c_void_p),
        ("lengths", c_void_p),
        ("norms", c_void_p),
        ("sources", c_void_p),
        ("todo", c_void_p),
        ("wrong", c_void_p),
        ("num_payloads", c_int),
        ("num_segments", c_int),
        ("bucket_size", c_int),
        ("divisor", c_float),
        ("factor", c_float),
        ("inverse", c_double),
        ("warps", c_int),
    ]


class MeasureJob(Structure):
    _fields_ = [
        ("buckets", c_void_p),
        ("segments", c_void_p),
        ("num_buckets", c_longlong),
        ("norms", c_void_p),
        ("weights", c_void_p),
        ("weighted", c_void_p),
        ("plain", c_void_p),
        ("linf", c_int),
    ]


class Tables(NamedTuple):
    """A codebook as kernels have it.

    Attributes:
        book: whose ``symbols`` still lie nowhere.
        symbols: uint8[2**depth].
        values: float32[256], of each word as a byte, where kernels of few levels take it.
        bins: uint8[400], the same: how many of the levels between 0 and 1 lie in lower bins.
        few: whether these kernels take it.
        search: "uniform", "few" or "any".
    """

    book: Book
    symbols: np.ndarray
    values: np.ndarray
    bins: np.ndarray
    few: bool
    search: str


@lru_cache(maxsize=16)
def tables_of(codebook: Codebook) -> Tables:
    """Kept: a new codebook is made only when levels are fitted."""
    levels, code = codebook.levels, codebook.code
    book = Book()
    _fill_levels(book, levels)
    words = {} if code.width else _words(code)
    book.width, book.runs, book.ones = code.width, _NUM_RUNS[code.runs], code.ones
    book.depth = max(map(len, words.values()), default=0)
    book.shortest = min(map(len, words.values()), default=0)
    for name, word in words.items():
        book.words[name] = int(word[::-1], 2) if word else 0
    book.words[NEGATIVE] = book.words[0]
    _fill_inner(book, words)
    few = bool(words) and not code.runs and levels.num_levels <= _FEW_LEVELS and book.depth <= _FEW_BITS
    few = few and _fill_limits(book, words)
    symbols, values = _symbols(words, book.depth), _values(words if few else {}, levels)
    return Tables(book, symbols, values, _bins(levels), few, _search(book, levels, few))


def _fill_levels(book: Book, levels: Levels) -> None:
    values = np.asarray(levels.values, np.float32)
    s = levels.num_levels
    book.num_levels = s
    book.uniform = bool(np.array_equal(values, (np.arange(s + 1) / s).astype(np.float32)))
    book.draw_bits = 31 - s.bit_length() if book.uniform else 31
    book.levels[: s + 1] = values.tolist()
    book.gaps[:s] = (np.float32(1) / (values[1:] - values[:-1])).tolist()


def _search(book: Book, levels: Levels, few: bool) -> str:
    wide = min(np.diff(np.asarray(levels.values, np.float32))) >= _SMALLEST_GAP
    if not few or book.uniform:
        return "uniform" if few else "any"
    return "few" if wide and len(set(bins := _level_bins(levels).tolist())) == len(bins) else "any"


def _level_bins(levels: Levels) -> np.ndarray:
    """The bins of the levels between 0 and 1: the highest bits of a sum that rises with the level."""
    inner = np.asarray(levels.values[1:-1], np.float32)
    return ((inner + _BIN_START).view(np.uint32) >> _BIN_SHIFT).astype(np.int64) - _FIRST_BIN


def _bins(levels: Levels) -> np.ndarray:
    """How many levels between 0 and 1 lie in lower bins, for each bin."""
    return np.searchsorted(_level_bins(levels), np.arange(_NUM_BINS), side="left").astype(np.uint8)


def _values(words: dict[int, str], levels: Levels) -> np.ndarray:
    """Of each word as a byte, first bit lowest."""
    values = np.zeros(1 << _FEW_BITS, np.float32)
    for name, word in words.items():
        values[int(word[::-1], 2) if word else 0] = levels.values[name & 127] * (-1 if name & NEGATIVE else 1)
    return values


def _words(code: Code) -> dict[int, str]:
    """The words of symbols that have one, by the symbols' names."""
    s = code.num_levels
    least = code.stages
    names = {m if m >= 0 else NEGATIVE - m: m for m in range(-s, s + 1) if abs(m) >= least}
    return {name: code.words[s + symbol] for name, symbol in names.items()}


def _symbols(words: dict[int, str], depth: int) -> np.ndarray:
    symbols = np.full(1 << depth, MISSING, np.uint8)
    for name, word in words.items():
        symbols[int(word[::-1], 2) if word else 0] = name
    return symbols


def _inner(words: dict[int, str], depth: int) -> list[int]:
    """The first ``depth`` bits, as numbers, of words that have more."""
    return sorted({int("0" + word[:depth], 2) for word in words.values() if len(word) > depth})


def _intervals(words: dict[int, str], depth: int) -> list[tuple[int, int]]:
    """Of the first ``depth`` bits of words that have more, from and up to, without the words that have not.

    Bits that begin no word may lie within: they are refused at the end, when they name no symbol.
    """
    inner = [(value, True) for value in _inner(words, depth)]
    ended = [(value, False) for _, value in _ended(words, depth)]
    runs = groupby(sorted(inner + ended), key=lambda pair: pair[1])
    ranges = [[value for value, _ in run] for goes_on, run in runs if goes_on]
    return [(values[0], values[-1] + 1) for values in ranges]


def _fill_inner(book: Book, words: dict[int, str]) -> None:
    for depth in range(1, book.depth):
        found = _intervals(words, depth)
        if len(found) > MOST_INTERVALS:
            raise AssertionError(f"{len(found)} intervals of words with more than {depth} bits")
        book.num_intervals[depth] = len(found)
        for number, interval in enumerate(found):
            book.intervals[depth][number][:] = interval


def _fill_limits(book: Book, words: dict[int, str]) -> bool:
    """Whether words are canonical, so that those with more bits are all from a limit on, and all below it are words."""
    for depth in range(1, book.depth + 1):
        inner, ended = _inner(words, depth), _ended(words, depth)
        # Behind the last word that ends here, all that is not a word goes on, and is refused at the end.
        limit = max((value + (1 << (depth - len(word))) for word, value in ended), default=0)
        # A gap, as between Elias omega's words, would be taken for a word.
        has_gap = sum(1 << (depth - len(word)) for word, _ in ended) < limit
        if has_gap or (inner and inner[0] < limit) or depth > _FEW_BITS:
            return False
        _fill_limit(book, depth - 1, limit)
    return True


def _fill_limit(book: Book, last: int, limit: int) -> None:
    """Of words of more than ``last + 1`` bits, as masks for each of these bits."""
    exists = limit < 2 << last
    book.more[last] = 2**32 - 1 if exists else 0
    for bit in range(last + 1):
        book.below[last][bit] = 2**32 - 1 if exists and not limit >> (last - bit) & 1 else 0


def _ended(words: dict[int, str], depth: int) -> list[tuple[str, int]]:
    """Words of up to ``depth`` bits, and the numbers of so many bits that they are first of."""
    return [(word, int(word, 2) << (depth - len(word))) for word in words.values() if 0 < len(word) <= depth]
