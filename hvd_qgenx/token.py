"""What the drop-in gives Horovod to reduce in place of a tensor: 2 + K float32 for K ranks.

    entry 0         1 on every rank: the factor that Horovod applied (Average, Sum, predivide, pre- and postscale)
    entry 1 + r     on rank r the number of this call over ``CALLS``, elsewhere 0
    entry 1 + K     1 on ranks of even number, 2 on the others

Reduced under the parameter's own name, entries 1 to K tell where each rank put that parameter, so that ranks need not
call in the same order. What is not linear changes entries unlike each other: under Min and Product a rank's own one is
0, under Max entry 0 is K times too small, and Adasum weighs ranks by their tokens, which the last entry makes unlike.

What holds on K ranks: float32 adds up entries 0 and 1 + K with a relative error of at most (K + 2) 2**-24, 2**-8 for
65,536 ranks. Entries 1 to K are sums with one term, exact but for two roundings by the scales before and after; against
this rank's own, which has the same scales, they are off by 2**-22, a quarter of a number of 2**18 at the worst.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Call numbers start again here.
CALLS = 2**18
_TOLERANCE = 2.0**-6  # four times the error on 65,536 ranks, and far below what another operation does
_BLOCK = 2**14  # entries that are made at once


class Tokens:
    """Tokens of one rank, made many at once: one tensor for each call would take longer than all else of the call."""

    def __init__(self, size: int, rank: int):
        self.size, self.rank = size, rank
        self._made: list[Tensor] = []
        self._next = 0

    def take(self, number: int) -> Tensor:
        """A token of the call of this number, 1 to ``CALLS``."""
        if number != self._next or not self._made:
            self._make(number)
        self._next = number % CALLS + 1
        return self._made.pop()

    def _make(self, first: int) -> None:
        count = min(max(_BLOCK // (2 + self.size), 1), CALLS + 1 - first)
        block = torch.zeros(count, 2 + self.size, dtype=torch.float32, device="cpu")
        block[:, 0] = 1.0
        block[:, 1 + self.rank] = torch.arange(first, first + count, dtype=torch.float32, device="cpu") / CALLS
        block[:, -1] = 1.0 + self.rank % 2
        self._made = list(block.unbind())[::-1]


def unit_of(one: float, own: float, last: float, size: int, number: int) -> float | None:
    """What Horovod made of a one that a single rank has; None if it did not add up ranks and scale the sum.

    Args:
        one, own, last: entries 0, 1 + rank and 1 + size of a reduced token.
        size: K.
        number: of this rank's call.
    """
    unit = own * CALLS / number
    if unit == 0.0 or not math.isfinite(unit):
        return None
    ones, lasts = size * unit, (size + size // 2) * unit
    is_sum = abs(one - ones) <= _TOLERANCE * abs(ones) and abs(last - lasts) <= _TOLERANCE * abs(lasts)
    return unit if is_sum else None


def numbers_of(entries: Sequence[float], rank: int, number: int) -> list[int] | None:
    """For every rank, the number of its call for the tensor of this reduced token; None if they cannot be known.

    Args:
        entries: of the token.
        rank: this rank.
        number: of its own call.
    """
    own, each = entries[1 + rank], entries[1:-1]
    unit = unit_of(entries[0], own, entries[-1], len(each), number)
    if unit is None:
        return None
    if each.count(own) == len(each):
        return [number] * len(each)  # the rule, and much less work
    found = [entry * CALLS / unit for entry in each]
    if not all(0.5 < value < CALLS + 0.5 for value in found):
        return None
    return [round(value) for value in found]


def joined_of(entries: Sequence[float], rank: int, number: int) -> list[int]:
    """Ranks that have called ``hvd.join()``, in whose places Horovod adds zeros; none if it did something else.

    Args:
        entries, rank, number: as of ``numbers_of``.
    """
    each = entries[1:-1]
    there = [other for other, entry in enumerate(each) if entry]
    unit = entries[0] / len(there) if there else 0.0
    if unit == 0.0 or not math.isfinite(unit):
        return []
    last = sum(1 + other % 2 for other in there) * unit
    is_sum = abs(entries[-1] - last) <= _TOLERANCE * abs(last) and round(each[rank] * CALLS / unit) == number
    return sorted(set(range(len(each))) - set(there)) if is_sum else []
