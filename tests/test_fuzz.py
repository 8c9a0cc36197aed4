"""Damaged and hostile payloads: the sanitized programs of tests/fuzz, and every backend called from Python."""

import re
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_qgenx import Codec, Key, Levels, PayloadError, backends
from hvd_qgenx.backends.specification.payload import crc32c
from hvd_qgenx.codebook import CODERS
from hvd_qgenx.payload import VERSION

ROOT = Path(__file__).parent.parent
BACKENDS = ("specification", "portable", *{backends.name()} - {"specification", "portable"})
FIELDS = (
    *("magic", "version", "size", "checksum", "flags", "reserved", "norms", "norm", "coder", "num_levels"),
    *("bucket_size", "numel", "levels", "code lengths", "sizes", "raw", "lengths", "codebook", "coded"),
)
HEADER, SIZE_AT, NUMEL = 72, 12, 107
HEADER_FIELDS = {
    "magic": (0, 4),
    "version": (4, 2),
    "flags": (6, 1),
    "norm": (7, 1),
    "coder": (8, 1),
    "num_levels": (9, 1),
    "reserved": (10, 2),
    "size": (12, 8),
    "numel": (20, 8),
    "num_segments": (28, 4),
    "min_numel": (32, 4),
    "bucket_size": (36, 4),
    "codebook": (64, 8),
}
EXTREMES = (0, 1, 2, 127, 128, 255, 16384, 16385, 2**16 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def _make(*targets, **variables):
    chosen = [f"{name}={value}" for name, value in variables.items()]
    command = ["make", "-j2", "-C", ROOT / "tests" / "fuzz", *targets, *chosen]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
def test_the_core_survives_mutations_and_round_trips_under_the_sanitizers():
    output = _make("sanitize", RUNS=20000)
    tried, refused = map(int, re.search(r"(\d+) inputs tried, (\d+) of them refused", output).groups())
    trips = int(re.search(r"(\d+) round trips", output).group(1))
    assert tried >= 20000 and 0 < refused < tried and trips > 1500


def _codecs():
    for coder in CODERS:
        yield Codec(Levels.exponential(4), coder, bucket_size=32, min_numel=8)
    yield Codec(Levels.uniform(2), "huffman", bucket_size=64, counts=(9, 1))
    yield Codec(Levels.uniform(4), "huffman", bucket_size=100, counts=(90, 1, 2, 1, 1, 1, 1, 1), norm="linf")
    yield Codec(Levels.uniform(4), "huffman", bucket_size=100, counts=(900, 90, 2, 1, 1, 1, 1, 1))
    yield Codec(Levels.uniform(8), "huffman", bucket_size=16384)


def _payloads():
    vector = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)) ** 3
    for codec in _codecs():
        yield codec.encode(vector, Key(1, 2, 3), sizes=(70, 5, 0, 32)).numpy().tobytes()


PAYLOADS = tuple(_payloads())


def _signed(content: bytes) -> bytes:
    """With the right size, if the header is there, and the right checksum."""
    if len(content) >= HEADER:
        content = content[:SIZE_AT] + struct.pack("<Q", len(content) + 4) + content[SIZE_AT + 8 :]
    return content + struct.pack("<I", crc32c(content))


def _outcome(backend: str, payloads: list[bytes], numel: int | None):
    """The field that is named, or what is decoded."""
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
               for data in payloads]  # fmt: skip
    with backends.force(backend):
        try:
            return Codec(Levels.uniform(2)).decode_mean(tensors, numel)
        except PayloadError as error:
            named = re.match(rf"payload: (?:codebook: )?({'|'.join(FIELDS)})\b", str(error))
            assert named, f"{backend} names no field: {error}"
            return named.group(1)


def _check_agreement(payloads: list[bytes], numel: int | None = NUMEL):
    """All backends refuse for the same field, or all give the same values; NaN is equal to NaN."""
    outcomes = [_outcome(backend, payloads, numel) for backend in BACKENDS]
    for outcome in outcomes[1:]:
        if isinstance(outcome, str) or isinstance(outcomes[0], str):
            assert outcome == outcomes[0], dict(zip(BACKENDS, outcomes, strict=True))
        else:
            assert torch.equal(outcome.isnan(), outcomes[0].isnan())
            assert torch.equal(outcome.nan_to_num(), outcomes[0].nan_to_num())
    return outcomes[0]


