"""What exchanges were like: what is summed up, what counts as another kind of gradient, and how often levels follow."""

from dataclasses import replace

import pytest
import torch

from hvd_qgenx import Codec, Key, Levels
from hvd_qgenx.adaptation import Settings, Statistics, fit
from hvd_qgenx.drift import BURST, GROUPS, INTERVAL, KINDS_SEEN, Drift, Sums, group_ends

CODEC = Codec(Levels.exponential(4), counts=(40, 20, 10, 10, 10, 5, 3, 2))
LIKE = Sums(3.5, 100.0, (400_000, 200_000, 200_000, 200_000))
UNLIKE = LIKE._replace(groups=(200_000, 400_000, 200_000, 200_000))


def _observe(drift, sums, iteration=1, kind="step 5", fitted=True):
    drift.observe(kind, sums, CODEC, iteration, fitted)
    return drift.refit


def test_groups_are_zero_and_three_parts_of_what_is_not():
    assert group_ends((50, 10, 10, 10, 10, 10, 10, 10)) == (1, 4, 6)
    assert group_ends((0, 100, 0, 0)) == (1, 2, 2)
    assert group_ends((99, 1)) == (1, 2, 2)
    assert group_ends((10, 0, 0, 0)) == (1, 2, 2)
    assert len(group_ends(None)) == GROUPS - 1


def test_sums_are_those_of_an_encoding():
    vector = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    layout, out = CODEC.layout((5000,)), torch.empty(CODEC.bound(5000), dtype=torch.uint8)
    drawn = CODEC.encode_segments([vector], layout, Key(0, 0, 0), out)
    sums = Sums.of(CODEC, drawn, replace(drawn, squared_error=2.0, squared_norm=4.0))
    assert sum(sums.groups) == 5000 and sums.groups[0] == int(drawn.counts[0])
    assert (sums.error, sums.norm, sums.mean_error, sums.mean_norm) == (
        drawn.squared_error,
        drawn.squared_norm,
        2.0,
        4.0,
    )
    total = Sums.total([sums, sums])
    assert total == Sums(2 * sums.error, 2 * sums.norm, tuple(2 * n for n in sums.groups), 4.0, 8.0)


@pytest.mark.parametrize("sums", [UNLIKE, LIKE._replace(error=5.0), LIKE._replace(error=1.0)])
def test_two_exchanges_of_a_kind_that_deviate_ask_for_other_levels(sums):
    drift = Drift()
    assert not _observe(drift, LIKE) and not _observe(drift, sums) and not _observe(drift, LIKE)
    assert not _observe(drift, sums), "what happens once, and then not, is chance"
    assert _observe(drift, sums)
    drift.start()
    assert not drift.refit and not _observe(drift, sums) and not _observe(drift, sums)


def test_exchanges_are_compared_with_those_of_their_kind():
    drift = Drift()
    for _ in range(5):
        assert not _observe(drift, LIKE, kind="extrapolation 5") and not _observe(drift, UNLIKE, kind="step 5")
    for number in range(2 * KINDS_SEEN):
        assert not _observe(drift, LIKE, kind=f"step {number}")
    assert len(drift.state_dict()["seen"]) == KINDS_SEEN


def test_what_cannot_be_judged_is_passed_over():
    drift = Drift()
    for sums in (LIKE, Sums(), Sums(0.0, 5.0), LIKE):
        assert not _observe(drift, sums)
    assert len(drift.state_dict()["seen"]) == 1


def test_the_first_gradient_that_is_not_zero_asks_for_the_first_fit():
    drift = Drift()
    assert not _observe(drift, LIKE, fitted=False), "the schedule has not begun"
    drift.wait()
    assert not _observe(drift, Sums(), fitted=False) and not _observe(drift, Sums(0.0, 1.0), fitted=False)
    assert _observe(drift, LIKE, fitted=False)
    drift.start()
    assert not drift.refit and not drift.waits


def test_levels_follow_no_more_often_than_so():
    """Gradients that are another kind at every exchange: four refits at once, then one in fifty iterations."""
    drift, taken = Drift(), []
    for iteration in range(2000):
        if drift.refit:
            drift.take(iteration)
            drift.start()
            taken.append(iteration)
        _observe(drift, (LIKE, UNLIKE)[iteration // 3 % 2], iteration + 1)
    assert 2000 // INTERVAL - 2 <= len(taken) <= 2000 // INTERVAL + BURST
    assert taken[BURST - 1] < INTERVAL <= taken[BURST] + INTERVAL


def test_the_second_rounding_is_watched_by_its_variance():
    drift, usual = Drift(), LIKE._replace(mean_error=1.0, mean_norm=100.0)
    _observe(drift, LIKE)  # by allgather, without a second rounding
    for sums in (usual, usual, LIKE, usual._replace(mean_error=1.5)):
        _observe(drift, sums)
    assert not drift.refit_mean
    _observe(drift, usual._replace(mean_error=1.5))
    assert drift.refit_mean and not drift.refit
    drift.start_mean()
    for _ in range(3):
        _observe(drift, usual._replace(mean_error=1.5))
    assert not drift.refit_mean


def test_a_state_continues_exactly():
    first, second = Drift(), Drift()
    for sums in (LIKE, UNLIKE):
        _observe(first, sums)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert _observe(first, UNLIKE) and _observe(second, UNLIKE)


STATIONARY = {
    "normal": lambda n, generator: torch.randn(n, generator=generator),
    "product of two normal": lambda n, generator: (
        torch.randn(n, generator=generator) * torch.randn(n, generator=generator)
    ),
    "fifth power": lambda n, generator: torch.randn(n, generator=generator) ** 5,
    "sparse": lambda n, generator: torch.randn(n, generator=generator) * (torch.rand(n, generator=generator) < 0.01),
    "one-hot": lambda n, generator: (torch.arange(n) == torch.randint(n, (1,), generator=generator)).float(),
}


@pytest.mark.parametrize("kind", STATIONARY)
@pytest.mark.parametrize(("bits", "numel"), [(3, 3000), (4, 3000), (4, 2**16)])
def test_stationary_gradients_are_fitted_once(kind, bits, numel):
    """Of two ranks, 300 exchanges or 60: heavy-tailed and sparse ones too, whose measured variance jumps."""
    generator, drift, codec = torch.Generator().manual_seed(1), Drift(), Settings(bits=bits).codec()
    layout, out = codec.layout((numel,)), torch.empty(2**20, dtype=torch.uint8)
    for step in range(300 if numel < 10_000 else 60):
        vectors = [STATIONARY[kind](numel, generator) for _ in range(2)]
        if step == 0:
            found = fit(Statistics.merged([Statistics.measure(codec, [v], layout) for v in vectors]), bits)
            codec = Settings(bits=bits).codec(*found)
        drawn = [codec.encode_segments([v], layout, Key(0, rank, step), out) for rank, v in enumerate(vectors)]
        drift.observe("step", Sums.total(Sums.of(codec, one) for one in drawn), codec, step + 1, True)
        assert not drift.refit, step
