"""Extra-gradient: two steps by hand, convergence where plain descent diverges, checkpoints between the half-steps."""

import copy

import numpy as np
import pytest
import torch
from bilinear import game, iterate

from hvd_qgenx import ExtraAdam, ExtraGradient, ExtraSGD


def test_two_iterations_of_extra_sgd_by_hand():
    x, y, gradients = game()
    optimizer = ExtraSGD([x, y], lr=0.5)
    gradients()
    optimizer.extrapolation()
    assert (x.item(), y.item()) == (0.5, 1.5)  # 1 - 0.5 * 1, 1 + 0.5 * 1
    gradients()
    optimizer.step()
    assert (x.item(), y.item()) == (0.25, 1.25)  # 1 - 0.5 * 1.5, 1 + 0.5 * 0.5
    gradients()
    optimizer.extrapolation()
    assert (x.item(), y.item()) == (-0.375, 1.375)  # 0.25 - 0.5 * 1.25, 1.25 + 0.5 * 0.25
    gradients()
    optimizer.step()
    assert (x.item(), y.item()) == (-0.4375, 1.0625)  # 0.25 - 0.5 * 1.375, 1.25 + 0.5 * -0.375


def test_two_iterations_of_extra_sgd_from_the_past_by_hand():
    x, y, gradients = game()
    optimizer = ExtraSGD([x, y], lr=0.5, past=True)
    assert not optimizer.extrapolation_uses_gradient
    x.grad = torch.full_like(x, torch.nan)  # is not looked at
    optimizer.extrapolation()
    assert (x.item(), y.item()) == (1.0, 1.0), "there is no past yet"
    gradients()
    optimizer.step()
    assert (x.item(), y.item()) == (0.5, 1.5)  # 1 - 0.5 * 1, 1 + 0.5 * 1; the past is now (1, -1)
    optimizer.extrapolation()
    assert (x.item(), y.item()) == (0.0, 2.0)  # 0.5 - 0.5 * 1, 1.5 + 0.5 * 1
    gradients()
    optimizer.step()
    assert (x.item(), y.item()) == (-0.5, 1.5)  # 0.5 - 0.5 * 2, 1.5 + 0.5 * 0


def test_two_iterations_of_extra_adam_by_hand():
    """Written out: moments and count advance in both half-steps; both moves start from the same point."""
    lr, (b1, b2), eps = 0.1, (0.5, 0.9), 1e-8
    x, y, gradients = game()
    optimizer = ExtraAdam([x, y], lr=lr, betas=(b1, b2))
    point, m, v, count = [1.0, 1.0], [0.0, 0.0], [0.0, 0.0], 0

    def update(at):
        nonlocal count
        count += 1
        moves = []
        for i, g in enumerate((at[1], -at[0])):
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            moves.append(-lr * (m[i] / (1 - b1**count)) / ((v[i] / (1 - b2**count)) ** 0.5 + eps))
        return moves

    for _ in range(2):
        half = [p + d for p, d in zip(point, update(point), strict=True)]
        gradients()
        optimizer.extrapolation()
        assert [x.item(), y.item()] == pytest.approx(half, rel=1e-14)
        point = [p + d for p, d in zip(point, update(half), strict=True)]
        gradients()
        optimizer.step()
        assert [x.item(), y.item()] == pytest.approx(point, rel=1e-14)


def published_extra_adam(x, operator, iterations, lr, betas, past, eps=1e-8):
    """Gidel et al. (2019), algorithm 4, from its formulas, in NumPy; ``past`` is its option 1.

    The moments advance at x_t and at x_{t+1/2}, and so does the count of the bias corrections.
    """
    b1, b2 = betas
    m, v, count, last = np.zeros_like(x), np.zeros_like(x), 0, np.zeros_like(x)
    for _ in range(iterations):
        at = x
        for half in (0, 1):
            g = last if past and half == 0 else operator(at)
            count += 1
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            at = x - lr * (m / (1 - b1**count)) / (np.sqrt(v / (1 - b2**count)) + eps)
        x, last = at, g
    return x


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("betas", [(0.5, 0.9), (0.9, 0.999), (0.0, 0.9)])
def test_extra_adam_is_the_published_one_over_100_steps(betas, past):
    random = np.random.default_rng(0)
    skew, start = random.normal(size=(6, 6)), random.normal(size=6)
    matrix = skew - skew.T + 0.1 * np.eye(6)
    p = torch.tensor(start, requires_grad=True)
    optimizer = ExtraAdam([p], lr=0.01, betas=betas, past=past)
    for _ in range(100):
        for half_step in (optimizer.extrapolation, optimizer.step):
            p.grad = torch.tensor(matrix @ p.detach().numpy())
            half_step()
    expected = published_extra_adam(start, lambda x: matrix @ x, 100, 0.01, betas, past)
    # Float64 in another order of operations: 5e-16 measured.
    assert np.abs(p.detach().numpy() - expected).max() < 1e-12


