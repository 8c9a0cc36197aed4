"""The distribution of normalised magnitudes that a histogram describes, and the levels that suit it best.

A normalised magnitude is u = |v_i| / norm(bucket); levels are 0 = l_0 < ... < l_s = 1. All of it is plain float64 in a
fixed order, so that equal integer counts give equal levels on every rank.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
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

_LOW, _HIGH = np.array(BIN_EDGES[:-1]), np.array(BIN_EDGES[1:])

_MINIMAL_GAP = 2.0**-20  # fitted levels stay apart in float32
_FIRST_SWEEPS = 5  # of every start; only the best one of them goes on
_SWEEPS = 100
_ENOUGH = 1e-7  # a sweep that lowers the objective by less than this share of it is the last
_SIMPLE_COUNT = 2**40


class Distribution:
    """The distribution of u that a histogram over ``BIN_EDGES`` describes, uniform inside each bin.

    W, M and S are the integrals of 1, u and u^2 from 0 to x. Sums go bin by bin and all else is +, -, *, / and square
    roots of float64, which are the same bits on every machine: all ranks get the same levels from the same counts.
    """

    def __init__(self, counts: Sequence[float]):
        try:
            values = np.array(counts, dtype=np.float64)
        except (TypeError, ValueError):
            values = np.zeros(0)
        # cumsum adds in order, sum in pairs whose shape depends on the machine.
        total = float(values.cumsum()[-1]) if values.shape == (NUM_BINS,) else 0.0
        if not 0.0 < total < math.inf or values.min() < 0.0:
            raise ValueError(f"counts must be {NUM_BINS} non-negative numbers, not all zero")
        mass = values / total
        density = mass / (_HIGH - _LOW)
        terms = (mass, mass * (_LOW + _HIGH) / 2.0, mass * (_LOW * _LOW + _LOW * _HIGH + _HIGH * _HIGH) / 3.0)
        self.mass, self._density = mass.tolist(), density.tolist()
        self._w, self._m, self._s = ([0.0, *term.cumsum().tolist()] for term in terms)

    def moments(self, x: float) -> tuple[float, float, float]:
        """(W(x), M(x), S(x))."""
        # x = 1 is the end of the last bin, not the start of another.
        index = min(bisect_right(BIN_EDGES, x) - 1, NUM_BINS - 1)
        low = BIN_EDGES[index]
        inside = self._density[index] * (x - low)
        return (
            self._w[index] + inside,
            self._m[index] + inside * (x + low) / 2.0,
            self._s[index] + inside * (x * x + x * low + low * low) / 3.0,
        )

    def quantile(self, probability: float) -> float:
        """The x with W(x) = probability."""
        index = min(max(bisect_right(self._w, probability) - 1, 0), NUM_BINS - 1)
        low, high, mass = BIN_EDGES[index], BIN_EDGES[index + 1], self.mass[index]
        # An empty bin has no place for the quantile: any point of it will do.
        inside = (probability - self._w[index]) / mass if mass > 0.0 else 0.0
        return low + (high - low) * min(max(inside, 0.0), 1.0)

    def quantiles(self, size: int) -> list[float]:
        """A start for the fit: 0, the quantiles of j / size, 1, kept apart."""
        return spread([0.0] + [self.quantile(j / size) for j in range(1, size)] + [1.0])

    def variance(self, levels: Sequence[float]) -> float:
        """The integral of (l_{j+1} - u)(u - l_j), the variance of stochastic rounding for a unit norm."""
        ends = pairwise((level, self.moments(level)) for level in levels)
        return _sum(_gap_variance(low, high, before, after) for (low, before), (high, after) in ends)

    def relative_variance(self, levels: Sequence[float]) -> float:
        """E||Q(v) - v||^2 / ||v||^2 of vectors with this histogram, weighted by squared norms: variance / E u^2."""
        return self.variance(levels) / self._s[-1]

    def best_between(self, low: float, current: float, high: float) -> float:
        """The level between two neighbours that minimises the variance: W(x) is the mean of W over [low, high]."""
        (w_low, m_low, _), (w_high, m_high, _) = self.moments(low), self.moments(high)
        # Nothing lies between the neighbours, so every place is as good as the present one.
        if w_high <= w_low:
            return current
        mean = (high * w_high - low * w_low - (m_high - m_low)) / (high - low)
        return min(max(self.quantile(mean), low), high)

    def slope(self, low: float, x: float, high: float) -> float:
        """d variance / d x of a level x between two others: int_low^x (u - low) dF - int_x^high (high - u) dF."""
        (w_low, m_low, _), (w, m, _), (w_high, m_high, _) = map(self.moments, (low, x, high))
        return (m - m_low - low * (w - w_low)) - (high * (w_high - w) - (m_high - m))

    def shares(self, low: float, high: float) -> tuple[float, float]:
        """How often stochastic rounding in the gap [low, high] gives its lower and its upper end."""
        (w_low, m_low, _), (w_high, m_high, _) = self.moments(low), self.moments(high)
        up = (m_high - m_low - low * (w_high - w_low)) / (high - low)
        # Differences of integrals may fall below zero by their rounding.
        return max(w_high - w_low - up, 0.0), max(up, 0.0)

    def symbol_probabilities(self, levels: Sequence[float]) -> tuple[float, ...]:
        """(p_0, ..., p_s): how often stochastic rounding gives each level."""
        probabilities = [0.0] * len(levels)
        for j, (low, high) in enumerate(pairwise(levels)):
            down, up = self.shares(low, high)
            probabilities[j] += down
            probabilities[j + 1] += up
        return tuple(probabilities)

    def code_length(self, levels: Sequence[float]) -> float:
        """Entropy of the signed symbols, in bits per coordinate: -sum_j p_j log2 p_j + (1 - p_0)."""
        zero, *others = self.symbol_probabilities(levels)
        return _bits(zero) + _sum(_bits(p) + p for p in others)


def _gap_variance(low: float, high: float, before: tuple, after: tuple) -> float:
    """The integral of (high - u)(u - low) over a gap, from the moments at its ends."""
    w, m, s = after[0] - before[0], after[1] - before[1], after[2] - before[2]
    return (low + high) * m - s - low * high * w


def _sum(terms: Iterable[float]) -> float:
    """From first to last; Python's own sum rounds otherwise from version 3.12 on."""
    total = 0.0
    for term in terms:
        total += term
    return total


