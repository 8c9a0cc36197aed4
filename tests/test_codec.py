"""The codec as a whole: round trips, sizes, bad arguments, numbers that are not finite."""

import os

import pytest
import torch
from drawn import as_received, drawn

from hvd_qgenx import Codec, Key, Levels, PayloadError, backends
from hvd_qgenx.codebook import CODERS

COMPILED = [name for name in ("portable", backends.name()) if name != "specification"]
SIZES = [0, 1, 2, 31, 63, 64, 65, 1001, 20_000]


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_receivers_decode_what_the_sender_drew(coder, norm, bits):
    codec = Codec(Levels.exponential(bits), coder, 64, norm)
    for numel in SIZES:
        vector = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
        key = Key(0, 1, numel)
        payload = codec.encode(vector, key)
        assert payload.dtype == torch.uint8 and len(payload) <= codec.bound(numel)
        assert torch.equal(codec.decode_mean([payload], numel), as_received(codec, vector, key))


def test_a_large_vector_survives():
    codec, numel = Codec(Levels.exponential(4)), 3_000_001
    vector = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    decoded = codec.decode_mean([codec.encode(vector, Key(0, 0, 0))], numel)
    assert torch.equal(decoded, as_received(codec, vector, Key(0, 0, 0)))


def test_the_mean_is_the_float32_sum_in_order_divided_by_the_count():
    codec = Codec(Levels.uniform(4))
    vectors = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    payloads = [codec.encode(vector, Key(0, rank, 0)) for rank, vector in enumerate(vectors)]
    first, second, third = (codec.decode_mean([payload]) for payload in payloads)
    assert torch.equal(codec.decode_mean(payloads), (first + second + third) / 3)


def test_equal_keys_give_equal_bytes_and_other_keys_other_bytes():
    codec, vector = Codec(Levels.uniform(4)), torch.randn(500, generator=torch.Generator().manual_seed(0))
    payload = codec.encode(vector, Key(0, 0, 0))
    assert torch.equal(payload, codec.encode(vector, Key(0, 0, 0)))
    symbols = [
        drawn(codec, vector, key).symbols
        for key in (Key(0, 0, 0), Key(1, 0, 0), Key(0, 1, 0), Key(0, 0, 1), Key(0, 0, 0, 1))
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(symbols) for b in symbols[:i])


def test_buckets_never_span_segments():
    codec = Codec(Levels.uniform(4), bucket_size=64)
    vector = torch.cat((torch.full((70,), 1e-6), torch.full((30,), 1e6)))
    assert codec.layout((70, 30)).bucket_lengths() == [64, 6, 30]
    assert drawn(codec, vector, Key(0, 0, 0), (70, 30)).norms[:2].max() < 1e-4