def test_extra_sgd_converges_on_the_bilinear_game_where_sgd_diverges():
    x, y, gradients = game()
    iterate(ExtraSGD([x, y], lr=0.3), gradients, 400)
    assert abs(x.item()) + abs(y.item()) < 1e-6
    x, y, gradients = game()
    iterate(ExtraSGD([x, y], lr=0.3, past=True), gradients, 400)
    assert abs(x.item()) + abs(y.item()) < 1e-6
    x, y, gradients = game()
    plain = torch.optim.SGD([x, y], lr=0.3)
    for _ in range(400):
        gradients()
        plain.step()
    assert abs(x.item()) + abs(y.item()) > 1e6


BASES = {
    "sgd_nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.05, foreach=True),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1, fused=True),
    "adagrad_fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.05),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "two_groups": lambda p: torch.optim.Adam([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}], lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.05),
}


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("base", BASES)
def test_any_optimizer_extrapolates(base, ahead, past):
    """Beside the same optimizer driven by hand: move, keep the point, move again, put the last move on the start."""
    x, y, gradients = game()
    optimizer = ExtraGradient(BASES[base]([x, y]), past=past)
    u, v, others = game()
    rule, last = BASES[base]([u, v]), [torch.zeros_like(u), torch.zeros_like(v)]
    for _ in range(10):
        for half_step in [optimizer.extrapolation] * ahead + [optimizer.step]:
            gradients()
            half_step()
        points = []
        for half in range(ahead + 1):
            points.append([u.item(), v.item()])
            others()
            if past and half < ahead:
                u.grad, v.grad = last[0].clone(), last[1].clone()
            given = [u.grad.clone(), v.grad.clone()]
            rule.step()
        last = given
        with torch.no_grad():
            for p, start, half in zip((u, v), points[0], points[-1], strict=True):
                p.copy_(start + (p - half))
    assert (x.item(), y.item()) == (u.item(), v.item())


def test_weight_decay_is_part_of_the_operator():
    x, y, gradients = game()
    iterate(ExtraSGD([x, y], lr=0.5, weight_decay=1.0), gradients)
    # g = (y + x, y - x): half-step (1 - 0.5 * 2, 1 - 0.5 * 0) = (0, 1), then (1 - 0.5 * 1, 1 - 0.5 * 1).
    assert (x.item(), y.item()) == (0.5, 0.5)


def test_a_closure_is_evaluated_at_both_points():
    x, y, gradients = game()
    seen = []

    def closure():
        gradients()
        seen.append((x.item(), y.item()))
        return x.detach() * y.detach()

    assert ExtraSGD([x, y], lr=0.5).step(closure) == 1.0
    assert seen == [(1.0, 1.0), (0.5, 1.5)]
    assert (x.item(), y.item()) == (0.25, 1.25)


def test_from_the_past_a_closure_is_evaluated_once():
    x, y, gradients = game()
    optimizer, seen = ExtraSGD([x, y], lr=0.5, past=True), []

    def closure():
        gradients()
        seen.append((x.item(), y.item()))
        return x.detach() * y.detach()

    assert [float(optimizer.step(closure)) for _ in range(2)] == [1.0, 0.0]
    assert seen == [(1.0, 1.0), (0.0, 2.0)]
    assert (x.item(), y.item()) == (-0.5, 1.5)