def _bits(p: float) -> float:
    """-p log2 p, by a series: a library's logarithm may differ in its last bit from machine to machine."""
    if p <= 0.0:
        return 0.0
    # p = mantissa 2^exponent, and the mantissa is near sqrt(1/2), where the series is short.
    mantissa, exponent = math.frexp(p)
    t = (mantissa - _ROOT_HALF) / (mantissa + _ROOT_HALF)  # |t| <= 0.172, so t^23 / 23 < 2^-62
    series = 0.0
    for k in range(21, 0, -2):
        series = series * t * t + 1.0 / k
    return -p * (exponent - 0.5 + 2.0 * t * series / _LN_2)


_ROOT_HALF, _LN_2 = 0.7071067811865476, 0.6931471805599453


def truncated_normal(moments: Sequence[int]) -> list[int]:
    """Counts over ``BIN_EDGES`` of |r| for a normal r with given moments, cut off outside [-1, 1].

    Args:
        moments: sums of w, w r and w r^2 over coordinates r = v_i / norm, weighted by w, the first one positive.

    Mean and deviation are those of the moments, the deviation at least 2**-16 and 1/32 of the mean (the width of a
    bin). Bins by Simpson's rule. Source: ALQ (Faghri et al., 2020), whose statistics Q-GenX takes over.
    """
    total, first, second = moments
    mean = first / total
    # Coordinates that are all equal have none, and a density needs some.
    deviation = max(math.sqrt(max(second / total - mean * mean, 0.0)), abs(mean) / 32.0, 2.0**-OCTAVES)

    def density(u: np.ndarray) -> np.ndarray:
        positive, negative = (u - mean) / deviation, (u + mean) / deviation
        return _exp_of_minus(positive * positive / 2.0) + _exp_of_minus(negative * negative / 2.0)

    # |r| gathers both signs: r and -r fall into one bin.
    mass = (density(_LOW) + 4.0 * density((_LOW + _HIGH) / 2.0) + density(_HIGH)) * (_HIGH - _LOW)
    return [round(count) for count in (mass / mass.cumsum()[-1] * _SIMPLE_COUNT).tolist()]


def _exp_of_minus(t: np.ndarray) -> np.ndarray:
    """exp(-t) for t >= 0 by exp(-t / 1024)**1024, for the reason that ``_bits`` gives."""
    small, series = np.minimum(t, 700.0) / 1024.0, np.ones_like(t)
    for k in range(16, 0, -1):
        series = 1.0 + small / k * series
    value = 1.0 / series
    for _ in range(10):
        value = value * value
    return value


