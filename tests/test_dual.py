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


@pytest.mark.parametrize("method", METHODS)
def test_the_ergodic_average_is_that_of_the_half_points(method):
    x, y, gradients = game()
    optimizer = QGenX([x, y], method=method)
    halves = []
    for _ in range(5):
        gradients()
        optimizer.extrapolation()
        halves.append([x.item(), y.item()])
        gradients()
        optimizer.step()
    here = [x.item(), y.item()]
    with optimizer.averaged():
        # A running mean rounds once for each of 5 points.
        assert [x.item(), y.item()] == pytest.approx([sum(h) / 5 for h in zip(*halves, strict=True)], rel=1e-14)
    assert [x.item(), y.item()] == here


def test_the_average_of_a_group_added_later_starts_there():
    x, y, gradients = game()
    optimizer = QGenX([x])
    iterate(optimizer, gradients, 3)
    optimizer.add_param_group({"params": [y]})
    gradients()
    optimizer.extrapolation()
    half = y.item()
    gradients()
    optimizer.step()
    with optimizer.averaged():
        assert y.item() == half


def test_nothing_moves_on_from_the_average():
    x, y, gradients = game()
    optimizer = QGenX([x, y])
    iterate(optimizer, gradients)
    with optimizer.averaged():
        for half_step in (optimizer.extrapolation, optimizer.step):
            with pytest.raises(RuntimeError, match=r"inside averaged\(\): leave it"):
                half_step()
    iterate(optimizer, gradients)


def test_another_number_of_ranks_on_the_way_keeps_the_step_size():
    """X_{t+1} = X_1 + gamma_{t+1} Y_{t+1}: a step size that jumped would take the point with it."""
    x, y, gradients = game()
    optimizer = QGenX([x, y])
    optimizer.num_ranks = 4
    assert optimizer.gamma == 4.0, "nothing was summed yet: K of the formula"
    iterate(optimizer, gradients, 3)
    before = optimizer.gamma
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.num_ranks = 2
    # Both directions are a few float64 roundings of a square and a root.
    assert optimizer.num_ranks == 2 and optimizer.gamma == pytest.approx(before, rel=1e-14)
    alone = QGenX([x, y])
    alone.load_state_dict(saved)
    assert alone.num_ranks == 1 and alone.gamma == pytest.approx(before, rel=1e-14)


def test_projecting_after_each_half_step_stays_in_the_set_and_converges():
    """min_x max_y x y + x / 2 - y over |x|, |y| <= 1/4: the gradients point out of the box at the solution."""
    x, y, _ = game()
    optimizer = QGenX([x, y])
    for _ in range(400):
        for half_step in (optimizer.extrapolation, optimizer.step):
            x.grad, y.grad = y.detach() + 0.5, 1 - x.detach()
            half_step()
            with torch.no_grad():
                x.clamp_(-0.25, 0.25)
                y.clamp_(-0.25, 0.25)
    assert (x.item(), y.item()) == (-0.25, -0.25)
