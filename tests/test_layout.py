"""How vectors are cut: buckets, parts and shards; and the draws of what is cut apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_qgenx import Codec, Key, Levels
from hvd_qgenx.key import PARTS, PHASES, SHARDS, stream_of
from hvd_qgenx.layout import Layout

layouts = st.builds(
    Layout,
    st.lists(st.sampled_from([0, 1, 7, 63, 64, 65, 100, 1000, 5000]), max_size=12).map(tuple),
    st.sampled_from([0, 1, 64, 100, 1000]),
    st.sampled_from([1, 16, 64, 1024]),
)


def test_a_layout_counts_what_is_coded_and_what_is_raw():
    layout = Layout((70, 3, 0, 64), min_numel=4, bucket_size=64)
    assert (layout.numel, layout.coded_numel, layout.raw_numel, layout.num_buckets) == (137, 134, 3, 3)
    assert layout.coded_sizes == (70, 64) and layout.raw_sizes == (3, 0)
    assert layout.bucket_lengths() == [64, 6, 64]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(((-1,),), "sizes"), (((1,), -1), "min_numel"), (((1,), 0, 0), "bucket_size"), ((1,), "sizes")],
)
def test_what_does_not_fit_is_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        Layout(*arguments)


def _check(layout, parts):
    """Every coordinate once, in order; cuts at buckets; coded pieces of what is coded, raw ones of what is raw."""
    slices = [piece for part in parts for piece in part.slices]
    covered = [(piece.segment, i) for piece in slices for i in range(piece.start, piece.stop)]
    assert covered == [(segment, i) for segment, size in enumerate(layout.sizes) for i in range(size)]
    for piece in slices:
        size = layout.sizes[piece.segment]
        assert piece.start % layout.bucket_size == 0
        assert piece.stop == size or piece.stop % layout.bucket_size == 0
        assert piece.stop == piece.start or (piece.stop - piece.start < layout.min_numel) == (size < layout.min_numel)
    assert sum(part.layout.num_buckets for part in parts) == layout.num_buckets
    assert sum(part.layout.raw_numel for part in parts) == layout.raw_numel


@settings(max_examples=200, deadline=None, derandomize=True)
@given(layouts, st.sampled_from([1, 400, 4096, 10**6]))
def test_parts_are_the_vector_cut_at_buckets(layout, num_bytes):
    parts = layout.parts(num_bytes)
    _check(layout, parts)
    unit = max(layout.min_numel, layout.bucket_size) + layout.bucket_size
    longest = max(num_bytes // 4, 2 * unit, *(size for size in layout.raw_sizes), 0)
    assert all(part.layout.numel <= longest for part in parts)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(layouts, st.sampled_from([1, 2, 3, 8, 40]))
def test_shards_are_as_many_as_ranks_and_hold_whole_buckets(layout, ranks):
    shards = layout.shards(ranks)
    assert len(shards) == ranks
    _check(layout, shards)


def test_shards_of_a_large_vector_are_even():
    sizes = [part.layout.numel for part in Layout((10**6, 5, 3 * 10**5), 1024).shards(8)]
    assert max(sizes) < 1.15 * sum(sizes) / 8 and min(sizes) > 0.8 * sum(sizes) / 8


def test_a_part_cuts_segments_into_views():
    layout = Layout((100, 30), bucket_size=16)
    segments = [torch.arange(100.0), torch.arange(30.0)]
    parts = layout.parts(4 * 40)
    pieces = [piece for part in parts for piece in part.cut(segments)]
    assert torch.equal(torch.cat(pieces), torch.cat(segments))
    assert all(piece.untyped_storage().data_ptr() in {s.untyped_storage().data_ptr() for s in segments}
               for piece in pieces)  # fmt: skip


def test_streams_of_phases_parts_and_shards_are_all_different():
    numbers = [stream_of(a, b, c) for a in (0, 1, PHASES - 1) for b in (0, 1, PARTS - 1) for c in (0, 1, SHARDS - 1)]
    assert len(set(numbers)) == 27 and max(numbers) == 2**32 - 1
    assert stream_of() == 0 and stream_of(phase=1) == 1
    for name, value in (("phase", PHASES), ("part", PARTS), ("shard", SHARDS)):
        with pytest.raises(ValueError, match=name):
            stream_of(**{name: value})


def test_equal_shards_of_one_exchange_draw_independently():
    """All a half: symbols under one key would be equal. Each pair agrees as often as two coins do, within 5 sigma."""
    codec, vector, n = Codec(Levels.uniform(2), "fixed", norm="linf"), torch.full((10_000,), 0.5), 10_000
    vector[::100] = 1.0  # the norm
    key = Key(0, 0, 0)
    keys = [key, key.within(shard=1), key.within(part=1), key.within(phase=1), key.within(part=1, shard=1)]
    decoded = [codec.decode_mean([codec.encode(vector, one)]) for one in keys]
    for i, first in enumerate(decoded):
        for second in decoded[:i]:
            agree = float((first == second).float().mean())
            assert abs(agree - 0.505) < 5 * 0.5 / n**0.5
