"""The model of an exchange, and the choice among ways, for networks and cores of any kind."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_qgenx.exchange.cost import (
    LEAST_PART_BYTES,
    TOLERANCE,
    Line,
    Network,
    Way,
    Work,
    choose,
    estimate,
    explain,
    link_bytes,
    needs_no_measurement,
    part_bytes,
)
from hvd_qgenx.layout import Layout

ALLGATHER, TWO_PHASE = Way("qgenx", 4, "allgather"), Way("qgenx", 4, "two_phase")
NONE, FP16 = Way("none", 0, "allreduce"), Way("fp16", 0, "allreduce")
GIGABIT = 125e6
LARGE = 25_000_000


def _works(ranks):
    """4 bits at 1.3 ns a coordinate to encode and .8 ns to decode a payload's, means of 6 bits at twice that, and
    Horovod's own compressors."""
    encode, decode = 1.3e-9, 0.8e-9
    return {
        NONE: Work(4.0, 0.7e-9, 0.5e-9),
        FP16: Work(2.0, 0.8e-9, 0.7e-9),
        ALLGATHER: Work(3.4 / 8, encode, ranks * decode, 3e-4),
        TWO_PHASE: Work(3.4 / 8, encode * (1 + 2 / ranks), 3 * decode, 6e-4, 5.6 / 8 / ranks),
    }


def _coded(ranks):
    return {way: work for way, work in _works(ranks).items() if way.compression == "qgenx"}


def _seconds(network, way, numel=LARGE, parts=1):
    return estimate(network, way, _works(network.ranks)[way], numel, parts).seconds


def test_a_line_is_latency_and_rate():
    assert Line(0.5, 0.25).seconds(8) == 2.5


def test_in_one_part_an_exchange_takes_the_sum_of_its_stages():
    network = Network(3, Line(1.0, 0.5), Line(2.0, 0.25), Line(3.0, 0.125), Line(5.0, 0.0625))
    # encode 8 * 2, told 1, allreduce 3 + .125 * 32, decode 8 * 4.
    assert estimate(network, NONE, Work(4.0, 2.0, 4.0), 8) == (16 + 1 + 3 + 4 + 32, 4.0, 4.0, 48.0)
    assert estimate(network, FP16, Work(2.0, 2.0, 4.0), 8) == (16 + 1 + 5 + 1 + 32, 6.0, 1.0, 48.0)
    assert estimate(network, FP16, Work(2.0, 2.0, 4.0), 8, tokens=True) == (16 + 5 + 1 + 32, 5.0, 1.0, 48.0)
    # encode 8 * 2, allgather 1 + .5 * 4, decode 8 * 4, and 7 for a message.
    assert estimate(network, ALLGATHER, Work(0.5, 2.0, 4.0, 7.0), 8) == (16 + 1 + 2 + 32 + 7, 1.0, 2.0, 55.0)
    # and under the drop-in tokens first, by an allreduce.
    assert estimate(network, ALLGATHER, Work(0.5, 2.0, 4.0, 7.0), 8, tokens=True) == (61, 4.0, 2.0, 55.0)
    # the same bytes by alltoall 2 + .25 * 4, then 1 + .5 * 2.
    assert estimate(network, TWO_PHASE, Work(0.5, 2.0, 4.0, 0.0, 0.25), 8) == (16 + 3 + 2 + 32, 3.0, 2.0, 48.0)


@pytest.mark.parametrize("way", [ALLGATHER, TWO_PHASE])
def test_parts_hide_the_shorter_of_work_and_wire_as_far_as_the_machine_overlaps_them(way):
    work = _works(3)[way]
    perfect, none = (Network.ideal(3, 0.0, GIGABIT, overlap) for overlap in (1.0, 0.0))
    whole = estimate(perfect, way, work, LARGE)
    hidden = estimate(perfect, way, work, LARGE, 64)
    longer = max(whole.wire, whole.codec)
    # With no latency many parts take little more than the longer of both; overhead is counted, and is in codec.
    assert longer - work.overhead <= hidden.seconds < 1.1 * longer + 64 * work.overhead
    serial = estimate(none, way, work, LARGE, 64)
    assert serial.seconds == pytest.approx(whole.seconds + 63 * work.overhead, rel=1e-9)


