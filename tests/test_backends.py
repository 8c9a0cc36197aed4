"""The compiled core against the specification in plain torch: the same symbols, the same bytes, the same refusals."""

import os
import subprocess
import sys

import pytest
import torch
from drawn import drawn

import hvd_qgenx
from hvd_qgenx import Codec, Key, Levels, backends
from hvd_qgenx.backends.backend import FORMS
from hvd_qgenx.backends.compiled import Compiled
from hvd_qgenx.codebook import CODERS, Code, Codebook

COMPILED = [name for name in ("portable", backends.name()) if name != "specification"]
LEVELS = {
    "ternary": Levels.uniform(2),
    "uniform4": Levels.uniform(4),
    "uniform8": Levels.uniform(8),
    "exponential3": Levels.exponential(3),
    "exponential4": Levels.exponential(4),
    "exponential5": Levels.exponential(5),
    "exponential8": Levels.exponential(8),
    "five": Levels((0.0, 0.011, 0.012, 0.3, 0.7, 1.0)),
    "eight": Levels((0.0, *(0.9**j for j in range(7, 0, -1)), 1.0)),
    "crowded": Levels((0.0, *(0.5 + j / 2**12 for j in range(98)), 1.0)),
}


def _vector(numel, seed=0, kind="normal"):
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(numel, generator=generator)
    if kind == "heavy":
        return vector**5
    return vector * (torch.rand(numel, generator=generator) < 0.03) if kind == "sparse" else vector


def _on(name, call, *arguments, **options):
    with backends.force(name):
        return call(*arguments, **options)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(
    ("norm", "kind", "size"), [("l2", "sparse", 1000), ("l2", "normal", 64), ("linf", "heavy", 500)]
)
def test_every_backend_writes_the_same_bytes_and_reads_the_same_values(coder, levels, norm, kind, size):
    codec = Codec(LEVELS[levels], coder, size, norm, min_numel=5)
    sizes = (1, 7, 0, 64, 4, 1333)
    vector, key = _vector(sum(sizes), 1, kind), Key(3, 1, 4)
    payload = _on("specification", codec.encode, vector, key, sizes=sizes)
    decoded = _on("specification", codec.decode_mean, [payload])
    assert len(payload) <= codec.bound(len(vector), sizes)
    for name in COMPILED:
        assert torch.equal(_on(name, codec.encode, vector, key, sizes=sizes), payload)
        assert torch.equal(_on(name, codec.decode_mean, [payload]), decoded)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-31, 1e30, 1e38])
@pytest.mark.parametrize("levels", ["uniform4", "exponential4", "exponential8"])
def test_extreme_norms_give_the_same_symbols(name, scale, levels):
    for norm in ("l2", "linf"):
        codec = Codec(LEVELS[levels], "fixed", 64, norm)
        vector = (_vector(500).double() * scale / 10).float()
        payload = _on("specification", codec.encode, vector, Key(0, 0, 0))
        assert torch.equal(_on(name, codec.encode, vector, Key(0, 0, 0)), payload)


def _edge_levels(count):
    """Tables at the edges of what Levels allows: gaps of 2**-126, equal ones, very unlike ones."""
    if count == 1:
        return {"single": Levels((0.0, 1.0))}
    inner, last = range(1, count), 1.0 - 2.0**-24
    return {
        "equal": Levels(tuple(j / count for j in range(count + 1))),
        "equal but for the last": Levels((0.0, *(j / 2**8 for j in inner), 1.0)),
        "in bfloat16": Levels((0.0, *((128 + j) / 2**8 for j in inner), 1.0)),
        "smallest": Levels((0.0, *(j * 2.0**-126 for j in inner), 1.0)),
        "one small": Levels((0.0, 2.0**-110, *(j / count for j in inner[1:]), 1.0)),
        "just too small to multiply": Levels((0.0, 2.0**-101, *(j / count for j in inner[1:]), 1.0)),
        "just large enough": Levels((0.0, 2.0**-100, *(j / count for j in inner[1:]), 1.0)),
        "crowded at the end": Levels((0.0, *(last - (count - 1 - j) * 2.0**-24 for j in inner), 1.0)),
        "all octaves": Levels((0.0, *(2.0 ** (-126 * (count - j) / (count - 1)) for j in inner), 1.0)),
    }


