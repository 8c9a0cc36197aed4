"""The rates of the paper at a size that is quick to run; benchmarks/rates.py has them in full."""

import sys
from pathlib import Path

import pytest
import torch

import hvd_qgenx

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rates():
    """benchmarks/rates.py, which is a script beside other scripts."""
    saved = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import rates

    yield rates
    sys.path[:] = saved


@pytest.fixture(scope="module")
def problems(rates):
    return rates.problems


@pytest.mark.parametrize("method", ["dual_averaging", "dual_extrapolation", "optimistic"])
@pytest.mark.parametrize("game", ["bilinear", "matrix"])
def test_the_simulation_is_qgenx_for_every_seed(rates, game, method):
    """QGenX told what the wrapper tells it: K, the mean, the sum over ranks of squared differences."""
    seeds, ranks = 2, 3
    simulation = rates.Simulation(game, method, "relative", "bits4", ranks, seeds)
    other = rates.Simulation(game, method, "relative", "bits4", ranks, seeds)
    problem, points = other.problem, [torch.nn.Parameter(row) for row in other.problem.start.clone()]
    rules = [hvd_qgenx.QGenX([p], method) for p in points]
    for rule in rules:
        rule.num_ranks = ranks

    def received():
        other.points = torch.stack([p.detach() for p in points])
        value = other.received()
        for p, mean in zip(points, value.mean(1), strict=True):
            p.grad = mean
        return value

    def project():
        for p, row in zip(points, problem.project(torch.stack([p.detach() for p in points])), strict=True):
            p.data.copy_(row)

    before = torch.zeros(other.shape, dtype=torch.float64)
    for _ in range(10):
        simulation.iterate()
        if method == "dual_extrapolation":
            before = received()
        for rule in rules:
            rule.extrapolation()
        project()
        value = received()
        for rule, difference in zip(rules, (value - before).square().sum((1, 2)).tolist(), strict=True):
            rule.squared_difference = difference
            rule.step()
        project()
        before = value if method == "optimistic" else before
    # Float64 in another order; a symbol that came out otherwise would show as 1e-2. 2e-15 measured.
    assert torch.stack([p.detach() for p in points]).sub(simulation.points).abs().max() < 1e-12
