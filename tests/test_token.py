"""The drop-in's token: what of it holds on how many ranks, shown by the arithmetic of float32 itself."""

import numpy as np
import pytest
import torch

from hvd_qgenx.token import CALLS, Tokens, numbers_of, unit_of

MOST = 65536
FACTORS = [1.0, 2.0, 3.0, 7.0, 1 / 3, 0.1, 1e-3, 1e3, 12345.678, -1.0]


def _reduced(tokens, before=1.0, after=1.0):
    """Tokens of all ranks, float32[K, 2 + K], scaled, added in rank order and scaled, each step rounded to float32."""
    scaled = tokens.numpy() * np.float32(before)
    total = scaled[0].copy()
    for other in scaled[1:]:
        total += other
    return (total * np.float32(after)).tolist()


def _tokens(numbers):
    return torch.stack([Tokens(len(numbers), rank).take(number) for rank, number in enumerate(numbers)])


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("number", [1, CALLS])
@pytest.mark.parametrize("op", ["average", "sum"])
def test_every_number_of_ranks_and_every_factor_is_accepted(factor, number, op):
    """All K to 65,536 at once: entry 0 and the last are running sums, in float32 and one after another."""
    ranks = np.arange(1, MOST + 1)
    before = np.float32(1 / factor)
    after = (factor / ranks if op == "average" else np.full(MOST, factor)).astype(np.float32)
    ones = np.cumsum(np.full(MOST, before, np.float32), dtype=np.float32) * after
    lasts = np.cumsum(before * (1 + np.arange(MOST) % 2).astype(np.float32), dtype=np.float32) * after
    own = np.float32(number / CALLS) * before * after
    for size, one, last, mine in zip(ranks.tolist(), ones.tolist(), lasts.tolist(), own.tolist(), strict=True):
        assert unit_of(one, mine, last, size, number) is not None, size


@pytest.mark.parametrize("factor", FACTORS)
def test_the_other_ranks_numbers_come_out_of_any_pair(factor):
    """Against a rank's own entry each other one is a single number, rounded: every pair of extremes, and 5,000 more."""
    generator = np.random.default_rng(0)
    mine = np.concatenate([[1, 1, CALLS, CALLS, 3], generator.integers(1, CALLS + 1, 5000)])
    theirs = np.concatenate([[CALLS, 2, 1, CALLS - 1, CALLS], generator.integers(1, CALLS + 1, 5000)])
    for size in (2, 3, 188, 65536):
        scale = np.float32(factor / size)
        entries = [(v / CALLS).astype(np.float32) * np.float32(1 / factor) * scale for v in (mine, theirs)]
        unit = entries[0].astype(np.float64) * CALLS / mine
        error = np.abs(entries[1].astype(np.float64) * CALLS / unit - theirs)
        assert error.max() < 0.25  # 0.06 measured; a number is lost from 0.5 on


@pytest.mark.parametrize("size", [2, 3, 7, 188, 513])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1 / 3, 3.0)])
def test_ranks_learn_each_others_numbers(size, scales):
    numbers = [(rank * 7919) % CALLS + 1 for rank in range(size)]
    entries = _reduced(_tokens(numbers), scales[0], scales[1] / size)
    assert all(numbers_of(entries, rank, numbers[rank]) == numbers for rank in range(size))
    same = _reduced(_tokens([5] * size), *scales)
    assert numbers_of(same, 0, 5) == [5] * size


@pytest.mark.parametrize("size", [2, 3, 4, 16])
@pytest.mark.parametrize("number", [1, 1000, CALLS])
@pytest.mark.parametrize("reduce", [torch.amin, torch.amax, torch.prod])
def test_what_is_no_sum_is_refused_by_every_rank(size, number, reduce):
    entries = reduce(_tokens([number] * size), dim=0).tolist()
    assert all(numbers_of(entries, rank, number) is None for rank in range(size))


@pytest.mark.parametrize("size", [2, 4, 8, 64])
@pytest.mark.parametrize("number", [1, 2, 1000, CALLS // 2, CALLS])
def test_adasum_is_refused_by_every_rank_and_for_every_call(size, number):
    vectors = list(_tokens([number] * size).double())
    while len(vectors) > 1:
        vectors = [_adasum(*vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
    entries = vectors[0].float().tolist()
    assert all(numbers_of(entries, rank, number) is None for rank in range(size))


def _adasum(a, b):
    """Maleki et al. (2021): a (1 - a.b / 2 |a|^2) + b (1 - a.b / 2 |b|^2)."""
    return a * (1 - a @ b / (2 * a @ a)) + b * (1 - a @ b / (2 * b @ b))


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_token_that_is_spoiled_is_refused(spoil, place):
    entries = _reduced(_tokens([4, 4]))
    entries[place] = spoil
    assert numbers_of(entries, 0, 4) is None


def test_a_rank_without_the_compression_adds_ones_and_is_noticed():
    entries = (_tokens([3, 3])[0] + torch.ones(4)).tolist()
    assert numbers_of(entries, 0, 3) is None


def test_tokens_of_one_rank_follow_each_other_also_when_numbers_start_again():
    tokens = Tokens(3, 1)
    for number in [1, 2, 3, CALLS - 1, CALLS, 1, 2, 9]:
        assert tokens.take(number).tolist() == [1.0, 0.0, number / CALLS, 0.0, 2.0]