@pytest.mark.parametrize("make", [ExtraSGD, ExtraAdam])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("halfway", [False, True])
def test_a_checkpoint_continues_bit_exactly_also_between_the_half_steps(make, past, halfway):
    x, y, gradients = game()
    optimizer = make([x, y], lr=0.1, past=past)
    iterate(optimizer, gradients, 3)
    if halfway:
        gradients()
        optimizer.extrapolation()
    saved = copy.deepcopy((x, y, optimizer.state_dict()))

    def finish(optimizer, gradients):
        if halfway:
            gradients()
            optimizer.step()
        iterate(optimizer, gradients, 3)

    finish(optimizer, gradients)
    u, v, others = game()
    with torch.no_grad():
        u.copy_(saved[0])
        v.copy_(saved[1])
    resumed = make([u, v], lr=0.7, past=past)
    resumed.load_state_dict(saved[2])
    finish(resumed, others)
    assert torch.equal(u, x) and torch.equal(v, y)


def test_a_parameter_without_gradient_stays_and_its_old_anchor_is_forgotten():
    x, y, gradients = game()
    optimizer = ExtraSGD([x, y], lr=0.5)
    iterate(optimizer, gradients, 2)
    with torch.no_grad():
        y.fill_(5.0)  # moved by somebody else
    for half_step in (optimizer.extrapolation, optimizer.step):
        gradients()
        y.grad = None
        half_step()
    assert y.item() == 5.0


def test_from_the_past_a_parameter_that_joins_late_or_pauses_is_moved_by_its_own_past():
    x, y, gradients = game()
    optimizer = ExtraAdam([x, y], lr=0.5, past=True)
    for has_gradient in (False, True, True, False, True):
        optimizer.extrapolation()
        gradients()
        if not has_gradient:
            before = optimizer.state[y]["anchor"].item() if "anchor" in optimizer.state[y] else y.item()
            y.grad = None
        optimizer.step()
        if not has_gradient:
            assert y.item() == before, "no gradient, no move"
    assert "past" in optimizer.state[y]


def test_a_second_extrapolation_moves_on_and_step_starts_from_the_first_point():
    x, y, gradients = game()
    optimizer = ExtraSGD([x, y], lr=0.5)
    for half_step in (optimizer.extrapolation, optimizer.extrapolation, optimizer.step):
        gradients()
        half_step()
    # (0.5, 1.5), then (0.5 - 0.75, 1.5 + 0.25) = (-0.25, 1.75), then (1 - 0.875, 1 - 0.125)
    assert (x.item(), y.item()) == (0.125, 0.875)


def test_step_without_extrapolation_says_what_is_missing():
    with pytest.raises(RuntimeError, match=r"step\(\) needs an extrapolation\(\) before it"):
        ExtraSGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer must be a Optimizer, got 3"):
        ExtraGradient(3)


@pytest.mark.parametrize("make", [ExtraSGD, ExtraAdam])
@pytest.mark.parametrize("lr", [-1.0, float("nan")])
def test_a_wrong_learning_rate_is_refused(make, lr):
    with pytest.raises(ValueError, match=f"(Invalid learning rate: |lr must be a finite number, got ){lr}"):
        make([torch.zeros(1, requires_grad=True)], lr=lr)


def test_groups_added_later_take_part():
    x, y, gradients = game()
    optimizer = ExtraSGD([x], lr=0.5)
    optimizer.add_param_group({"params": [y], "lr": 0.5})
    iterate(optimizer, gradients)
    assert (x.item(), y.item()) == (0.25, 1.25)


def test_schedulers_and_the_wrapped_optimizer_see_the_same_groups():
    x, y, gradients = game()
    optimizer = ExtraSGD([x, y], lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    iterate(optimizer, gradients)
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("base", [torch.optim.LBFGS, ExtraSGD])
def test_a_base_that_does_not_make_one_move_a_step_is_refused(base):
    with pytest.raises(ValueError, match="base_optimizer must make one move a step"):
        ExtraGradient(base([torch.zeros(1, requires_grad=True)]))


def test_a_closure_at_the_extrapolated_point_is_refused():
    x, y, gradients = game()
    optimizer = ExtraSGD([x, y], lr=0.5)
    gradients()
    optimizer.extrapolation()
    with pytest.raises(RuntimeError, match=r"parameters are at x_\{t\+1/2\}: call step\(\) alone"):
        optimizer.step(lambda: None)
