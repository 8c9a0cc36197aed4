"""train/lookahead.py, beside what its formula gives on the game min_x max_y x y."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
from lookahead import Lookahead

sys.path.pop(0)


def _players():
    return [torch.nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (1.0, 0.5)]


def _descend(players, rate):
    x, y = players
    with torch.no_grad():
        step = rate * y, -rate * x
        x -= step[0]
        y -= step[1]


def _played(players, every, iterations, rate=0.1):
    lookahead = Lookahead(players, every)
    for iteration in range(1, iterations + 1):
        _descend(players, rate)
        lookahead.after(iteration)
    return complex(players[0].item(), players[1].item())


def test_it_turns_descent_that_spirals_outwards_inwards():
    """A step multiplies x + iy by 1 + 0.1i; a pull-back takes the mean of the point and the one five steps before."""
    start, turn = complex(1.0, 0.5), 1 + 0.1j
    assert _played(_players(), 0, 20) == pytest.approx(start * turn**20)
    assert _played(_players(), 5, 20) == pytest.approx(start * ((1 + turn**5) / 2) ** 4)
    assert abs(_played(_players(), 5, 20)) < abs(start) < abs(_played(_players(), 0, 20))


def test_it_goes_on_from_the_slow_weights_of_a_checkpoint():
    whole, cut = _players(), _players()
    expected = _played(whole, 4, 10)
    lookahead = Lookahead(cut, 4)
    for iteration in range(1, 11):
        _descend(cut, 0.1)
        lookahead.after(iteration)
        if iteration == 6:
            slow = [tensor.clone() for tensor in lookahead.slow]
            lookahead = Lookahead(cut, 4)
            lookahead.start(slow)
    assert complex(cut[0].item(), cut[1].item()) == expected


def test_without_it_nothing_is_kept():
    lookahead = Lookahead(_players(), 0)
    lookahead.after(1)
    assert lookahead.slow == []