def test_what_bounds_an_exchange_is_the_largest_of_three():
    slow, fast, far = (Network.ideal(4, *pair) for pair in ((1e-4, 1e6), (1e-6, 1e11), (10.0, 1e11)))
    found = [estimate(network, ALLGATHER, _works(4)[ALLGATHER], LARGE).bound for network in (slow, fast, far)]
    assert found == ["wire", "codec", "latency"]


def test_a_slow_link_and_many_ranks_take_two_phases_and_a_fast_link_and_few_ranks_an_allgather():
    assert choose(Network.ideal(16, 1e-3, GIGABIT / 100), _coded(16), LARGE).way == TWO_PHASE
    assert choose(Network.ideal(3, 1e-3, 100 * GIGABIT), _coded(3), LARGE).way == ALLGATHER


def test_a_small_vector_takes_one_message_by_allgather():
    for ranks, rate in itertools.product((3, 8, 32), (GIGABIT / 10, GIGABIT, 25 * GIGABIT)):
        choice = choose(Network.ideal(ranks, 1e-3, rate), _coded(ranks), 1000)
        assert (choice.way, choice.parts, choice.part_bytes(1000)) == (ALLGATHER, 1, 0)


def test_parts_are_taken_only_where_work_and_wire_are_both_long():
    def parts(rate, numel, overlap=1.0):
        return choose(Network.ideal(3, 1e-3, rate, overlap), {ALLGATHER: _works(3)[ALLGATHER]}, numel).parts

    assert parts(GIGABIT, LARGE) > 1
    assert parts(GIGABIT, LARGE, overlap=0.0) == parts(GIGABIT, LARGE, overlap=0.5), "a bad moment is not believed"
    assert parts(GIGABIT / 1000, LARGE) == 1, "the codec is nothing beside the wire"
    assert parts(1000 * GIGABIT, LARGE) == 1, "the wire is nothing beside the codec"
    assert parts(GIGABIT, 2 * LEAST_PART_BYTES // 4 - 1) == 1, "parts would be small"


def test_parts_are_none_where_vectors_may_not_be_cut():
    network, works = Network.ideal(3, 1e-3, GIGABIT), _coded(3)
    assert choose(network, works, LARGE).parts > 1 == choose(network, works, LARGE, in_parts=False).parts


def test_parts_cover_the_vector():
    choice = choose(Network.ideal(3, 1e-3, GIGABIT), _coded(3), LARGE)
    assert choice.parts * choice.part_bytes(LARGE) >= 4 * LARGE > (choice.parts - 1) * choice.part_bytes(LARGE)


@pytest.mark.parametrize("parts", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("bucket_size", [1, 512, 1024, 16384])
def test_one_vector_is_cut_into_as_many_parts_as_were_chosen(parts, bucket_size):
    for numel in (2**22, LARGE, LARGE + 1, 123_456_789):
        layout = Layout((numel,), min_numel=1024, bucket_size=bucket_size)
        assert len(layout.parts(part_bytes(numel, parts) or 2**62)) == parts


@pytest.mark.parametrize("numel", [100_000, LARGE])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_from_slow_to_fast_links_the_choice_leaves_two_phases_once(numel, overlap):
    for ranks in (4, 8, 16):
        rates = [1e5 * 2**i for i in range(24)]
        ways = [choose(Network.ideal(ranks, 5e-4, rate, overlap), _coded(ranks), numel).way for rate in rates]
        # At the fast end each rank decodes K payloads or two, so two phases may be right again: not before the wire is.
        bounds = [
            estimate(Network.ideal(ranks, 5e-4, rate), ALLGATHER, _works(ranks)[ALLGATHER], numel).bound
            for rate in rates
        ]
        by_wire = [way for way, bound in zip(ways, bounds, strict=True) if bound == "wire"]
        assert by_wire == sorted(by_wire, key=lambda way: way == ALLGATHER), (ranks, by_wire)


def test_from_few_to_many_ranks_the_choice_leaves_the_allgather_once():
    for rate in (GIGABIT / 10, GIGABIT, 10 * GIGABIT):
        ways = [choose(Network.ideal(ranks, 5e-4, rate), _coded(ranks), LARGE).way for ranks in range(3, 65)]
        assert ways == sorted(ways, key=lambda way: way == TWO_PHASE), rate
        assert ways[-1] == TWO_PHASE


def test_the_slower_the_link_the_fewer_bytes_are_chosen():
    sizes = []
    for rate in [1e6 * 2**i for i in range(20)]:
        choice = choose(Network.ideal(3, 1e-4, rate, 0.0), _works(3), LARGE)
        sizes.append(_works(3)[choice.way].sent)
    assert sizes == sorted(sizes) and sizes[0] < 1.0 and sizes[-1] == 4.0


def test_none_and_fp16_are_possible_answers():
    fast = Network.ideal(2, 1e-5, 1e11)
    works = {way: _works(2)[way] for way in (NONE, FP16, ALLGATHER)}
    assert choose(fast, works, LARGE).way == NONE
    assert choose(Network.ideal(2, 1e-5, 3e9), works, LARGE).way == FP16


def test_of_equally_fast_ways_the_first_is_taken():
    works = {FP16: Work(2.0, 1e-9, 1e-9), ALLGATHER: Work(2.0, 1e-9, 1e-9)}
    network = Network(2, Line(0.0, 1e-9), Line(0.0, 1e-9), Line(0.0, 1e-9), Line(0.0, 1e-9))
    assert choose(network, works, 1000).way == FP16
    assert choose(network, dict(reversed(works.items())), 1000).way == ALLGATHER
    slower = {**works, FP16: Work(2.0, 1e-9 + 4.1e-9 * TOLERANCE, 1e-9)}
    assert choose(network, slower, 1000).way == ALLGATHER


_SECONDS = st.floats(1e-7, 1.0)
_RATES = st.floats(1e4, 1e12)
_NETWORKS = st.builds(Network.ideal, st.integers(3, 256), _SECONDS, _RATES, st.floats(0.0, 1.0))


@given(_NETWORKS, st.integers(1, 10**9))
def test_no_other_way_is_expected_to_be_faster_by_more_than_the_tolerance(network, numel):
    works = _works(network.ranks)
    choice = choose(network, works, numel)
    for way in works:
        for parts in (1, 2, 4, 8, 16):
            if parts == 1 or (way.plan != "allreduce" and 4 * numel >= parts * LEAST_PART_BYTES):
                assert choice.estimate.seconds <= (1 + TOLERANCE) * _seconds(network, way, numel, parts) * (1 + 1e-9)


@given(_NETWORKS, st.integers(1, 10**8), st.sampled_from([1, 2, 8]))
def test_time_grows_with_latency_with_bytes_and_with_coordinates(network, numel, parts):
    for way in (ALLGATHER, TWO_PHASE, NONE):
        here = _seconds(network, way, numel, parts)
        line = network.allgather
        rate = (network.ranks - 1) / line.per_byte
        for other in (
            Network.ideal(network.ranks, 2 * line.latency, rate, network.overlap),
            Network.ideal(network.ranks, line.latency, rate / 2, network.overlap),
        ):
            assert _seconds(other, way, numel, parts) >= here * (1 - 1e-9)
        assert _seconds(network, way, 2 * numel, parts) >= here * (1 - 1e-9)
        assert math.isfinite(here)


def test_nothing_is_measured_where_there_is_nothing_to_choose():
    assert needs_no_measurement(["allgather"], 2, 100_000)
    assert not needs_no_measurement(["allgather"], 2, LARGE), "it may travel in parts"
    assert needs_no_measurement(["allgather", "two_phase"], 3, 5000)
    assert not needs_no_measurement(["allgather", "two_phase"], 64, 5000)


def test_link_bytes_are_those_of_rings():
    assert link_bytes(NONE, 4, 400.0) == 600.0
    assert link_bytes(ALLGATHER, 4, 100.0) == 300.0
    assert link_bytes(TWO_PHASE, 4, 100.0, 40.0) == 75.0 + 120.0


def test_the_explanation_says_what_why_and_what_else():
    network, works = Network.ideal(3, 1e-3, GIGABIT), _works(3)
    said = explain(
        network,
        {way: choose(network, {way: work}, LARGE) for way, work in works.items()},
        LARGE,
        choose(network, works, LARGE),
    )
    assert said.startswith("qgenx 4 bits by two_phase in ") and "25,000,000 coordinates on 3 ranks" in said
    assert "bound by wire" in said and "none by allreduce" in said and "125 MB/s a link" in said