def _around(levels):
    """Numbers up to 1: each level and its neighbours, what is between levels, all octaves, and 1 in every 64."""
    values = torch.tensor(levels.values)
    edges = torch.cat([values, values.nextafter(torch.tensor(2.0)), values.nextafter(torch.tensor(-1.0))])
    generator = torch.Generator().manual_seed(0)
    between = values[:-1] + (values[1:] - values[:-1]) * torch.rand(16, len(values) - 1, generator=generator)
    octaves = 2.0 ** (-140.0 * torch.rand(1000, generator=generator))
    parts = torch.cat([edges, between.view(-1), octaves]).clamp(-1.0, 1.0)
    parts = parts[torch.randperm(len(parts), generator=generator)]
    rows = torch.cat([parts, torch.zeros(-len(parts) % 63)]).view(-1, 63)
    signs = torch.where(torch.rand(rows.shape, generator=generator) < 0.5, -1.0, 1.0)
    return torch.cat([rows * signs, torch.ones(len(rows), 1)], dim=1).view(-1)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("count", [1, 2, 7, 8, 15, 16, 63, 64, 127])
def test_every_way_to_search_levels_finds_those_of_the_specification(name, count):
    for levels in _edge_levels(count).values():
        codec, vector = Codec(levels, "fixed", 64, "linf"), _around(levels)
        for scale in (1.0, 2.0**-120, 2.0**120):
            payload = _on("specification", codec.encode, vector * scale, Key(0, 0, 0))
            assert torch.equal(_on(name, codec.encode, vector * scale, Key(0, 0, 0)), payload)
            assert torch.equal(codec.decode_mean([payload]), _on("specification", codec.decode_mean, [payload]))


@pytest.mark.parametrize("name", COMPILED)
def test_numbers_that_are_not_finite_spoil_the_same_segments(name):
    sizes = (3, 200, 70, 4, 64)
    for value in (torch.nan, torch.inf, -torch.inf, 3e38):
        for place in (1, 5, 250, 275, 300):
            vector = _vector(sum(sizes))
            vector[place : place + 2] = value
            codec = Codec(Levels.uniform(4), bucket_size=64, min_numel=5)
            payload = _on("specification", codec.encode, vector, Key(0, 0, 0), sizes=sizes)
            written = _on(name, codec.encode, vector, Key(0, 0, 0), sizes=sizes)
            first, second = (codec.decode_mean([p]) for p in (payload, written))
            assert torch.equal(first.isnan(), second.isnan()) and torch.equal(first.nan_to_num(), second.nan_to_num())


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("coder", CODERS)
def test_the_number_of_threads_changes_nothing(threads, coder):
    codec, sizes, before = Codec(Levels.uniform(4), coder, 500), (300_000, 5, 700_001), torch.get_num_threads()
    vector, counts = _vector(sum(sizes)), torch.zeros(2, 8, dtype=torch.int64)
    try:
        torch.set_num_threads(1)
        expected = codec.encode(vector, Key(0, 0, 0), sizes=sizes, counts=counts[0])
        mean = codec.decode_mean([expected, expected])
        torch.set_num_threads(threads)
        assert torch.equal(codec.encode(vector, Key(0, 0, 0), sizes=sizes, counts=counts[1]), expected)
        assert torch.equal(codec.decode_mean([expected, expected]), mean)
    finally:
        torch.set_num_threads(before)
    symbols = drawn(codec, vector, Key(0, 0, 0), sizes).symbols
    assert torch.equal(counts[0], torch.bincount(symbols.abs().int(), minlength=8)) and torch.equal(*counts)


