"""Fits: coordinate steps never raise the variance, reach the optimality condition and come near the exact optimum."""

import math

import pytest
import torch

from hvd_qgenx import Levels, distribution, reference
from hvd_qgenx.distribution import BIN_EDGES, FITS, NUM_BINS, Distribution, normal_distribution


def _histogram(values: torch.Tensor, norm: str) -> list[int]:
    """Counts of |v| / norm for rows of 1024, weighted by squared norms."""
    rows = values.view(-1, 1024)
    norms = rows.norm(dim=1, keepdim=True) if norm == "l2" else rows.abs().amax(dim=1, keepdim=True)
    weights = (norms.double().square() / norms.double().square().max() * 2**20).long().expand_as(rows)
    return reference.histogram((rows.abs() / norms).clamp(max=1.0).view(-1), weights.reshape(-1)).tolist()


def _histograms():
    """20 of them: normal, Laplace, cubed normal, sparse and mixed vectors, both norms, two sizes of the sample."""
    draws = {
        "normal": lambda g, n: torch.randn(n, generator=g),
        "laplace": lambda g, n: torch.randn(n, generator=g) * torch.randn(n, generator=g).abs(),
        "cubed": lambda g, n: torch.randn(n, generator=g) ** 3,
        "sparse": lambda g, n: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.1),
        "mixed": lambda g, n: torch.randn(n, generator=g) * torch.logspace(-3, 0, n),
    }
    for index, draw in enumerate(draws.values()):
        for norm in ("l2", "linf"):
            for size in (8, 200):
                yield _histogram(draw(torch.Generator().manual_seed(index), 1024 * size), norm)


HISTOGRAMS = list(_histograms())


def test_there_are_twenty_histograms():
    assert len(HISTOGRAMS) == 20


@pytest.mark.parametrize("index", range(20))
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_coordinate_descent_is_near_the_exact_optimum(index, bits):
    """The exact optimum is among edges of bins, 3 % apart, so levels between edges may beat it, at 8 bits by a lot."""
    found = Distribution(HISTOGRAMS[index])
    exact = found.variance(Levels.fitted(HISTOGRAMS[index], bits, "exact").values)
    assert found.variance(Levels.fitted(HISTOGRAMS[index], bits).values) <= 1.01 * exact


@pytest.mark.parametrize("index", range(20))
def test_exact_is_the_best_of_all_choices_of_edges(index):
    """For 3 levels, by trying all pairs of every 8th edge: the dynamic programme has more to choose from."""
    found = Distribution(HISTOGRAMS[index])
    coarse = BIN_EDGES[8:-1:8]
    tried = min(found.variance((0.0, a, b, 1.0)) for a in coarse for b in coarse if a < b)
    assert found.variance(Levels.fitted(HISTOGRAMS[index], 3, "exact").values) <= tried * (1 + 1e-5)


@pytest.mark.parametrize("update", [distribution._set_to_optimum, distribution._move_down])
@pytest.mark.parametrize("index", range(0, 20, 3))
def test_a_coordinate_step_never_raises_the_variance(update, index):
    found = Distribution(HISTOGRAMS[index])
    for levels in distribution.starts(found, 7):
        before = found.variance(levels)
        for sweep in range(3):
            for j in range(1, 7):
                levels[j] = update(found, levels[j - 1], levels[j], levels[j + 1])
                after = found.variance(levels)
                # Sums of 513 float64 terms of order one: 1e-13 of rounding.
                assert after <= before + 1e-13, (sweep, j)
                before = after


@pytest.mark.parametrize("index", range(20))
def test_the_fixed_point_satisfies_the_optimality_condition(index):
    """F(l_j) is the mean of F between its neighbours."""
    found = Distribution(HISTOGRAMS[index])
    levels = found.quantiles(7)
    for _ in range(3000):
        for j in range(1, 7):
            levels[j] = found.best_between(levels[j - 1], levels[j], levels[j + 1])
    for low, x, high in zip(levels, levels[1:], levels[2:], strict=False):
        assert abs(found.moments(x)[0] - _mean_of_cdf(found, low, high)) < 1e-6


def _mean_of_cdf(found: Distribution, low: float, high: float) -> float:
    """By the midpoint rule inside every bin, independent of the closed form."""
    edges = [low, *[edge for edge in BIN_EDGES if low < edge < high], high]
    total = sum((b - a) * found.moments((a + b) / 2)[0] for a, b in zip(edges, edges[1:], strict=False))
    return total / (high - low)


@pytest.mark.parametrize("index", range(20))
@pytest.mark.parametrize("method", [name for name in FITS if name != "exact"])
def test_no_fit_is_worse_than_its_own_starts(index, method):
    found = Distribution(HISTOGRAMS[index])
    variance = found.variance(Levels.fitted(HISTOGRAMS[index], 4, method).values)
    if method == "multiplier":
        starts = [distribution._powers(p, 7) for p in (0.2, 0.5, 0.8)]
    else:
        starts = distribution.starts(found, 7)
    assert variance <= min(map(found.variance, starts)) * (1 + 1e-6)


def test_the_slope_is_the_derivative_of_the_variance():
    found = normal_distribution("linf", 1024)
    for low, x, high in ((0.0, 0.1, 0.3), (0.1, 0.33, 0.4), (0.5, 0.77, 1.0)):
        step = 1e-6
        difference = found.variance((low, x + step, high)) - found.variance((low, x - step, high))
        assert found.slope(low, x, high) == pytest.approx(difference / (2 * step), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("counts", [[0] * NUM_BINS, [1] * 5, [math.nan] * NUM_BINS, [-1] + [1] * (NUM_BINS - 1)])
def test_what_is_no_histogram_is_refused(counts):
    with pytest.raises(ValueError, match=f"counts must be {NUM_BINS} non-negative numbers, not all zero"):
        Levels.fitted(counts, 4)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method must be one of 'coordinate_descent', 'projected_gradient'"):
        Levels.fitted(HISTOGRAMS[0], 4, "guess")
