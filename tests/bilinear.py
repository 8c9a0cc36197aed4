"""The game min_x max_y x y from (1, 1), as one operator g = (y, -x), and how a test walks through it."""

import torch


def game():
    """x, y, and a function that puts the operator at the present point into their gradients."""
    x, y = (torch.tensor([1.0], dtype=torch.float64, requires_grad=True) for _ in range(2))

    def gradients():
        x.grad, y.grad = y.detach().clone(), -x.detach().clone()

    return x, y, gradients


def iterate(optimizer, gradients, count=1):
    """``count`` iterations of two half-steps."""
    for _ in range(count):
        for half_step in (optimizer.extrapolation, optimizer.step):
            gradients()
            half_step()
