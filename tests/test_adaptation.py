"""Statistics, their merging, and the fit that all ranks make alike."""

import pytest
import torch

from hvd_qgenx import Codec, Key, Levels
from hvd_qgenx.adaptation import Settings, Statistics, fit
from hvd_qgenx.distribution import NUM_BINS


def _statistics(vector, sizes=None, norm="l2"):
    codec = Codec(Levels.uniform(4), bucket_size=64, norm=norm)
    return Statistics.measure(codec, vector, sizes or (len(vector),))


def test_statistics_survive_their_message():
    statistics = _statistics(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    message = statistics.to_message()
    assert message.dtype == torch.int64 and len(message) == 1 + 2 * NUM_BINS
    copy = Statistics.from_message(message)
    assert copy.exponent == statistics.exponent
    assert torch.equal(copy.weighted, statistics.weighted) and torch.equal(copy.plain, statistics.plain)


def test_every_coordinate_counts_once_and_by_the_squared_norm_of_its_bucket():
    vector = torch.cat((torch.full((64,), 3.0), torch.full((64,), 6.0)))
    statistics = _statistics(vector)
    assert int(statistics.plain.sum()) == 128
    weights = statistics.weighted[statistics.weighted > 0]
    assert len(weights) == 1, "both buckets have u = 1/8 throughout"
    # Squared norms 576 and 2304; the exponent's unit is 2**-8, 20 bits below the heavier one.
    assert int(weights[0]) * 2.0**statistics.exponent == 64 * 576.0 + 64 * 2304.0


def test_merging_does_not_depend_on_scale_order_beyond_dropped_bits():
    small = _statistics(torch.randn(640, generator=torch.Generator().manual_seed(0)) * 1e-3)
    large = _statistics(torch.randn(640, generator=torch.Generator().manual_seed(1)))
    merged = Statistics.merged([small, large])
    assert merged.exponent == large.exponent
    assert torch.equal(merged.weighted, large.weighted + (small.weighted >> (large.exponent - small.exponent)))
    assert torch.equal(merged.plain, small.plain + large.plain)


@pytest.mark.parametrize(
    "vector", [torch.zeros(200), torch.zeros(0), torch.full((200,), torch.nan), torch.full((200,), torch.inf)]
)
def test_vectors_without_weight_give_no_fit_and_do_not_spoil_others(vector):
    empty = _statistics(vector)
    assert fit(empty, 4) is None
    full = _statistics(torch.randn(640, generator=torch.Generator().manual_seed(1)))
    assert fit(Statistics.merged([empty, full]), 4) == fit(full, 4)


def test_extreme_scales_are_measured():
    for scale in (1e-44, 1e-20, 1e36):
        vector = torch.randn(64, generator=torch.Generator().manual_seed(1)) * scale
        assert int(_statistics(vector).weighted.sum()) > 0


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("draw", [torch.randn, lambda n, generator: torch.randn(n, generator=generator) ** 3])
def test_fitted_levels_cut_the_variance_and_their_code_is_near_the_entropy(norm, draw):
    vector = draw(64 * 500, generator=torch.Generator().manual_seed(2))
    levels, counts = fit(_statistics(vector, norm=norm), 4)
    measured = {}
    for name, table in (("uniform", Levels.uniform(4)), ("exponential", Levels.exponential(4)), ("fitted", levels)):
        codec = Codec(table, bucket_size=64, norm=norm)
        decoded = codec.dequantize(codec.quantize(vector, Key(0, 0, 0), (len(vector),)))
        measured[name] = float((decoded - vector).square().sum() / vector.square().sum())
    assert measured["fitted"] < min(measured["uniform"], measured["exponential"])
    symbols = (
        Codec(levels, bucket_size=64, norm=norm, counts=counts)
        .quantize(vector, Key(0, 0, 0), (len(vector),))
        .quantized.symbols
    )
    shares = torch.bincount(symbols.abs().long(), minlength=8).double() / len(vector)
    # 20 deviations of a share of 32,000 draws at most, and bins 3 % wide.
    assert torch.allclose(shares, torch.tensor(counts).double() / sum(counts), atol=0.01)


def test_a_schedule_names_its_iterations():
    settings = Settings(adapt_at=(0, 3), adapt_every=5)
    assert [step for step in range(16) if settings.adapts(step)] == [0, 3, 5, 10, 15]
    assert not any(Settings(levels="uniform").adapts(step) for step in range(10))
    assert [step for step in range(16) if Settings(adapt_at=(2,), adapt_every=0).adapts(step)] == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits must be an integer between 2 and 8, got 0"),
        ({"bits": 9}, "bits must be"),
        (
            {"levels": "quadratic"},
            "levels must be one of 'adaptive', 'uniform', 'exponential' or a Levels, got 'quadratic'",
        ),
        ({"levels": [0, 0.5, 1]}, "levels must be one of"),
        ({"levels": "a Levels"}, "levels must be one of"),
        ({"process_set": "all"}, "process_set must be a horovod.torch.ProcessSet, got 'all'"),
        ({"named_parameters": 5}, "named_parameters must be"),
        ({"named_parameters": [torch.zeros(1)]}, "named_parameters must be"),
        ({"adapt_at": None}, "adapt_at must be a sequence"),
        ({"levels": Levels.uniform(8)}, "levels must be at most 7 for bits=4"),
        ({"coder": "gzip"}, "coder must be one of 'fixed', 'elias_gamma'"),
        ({"norm": "l1"}, "norm must be one of 'l2', 'linf'"),
        ({"bucket_size": -5}, "bucket_size must be"),
        ({"rounding": "nearest"}, "rounding must be"),
        ({"min_numel": -1}, "min_numel must be"),
        ({"adapt_at": (-1,)}, "adapt_at must be"),
        ({"adapt_at": 5}, "adapt_at must be"),
        ({"adapt_every": float("nan")}, "adapt_every must be"),
        ({"seed": -1}, "seed must be"),
        ({"nonfinite": "skip"}, "nonfinite must be"),
    ],
)
def test_a_wrong_setting_is_named_when_the_compressor_is_made(arguments, message):
    from hvd_qgenx import Compression

    with pytest.raises(ValueError, match=message):
        Compression.qgenx(**arguments)