def test_small_segments_travel_as_float32():
    codec = Codec(Levels.uniform(2), min_numel=10)
    vector = torch.randn(49, generator=torch.Generator().manual_seed(0))
    decoded = codec.decode_mean([codec.encode(vector, Key(0, 0, 0), sizes=(9, 30, 10))])
    assert torch.equal(decoded[:9], vector[:9])
    assert not torch.equal(decoded[9:], vector[9:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_segment_that_is_not_finite_is_nan_throughout_and_no_other_is_touched(value, norm):
    codec = Codec(Levels.uniform(4), bucket_size=16, norm=norm, min_numel=5)
    for broken in range(3):
        vector = torch.ones(100)
        vector[(3, 40, 97)[broken]] = value
        decoded = codec.decode_mean([codec.encode(vector, Key(0, 0, 0), sizes=(4, 50, 46))]).split((4, 50, 46))
        assert [bool(part.isnan().all()) for part in decoded] == [index == broken for index in range(3)]
        assert all(part.isfinite().all() for index, part in enumerate(decoded) if index != broken)


def test_zero_and_subnormal_vectors_survive():
    codec = Codec(Levels.uniform(4))
    assert torch.equal(codec.decode_mean([codec.encode(torch.zeros(3000), Key(0, 0, 0))]), torch.zeros(3000))
    tiny = torch.full((16,), 1e-44)
    decoded = codec.decode_mean([codec.encode(tiny, Key(0, 0, 0))])
    assert decoded.isfinite().all() and decoded.max() <= 1e-43


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_converted(dtype):
    codec, vector = Codec(Levels.uniform(4)), torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(codec.encode(vector, Key(0, 0, 0)), codec.encode(vector.float(), Key(0, 0, 0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", COMPILED)
def test_flushing_subnormal_numbers_in_torch_changes_no_byte(backend, dtype):
    """Not for float64, which torch itself converts to float32, then flushing what is subnormal there."""
    codec = Codec(Levels.exponential(4), bucket_size=16)
    scale = torch.tensor([1.0, 1e-39, 1e-43, 1e-7]).repeat_interleave(16)
    vector = (torch.randn(64, generator=torch.Generator().manual_seed(0)).double() * scale).to(dtype)
    assert dtype == torch.float16 or vector.float().abs()[16:48].max() > 0
    with backends.force(backend):
        payload = codec.encode(vector, Key(0, 0, 0))
        decoded = codec.decode_mean([payload])
        try:
            assert torch.set_flush_denormal(True)
            flushed = codec.encode(vector, Key(0, 0, 0))
            again = codec.decode_mean([payload])
        finally:
            torch.set_flush_denormal(False)
    assert torch.equal(flushed, payload) and torch.equal(again.view(torch.int32), decoded.view(torch.int32))


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-39, 3.0, -3.4e38])
def test_one_element_survives(coder, value):
    for norm in ("l2", "linf"):
        codec = Codec(Levels.uniform(3), coder, norm=norm)
        decoded = codec.decode_mean([codec.encode(torch.tensor(value), Key(0, 0, 0))])
        assert torch.equal(decoded, torch.tensor([value]))  # its norm is its magnitude, and level 1 times that exact


@pytest.mark.skipif(
    "HVD_QGENX_TEST_HUGE" not in os.environ, reason="takes 12 GB and minutes: ask for it with HVD_QGENX_TEST_HUGE=1"
)
def test_more_coordinates_than_int32_can_count():
    codec, numel = Codec(Levels.uniform(4), "fixed", bucket_size=16384, norm="linf"), 2**31 + 5
    vector = torch.zeros(numel)
    vector[-5:] = torch.tensor([7.0, -6.0, 5.0, 0.0, 1.0])  # multiples of the level 1/7: drawn without chance
    payload = codec.encode(vector, Key(0, 0, 0))
    assert len(payload) > 2**30
    vector[:: 2**20] = 9.0  # decode_mean must overwrite this
    decoded = codec.decode_mean([payload], numel, out=vector)
    assert decoded[-5:].tolist() == [7.0, -6.0, 5.0, 0.0, 1.0] and int(decoded.count_nonzero()) == 4


def test_a_tensor_that_is_not_contiguous_is_read_in_its_logical_order():
    codec, matrix = Codec(Levels.uniform(4)), torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codec.encode(matrix.t(), Key(0, 0, 0)), codec.encode(matrix.t().contiguous(), Key(0, 0, 0)))


def test_out_is_overwritten():
    codec, vector = Codec(Levels.uniform(4)), torch.randn(100, generator=torch.Generator().manual_seed(0))
    buffer, mean = torch.full((codec.bound(100),), 7, dtype=torch.uint8), torch.full((100,), torch.nan)
    payload = codec.encode(vector, Key(0, 0, 0), out=buffer)
    assert payload.data_ptr() == buffer.data_ptr()
    assert codec.decode_mean([payload], out=mean) is mean and mean.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": 4}, "levels must be a Levels"),
        ({"coder": "zip"}, "coder must be one of"),
        ({"norm": 2}, "norm must be one of"),
        ({"bucket_size": -1}, "bucket_size must be an integer between 1 and 16384"),
        ({"bucket_size": 0}, "bucket_size"),
        ({"bucket_size": 20000}, "bucket_size"),
        ({"rounding": "nearest"}, "rounding must be one of"),
        ({"counts": (1, 2)}, "counts must be 8 integers"),
        ({"counts": (1,) * 7 + (-1,)}, "counts must be an integer at least 0, got -1"),
        ({"counts": (1,) * 7 + (1.5,)}, "counts must be an integer at least 0, got 1.5"),
        ({"counts": 3}, "counts must be a sequence"),
        ({"min_numel": -1}, "min_numel must be"),
    ],
)
def test_a_wrong_argument_is_named_when_the_codec_is_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        Codec(**{"levels": Levels.uniform(4), **arguments})


@pytest.mark.parametrize(
    "gradient", [torch.ones(4, dtype=torch.int32), [1.0], torch.ones(4).to_sparse(), torch.ones(2, dtype=torch.cfloat)]
)
def test_what_is_no_dense_float_tensor_is_refused(gradient):
    with pytest.raises(ValueError, match="gradient must be a dense"):
        Codec(Levels.uniform(4)).encode(gradient, Key(0, 0, 0))


def test_wrong_buffers_are_refused_by_name():
    codec, vector = Codec(Levels.uniform(4)), torch.ones(100)
    payload = codec.encode(vector, Key(0, 0, 0))
    with pytest.raises(ValueError, match="out must be a contiguous 1-D uint8"):
        codec.encode(vector, Key(0, 0, 0), out=torch.empty(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="out must be float32 of shape"):
        codec.decode_mean([payload], numel=100, out=torch.empty(99))
    with pytest.raises(PayloadError, match="numel is 100, expected 99"):
        codec.decode_mean([payload], out=torch.empty(99))
    with pytest.raises(ValueError, match="sizes must add up"):
        codec.encode(vector, Key(0, 0, 0), sizes=(50, 49))
    with pytest.raises(ValueError, match="sizes must be a sequence"):
        codec.encode(vector, Key(0, 0, 0), sizes=3)
    with pytest.raises(ValueError, match="key must be a Key, got None"):
        codec.encode(vector, None)
    with pytest.raises(ValueError, match="out must be a Tensor, got 5"):
        codec.encode(vector, Key(0, 0, 0), out=5)
    with pytest.raises(ValueError, match="payloads must hold"):
        codec.decode_mean([])
    with pytest.raises(ValueError, match="payload must be a 1-D uint8"):
        codec.decode_mean([torch.ones(9)])