def test_payloads_cut_in_different_ways_have_the_mean_of_their_vectors():
    vector = _vector(1000)
    codecs = [Codec(Levels.uniform(4), bucket_size=64), Codec(Levels.uniform(3), "fixed", 100, min_numel=400)]
    cuts = (None, (300, 700))
    payloads = [codec.encode(vector, Key(0, 0, 0), sizes=cut) for codec, cut in zip(codecs, cuts, strict=True)]
    expected = (codecs[0].decode_mean(payloads[:1]) + codecs[1].decode_mean(payloads[1:])) / 2
    for name in (*COMPILED, "specification"):
        assert torch.equal(_on(name, codecs[0].decode_mean, payloads), expected)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("min_numel", [0, 300])
@pytest.mark.parametrize("form", FORMS)
def test_statistics_are_the_same_integers(name, norm, min_numel, form):
    codec, sizes = Codec(Levels.uniform(4), bucket_size=64, norm=norm, min_numel=min_numel), (1000, 200, 0, 3001)
    vector = _vector(sum(sizes), kind="heavy")
    vector[1100] = torch.nan
    expected = _on("specification", codec.statistics, vector.split(sizes), codec.layout(sizes), form)
    found = _on(name, codec.statistics, vector.split(sizes), codec.layout(sizes), form)
    assert found[0] == expected[0] and all(torch.equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_the_largest_of_a_hundred_million_elements_never_passes_its_level(name):
    """Under L-infinity the largest of a bucket is its norm: by every draw it takes the last level, and none passes."""
    numel, generator = 10**7, torch.Generator().manual_seed(0)
    vector = torch.rand(numel, generator=generator)
    tables = (Levels.uniform(4), Levels.uniform(8), Levels.exponential(4), Levels((0.0, 0.3, 0.99, 1.0)))
    for step in range(10):
        codec = Codec(tables[step % 4], "fixed", 100, "linf")
        vector.mul_(1.0 + 2.0**-20)  # other mantissas
        payload = _on(name, codec.encode, vector, Key(0, 0, step))
        decoded = codec.decode_mean([payload]).view(-1, 100)
        largest = vector.view(-1, 100).amax(1)
        assert torch.equal(decoded.amax(1), largest)


@pytest.mark.slow
def test_an_unknown_backend_is_one_sentence():
    command = [sys.executable, "-c", "import hvd_qgenx"]
    for asked, code in (("gpu", 1), ("specification", 0)):
        environment = {**os.environ, backends.SWITCH: asked}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == code
        assert code == 0 or f"{backends.SWITCH} must be one of avx2, portable, specification" in done.stderr


def test_the_backend_in_use_can_be_seen():
    assert hvd_qgenx.backend == backends.name()
    with backends.force("specification"):
        assert hvd_qgenx.backend == "specification"


def _breaking_kraft():
    """A codebook that no caller can make by make_code: three words of one bit."""
    return Codebook("huffman", Levels.uniform(2), Code(("0", "0", "0")))


@pytest.mark.parametrize("name", COMPILED)
def test_an_argument_that_is_wrong_blames_no_payload(name):
    payload = Codec(Levels.uniform(2)).encode(torch.ones(5), Key(0, 0, 0))
    with pytest.raises(ValueError, match="Kraft") as caught:
        Compiled(name).decode_mean(_breaking_kraft(), [payload], [torch.zeros(5)])
    assert not isinstance(caught.value, hvd_qgenx.PayloadError)


WITHOUT_MEMORY = """
import resource, torch
from hvd_qgenx import Codec, Key, Levels
codec = Codec(Levels.uniform(8), bucket_size=16384)  # the largest scratch: some 1.1 MB
vector, out = torch.ones(16384), torch.zeros(16384)
payload = codec.encode(vector, Key(0, 0, 0))
held = []
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size, size))
for block in (2**20, 2**14):  # what the allocator still has of its own
    try:
        while True:
            held.append(bytearray(block))
    except MemoryError:
        pass
try:
    codec.decode_mean([payload], out=out)
    print("no error")
except Exception as error:
    held.clear()
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_memory_that_is_missing_blames_no_payload():
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True)
    assert done.stdout.strip() == "MemoryError out of memory", done.stdout + done.stderr