positions = st.integers(0, 400)
changes = st.one_of(
    st.tuples(st.just("cut"), positions),
    st.tuples(st.just("flip"), positions, st.integers(0, 7)),
    st.tuples(st.just("byte"), positions, st.integers(0, 255)),
    st.tuples(st.just("field"), st.sampled_from(sorted(HEADER_FIELDS)), st.sampled_from(EXTREMES)),
    st.tuples(st.just("words"), positions, st.sampled_from(EXTREMES)),
    st.tuples(st.just("splice"), positions, st.sampled_from(range(len(PAYLOADS)))),
    st.tuples(st.just("insert"), positions, st.binary(max_size=12)),
)


def _change(content: bytes, change: tuple) -> bytes:
    kind, where, *what = change
    if kind == "field":
        where, size = HEADER_FIELDS[where]
        return content[:where] + what[0].to_bytes(8, "little")[:size] + content[where + size :]
    where = where % (len(content) + 1)
    if kind == "cut":
        return content[:where]
    if kind == "splice":
        return content[:where] + PAYLOADS[what[0]][where:-4]
    if kind == "insert":
        return content[:where] + what[0] + content[where:]
    if kind == "words":
        return content[:where] + what[0].to_bytes(8, "little") + content[where + 8 :]
    old = content[where] if where < len(content) else 0
    return content[:where] + bytes([old ^ 1 << what[0] if kind == "flip" else what[0]]) + content[where + 1 :]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(PAYLOADS), st.lists(changes, min_size=1, max_size=3), st.booleans())
def test_backends_agree_on_damaged_payloads_with_a_right_checksum(payload, damage, known):
    content = payload[:-4]
    for change in damage:
        content = _change(content, change)
    # Without numel= the caller lets the payload say how much to allocate: at most 4096 coordinates a byte.
    outcome = _check_agreement([_signed(content)], NUMEL if known else None)
    assert isinstance(outcome, str) or not outcome.isinf().any()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.booleans())
def test_backends_agree_on_random_bytes(data, headed):
    _check_agreement([_signed(PAYLOADS[0][:HEADER] + data) if headed else data])


@pytest.mark.parametrize("bad", range(3))
def test_one_damaged_payload_among_good_ones_is_refused(bad):
    payloads = [PAYLOADS[0], PAYLOADS[3], PAYLOADS[-1]]
    payloads[bad] = _signed(payloads[bad][:-9])
    assert _check_agreement(payloads) in ("coded", "lengths")


def test_payloads_cut_differently_have_the_same_mean_on_every_backend():
    assert _check_agreement(list(PAYLOADS)).shape == (NUMEL,)


def _hostile(coder, lengths, levels, sections, numel, bucket_size=64, segments=1) -> bytes:
    """A payload with the right size and checksum, L2 norms and the given content."""
    head = (
        b"QGNX",
        VERSION,
        1,
        0,
        CODERS.index(coder),
        len(levels),
        0,
        0,
        numel,
        segments,
        0,
        bucket_size,
        0,
        0,
        0,
        0,
        0,
    )
    inline = struct.pack(f"<{len(levels)}f", *levels) + bytes(lengths)
    return _signed(struct.pack("<4sHBBBBHQQIIIQQIIQ", *head) + inline + sections)


def _bucket(code: bytes, numel: int, norm: float = 1.0) -> bytes:
    """The sections of one segment with one bucket."""
    return struct.pack("<QfH", numel, norm, len(code)) + code


def _bits(text: str) -> bytes:
    padded = text.replace(" ", "") + "0" * (-len(text.replace(" ", "")) % 8)
    return bytes(int(padded[i : i + 8][::-1], 2) for i in range(0, len(padded), 8))