def normal_distribution(norm: str, bucket_size: int) -> Distribution:
    """The distribution of |z| / norm for a bucket of ``bucket_size`` standard normal numbers z, to first order."""
    scale = math.sqrt(bucket_size) if norm == "l2" else _expected_maximum(bucket_size)
    cumulative = [math.erf(edge * scale / math.sqrt(2.0)) for edge in BIN_EDGES]
    counts = [high - low for low, high in pairwise(cumulative)]
    # What a normal number has beyond 1 cannot occur: u is at most 1.
    counts[-1] += 1.0 - sum(counts)
    return Distribution(counts)


def _expected_maximum(count: int) -> float:
    """The x that one of ``count`` normal magnitudes exceeds on average, by bisection."""
    low, high = 0.1, 40.0
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if math.erfc(middle / math.sqrt(2.0)) * count > 0.9 else (low, middle)
    return low


def starts(distribution: Distribution, size: int) -> list[list[float]]:
    """The fit is not convex, so it starts from uniform, halving, quantile and companded levels and from the optimum
    among edges of bins (every third, where there are few levels)."""
    uniform = [j / size for j in range(size + 1)]
    halving = [0.0] + [2.0 ** (j - size) for j in range(1, size + 1)]
    at_edges = exact(distribution, size, stride=3 if size < 32 else 1)
    return [uniform, halving, distribution.quantiles(size), companded(distribution, size), spread(at_edges)]


def companded(distribution: Distribution, size: int) -> list[float]:
    """Levels as dense as the density to the power 5/16, near the optimal 1/3 of many levels (Panter and Dite, 1951).

    5/16 because square roots, unlike other powers, are the same bits on every machine.
    """
    fourth = np.sqrt(np.sqrt(np.array(distribution.mass) / (_HIGH - _LOW)))
    return Distribution(fourth * np.sqrt(np.sqrt(fourth)) * (_HIGH - _LOW)).quantiles(size)


def coordinate_descent(distribution: Distribution, size: int) -> list[float]:
    """Sweeps over the inner levels, each set to the optimum between its neighbours. Source: ALQ (Faghri et al.)."""
    return _fit_each(distribution, size, _set_to_optimum)


def projected_gradient(distribution: Distribution, size: int) -> list[float]:
    """Sweeps over the inner levels, each moved against its gradient by half the way to a neighbour at most."""
    return _fit_each(distribution, size, _move_down)


def _fit_each(distribution: Distribution, size: int, update: Callable) -> list[float]:
    """A descent in which ``update`` gives each level its place between its neighbours."""

    def sweep(levels: list[float]) -> None:
        for j in range(1, size):
            levels[j] = update(distribution, levels[j - 1], levels[j], levels[j + 1])

    return _best_descent(starts(distribution, size), sweep, distribution.variance)


def _best_descent(candidates: list[list[float]], sweep: Callable, objective: Callable) -> list[float]:
    """Some sweeps from every start, then from the best of them until they no longer lower the objective."""
    for levels in candidates:
        _descend(levels, sweep, objective, _FIRST_SWEEPS)
    best = min(candidates, key=objective)
    # A few sweeps tell which valley is deepest; only there is it worth going to the bottom.
    _descend(best, sweep, objective, _SWEEPS)
    return best


def _descend(levels: list[float], sweep: Callable, objective: Callable, sweeps: int) -> None:
    before = objective(levels)
    for _ in range(sweeps):
        sweep(levels)
        after = objective(levels)
        # Sweeps go on for ever by ever smaller steps; these no longer matter.
        if after >= before * (1.0 - _ENOUGH):
            break
        before = after


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
        # A step over the optimum raises the variance: half of it may not.
        step /= 2.0
    return current


def multiplier(distribution: Distribution, size: int) -> list[float]:
    """l_j = p**(size - j) with the best p: a grid of 64, then golden section around its best. Source: AMQ."""

    def variance(p: float) -> float:
        return distribution.variance(_powers(p, size))

    grid = [k / 65 for k in range(1, 65)]
    middle = min(range(64), key=lambda k: variance(grid[k]))
    # The variance has one valley in p, but only the grid shows where.
    low, high = grid[max(middle - 1, 0)], grid[min(middle + 1, 63)]
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if variance(left) <= variance(right) else (left, high)
    return _powers(min((low, high, grid[middle]), key=variance), size)


def _powers(p: float, size: int) -> list[float]:
    return [0.0] + [p ** (size - j) for j in range(1, size + 1)]


