"""Gradients encoded where they lie, and means decoded into where they belong, by every backend."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from drawn import as_received, drawn

from hvd_qgenx import Codec, Key, Levels, PayloadError, backends
from hvd_qgenx.backends.backend import FORMS
from hvd_qgenx.codebook import CODERS
from hvd_qgenx.levels import NORMS

COMPILED = [name for name in ("portable", backends.name()) if name != "specification"]
SHAPES = ((3,), (40, 5), (), (0,), (1, 333), (64,), (2,), (20_000,))
RAW_PIECE = 16384  # coordinates of a raw segment whose squares are added up at once
KEY = Key(3, 1, 4)


def _tensors(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _sizes(tensors):
    return tuple(tensor.numel() for tensor in tensors)


def _joined(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _encode(codec, tensors, key=KEY):
    """The payload and what was measured."""
    sizes = _sizes(tensors)
    out = torch.empty(codec.bound(sum(sizes), sizes), dtype=torch.uint8)
    measured = codec.encode_segments(tensors, codec.layout(sizes), key, out, inline=True)
    return out[: measured.size], measured


@pytest.fixture(params=COMPILED)
def path(request):
    with backends.force(request.param):
        yield request.param


@pytest.fixture
def threads():
    """A function that sets their number until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- encoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_list_of_tensors_has_the_bytes_of_their_vector(path, coder, norm):
    codec, tensors = Codec(Levels.uniform(4), coder, 64, norm, min_numel=5), _tensors()
    with backends.force("specification"):
        expected = codec.encode(_joined(tensors), KEY, sizes=_sizes(tensors))
    assert torch.equal(_encode(codec, tensors)[0], expected)


