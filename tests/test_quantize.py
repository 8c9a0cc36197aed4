"""Norms, draws and stochastic rounding: unbiased, exact where they can be."""

import math

import pytest
import torch
from drawn import as_received, drawn

from hvd_qgenx import Codec, Key, Levels
from hvd_qgenx.backends.specification import rounding
from hvd_qgenx.backends.specification.rounding import Buckets, bucket_norms
from hvd_qgenx.layout import Layout


def test_l2_norm_is_rounded_up_so_that_no_magnitude_passes_one():
    torch.manual_seed(0)
    rows = torch.randn(5000, 48) * torch.logspace(-40, 37, 5000)[:, None]
    norms, exact = rounding.l2_norms(rows), rows.double().square().sum(1).sqrt()
    assert (norms.double() >= exact * (1 - 1e-15)).all()
    assert (rows.abs() / norms[:, None]).max() <= 1.0


def test_norms_neither_overflow_nor_underflow():
    buckets = Buckets.cut(Layout((4,), 0, 4))
    assert bucket_norms(torch.tensor([3e38, 0.0, 0.0, 0.0]), buckets, "l2") == torch.tensor(3e38)
    assert bucket_norms(torch.tensor([1e-45, 0.0, 0.0, 0.0]), buckets, "l2") == torch.tensor(1e-45)
    assert bucket_norms(torch.tensor([3e38, 3e38, 0.0, 0.0]), buckets, "l2").isnan()


def test_l2_norm_adds_in_the_documented_order():
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    lanes = [0.0] * 16
    for index, value in enumerate(row[0].double().tolist()):
        lanes[index % 16] += value * value
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [lanes[j] + lanes[j + half] for j in range(half)]
    norm = rounding.l2_norms(row)[0]
    below = norm.nextafter(torch.tensor(0.0))
    assert float(below.double()) ** 2 < lanes[0] <= float(norm.double()) ** 2


def _stream(key, numel):
    """The draws of one vector in buckets of 1024."""
    buckets = Buckets.cut(Layout((numel,)))
    return rounding.draws(key.pair, buckets.starts, buckets.lengths)


