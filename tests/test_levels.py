"""Levels: what they may be, their fit, Theorem 1."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_qgenx import Levels
from hvd_qgenx.fitting import BIN_EDGES, NUM_BINS, normal_distribution


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


@pytest.mark.parametrize("values", [(0.0, 0.1, 0.3, 1.0), (0.0, 2.0**-120, 0.5, 1.0), Levels.uniform(4).values])
def test_short_levels_are_the_nearest_of_eight_significant_bits(values):
    levels = Levels(values)
    expected = torch.tensor(levels.values).to(torch.bfloat16).float().tolist()
    assert list(levels.short().values) == expected
    assert levels.short().short() == levels.short()
    assert all(abs(a - b) <= 2.0**-8 * b for a, b in zip(expected, levels.values, strict=True))


@pytest.mark.parametrize("values", [(0.0, 0.5, 0.5001, 1.0), (0.0, 0.5, 0.9999, 1.0), Levels.uniform(8).values])
def test_levels_that_would_meet_or_are_many_stay_as_they_are(values):
    assert Levels(values).short() == Levels(values)


def test_fitted_levels_lose_next_to_nothing_by_being_short():
    found = normal_distribution("l2", 1024)
    levels = Levels.fitted(found.mass, 4)
    # At a minimum the loss is quadratic in moves of at most 2**-8: 7.5e-6 of the variance measured.
    assert found.variance(levels.short().values) <= found.variance(levels.values) * (1 + 1e-4)


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


#: (bucket, norm, bits): (relative variance, bits per coordinate) of uniform, exponential and fitted levels, as printed
#: in the facts of this project; None where nothing was.
PUBLISHED = {
    (1024, "l2", 3): ((7.51, 1.11), (5.39, 1.13), (0.309, 2.19)),
    (1024, "l2", 4): ((2.65, 1.38), (0.0956, 2.99), (0.0370, 3.42)),
    (1024, "l2", 8): ((0.0106, 4.12), (0.0819, 3.66), None),
    (1024, "linf", 3): ((0.218, 2.25), (0.147, 2.47), (0.142, 2.54)),
    (1024, "linf", 4): ((0.0400, 3.21), (0.0816, 3.56), (0.0246, 3.65)),
    (1024, "linf", 8): ((None, 7.35), (0.0816, 3.66), None),
    (8192, "l2", 3): ((23.1, None), (17.1, None), (0.348, None)),
}
#: Printed with one digit, 0.0008 / 6.79, 1e-4 and 1e-4 / 7.40, and recomputed: the fits had not converged.
CORRECTED = {
    (1024, "l2", 8): (None, None, (8.45e-5, 7.72)),
    (1024, "linf", 8): ((1.25e-4, None), None, (7.45e-5, 7.80)),
}


@pytest.mark.parametrize(("case", "expected"), [*PUBLISHED.items(), *CORRECTED.items()])
def test_variances_and_bits_of_a_normal_vector_are_those_of_the_table(case, expected, levels_table):
    """Within 3 %: the table is of one sample of some normal vectors, this is of another."""
    found = levels_table.measure(*case)
    pairs = [pair for kind, wanted in zip(found.values(), expected, strict=True) if wanted
             for pair in zip(kind, wanted, strict=True)]  # fmt: skip
    assert all(value == pytest.approx(printed, rel=0.03) for value, printed in pairs if printed is not None)


def test_the_corrected_variance_is_that_of_many_levels(levels_table):
    """Panter and Dite (1951): with gaps so small that the density is constant in each, the best ones have a variance of
    (int f^(1/3))^3 / (6 s^2) = pi sqrt(27) / (12 s^2) times sigma^2 for a normal f. 0.2 % of it measured at s = 127."""
    (_, _, (variance, _)) = levels_table.measure(1024, "l2", 8).values()
    assert variance == pytest.approx(math.pi * math.sqrt(27.0) / (12.0 * 127**2), rel=0.01)


@pytest.fixture(scope="module")
def levels_table():
    """The benchmark that writes the table of docs/levels.md."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        import levels_table

        return levels_table


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
