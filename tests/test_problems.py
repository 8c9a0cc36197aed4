"""The games of train/problems.py: operators are gradients, gaps are exact, projections are nearest points."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train import problems

NAMES = list(problems.PROBLEMS)


def points(problem, count=4, seed=0):
    """Points of the problem's set, around X_1."""
    random = torch.Generator().manual_seed(seed)
    spread = 0.3 * problem.start.norm(dim=1, keepdim=True).clamp(min=1.0) / problem.start.shape[1] ** 0.5
    for _ in range(count):
        noise = torch.randn(problem.start.shape, generator=random, dtype=torch.float64)
        yield problem.project(problem.start + spread * noise)


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_is_monotone(name):
    problem = problems.make(name, seeds=2)
    for x, y in zip(points(problem), points(problem, seed=1), strict=True):
        product = ((problem.operator(x) - problem.operator(y)) * (x - y)).sum(1)
        # Zero for the bilinear games, up to float64's rounding.
        assert (product > -1e-14).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_gap_is_positive_and_falls_to_zero_at_the_solution(name):
    """Extra-gradient with a step below 1 / L gets there, on projections too; the gap of the last point shows it."""
    problem = problems.make(name, seeds=2)
    assert all((problem.gap(x) > 0).all() for x in points(problem))
    x, first = problem.start, problem.gap(problem.start)
    for _ in range(3000):
        half = problem.project(x - 0.7 * problem.operator(x))
        x = problem.project(x - 0.7 * problem.operator(half))
    assert (problem.gap(x) > -1e-14).all() and (problem.gap(x) < 1e-3 * first).all()


def test_the_solution_of_an_affine_problem_has_gap_zero():
    for name in ("bilinear", "regularised", "quadratic"):
        problem = problems.make(name, seeds=3)
        assert (problem.operator(problem.solution) == 0).all()
        assert problem.gap(problem.solution).abs().max() < 1e-30


@pytest.mark.parametrize("name", ["bilinear", "regularised", "quadratic"])
def test_the_restricted_gap_is_a_supremum_that_is_attained(name):
    """<A(z), x - z> over the unit ball about the solution: no sample is above it, and ascent reaches it."""
    problem = problems.make(name, seeds=2)
    random = torch.Generator().manual_seed(3)
    for x in points(problem, 2):
        gap = problem.gap(x)
        best = torch.full_like(gap, -np.inf)
        z = torch.zeros_like(x)
        for _ in range(2000):
            value = (problem.operator(problem.solution + z) * (x - problem.solution - z)).sum(1)
            best = torch.maximum(best, value)
            # The gradient of <B z, e - z> is B^T (e - z) - B z; a step of 1/4 of its curvature, back into the ball.
            e = x - problem.solution
            ascent = problem._apply(problem.matrix.mT, e - z) - problem._apply(problem.matrix, z)
            z = z + 0.25 * ascent
            z = z / z.norm(dim=1, keepdim=True).clamp(min=1.0)
        for _ in range(200):
            w = torch.randn(x.shape, generator=random, dtype=torch.float64)
            w = w / w.norm(dim=1, keepdim=True) * torch.rand(2, 1, generator=random, dtype=torch.float64)
            value = (problem.operator(problem.solution + w) * (x - problem.solution - w)).sum(1)
            assert (value <= gap).all()
        # Projected ascent closes the rest linearly: 1e-12 of the gap is left at most.
        assert torch.allclose(best, gap, rtol=1e-9, atol=0) and (best <= gap * (1 + 1e-12)).all()


def test_the_gap_of_a_matrix_game_is_the_best_reply_of_both():
    problem = problems.make("matrix", 6, seeds=1)
    x = next(points(problem))
    u, v = x[0].split(3)
    m = problem.matrix[0]
    replies = torch.eye(3, dtype=torch.float64)
    best = max(float(u @ m @ r) for r in replies) - min(float(r @ m @ v) for r in replies)
    assert float(problem.gap(x)) == pytest.approx(best, rel=1e-14)


def test_the_logistic_operator_is_the_gradient_of_its_value():
    problem = problems.make("logistic")
    x = next(points(problem))
    w, q = (part[0].clone().requires_grad_() for part in problem._split(x))
    descent, ascent = torch.autograd.grad(problem.value(w, q), (w, q))
    assert torch.allclose(problem.operator(x)[0], torch.cat((descent, -ascent)), rtol=1e-10, atol=1e-14)


def test_the_replies_of_the_logistic_game_are_optimal():
    """No other point does better, and the gradient is zero where there is no bound."""
    problem = problems.make("logistic")
    w, q = problem._split(next(points(problem)))
    best = problem._best_response(q[0]).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.value(best, q[0]), best)
    assert gradient.norm() < 1e-12
    worst = problems.onto_simplex(1 / problem.root + problem._losses(w) / problem.root / problem.grip, problem.root)
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = torch.rand(q.shape, generator=random, dtype=torch.float64)
        other = other / other.sum() * problem.root
        for step in (1.0, 1e-3):
            assert problem.value(w, worst) >= problem.value(w, worst + step * (other - worst))


@pytest.mark.parametrize("total", [1.0, 2.5])
def test_the_projection_onto_the_simplex_is_the_nearest_point(total):
    """By its own condition: x = max(y - m, 0) for one number m, with the right sum."""
    y = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = problems.onto_simplex(y, total)
    assert (x >= 0).all() and torch.allclose(x.sum(1), torch.full((50,), total, dtype=torch.float64), rtol=1e-14)
    for row, given in zip(x, y, strict=True):
        shifts = (given - row)[row > 0]
        assert shifts.max() - shifts.min() < 1e-14 and (given[row == 0] <= shifts.max() + 1e-14).all()
    inside = torch.full((1, 4), total / 4, dtype=torch.float64)
    assert torch.equal(problems.onto_simplex(inside, total), inside)


@pytest.mark.parametrize("noise", ["absolute", "relative"])
def test_noise_has_the_stated_size_and_no_bias(noise):
    value = torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    random = torch.Generator().manual_seed(2)
    draws = problems.add_noise(value.expand(20000, 20), noise, 0.5, random) - value
    expected = 0.25 * (1.0 if noise == "absolute" else float(value.square().sum()))
    # 400,000 normal draws: the mean square has a relative standard deviation of sqrt(2 / 400,000) = 0.0022.
    assert float(draws.square().sum(1).mean()) == pytest.approx(expected, rel=0.011)
    # Each of 20 means has a standard deviation of sqrt(expected / 20 / 20000); 5 of them.
    assert draws.mean(0).abs().max() < 5 * (expected / 20 / 20000) ** 0.5
    assert problems.add_noise(value, "none", 0.5, random) is value


@pytest.mark.parametrize("dimension", [3, 30, 1])
def test_a_dimension_that_no_game_has_is_named(dimension):
    with pytest.raises(ValueError, match=f"dimension must be even, and beyond 20 a multiple of it, got {dimension}"):
        problems.make("bilinear", dimension)


def test_many_blocks_are_independent_games():
    problem = problems.make("bilinear", 60, seeds=1)
    x = next(points(problem))
    value = problem.operator(x)
    other = x.clone()
    other[:, 20:40] += 1.0
    changed = (problem.operator(other) != value).view(3, 20).any(1)
    assert changed.tolist() == [False, True, False]