def test_draws_are_those_of_the_integer_formula():
    """The generator written once more, in Python's integers: no backend and no later version may draw others."""
    pair, starts, lengths = (0x12345678, 0xFABCDEF0), (0, 37, 2**32 - 5, 2**33 + 11), (37, 3, 50, 1000)
    expected = []
    for start, length in zip(starts, lengths, strict=True):
        for i in range(length):
            x = (start + 8 * (i // 16) + i % 8 + pair[0]) % 2**32
            x = (x ^ x >> 16) * 0x7FEB352D % 2**32
            x = ((x ^ x >> 15) + pair[1] + (start >> 32) * 0x9E3779B9) % 2**32 * 0x846CA68B % 2**32
            x ^= x >> 16
            expected.append(x if i & 8 else (x % 2**16) * 2**16 + x // 2**16)
    assert rounding.draws(pair, torch.tensor(starts), torch.tensor(lengths)).tolist() == expected
    assert [draw >> 16 for draw in expected[:3]] == [62853, 58752, 24541]


def test_the_pair_of_a_key_is_that_written_down():
    assert Key(seed=1, rank=2, step=3, stream=4).pair == (94439791, 729390280)


def test_draws_are_even_and_independent_of_rank_step_stream_and_neighbour():
    n = 2**20
    streams = [_stream(Key(0, r, t, s), n).double() for r, t, s in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    for stream in streams:
        # 256 cells of 4096 expected: chi-squared has mean 255 and deviation 22.6; 6 deviations.
        for part in (stream, stream % 2**16 * 2**16):  # the halves that decide, and those behind them
            counts = torch.histc(part, 256, 0, 2**32)
            assert abs(((counts - n / 256) ** 2 / (n / 256)).sum() - 255) < 6 * 22.6
    unit = [(stream - 2**31) / (2**32 / math.sqrt(12)) for stream in streams]
    pairs = [(unit[0], other) for other in unit[1:]] + [(unit[0][:-lag], unit[0][lag:]) for lag in (1, 2, 16)]
    for first, second in pairs:
        assert abs((first * second).mean()) * math.sqrt(len(first)) < 5.0  # 5 deviations of a product's mean


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(
    "levels",
    [Levels.uniform(2), Levels.uniform(4), Levels.uniform(8), Levels.exponential(4), Levels((0.0, 0.011, 0.3, 1.0))],
)
def test_rounding_is_unbiased(levels, norm):
    d, repeats = 64, 4000
    vector = torch.randn(d, generator=torch.Generator().manual_seed(3))
    codec = Codec(levels, coder="fixed", bucket_size=d, norm=norm)
    total = torch.zeros(d, dtype=torch.float64)
    for step in range(8):
        total += as_received(codec, vector.repeat(repeats), Key(5, step % 3, step)).view(repeats, d).double().sum(0)
    deviation = _deviation(vector, levels, norm)
    error = (total / (8 * repeats) - vector.double()).abs()
    # z below 5 for 64 coordinates: false alarm 4e-5 a case; the largest of a bucket may be a level to the last place.
    assert (error <= 5 * deviation / math.sqrt(8 * repeats) + 2.0**-22 * float(vector.norm())).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(
    "levels",
    [Levels.uniform(2), Levels.uniform(4), Levels.uniform(7), Levels.uniform(8), Levels.exponential(4),
     Levels.exponential(8), Levels((0.0, 0.011, 0.3, 1.0))],
)  # fmt: skip
def test_the_bias_is_that_of_float32_alone(levels, norm):
    """Exactly, for 65,536 coordinates: the number of draws that round one up is found by halves."""
    vector = torch.randn(65536, generator=torch.Generator().manual_seed(1))
    vector[::2] *= 1e-6
    buckets, bits = Buckets.cut(Layout((len(vector),))), 32
    norms = bucket_norms(vector, buckets, norm)

    def index(draw):
        return rounding.round_to_levels(vector, norms, buckets.bucket_of, levels, draw)

    lower, up = index(torch.zeros(len(vector), dtype=torch.int64)), torch.full((len(vector),), 2**bits)
    for bit in reversed(range(bits)):  # the smallest draw that rounds up, 2**bits if none does
        lowered = up - 2**bit
        up = torch.where(index(lowered.clamp(max=2**bits - 1)) > lower, lowered, up)
    table = torch.tensor(levels.values, dtype=torch.float64)
    above = (lower + 1).clamp(max=levels.num_levels)
    mean = table[lower] + (2**bits - up) / 2**bits * (table[above] - table[lower])
    exact = (vector.double().abs() / norms.double()[buckets.bucket_of]).clamp(max=1.0)
    gap = (table[above] - table[lower]).clamp(min=float((table[1:] - table[:-1]).min()))
    # An element on a level's float32 edge may count to the interval above it: its gap is that of its neighbour then.
    resolution = 2.0 ** -(rounding.draw_bits(levels) + 1)
    assert float((((mean - exact).abs() - 2.0**-21 * exact) / gap).max()) <= resolution


def _deviation(vector, levels, norm):
    """Exact deviation of each rounded coordinate: norm sqrt((l+ - u)(u - l-))."""
    scale = vector.double().norm() if norm == "l2" else vector.double().abs().max()
    table, u = torch.tensor(levels.values, dtype=torch.float64), vector.double().abs() / scale
    lower = (torch.searchsorted(table, u, right=True) - 1).clamp(max=levels.num_levels - 1)
    return scale * ((table[lower + 1] - u) * (u - table[lower])).clamp(min=0).sqrt()


def test_measured_variance_is_the_exact_sum():
    torch.manual_seed(4)
    levels, d, repeats = Levels.exponential(4), 256, 2000
    vector = torch.randn(d)
    codec = Codec(levels, coder="fixed", bucket_size=d)
    decoded = as_received(codec, vector.repeat(repeats), Key(0, 0, 0))
    measured = (decoded.view(repeats, d) - vector).double().square().sum(1)
    exact = _deviation(vector, levels, "l2").square().sum()
    assert abs(measured.mean() - exact) < 5 * measured.std() / math.sqrt(repeats)


def test_values_on_a_level_are_kept_exactly():
    levels = Levels.uniform(4)
    vector = torch.tensor(levels.values + tuple(-value for value in levels.values)) * 8.0
    codec = Codec(levels, norm="linf")
    assert torch.equal(codec.decode_mean([codec.encode(vector, Key(0, 0, 0))]), vector)


def test_the_largest_element_never_passes_its_level():
    generator = torch.Generator().manual_seed(0)
    for bits in (2, 4, 8):
        vector = torch.randn(64 * 4096, generator=generator) * 10
        symbols = drawn(Codec(Levels.uniform(bits), bucket_size=64, norm="linf"), vector, Key(0, 0, 0)).symbols
        rows = vector.view(-1, 64)
        largest = symbols.view(-1, 64).gather(1, rows.abs().argmax(1, keepdim=True))
        assert (largest.abs() == 2 ** (bits - 1) - 1).all()


@pytest.mark.parametrize(
    "arguments", [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (0, 0, 0, -1), (2**64, 0, 0), (0.5, 0, 0), (0, 0, float("nan"))]
)
def test_a_key_out_of_range_is_refused_by_name(arguments):
    with pytest.raises(ValueError, match=r"(seed|rank|step|stream) must be an integer"):
        Key(*arguments)