HOSTILE = {
    "more coordinates than memory": (
        "norms", _hostile("huffman", [2, 1, 2], [1.0], struct.pack("<Q", 2**62) + bytes(90), 2**62)),
    "numel beyond int64": ("norms", _hostile("huffman", [2, 1, 2], [1.0], struct.pack("<Q", 2**63) + bytes(90), 2**63)),
    "sizes that wrap around": (
        "sizes", _hostile("fixed", [0] * 3, [1.0], struct.pack("<QQ", 2**63, 2**63 + 8), 8, segments=2)),
    "more segments than bytes": ("sizes", _hostile("fixed", [0] * 3, [1.0], bytes(8), 0, segments=2**32 - 1)),
    "norms over the end": ("norms", _hostile("fixed", [0] * 3, [1.0], struct.pack("<Qf", 129, 1.0), 129)),
    "lengths over the end": ("lengths", _hostile("huffman", [2, 1, 2], [1.0], struct.pack("<Qf", 9, 1.0), 9)),
    "lengths that overlap the checksum": (
        "lengths", _hostile("huffman", [2, 1, 2], [1.0], struct.pack("<QfH", 9, 1.0, 9) + bytes(5), 9)),
    "a norm and lengths that are wrong": (
        "norms", _hostile("huffman", [2, 1, 2], [1.0], struct.pack("<QfH", 9, -1.0, 9) + bytes(5), 9)),
    "words that break Kraft": ("code lengths", _hostile("huffman", [3, 1, 1, 1, 3], [0.5, 1.0], _bucket(b"\0", 4), 4)),
    "words too long": ("code lengths", _hostile("huffman", [1, 2, 16], [1.0], _bucket(b"\0", 4), 4)),
    "words not the coder's": ("code lengths", _hostile("elias_gamma", [4, 1, 5], [1.0], _bucket(b"\0", 4), 4)),
    "levels that fall": ("levels", _hostile("fixed", [0] * 5, [1.0, 0.5], bytes(12), 4)),
    "levels that are no numbers": ("levels", _hostile("fixed", [0] * 5, [float("nan"), 1.0], bytes(12), 4)),
    "a word that nobody has": ("coded", _hostile("huffman", [2, 2, 2], [1.0], _bucket(b"\xff", 4), 4)),
    "bits behind the words": ("coded", _hostile("huffman", [2, 1, 2], [1.0], _bucket(b"\x80", 4), 4)),
    "bytes behind the words": ("coded", _hostile("huffman", [2, 1, 2], [1.0], _bucket(bytes(2), 4), 4)),
    "a bucket without its code": ("coded", _hostile("huffman", [2, 1, 2], [1.0], _bucket(b"", 4), 4)),
    "a symbol above the highest": ("coded", _hostile("fixed", [0] * 3, [1.0], struct.pack("<Qf", 4, 1.0) + b"\xff", 4)),
    "a run longer than its bucket": (
        "coded", _hostile("huffman", [1, 0, 1], [1.0], _bucket(_bits("0000 000001"), 4), 4)),
    # Groups 10, 111, 11111111 and one of 256 bits, which shifts by more than 63 could take for a one, a run of none.
    "an omega word of 256 bits": (
        "coded",
        _hostile("elias_runs", [2, 0, 2], [1.0], _bucket(_bits(
            "10 111 11111111" + ("1" + "0" * 62 + "1") * 4 + "0" + "10 110 1010000 0" + "0" + "0"), 80), 80, 128)),
    "a Rice parameter that no encoder writes": (
        "coded", _hostile("huffman", [1, 0, 1], [1.0], _bucket(_bits("1000" + "1 0" * 4 + "0000"), 4), 4)),
    "nothing but ones where runs should be": (
        "coded", _hostile("elias_runs", [2, 0, 2], [1.0], _bucket(b"\xff" * 24, 64), 64)),
    "nothing but zeros where runs should be": (
        "coded", _hostile("huffman", [1, 0, 1], [1.0], _bucket(bytes(20), 64), 64)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_payload_is_refused_by_the_name_of_its_field(name):
    field, payload = HOSTILE[name]
    assert _check_agreement([payload], None) == field
