"""Unbiasedness where it is hardest, over many draws; roots; and buckets that have no code."""

import math

import pytest
import torch
from drawn import drawn

from hvd_qgenx import Codec, Key, Levels, PayloadError, backends
from hvd_qgenx.backends.specification import payload as specification
from hvd_qgenx.backends.specification import rounding
from hvd_qgenx.codebook import CODERS
from hvd_qgenx.levels import NORMS
from hvd_qgenx.payload import CHECKSUM, FIXED

COMPILED = [name for name in ("portable", backends.name()) if name != "specification"]
LEVELS = [*map(Levels.uniform, (2, 4, 8)), Levels.exponential(4), Levels((0.0, 0.011, 0.3, 1.0))]


def _on(name, call, *arguments, **options):
    with backends.force(name):
        return call(*arguments, **options)


# ---- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("small", [1e-4, 1e-5, 1e-6, 1e-7])
def test_a_bucket_of_one_and_many_small_numbers_keeps_them_in_the_mean(levels, small):
    """How many of 10^8 draws round up is binomial: 5 deviations, a false alarm in 2 million cases."""
    buckets, keys, bucket_size = 784, 128, 1024
    vector = torch.full((buckets, bucket_size), small)
    vector[:, 17] = 1.0
    codec = Codec(levels, "fixed", bucket_size, "linf")
    counts, up = torch.zeros(levels.num_levels + 1, dtype=torch.int64), 0
    for step in range(keys):
        codec.encode(vector, Key(7, step % 5, step), counts=counts)
        up += int(counts[1]) - buckets * (levels.num_levels == 1)
    probability, draws = float(vector[0, 0]) / levels.values[1], buckets * keys * (bucket_size - 1)
    deviation = math.sqrt(draws * probability * (1 - probability))
    assert abs(up - draws * probability) < 5 * deviation


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("levels", [*LEVELS, Levels.exponential(8)])
@pytest.mark.parametrize("unit", [2.0**-149, 2.0**-145, 2.0**-138, 2.0**-130, 2.0**-90])
def test_rounding_is_unbiased_where_values_are_subnormal(levels, norm, unit):
    """Per coordinate and, as one sum, for all of a bucket, whose bias would have one sign."""
    d, repeats = 64, 16384
    vector = (torch.randn(d, generator=torch.Generator().manual_seed(3)) * 400).round() * unit
    codec = Codec(levels, "fixed", d, norm)
    payload = codec.encode(vector.repeat(repeats), Key(5, 1, 2))
    decoded = codec.decode_mean([payload]).view(repeats, d).double() / unit
    error, exact = (decoded - vector.double() / unit), vector.double() / unit
    mean, deviation = error.mean(0), error.std(0) / math.sqrt(repeats)
    # z below 5.5 for 64 coordinates in 60 cases: false alarm 1e-4; float32 itself loses 2^-23 of a coordinate.
    assert (mean.abs() <= 5.5 * deviation + 2.0**-23 * exact.abs()).all()
    along = (error * exact.sign()).sum(1)
    most = 5 * float(along.std()) / math.sqrt(repeats) + 2.0**-23 * float(exact.abs().sum())
    assert abs(float(along.mean())) <= most


# ---- roots -----------------------------------------------------------------------------------------------------------


def _sums():
    """Random ones of all sizes, squares of float32 and their neighbours on both sides, 0 and the largest."""
    generator = torch.Generator().manual_seed(5)
    exponents = torch.randint(-296, 250, (20_000,), generator=generator).double()
    random = torch.rand(20_000, generator=generator, dtype=torch.float64).add(1.0) * torch.exp2(exponents)
    roots = torch.rand(20_000, generator=generator).add(1.0) * torch.exp2(torch.randint(-149, 127, (20_000,)).double())
    exact = roots.float().double().square()
    infinite = torch.tensor(math.inf, dtype=torch.float64)
    sides = [exact.nextafter(infinite), exact.nextafter(torch.zeros_like(infinite))]
    edges = torch.tensor([0.0, 2.0**-298, 2.0**-297, (2.0**128 - 2.0**104) ** 2], dtype=torch.float64)
    return torch.cat([random, exact, *sides, edges])


def test_a_norm_is_the_smallest_float32_whose_square_is_not_below_the_sum():
    sums = _sums()
    norms = rounding.root_above(sums)
    below = norms.nextafter(torch.tensor(-1.0))
    assert (norms.double().square() >= sums).all()
    assert ((below < 0) | (below.double().square() < sums)).all()


@pytest.mark.parametrize("name", COMPILED)
def test_every_backend_takes_the_same_roots(name):
    """Pairs: random ones of like and of unlike sizes, exact roots, and those that miss one by the least there is."""
    generator = torch.Generator().manual_seed(6)
    random = torch.randn(40_000, 2, generator=generator)
    random[:20_000] *= torch.exp2(torch.randint(-140, 120, (20_000, 2), generator=generator).float())
    whole = torch.tensor([3.0, 4.0]) * torch.randint(1, 2**20, (20_000, 1), generator=generator)
    # The square of the second is about half of a last place of the first's in float64.
    barely = torch.stack((random[:, 0], random[:, 0] * 2.0**-26.5), dim=1)
    codec, pairs = Codec(Levels.uniform(4), bucket_size=2), torch.cat([random, whole, barely])
    payload = _on(name, codec.encode, pairs, Key(0, 0, 0))
    norms = specification.parse(payload).norms
    sums = pairs[:, 0].double().square() + pairs[:, 1].double().square()
    assert torch.equal(norms, rounding.root_above(sums))
    assert torch.equal(norms[40_000:60_000], 5.0 / 3.0 * whole[:, 0])
    assert (norms[60_000:] > random[:, 0].abs()).any() and (norms[60_000:] == random[:, 0].abs()).any()


