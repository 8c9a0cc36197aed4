"""Levels: what they may be, their fit, Theorem 1."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_qgenx import Levels, reference
from hvd_qgenx.distribution import BIN_EDGES, NUM_BINS, normal_distribution


def test_uniform_levels_are_equally_spaced():
    assert Levels.uniform(bits=3).values == tuple(float(torch.tensor(j / 3)) for j in range(4))
    assert Levels.uniform(bits=2).values == (0.0, 1.0)
    assert Levels.uniform(bits=8).num_levels == 127


def test_exponential_levels_halve():
    assert Levels.exponential(bits=4).values == (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    assert Levels.exponential(bits=8).values[1] == 2.0**-126


@pytest.mark.parametrize(
    "values",
    [
        (0.0,),
        (0.0, 0.5),
        (0.1, 1.0),
        (0.0, 0.5, 0.5, 1.0),
        (0.0, 0.7, 0.2, 1.0),
        (0.0, math.nan, 1.0),
        (0.0, 1e-60, 1.0),
        tuple(j / 200 for j in range(201)),
        "ab",
        "01",
        (0.0, None, 1.0),
    ],
)
def test_levels_that_do_not_rise_from_0_to_1_are_refused(values):
    with pytest.raises(ValueError, match="levels must"):
        Levels(values)


@pytest.mark.parametrize("bits", [0, 1, 9, -3, 4.0, "4", True, None])
def test_bits_outside_2_to_8_are_refused_by_name(bits):
    with pytest.raises(ValueError, match="bits must be an integer between 2 and 8"):
        Levels.uniform(bits)


def test_fit_of_even_data_is_uniform():
    # Bin masses proportional to bin widths: u is uniform on [0, 1], where equal gaps are optimal.
    counts = [round((high - low) * 2**40) for low, high in zip(BIN_EDGES, BIN_EDGES[1:], strict=False)]
    fitted = Levels.fitted(counts, bits=4).values
    assert max(abs(a - b) for a, b in zip(fitted, Levels.uniform(4).values, strict=True)) < 1e-4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_fit_is_never_worse_than_its_starts(bits, norm):
    distribution = normal_distribution(norm, 1024)
    fitted = distribution.variance(Levels.fitted(distribution.mass, bits).values)
    for start in (Levels.uniform(bits), Levels.exponential(bits)):
        assert fitted <= distribution.variance(start.values) * (1 + 1e-6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2**40), min_size=NUM_BINS, max_size=NUM_BINS).filter(any), st.integers(2, 8))
def test_fit_of_any_histogram_is_a_valid_table(counts, bits):
    assert Levels.fitted(counts, bits).num_levels == 2 ** (bits - 1) - 1


def test_fit_of_all_mass_in_one_bin_is_a_valid_table():
    for index in (0, 1, 300, NUM_BINS - 1):
        counts = [0] * NUM_BINS
        counts[index] = 1
        assert Levels.fitted(counts, 8).num_levels == 127


@pytest.mark.parametrize(
    ("norm", "bits", "expected"),
    [
        ("l2", 3, (7.51, 5.39, 0.309)),
        ("l2", 4, (2.65, 0.0956, 0.0370)),
        ("linf", 3, (0.218, 0.147, 0.142)),
        ("linf", 4, (0.0400, 0.0816, 0.0246)),
    ],
)
def test_variances_of_a_normal_vector_are_those_of_the_table(norm, bits, expected):
    """Relative variance for d = 1024 with uniform, exponential and fitted levels, within 3 % of the printed digits."""
    vectors = torch.randn(4000, 1024, generator=torch.Generator().manual_seed(0))
    norms = vectors.norm(dim=1, keepdim=True) if norm == "l2" else vectors.abs().amax(dim=1, keepdim=True)
    u, weights = (vectors.abs() / norms).clamp(max=1.0), norms.double().square()
    units = (weights / weights.max() * 2**20).long().expand_as(u).reshape(-1)
    fitted = Levels.fitted(reference.histogram(u.view(-1), units).tolist(), bits)
    for levels, value in zip((Levels.uniform(bits), Levels.exponential(bits), fitted), expected, strict=True):
        variance = (_variance(u.double(), levels) * weights[:, 0] / vectors.double().square().sum(1)).mean()
        assert float(variance) == pytest.approx(value, rel=0.03)


def _variance(u, levels):
    """The sum over each row of (l+ - u)(u - l-)."""
    table = torch.tensor(levels.values, dtype=torch.float64)
    lower = (torch.searchsorted(table, u, right=True) - 1).clamp(max=levels.num_levels - 1)
    return ((table[lower + 1] - u) * (u - table[lower])).sum(-1)


def test_variance_bound_is_that_of_nuqsgd_for_halving_levels():
    levels, d = Levels.exponential(bits=4), 1024
    assert levels.variance_bound(d) == pytest.approx(1 / 8 + 2.0 ** (-2 * 6 - 2) * d)
    assert levels.variance_bound(10**6) == pytest.approx(2.0**-6 * 1000 - 7 / 8)


@pytest.mark.parametrize(
    "levels", [Levels.uniform(2), Levels.uniform(4), Levels.exponential(3), Levels((0.0, 0.03, 0.4, 1.0))]
)
@pytest.mark.parametrize("d", [1, 7, 64, 1024])
def test_exact_variance_stays_below_theorem_1(levels, d):
    torch.manual_seed(d)
    for vector in (torch.randn(50, d), torch.randn(50, d) ** 3, torch.ones(1, d), torch.eye(d)[:1]):
        for u in _normalised(vector.double()):
            variance = _variance(u, levels) / u.square().sum()
            assert variance <= levels.variance_bound(d) * (1 + 1e-9)


def _normalised(vectors):
    for vector in vectors:
        for norm in (vector.norm(), vector.abs().max()):
            yield (vector.abs() / norm).clamp(max=1.0)
