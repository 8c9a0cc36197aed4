"""Algorithm 1: two steps by hand for each method, and what each sends."""

import copy

import pytest
import torch
from bilinear import game, iterate

from hvd_qgenx import QGenX

METHODS = ["dual_averaging", "dual_extrapolation", "optimistic"]


@pytest.mark.parametrize("method", METHODS)
def test_two_iterations_by_hand(method):
    """The update rule written out in plain numbers."""
    x, y, gradients = game()
    optimizer = QGenX([x, y], method=method, step_scale=0.5)
    start, dual, point, total, last = [1.0, 1.0], [0.0, 0.0], [1.0, 1.0], 0.0, [0.0, 0.0]
    for _ in range(2):
        gamma = 0.5 * (1.0 + total) ** -0.5
        ahead = {"dual_averaging": [0.0, 0.0], "dual_extrapolation": [point[1], -point[0]], "optimistic": last}[method]
        half = [p - gamma * v for p, v in zip(point, ahead, strict=True)]
        last = [half[1], -half[0]]
        total += sum((a - b) ** 2 for a, b in zip(ahead, last, strict=True))
        dual = [d - v for d, v in zip(dual, last, strict=True)]
        point = [s + 0.5 * (1.0 + total) ** -0.5 * d for s, d in zip(start, dual, strict=True)]
        gradients()
        optimizer.extrapolation()
        assert [x.item(), y.item()] == pytest.approx(half, rel=1e-14)
        gradients()
        optimizer.step()
        assert [x.item(), y.item()] == pytest.approx(point, rel=1e-14)


@pytest.mark.parametrize("method", ["dual_extrapolation", "optimistic"])
def test_it_converges_without_a_learning_rate(method):
    x, y, gradients = game()
    iterate(QGenX([x, y], method=method), gradients, 3000)
    assert abs(x.item()) + abs(y.item()) < 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_a_closure_is_evaluated_as_often_as_the_method_needs(method):
    x, y, gradients = game()
    calls = []
    optimizer = QGenX([x, y], method=method)
    optimizer.step(lambda: calls.append(gradients()))
    assert len(calls) == 1 + optimizer.extrapolation_uses_gradient


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("halfway", [False, True])
def test_a_checkpoint_continues_bit_exactly(method, halfway):
    x, y, gradients = game()
    optimizer = QGenX([x, y], method=method)
    iterate(optimizer, gradients, 2)
    if halfway:
        gradients()
        optimizer.extrapolation()
    u, v, others = game()
    with torch.no_grad():
        u.copy_(x)
        v.copy_(y)
    resumed = QGenX([u, v])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for rule, make in ((optimizer, gradients), (resumed, others)):
        if halfway:
            make()
            rule.step()
        iterate(rule, make, 2)
    assert torch.equal(u, x) and torch.equal(v, y) and resumed.gamma == optimizer.gamma


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "newton"}, "method must be one of 'dual_averaging', 'dual_extrapolation', 'optimistic'"),
        ({"step_scale": float("nan")}, "step_scale must be a positive number, got nan"),
        ({"step_scale": 0}, "step_scale"),
    ],
)
def test_a_wrong_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        QGenX([torch.zeros(1, requires_grad=True)], **options)


def test_step_without_extrapolation_says_what_is_missing():
    with pytest.raises(RuntimeError, match=r"step\(\) needs an extrapolation\(\)"):
        QGenX([torch.zeros(1, requires_grad=True)]).step()