# ---- buckets without code --------------------------------------------------------------------------------------------


def _with_zero_buckets():
    vector = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    vector[:128], vector[320:384], vector[960:] = 0.0, 0.0, 0.0
    return vector


@pytest.mark.parametrize("coder", CODERS)
def test_a_bucket_of_norm_zero_or_nan_has_no_code(coder):
    codec, sizes = Codec(Levels.uniform(4), coder, 64, min_numel=5), (4, 396, 600)
    vector = _with_zero_buckets()
    for broken in (False, True):
        if broken:
            vector[700] = torch.nan
        payload = _on("specification", codec.encode, vector, Key(0, 0, 0), sizes=sizes)
        parsed = specification.parse(payload)
        has_code = parsed.norms > 0
        assert torch.equal(parsed.byte_lengths > 0, has_code) and not has_code.all()
        assert broken == bool(parsed.norms.isnan().any())
        expected = _on("specification", codec.decode_mean, [payload])
        assert (expected[:128] == 0).all() and expected[400:].isnan().all() == broken
        for name in COMPILED:
            assert torch.equal(_on(name, codec.encode, vector, Key(0, 0, 0), sizes=sizes), payload)
            for factor in (1, 3):
                found = _on(name, codec.decode_mean, [payload] * factor)
                wanted = _on("specification", codec.decode_mean, [payload] * factor)
                assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("name", [*COMPILED, "specification"])
def test_zero_buckets_among_others_leave_the_sum_as_it_is(name):
    codec, first = Codec(Levels.uniform(4), bucket_size=64), _with_zero_buckets()
    second = torch.ones(1000)
    payloads = [codec.encode(vector, Key(0, 0, i)) for i, vector in enumerate((first, second, torch.zeros(1000)))]
    alone = [codec.decode_mean([payload]) for payload in payloads]
    expected = (alone[0] + alone[1] + alone[2]) / 3
    assert torch.equal(_on(name, codec.decode_mean, payloads), expected)
    assert torch.equal(_on(name, codec.decode_mean, payloads[::-1]), (alone[2] + alone[1] + alone[0]) / 3)


def test_zero_buckets_cost_their_norm_and_length_alone():
    codec, n = Codec(Levels.exponential(4), bucket_size=1024), 2**20
    vector = torch.randn(n // 1024, 1024, generator=torch.Generator().manual_seed(0))
    full = len(codec.encode(vector, Key(0, 0, 0), inline=False))
    around = FIXED.size + 8 + CHECKSUM.size
    for kept in (2, 8):  # of so many buckets one is not zero
        sparse = torch.where(torch.arange(len(vector))[:, None] % kept == 0, vector, 0.0)
        size = len(codec.encode(sparse, Key(0, 0, 0), inline=False))
        code = (full - around) / len(vector) - 6
        assert abs(size - around - len(vector) * (6 + code / kept)) < 0.01 * size
    empty = codec.encode(torch.zeros(n), Key(0, 0, 0), inline=False)
    assert len(empty) == around + 6 * len(vector)


@pytest.mark.parametrize("name", [*COMPILED, "specification"])
@pytest.mark.parametrize("norm", [0.0, math.nan])
@pytest.mark.parametrize("coder", ["huffman", "fixed"])
def test_code_in_a_bucket_that_should_have_none_is_refused(name, norm, coder):
    codec = Codec(Levels.uniform(4), coder, bucket_size=64)
    payload = codec.encode(torch.randn(64, generator=torch.Generator().manual_seed(0)), Key(0, 0, 0), inline=False)
    at = FIXED.size + 8
    payload[at : at + 4] = torch.tensor([norm]).view(torch.uint8)
    checksum = specification.crc32c(payload[:-4].numpy().data)
    payload[-4:] = torch.tensor(list(checksum.to_bytes(4, "little")), dtype=torch.uint8)
    with pytest.raises(PayloadError, match="coded|lengths"):
        _on(name, codec.decode_mean, [payload])


def test_symbols_of_a_zero_bucket_are_not_counted():
    codec, vector = Codec(Levels.uniform(4), bucket_size=64), _with_zero_buckets()
    counts = torch.zeros(8, dtype=torch.int64)
    for name in [*COMPILED, "specification"]:
        _on(name, codec.encode, vector, Key(0, 0, 0), counts=counts)
        symbols = drawn(codec, vector, Key(0, 0, 0)).symbols
        expected = torch.bincount(symbols.abs().int(), minlength=8)
        expected[0] -= 128 + 64 + 40
        assert torch.equal(counts, expected)