def _squares(values):
    """Sum of squares in float64, in the order of docs/wire_format.md: 16 lanes, folded in halves."""
    rows = torch.zeros(-(-len(values) // 16) * 16)
    rows[: len(values)] = values
    lanes = torch.zeros(16, dtype=torch.float64)
    for row in rows.double().square().view(-1, 16):
        lanes += row
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return float(lanes[0])


def _sum(parts):
    """One after another, which ``sum`` does not promise."""
    total = 0.0
    for part in parts:
        total += part
    return total


def _expected_sums(codec, tensors):
    """Squared error and norm: raw segments first, each as a whole, then bucket after bucket."""
    decoded = as_received(codec, _joined(tensors), KEY, _sizes(tensors)).split(_sizes(tensors))
    raw, coded, errors = [], [], []
    for values, found in zip([tensor.reshape(-1) for tensor in tensors], decoded, strict=True):
        if found.isnan().any():
            continue
        if len(values) < codec.min_numel:
            raw.append(_sum(map(_squares, values.split(RAW_PIECE))))
        else:
            coded += map(_squares, values.split(codec.bucket_size))
            errors += map(_squares, (found - values).split(codec.bucket_size))
    return _sum(errors), _sum(raw + coded)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("levels", [Levels.uniform(2), Levels.uniform(4), Levels.exponential(4), Levels.uniform(8),
                                    Levels.exponential(5), Levels.exponential(8)])  # fmt: skip
@pytest.mark.parametrize("min_numel", [0, 70, 10**6])
@pytest.mark.parametrize("broken", [False, True])
def test_what_an_encoding_measures_is_what_receivers_will_see(path, norm, levels, min_numel, broken):
    codec, tensors = Codec(levels, "fixed", 64, norm, min_numel=min_numel), _tensors()
    if broken:
        tensors[0][1], tensors[4][0, 70], tensors[5][:] = torch.nan, -torch.inf, 3e38
    _, measured = _encode(codec, tensors)
    symbols = drawn(codec, _joined(tensors), KEY, _sizes(tensors)).symbols
    # What is spoiled has no code, so that none of its symbols is sent.
    coded = [i for i, tensor in enumerate(tensors) if tensor.numel() >= max(min_numel, 1)]
    sent = [torch.full((tensors[i].numel(),), not measured.spoiled[i]) for i in coded]
    symbols = symbols[torch.cat(sent)] if sent else symbols
    assert torch.equal(measured.counts, torch.bincount(symbols.abs().int(), minlength=levels.num_levels + 1))
    assert (measured.squared_error, measured.squared_norm) == _expected_sums(codec, tensors)
    overflows = broken and norm == "l2" and min_numel <= 64  # of finite numbers, their L2 norm
    assert [i for i, spoiled in enumerate(measured.spoiled) if spoiled] == ([0, 4, 5] if overflows else [0, 4]) * broken


@pytest.mark.parametrize("norm", NORMS)
def test_the_sums_are_those_of_float64(path, norm):
    """Each difference is rounded to float32 before it is squared: by 2**-24 of itself at most."""
    codec, tensors = Codec(Levels.exponential(4), norm=norm, min_numel=5), _tensors()
    payload, measured = _encode(codec, tensors)
    vector = _joined(tensors).double()
    error = (codec.decode_mean([payload]).double() - vector).square().sum()
    assert measured.squared_error == pytest.approx(float(error), rel=2.0**-22, abs=0.0)
    assert measured.squared_norm == pytest.approx(float(vector.square().sum()), rel=1e-13, abs=0.0)


@pytest.mark.parametrize("counts", [(1,), (2,), (3,), (7,), (8,), (15,), (16,)])
def test_counts_are_right_for_any_number_of_levels_and_long_buckets(path, counts):
    """More than 255 vectors of 32 symbols, and a rest."""
    levels = Levels(tuple(j / counts[0] for j in range(counts[0] + 1)))
    codec, tensors = Codec(levels, "fixed", 16384, "linf"), [torch.rand(16384 + 8161)]
    _, measured = _encode(codec, tensors)
    symbols = drawn(codec, _joined(tensors), KEY, _sizes(tensors)).symbols
    assert torch.equal(measured.counts, torch.bincount(symbols.abs().int(), minlength=counts[0] + 1))


def test_no_segments_at_all_make_a_payload_that_decodes(path):
    codec = Codec(Levels.uniform(4))
    payload, measured = _encode(codec, [])
    with backends.force("specification"):
        assert torch.equal(payload, codec.encode(torch.zeros(0), KEY, sizes=()))
    assert (measured.squared_error, measured.squared_norm, measured.spoiled) == (0.0, 0.0, ())
    assert codec.decode_sections([payload], []) == ()


@pytest.mark.parametrize("norm", NORMS)
def test_neither_threads_nor_the_path_change_what_is_measured(threads, norm):
    codec = Codec(Levels.exponential(4), "huffman", 500, norm, min_numel=10)
    tensors, found = _tensors(((700_001,), (5,), (300, 999))), []
    for name in COMPILED:
        for count in (1, 2, 3, 7):
            threads(count)
            with backends.force(name):
                payload, measured = _encode(codec, tensors)
            found.append((payload.tolist(), measured.counts.tolist(), measured.squared_error, measured.squared_norm))
    assert all(one == found[0] for one in found)


def test_statistics_of_a_list_are_those_of_its_vector(path):
    codec, tensors = Codec(Levels.uniform(4), bucket_size=64, min_numel=5), _tensors()
    for form in FORMS:
        with backends.force("specification"):
            expected = codec.statistics([_joined(tensors)], codec.layout(_sizes(tensors)), form)
        found = codec.statistics(tensors, codec.layout(_sizes(tensors)), form)
        assert found[0] == expected[0] and all(torch.equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))


# ---- decoding --------------------------------------------------------------------------------------------------------

PARAMETERS = ((40, 5), (3,), (1000,), (7, 9), (130,), (2,))
HELD = ((0, 1, 3), (3, 2, 1, 5), (5, 0), (0, 5))  # by each rank, in its payload's order; nobody has 4


def _codecs(alike):
    first = Codec(Levels.uniform(4), bucket_size=64, min_numel=5)
    if alike:
        return [first, Codec(Levels.exponential(4), "elias_gamma", 64, "linf", min_numel=5), first, first]
    others = Codec(Levels.uniform(3), "fixed", 100, min_numel=300), Codec(Levels.uniform(2), bucket_size=64)
    return [first, *others, first]


def _ranks(alike=True):
    """Each rank's payload, its segments as the specification decodes them, and the map of sections."""
    payloads, decoded, sections = [], [], [[-1] * len(PARAMETERS) for _ in HELD]
    for rank, (held, codec) in enumerate(zip(HELD, _codecs(alike), strict=True)):
        tensors = _tensors([PARAMETERS[i] for i in held], seed=rank)
        with backends.force("specification"):
            payloads.append(codec.encode(_joined(tensors), Key(0, rank, 0), sizes=_sizes(tensors)))
            parts = codec.decode_mean(payloads[-1:]).split(_sizes(tensors))
        decoded.append(dict(zip(held, parts, strict=True)))
        for section, parameter in enumerate(held):
            sections[rank][parameter] = section
    return payloads, decoded, sections


def _expected_mean(decoded, parameter, factor):
    total = torch.zeros(torch.Size(PARAMETERS[parameter]).numel())
    for parts in decoded:
        total += parts.get(parameter, torch.zeros(()))
    return total / len(HELD) * factor


def _targets(shapes=PARAMETERS):
    """Contiguous, but none at a round address."""
    return [torch.full((torch.Size(shape).numel() + 1,), 7.0)[1:].view(shape) for shape in shapes]


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("factor", [1.0, 4.0, -0.3, 1 / 3])
def test_permuted_and_absent_sections_are_added_in_the_payloads_order(path, threads, alike, count, factor):
    threads(count)
    payloads, decoded, sections = _ranks(alike)
    targets = _targets()
    broken = _codecs(True)[0].decode_sections(payloads, targets, sections, factor)
    for parameter, target in enumerate(targets):
        expected = _expected_mean(decoded, parameter, torch.tensor(factor))
        assert torch.equal(target.view(-1), torch.full((130,), 7.0) if parameter == 4 else expected)
    assert not any(broken)


def test_large_means_do_not_depend_on_threads(path, threads):
    codec = Codec(Levels.uniform(4), bucket_size=1000, min_numel=10)
    shapes, held = ((400_001,), (5,), (300, 999)), ((0, 1, 2), (2, 0), (1, 2))
    parts = [_tensors([shapes[i] for i in order], seed) for seed, order in enumerate(held)]
    payloads = [_encode(codec, tensors)[0] for tensors in parts]
    sections = [[0, 1, 2], [1, -1, 0], [-1, 0, 1]]
    means = []
    for count in (1, 2, 3, 7):
        threads(count)
        targets = _targets(shapes)
        codec.decode_sections(payloads, targets, sections)
        means.append(_joined(targets))
    assert all(torch.equal(mean, means[0]) for mean in means)


def test_a_section_of_no_coordinates_is_absent(path):
    codec, full, empty = Codec(Levels.uniform(4)), _tensors(((5,), (70,))), [torch.ones(5), torch.ones(0)]
    payloads = [_encode(codec, tensors)[0] for tensors in (full, empty)]
    targets, alone = _targets(((5,), (70,))), _targets(((5,), (70,)))
    codec.decode_sections(payloads, targets)
    codec.decode_sections(payloads[:1], alone)
    assert torch.equal(targets[1], alone[1] / 2)


def test_one_section_may_go_to_several_targets(path):
    codec = Codec(Levels.uniform(4))
    payload, _ = _encode(codec, _tensors(((70,), (5,))))
    targets = _targets(((70,), (70,)))
    codec.decode_sections([payload], targets, [[0, 0]])
    assert torch.equal(*targets) and torch.equal(targets[0], codec.decode_mean([payload])[:70])


@pytest.mark.parametrize("min_numel", [0, 10**6])
def test_a_segment_that_some_payload_spoils_is_broken(path, min_numel):
    codec, payloads = Codec(Levels.uniform(4), bucket_size=16, min_numel=min_numel), []
    for place in (None, 1, 3):
        tensors = _tensors(((40,), (50,), (3,), (0,)))
        if place is not None:
            tensors[place % 3][1] = torch.inf
        payloads.append(_encode(codec, tensors)[0])
    targets = _targets(((40,), (50,), (3,), (0,)))
    broken = codec.decode_sections(payloads, targets)
    assert broken == (True, True, False, False)
    assert [bool(target.isnan().all()) for target in targets[:3]] == [True, True, False]
    places = [[0, 1, 2, 3], [0, -1, 2, 3], [-1, 1, 2, 3]]
    assert not any(codec.decode_sections(payloads, targets, places))


def _refusal(payloads, targets, sections=None):
    codec = Codec(Levels.uniform(4), bucket_size=64, min_numel=5)
    with pytest.raises(PayloadError) as error:
        codec.decode_sections(payloads, targets, sections)
    assert all(bool((target == 7.0).all()) for target in targets)
    return str(error.value).removeprefix("payload: ")


def test_payloads_that_do_not_hold_what_is_wanted_are_refused_before_anything_is_written(path):
    payloads, _, sections = _ranks()
    wrong = [list(own) for own in sections]
    wrong[1][0] = 1
    assert _refusal(payloads, _targets(), wrong) == "sizes: section 1 of payload 1 has 1000 coordinates, expected 200"
    wrong[1][0] = 4
    assert _refusal(payloads, _targets(), wrong) == "num_segments is 4, but section 4 is wanted"
    assert _refusal(payloads, _targets()) == "num_segments is 3, expected 6"
    damaged = payloads[3].clone()
    damaged[90] ^= 1
    assert _refusal([*payloads[:3], damaged], _targets(), sections) == "checksum does not match the bytes"


def test_arguments_that_are_no_payloads_fault_are_value_errors(path):
    codec, tensors = Codec(Levels.uniform(4)), _tensors(((8, 8), (5,)))
    payload, _ = _encode(codec, tensors)
    out, layout = torch.empty(10, dtype=torch.uint8), codec.layout((64, 5))
    room = torch.empty(codec.bound(69), dtype=torch.uint8)
    for call, message in (
        (partial(codec.encode_segments, [tensors[0].t(), tensors[1]], layout, KEY, room), "contiguous torch.float32"),
        (partial(codec.encode_segments, [tensors[0].double(), tensors[1]], layout, KEY, room), "torch.float32"),
        (partial(codec.encode_segments, tensors[:1], layout, KEY, room), "the layout's 69 coordinates, got 64"),
        (partial(codec.encode_segments, tensors[::-1], layout, KEY, room), "the layout's 69 coordinates"),
        (partial(codec.encode_segments, tensors, layout, KEY, out), "out must have room for .* bytes, got 10"),
        (partial(codec.decode_sections, [], tensors, None), "payloads must hold at least one"),
        (partial(codec.decode_sections, [payload], tensors, [[0, -2]]), "sections must be -1 or more, got -2"),
        (partial(codec.decode_sections, [payload], tensors, [[0]]), "one for each of the 2 targets"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.slow
def test_no_memory_is_a_memory_error():
    """The statistics of buckets of one coordinate need a norm for each, 128 MB that the process may not have."""
    program = """
import resource, torch
from hvd_qgenx import Codec, Levels
codec, vector = Codec(Levels.uniform(4), bucket_size=1), torch.zeros(2**25)
codec.statistics([vector[:10]], codec.layout((10,)), "histogram")
held = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (held, held))
try:
    codec.statistics([vector], codec.layout((2**25,)), "histogram")
except MemoryError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "out of memory\n", done.stderr


@pytest.mark.parametrize("min_numel", [0, 10**6])
def test_a_sum_beyond_float32_is_broken_and_one_that_may_be_but_is_not_is_not(path, min_numel):
    codec, sizes = Codec(Levels.uniform(2), "fixed", 16, "linf", min_numel=min_numel), (40, 16)
    first, second = torch.zeros(56), torch.zeros(56)
    first[3], second[3] = 3e38, 3e38  # one coordinate, whose sum is too large
    first[40], second[41] = 3e38, 3e38  # two coordinates of one bucket
    payloads = [codec.encode(vector, KEY, sizes=sizes) for vector in (first, second)]
    targets = _targets(((40,), (16,)))
    assert codec.decode_sections(payloads, targets) == (True, False)
    with backends.force("specification"):
        assert codec.decode_sections(payloads, _targets(((40,), (16,)))) == (True, False)


ONE_LACKS_ONE = """
import resource, sys, torch
from hvd_qgenx import Codec, Key, Levels
torch.set_num_threads(1)
codec, ranks, sizes = Codec(Levels.uniform(4)), 8, [1000, 4 * 2**20]
payloads = []
for rank in range(ranks):
    own = [0 if rank == 3 and sys.argv[1] == "lacks" else sizes[0], sizes[1]]
    vector = torch.randn(sum(own), generator=torch.Generator().manual_seed(rank))
    payloads.append(codec.encode(vector, Key(0, rank, 0), sizes=own))
targets = [torch.ones(size) for size in sizes]
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
open("/proc/self/clear_refs", "w").write("5")
before = peak()
codec.decode_sections(payloads, targets)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("who", ["all", "lacks"])
def test_a_section_that_one_rank_lacks_makes_no_vector_of_the_others(who):
    """16 MB a vector, 8 ranks: what decoding needs beside the targets is its scratch."""
    done = subprocess.run([sys.executable, "-c", ONE_LACKS_ONE, who], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4000, "kB"