def exact(distribution: Distribution, size: int, stride: int = 1) -> list[float]:
    """The optimum among levels at every ``stride``-th edge of bins: shortest path with ``size`` gaps from 0 to 1."""
    edges = np.array(BIN_EDGES[::stride])
    cost = _gap_costs(distribution, edges)
    # cost[i, 0] is one gap from 0 to edge i; each round adds one more gap before it.
    best, came_from = cost[:, 0], []
    for _ in range(size - 1):
        total = cost + best
        came_from.append(total.argmin(axis=1))
        best = total[np.arange(len(edges)), came_from[-1]]
    path = [len(edges) - 1]
    for choice in reversed(came_from):
        path.append(int(choice[path[-1]]))
    return [0.0] + [float(edges[index]) for index in reversed(path)]


def _gap_costs(distribution: Distribution, edges: np.ndarray) -> np.ndarray:
    """(edges, edges): the variance of a gap from edge j to edge i > j; infinite elsewhere."""
    w, m, s = (np.array(column) for column in zip(*map(distribution.moments, edges.tolist()), strict=True))
    high, low = edges[:, None], edges[None, :]
    cost = (low + high) * (m[:, None] - m) - (s[:, None] - s) - low * high * (w[:, None] - w)
    return np.where(low < high, cost, np.inf)


FITS = {
    "coordinate_descent": coordinate_descent,
    "projected_gradient": projected_gradient,
    "multiplier": multiplier,
    "exact": exact,
}


def rate_aware(distribution: Distribution, plain: Distribution, fitted: list[float], weight: float) -> list[float]:
    """Descent on relative variance + ``weight`` * code length, the latter on the unweighted histogram ``plain``.

    From ``fitted`` levels, from its other starts, and from levels a step apart, whose codes are short.
    """

    def objective(levels: list[float]) -> float:
        return distribution.relative_variance(levels) + weight * plain.code_length(levels)

    def sweep(levels: list[float]) -> None:
        for j in range(1, len(levels) - 1):
            levels[j] = _best_place(distribution, plain, weight, levels, j)

    size = len(fitted) - 1
    # The objective has many valleys, since a level without coordinates costs no bits.
    candidates = [fitted, *starts(distribution, size), *_stepped(size)]
    return _best_descent(sorted(candidates, key=objective)[:_RATE_STARTS], sweep, objective)


def _stepped(size: int) -> list[list[float]]:
    """Levels a step apart but for the last, and levels that are even beyond a large first one."""
    steps = [share * 2.0**-k / size for k in range(10) for share in (0.75, 0.5)]
    firsts = [j / 16 for j in range(1, 16)] + [1.0 - 2.0**-12]
    even = [[0.0] + [first + (1.0 - first) * j / (size - 1) for j in range(size)] for first in firsts if size > 1]
    return [[j * step for j in range(size)] + [1.0] for step in steps] + even


def _best_place(distribution: Distribution, plain: Distribution, weight: float, levels: list[float], j: int) -> float:
    """Of level j's place and places up to half way to its neighbours, the one with the lowest objective."""
    low, current, high = levels[j - 1 : j + 2]
    # The neighbours' frequencies change with this level too, and their code words with them.
    below = plain.shares(levels[j - 2], low)[1] if j > 1 else 0.0
    above = plain.shares(high, levels[j + 2])[0] if j + 2 < len(levels) else 0.0

    def objective(x: float) -> float:
        (down, middle_up), (middle_down, up) = plain.shares(low, x), plain.shares(x, high)
        middle = middle_up + middle_down
        bits = _bits(below + down) + (below + down) * (j > 1) + _bits(middle) + middle + _bits(up + above) + up
        return distribution.relative_variance((low, x, high)) + weight * bits

    places = [current]
    for share in _SHARES:
        places += [current - share * (current - low), current + share * (high - current)]
    return min((x for x in places if x == current or low < x < high), key=objective)


_RATE_STARTS = 4
_SHARES = (0.5, 0.125, 0.02, 0.002)


def spread(levels: list[float]) -> list[float]:
    """Keeps neighbours apart by the smallest gap that float32 resolves everywhere on [0, 1]."""
    for j in range(1, len(levels) - 1):
        levels[j] = max(levels[j], levels[j - 1] + _MINIMAL_GAP)
    # Pushing up may have passed the end, which stays 1: push back down.
    for j in range(len(levels) - 2, 0, -1):
        levels[j] = min(levels[j], levels[j + 1] - _MINIMAL_GAP)
    return levels
