"""The distribution of normalised magnitudes that a histogram describes, and the levels that suit it best.

A normalised magnitude is u = |v_i| / norm(bucket); levels are 0 = l_0 < ... < l_s = 1. All of it is plain float64 in a
fixed order, so that equal integer counts give equal levels on every rank.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

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

    def quantiles(self, size: int) -> list[float]:
        """A start for the fit: 0, the quantiles of j / size, 1, kept apart."""
        return spread([0.0] + [self.quantile(j / size) for j in range(1, size)] + [1.0])

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

    def slope(self, low: float, x: float, high: float) -> float:
        """d variance / d x of a level x between two others: int_low^x (u - low) dF - int_x^high (high - u) dF."""
        (w_low, m_low, _), (w, m, _), (w_high, m_high, _) = map(self.moments, (low, x, high))
        return (m - m_low - low * (w - w_low)) - (high * (w_high - w) - (m_high - m))

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


def starts(distribution: Distribution, size: int) -> list[list[float]]:
    """Uniform, halving, quantile and companded levels: the fit is not convex, so it starts from each of them."""
    uniform = [j / size for j in range(size + 1)]
    halving = [0.0] + [2.0 ** (j - size) for j in range(1, size + 1)]
    return [uniform, halving, distribution.quantiles(size), _companded(distribution, size)]


def _companded(distribution: Distribution, size: int) -> list[float]:
    """Levels as dense as the density to the power 5/16, near the optimal 1/3 of many levels (Panter and Dite, 1951).

    5/16 because square roots, unlike other powers, are the same bits on every machine.
    """
    roots = []
    for (low, high), mass in zip(pairwise(BIN_EDGES), distribution.mass, strict=True):
        fourth = math.sqrt(math.sqrt(mass / (high - low)))
        roots.append(fourth * math.sqrt(math.sqrt(fourth)) * (high - low))
    return Distribution(roots).quantiles(size)


def coordinate_descent(distribution: Distribution, size: int) -> list[float]:
    """Sweeps over the inner levels, each set to the optimum between its neighbours. Source: ALQ (Faghri et al.)."""
    return _best_descent(distribution, size, _set_to_optimum)


def projected_gradient(distribution: Distribution, size: int) -> list[float]:
    """Sweeps over the inner levels, each moved against its gradient by half the way to a neighbour at most."""
    return _best_descent(distribution, size, _move_down)


def _best_descent(distribution: Distribution, size: int, update) -> list[float]:
    fits = [_descend(distribution, start, update) for start in starts(distribution, size)]
    return min(fits, key=distribution.variance)


def _descend(distribution: Distribution, levels: list[float], update) -> list[float]:
    """Sweeps until a sweep no longer lowers the variance."""
    best = distribution.variance(levels)
    for _ in range(_SWEEPS):
        for j in range(1, len(levels) - 1):
            levels[j] = update(distribution, levels[j - 1], levels[j], levels[j + 1])
        variance = distribution.variance(levels)
        if variance >= best * (1.0 - 1e-9):
            break
        best = variance
    return levels


def _set_to_optimum(distribution: Distribution, low: float, current: float, high: float) -> float:
    return distribution.best_between(low, current, high)


def _move_down(distribution: Distribution, low: float, current: float, high: float) -> float:
    """One step of projected gradient descent, halved until it does not raise the variance."""
    reach = min(current - low, high - current) / 2.0
    step = math.copysign(reach, -distribution.slope(low, current, high))
    before = distribution.variance((low, current, high))
    for _ in range(20):
        if distribution.variance((low, current + step, high)) <= before:
            return current + step
        step /= 2.0
    return current


def multiplier(distribution: Distribution, size: int) -> list[float]:
    """l_j = p**(size - j) with the best p: a grid of 64, then golden section around its best. Source: AMQ."""

    def variance(p: float) -> float:
        return distribution.variance(_powers(p, size))

    grid = [k / 65 for k in range(1, 65)]
    middle = min(range(64), key=lambda k: variance(grid[k]))
    low, high = grid[max(middle - 1, 0)], grid[min(middle + 1, 63)]
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if variance(left) <= variance(right) else (left, high)
    return _powers(min((low, high, grid[middle]), key=variance), size)


def _powers(p: float, size: int) -> list[float]:
    return [0.0] + [p ** (size - j) for j in range(1, size + 1)]


def exact(distribution: Distribution, size: int) -> list[float]:
    """The optimum among levels at edges of bins: shortest path with ``size`` gaps from 0 to 1."""
    cost = _gap_costs(distribution)
    best, came_from = cost[0], []
    for _ in range(size - 1):
        total = best[:, None] + cost
        came_from.append(total.argmin(axis=0))
        best = total.min(axis=0)
    path = [NUM_BINS]
    for choice in reversed(came_from):
        path.append(int(choice[path[-1]]))
    return [0.0] + [BIN_EDGES[index] for index in reversed(path)]


def _gap_costs(distribution: Distribution) -> np.ndarray:
    """(NUM_BINS + 1)^2: the variance of a gap from edge i to edge j > i; infinite elsewhere."""
    w, m, s = (np.array(column) for column in zip(*distribution.prefix, strict=True))
    edges = np.array(BIN_EDGES)
    low, high = edges[:, None], edges[None, :]
    cost = (low + high) * (m[None] - m[:, None]) - (s[None] - s[:, None]) - low * high * (w[None] - w[:, None])
    return np.where(low < high, cost, np.inf)


FITS = {
    "coordinate_descent": coordinate_descent,
    "projected_gradient": projected_gradient,
    "multiplier": multiplier,
    "exact": exact,
}


def spread(levels: list[float]) -> list[float]:
    """Keeps neighbours apart by the smallest gap that float32 resolves everywhere on [0, 1]."""
    for j in range(1, len(levels) - 1):
        levels[j] = max(levels[j], levels[j - 1] + _MINIMAL_GAP)
    for j in range(len(levels) - 2, 0, -1):
        levels[j] = min(levels[j], levels[j + 1] - _MINIMAL_GAP)
    return levels
