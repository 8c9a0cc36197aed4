"""Levels: the sorted table on [0, 1] to which normalised magnitudes are rounded.

The table is 0 = l_0 < l_1 < ... < l_s = 1; *bits* is the width of one symbol, sign included, so s = 2**(bits - 1) - 1
and symbols lie in [-s, s].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from hvd_qgenx.checks import check_choice, check_integer, check_non_negative
from hvd_qgenx.fitting import FITS, Distribution, normal_distribution, rate_aware, spread

MAX_LEVELS = 127  # symbols are int8
NORMS = ("l2", "linf")


@dataclass(frozen=True)
class Levels:
    """Positive quantisation levels, ``values`` = (0, l_1, ..., l_s = 1), each rounded to float32.

    Args:
        values: numbers that rise strictly from 0 to 1; between 2 and 128 of them.

    Raises:
        ValueError: if they do not.
    """

    values: tuple[float, ...]

    def __post_init__(self):
        try:
            if isinstance(self.values, str):
                raise TypeError
            # The core holds float32, so what is checked below is what it will hold.
            rounded = tuple(float(np.float32(value)) for value in self.values)
        except (TypeError, ValueError):
            raise ValueError(f"levels must be a sequence of numbers, got {self.values!r}") from None
        if not 2 <= len(rounded) <= MAX_LEVELS + 1:
            raise ValueError(f"levels must have between 2 and {MAX_LEVELS + 1} values, got {len(rounded)}")
        rises = all(low < high for low, high in pairwise(rounded))
        # Two float64 may be one float32: levels must differ in what travels.
        if rounded[0] != 0.0 or rounded[-1] != 1.0 or not rises:
            raise ValueError(f"levels must rise strictly from 0 to 1 in float32, got {_shorten(rounded)}")
        if min(high - low for low, high in pairwise(rounded)) < 2.0**-126:
            raise ValueError(f"levels must rise by at least 2**-126, got {_shorten(rounded)}")
        object.__setattr__(self, "values", rounded)

    @classmethod
    def uniform(cls, bits: int) -> Levels:
        """l_j = j / s with s = 2**(bits - 1) - 1; bits from 2 to 8. Source: QSGD (Alistarh et al., 2017)."""
        count = num_positive(bits)
        return cls(tuple(j / count for j in range(count + 1)))

    @classmethod
    def exponential(cls, bits: int, base: float = 0.5) -> Levels:
        """l_j = base**(s - j) for j >= 1, base in (0, 1). Source: NUQSGD (Ramezani-Kebrya et al., 2021)."""
        count = num_positive(bits)
        if not (isinstance(base, (int, float)) and 0.0 < base < 1.0):
            raise ValueError(f"base must be a number between 0 and 1, got {base!r}")
        return cls((0.0,) + tuple(base ** (count - j) for j in range(1, count + 1)))

    @classmethod
    def fitted(
        cls,
        counts: Sequence[float],
        bits: int,
        method: str = "coordinate_descent",
        rate_weight: float = 0.0,
        plain_counts: Sequence[float] | None = None,
    ) -> Levels:
        """The levels that minimise variance + ``rate_weight`` * code length of a histogram (QAda's objective at 0).

        The variance is E||Q(v) - v||^2 / ||v||^2, the sum over u of w(u) (l_{j+1} - u)(u - l_j) divided by that of
        w(u) u^2; the code length is the entropy of the signed symbols in bits per coordinate. In float64 and in a
        fixed order: equal counts give equal levels.

        Args:
            counts: ``NUM_BINS`` non-negative numbers over ``BIN_EDGES``, not all zero, weighted by the squared norm
                of the buckets that the magnitudes come from.
            bits: width of a symbol, from 2 to 8.
            method: "coordinate_descent" (ALQ), from uniform, exponential, quantile and companded levels and from the
                optimum at edges of bins, keeping the best; "projected_gradient" (its gradient form), from the same;
                "multiplier" (AMQ), l_j = p**(s - j) with the best p; "exact", the optimum among levels at edges of
                bins, by dynamic programming.
            rate_weight: lambda, 0 or more: the relative variance that is worth one bit per coordinate. At fine levels
                one bit more divides the variance V by 4, so that lambda = 2 ln(2) V is where both are in balance.
                Above 0 the fit of ``method`` is one of the starts of a descent on the whole objective.
            plain_counts: the histogram without weights, from which code lengths follow; None takes ``counts``.

        Source: Q-GenX section 3 (QAda); ALQ and AMQ (Faghri et al., 2020).
        """
        size = num_positive(bits)
        check_choice("method", method, tuple(FITS))
        found = Distribution(counts)
        levels = FITS[method](found, size)
        if check_non_negative("rate_weight", rate_weight) > 0.0:
            plain = found if plain_counts is None else Distribution(plain_counts)
            # The fit of the variance alone is a start: codes are short where levels are few.
            levels = rate_aware(found, plain, levels, rate_weight)
        return cls(tuple(spread(levels)))

    @property
    def num_levels(self) -> int:
        """s, the number of positive levels."""
        return len(self.values) - 1

    @cached_property
    def is_uniform(self) -> bool:
        """Whether l_j = j / s for all j."""
        return all(value == float(np.float32(j / self.num_levels)) for j, value in enumerate(self.values))

    def short(self) -> Levels:
        """Up to seven levels, rounded to 8 significant bits, those of bfloat16, if that keeps them apart; else itself.

        A float32 with more bits reaches such a level if and only if its upper half does: the core then compares 16
        coordinates at once. Each level moves by at most 2**-8 of itself.
        """
        bits = np.array(self.values, np.float32).view(np.uint32)
        # bfloat16 is the upper half of a float32, rounded to nearest with halves to even.
        upper = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16  # to nearest, halves to even
        apart = self.num_levels <= 7 and bool(np.all(upper[1:] > upper[:-1]))
        return Levels(tuple((upper << 16).view(np.float32).tolist())) if apart else self

    def variance_bound(self, numel: int, norm: str = "l2") -> float:
        """eps_Q of Theorem 1: E||Q(v) - v||^2 <= eps_Q ||v||^2 for a bucket of ``numel`` coordinates.

        eps_Q = (r - 1)^2 / (4 r) + (l_1 sqrt(d) - 1) [d >= d_th] + (l_1^2 / 4) d [d < d_th], with r the largest ratio
        of neighbouring positive levels and d_th = (2 / l_1)^2; the same for both norms. Source: Q-GenX, Theorem 1.
        """
        check_integer("numel", numel, 1)
        check_choice("norm", norm, NORMS)
        positive = self.values[1:]
        # A single positive level has no ratio; the first term is then zero.
        ratio = max((high / low for low, high in pairwise(positive)), default=1.0)
        first = positive[0]
        small = first * math.sqrt(numel) - 1.0 if numel >= (2.0 / first) ** 2 else first**2 * numel / 4.0
        return (ratio - 1.0) ** 2 / (4.0 * ratio) + small

    def symbol_probabilities(self, norm: str = "l2", bucket_size: int = 1024) -> tuple[float, ...]:
        """Probabilities (p_0, ..., p_s) of the magnitudes' level indices in a bucket of independent normal numbers."""
        check_choice("norm", norm, NORMS)
        check_integer("bucket_size", bucket_size, 1)
        return normal_distribution(norm, bucket_size).symbol_probabilities(self.values)


def num_positive(bits: int) -> int:
    """s = 2**(bits - 1) - 1, the number of positive levels that symbols of ``bits`` bits, sign included, can name."""
    return 2 ** (check_integer("bits", bits, 2, 8) - 1) - 1


def _shorten(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:8])
    return f"({shown}{', ...' if len(values) > 8 else ''})"
