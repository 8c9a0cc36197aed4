"""Levels: the sorted table on [0, 1] to which normalised magnitudes are rounded, and its fit to a histogram.

A normalised magnitude is u = |v_i| / norm(bucket). The table is 0 = l_0 < l_1 < ... < l_s = 1; *bits* is the width of
one symbol, sign included, so s = 2**(bits - 1) - 1 and symbols lie in [-s, s].
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hvd_qgenx.checks import check_choice, check_integer

MAX_LEVELS = 127  # symbols are int8
NORMS = ("l2", "linf")

# Histograms of u have logarithmic bins: one for u < 2**-16, then 32 to the octave. They can be read off the bits of a
# float32, so that every rank and every backend counts the same, and they resolve the small magnitudes of L2 buckets.
BINS_PER_OCTAVE = 32
OCTAVES = 16
NUM_BINS = 1 + OCTAVES * BINS_PER_OCTAVE
BIN_EDGES = (
    (0.0,)
    + tuple(
        (1.0 + step / BINS_PER_OCTAVE) * 2.0 ** (octave - OCTAVES)
        for octave in range(OCTAVES)
        for step in range(BINS_PER_OCTAVE)
    )
    + (1.0,)
)

_MINIMAL_GAP = 2.0**-20  # fitted levels stay apart in float32
_SWEEPS = 100


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
            rounded = tuple(float(np.float32(value)) for value in self.values)
        except (TypeError, ValueError):
            raise ValueError(f"levels must be a sequence of numbers, got {self.values!r}") from None
        if not 2 <= len(rounded) <= MAX_LEVELS + 1:
            raise ValueError(f"levels must have between 2 and {MAX_LEVELS + 1} values, got {len(rounded)}")
        rises = all(low < high for low, high in pairwise(rounded))
        if rounded[0] != 0.0 or rounded[-1] != 1.0 or not rises:
            raise ValueError(f"levels must rise strictly from 0 to 1 in float32, got {_shorten(rounded)}")
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
    def fitted(cls, counts: Sequence[int], bits: int) -> Levels:
        """The levels that minimise the variance of stochastic rounding on a histogram (QAda's objective).

        Minimises sum_u w(u) (l_{j+1} - u)(u - l_j) by coordinate descent from uniform, exponential and quantile
        starts and keeps the best, in float64 and in a fixed order, so that equal counts give equal levels.

        Args:
            counts: ``NUM_BINS`` non-negative integers over ``BIN_EDGES``, not all zero, weighted by the squared norm
                of the buckets that the magnitudes come from.
            bits: width of a symbol, from 2 to 8.

        Source: Q-GenX section 3 (QAda), and ALQ (Faghri et al., 2020), equation of the coordinate step.
        """
        distribution = Distribution(counts)
        size = num_positive(bits)
        starts = [cls.uniform(bits).values, cls.exponential(bits).values, distribution.quantiles(size)]
        fits = [_descend(distribution, list(start)) for start in starts]
        return cls(tuple(_spread(min(fits, key=distribution.variance))))

    @property
    def num_levels(self) -> int:
        """s, the number of positive levels."""
        return len(self.values) - 1

    def variance_bound(self, numel: int, norm: str = "l2") -> float:
        """eps_Q of Theorem 1: E||Q(v) - v||^2 <= eps_Q ||v||^2 for a bucket of ``numel`` coordinates.

        eps_Q = (r - 1)^2 / (4 r) + (l_1 sqrt(d) - 1) [d >= d_th] + (l_1^2 / 4) d [d < d_th], with r the largest ratio
        of neighbouring positive levels and d_th = (2 / l_1)^2; the same for both norms. Source: Q-GenX, Theorem 1.
        """
        check_integer("numel", numel, 1)
        check_choice("norm", norm, NORMS)
        positive = self.values[1:]
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


class Distribution:
    """The distribution of u that a histogram over ``BIN_EDGES`` describes, uniform inside each bin.

    W, M and S are the integrals of 1, u and u^2 from 0 to x. Plain Python floats in a fixed order: all ranks get the
    same bits from the same counts.
    """

    def __init__(self, counts: Sequence[float]):
        counts = [count.item() if hasattr(count, "item") else count for count in counts]
        if len(counts) != NUM_BINS or not 0 < sum(counts) < math.inf or min(counts) < 0:
            raise ValueError(f"counts must be {NUM_BINS} non-negative numbers, not all zero")
        total = sum(counts)
        self.mass = [count / total for count in counts]
        self.prefix = [(0.0, 0.0, 0.0)]
        for (low, high), mass in zip(pairwise(BIN_EDGES), self.mass, strict=True):
            inside = _uniform_moments(low, high, mass, high)
            self.prefix.append(tuple(a + b for a, b in zip(self.prefix[-1], inside, strict=True)))
        self.cumulative = [moments[0] for moments in self.prefix]

    def moments(self, x: float) -> tuple[float, float, float]:
        """(W(x), M(x), S(x))."""
        index = min(bisect_right(BIN_EDGES, x) - 1, NUM_BINS - 1)
        inside = _uniform_moments(BIN_EDGES[index], BIN_EDGES[index + 1], self.mass[index], x)
        return tuple(a + b for a, b in zip(self.prefix[index], inside, strict=True))

    def quantile(self, probability: float) -> float:
        """The x with W(x) = probability."""
        index = min(max(bisect_right(self.cumulative, probability) - 1, 0), NUM_BINS - 1)
        low, high, mass = BIN_EDGES[index], BIN_EDGES[index + 1], self.mass[index]
        inside = (probability - self.cumulative[index]) / mass if mass > 0.0 else 0.0
        return low + (high - low) * min(max(inside, 0.0), 1.0)

    def quantiles(self, size: int) -> tuple[float, ...]:
        """A start for the fit: 0, the quantiles of j / size, 1, kept apart."""
        return tuple(_spread([0.0] + [self.quantile(j / size) for j in range(1, size)] + [1.0]))

    def variance(self, levels: Sequence[float]) -> float:
        """The integral of (l_{j+1} - u)(u - l_j), the variance of stochastic rounding for a unit norm."""
        return sum(self._gap_variance(low, high) for low, high in pairwise(levels))

    def _gap_variance(self, low: float, high: float) -> float:
        w, m, s = (b - a for a, b in zip(self.moments(low), self.moments(high), strict=True))
        return (low + high) * m - s - low * high * w

    def best_between(self, low: float, current: float, high: float) -> float:
        """The level between two neighbours that minimises the variance: W(x) is the mean of W over [low, high]."""
        (w_low, m_low, _), (w_high, m_high, _) = self.moments(low), self.moments(high)
        if w_high <= w_low:
            return current
        mean = (high * w_high - low * w_low - (m_high - m_low)) / (high - low)
        return min(max(self.quantile(mean), low), high)

    def symbol_probabilities(self, levels: Sequence[float]) -> tuple[float, ...]:
        """(p_0, ..., p_s): how often stochastic rounding gives each level."""
        shares = [0.0] * len(levels)
        for j, (low, high) in enumerate(pairwise(levels)):
            w, m, _ = (b - a for a, b in zip(self.moments(low), self.moments(high), strict=True))
            up = (m - low * w) / (high - low)
            shares[j] += w - up
            shares[j + 1] += up
        return tuple(max(share, 0.0) for share in shares)


def normal_distribution(norm: str, bucket_size: int) -> Distribution:
    """The distribution of |z| / norm for a bucket of ``bucket_size`` standard normal numbers z, to first order."""
    scale = math.sqrt(bucket_size) if norm == "l2" else _expected_maximum(bucket_size)
    cumulative = [math.erf(edge * scale / math.sqrt(2.0)) for edge in BIN_EDGES]
    counts = [high - low for low, high in pairwise(cumulative)]
    counts[-1] += 1.0 - sum(counts)
    return Distribution(counts)


def _expected_maximum(count: int) -> float:
    """The x that one of ``count`` normal magnitudes exceeds on average, by bisection."""
    low, high = 0.1, 40.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if math.erfc(middle / math.sqrt(2.0)) * count > 0.9 else (low, middle)
    return low


def _uniform_moments(low: float, high: float, mass: float, x: float) -> tuple[float, float, float]:
    """Integrals of 1, u, u^2 from ``low`` to ``x`` of a mass spread evenly over [low, high]."""
    density = mass / (high - low)
    return (
        density * (x - low),
        density * (x - low) * (x + low) / 2.0,
        density * (x - low) * (x * x + x * low + low * low) / 3.0,
    )


def _descend(distribution: Distribution, levels: list[float]) -> list[float]:
    """Coordinate descent: sweep over the inner levels until a sweep no longer lowers the variance."""
    best = distribution.variance(levels)
    for _ in range(_SWEEPS):
        for j in range(1, len(levels) - 1):
            levels[j] = distribution.best_between(levels[j - 1], levels[j], levels[j + 1])
        variance = distribution.variance(levels)
        if variance >= best * (1.0 - 1e-9):
            break
        best = variance
    return levels


def _spread(levels: list[float]) -> list[float]:
    """Keeps neighbours apart by the smallest gap that float32 resolves everywhere on [0, 1]."""
    for j in range(1, len(levels) - 1):
        levels[j] = max(levels[j], levels[j - 1] + _MINIMAL_GAP)
    for j in range(len(levels) - 2, 0, -1):
        levels[j] = min(levels[j], levels[j + 1] - _MINIMAL_GAP)
    return levels


def _shorten(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:8])
    return f"({shown}{', ...' if len(values) > 8 else ''})"
