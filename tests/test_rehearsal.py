"""What a rank sends and computes is found without a network, by the code that does it."""

import pytest
import torch

from hvd_qgenx.adaptation import Settings, Statistics, fit
from hvd_qgenx.exchange.coded import CodedExchange, rehearse_coded
from hvd_qgenx.exchange.dense import rehearse_dense
from hvd_qgenx.exchange.message import ENVELOPE_BYTES
from hvd_qgenx.exchange.rehearsal import CODED, Rehearsal, _even
from hvd_qgenx.payload import CHECKSUM, FIXED
from hvd_qgenx.uncoded import FP16Compressor, NoneCompressor

SETTINGS = Settings(bits=4)


def _normal(numel):
    return torch.randn(numel, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("ranks", [3, 4, 16])
@pytest.mark.parametrize("plan", ["allgather", "two_phase"])
def test_ranks_that_send_the_same_have_the_mean_that_each_sends(ranks, plan):
    exchange = CodedExchange(Settings(bits=8, min_numel=1, bucket_size=64), Rehearsal(ranks), plan=plan)
    exchange.codec = exchange.settings.typical_codec()
    exchange.mean_codec = exchange.mean_settings.typical_codec()
    vector = _normal(ranks * 640)
    shard = vector[:640].clone()
    exchange.describe(["x"], [torch.float32], [len(vector)])
    exchange.settle()
    (mean,) = exchange.collect(exchange.submit(exchange.fuse([vector.clone()]), "step"), ["x"]).means
    expected = vector if plan == "allgather" else shard.repeat(ranks)  # all ranks' shards are the first one's
    # The same draws on all "ranks", so that the error is that of one rounding, or of two.
    error = float((mean - expected).square().sum() / expected.square().sum())
    variance = exchange.communication.variance + (exchange.communication.mean_variance or 0.0)
    assert 0.0 < error < 2 * variance


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_those_of_a_fitted_codec(bits):
    settings, vector = Settings(bits=bits), _normal(2**18)
    codec = settings.codec()
    layout = codec.layout([len(vector)])
    statistics = Statistics.measure(codec, [vector], layout)
    fitted = settings.codec(*fit(statistics, bits))
    found = settings.typical_codec().expected_bits(len(vector))
    # Companded levels are near the fitted ones: 4.6 % at 8 bits, where it was farthest.
    assert found == pytest.approx(fitted.expected_bits(len(vector)), rel=0.06)
    work = rehearse_coded(settings, 3, "allgather")
    # The last byte of each bucket is half full. Padding to size classes adds up to 1.6 %.
    message = found + 4 * layout.num_buckets + 8 * (ENVELOPE_BYTES + FIXED.size + CHECKSUM.size)
    assert found <= 8 * work.sent * len(vector) <= (1 + 2**-6) * message and work.sent_again == 0.0


def test_levels_that_are_not_fitted_are_rehearsed_as_they_are():
    settings = Settings(bits=4, levels="uniform", coder="fixed", norm="linf")
    assert settings.typical_codec() == settings.codec()
    assert 8 * rehearse_coded(settings, 3, "allgather").sent == pytest.approx(4.05, abs=0.08)


def test_a_second_phase_sends_a_shard_of_the_finer_mean():
    work = rehearse_coded(SETTINGS, 4, "two_phase")
    once = rehearse_coded(SETTINGS, 4, "allgather")
    assert work.sent == pytest.approx(once.sent, rel=0.02)  # the same payloads, cut in four and padded
    assert once.sent < 4 * work.sent_again < 2 * once.sent


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("compressor", "size"), [(NoneCompressor, 4), (FP16Compressor, 2)])
def test_dense_vectors_are_sent_as_they_are(compressor, size, keep):
    work = rehearse_dense(compressor, 3, keep)
    # Who has what goes first, in 112 bytes; where vectors are kept padding adds up to 1.6 %.
    assert size <= work.sent <= size * (1.016 if keep else 1.001) and work.sent_again == 0.0
    assert work.encode > 0.0 and work.decode > 0.0 and work.overhead >= 0.0


@pytest.mark.parametrize("ranks", [2, 3, 7, 64])
@pytest.mark.parametrize("unit", [1, 1024, 16384])
def test_shards_of_a_rehearsal_are_of_equal_lengths(ranks, unit):
    layout = Settings(bucket_size=min(unit, 1024), min_numel=unit).codec().layout([_even(CODED, ranks * unit)])
    lengths = {shard.layout.numel for shard in layout.shards(ranks)}
    assert len(lengths) == 1
