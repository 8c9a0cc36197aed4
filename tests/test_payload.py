"""The bytes: golden vectors, and what happens to damaged ones."""

import json
import struct
from pathlib import Path

import pytest
import torch
from golden.vectors import CASES, encode
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_qgenx import Codec, Key, Levels, PayloadError
from hvd_qgenx.backends.specification.payload import crc32c
from hvd_qgenx.codebook import CODERS
from hvd_qgenx.exchange.allgather import Arrived
from hvd_qgenx.payload import VERSION

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", sorted(CASES))
def test_golden_vectors_encode_to_the_recorded_bytes(name):
    assert bytes(encode(name).numpy()) == (GOLDEN / f"{name}.bin").read_bytes()


@pytest.mark.parametrize("name", sorted(CASES))
def test_golden_vectors_decode_to_the_recorded_values(name):
    recorded = json.loads((GOLDEN / "manifest.json").read_text())[name]
    payload = torch.frombuffer(bytearray((GOLDEN / f"{name}.bin").read_bytes()), dtype=torch.uint8)
    decoded = Codec(Levels.uniform(2)).decode_mean([payload])
    assert [value.hex() for value in decoded.double().tolist()] == recorded


def _payload(coder="huffman", inline=True):
    codec = Codec(Levels.exponential(4), coder=coder, bucket_size=32, min_numel=8)
    vector = torch.randn(200, generator=torch.Generator().manual_seed(0))
    return codec, codec.encode(vector, Key(1, 2, 3), sizes=(100, 5, 95), inline=inline)


@pytest.mark.parametrize("coder", CODERS)
def test_every_truncated_payload_is_refused(coder):
    codec, payload = _payload(coder)
    for size in range(len(payload)):
        with pytest.raises(PayloadError, match="payload: "):
            codec.decode_mean([payload[:size]])


@pytest.mark.parametrize("coder", ["huffman", "fixed"])
def test_every_flipped_bit_is_refused(coder):
    codec, payload = _payload(coder)
    for position in range(len(payload)):
        for bit in range(8):
            flipped = payload.clone()
            flipped[position] ^= 1 << bit
            with pytest.raises(PayloadError, match="payload: "):
                codec.decode_mean([flipped])


def _signed(data: bytes) -> torch.Tensor:
    """A payload with a right checksum."""
    return torch.frombuffer(bytearray(data + struct.pack("<I", crc32c(data))), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("offset", "value", "field"),
    [
        (0, b"QQQQ", "magic"),
        (4, b"\x09\x00", "version"),
        (6, b"\x07", "flags"),
        (7, b"\x09", "norm"),
        (8, b"\x09", "coder"),
        (9, b"\x06", "code"),
        (10, b"\x01", "reserved"),
        (12, b"\xff" * 8, "size"),
        (20, b"\xff" * 7, "numel"),
        (28, b"\xff" * 4, "sizes"),
        (32, b"\xff" * 4, "raw"),
        (36, b"\x00" * 4, "bucket_size"),
        (36, b"\xff" * 4, "bucket_size"),
    ],
)
def test_a_field_that_does_not_fit_is_named(offset, value, field):
    codec, payload = _payload()
    data = bytearray(payload.numpy().tobytes()[:-4])
    data[offset : offset + len(value)] = value
    with pytest.raises(PayloadError, match=field):
        codec.decode_mean([_signed(bytes(data))])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_a_payload_with_a_right_checksum_and_wrong_content_is_refused_or_finite(data):
    codec, payload = _payload(data.draw(st.sampled_from(CODERS)))
    content = bytearray(payload.numpy().tobytes()[:-4])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = codec.decode_mean([_signed(bytes(content))], numel=200)
    except PayloadError:
        return
    # A norm or a raw value may have become NaN, which is legitimate; nothing can become infinite.
    assert decoded.shape == (200,) and not decoded.isinf().any()


def test_numel_is_checked_before_anything_else_is_read():
    codec, payload = _payload()
    with pytest.raises(PayloadError, match="numel is 200, expected 199"):
        codec.decode_mean([payload], numel=199)


def test_a_payload_that_refers_to_another_codebook_is_refused():
    _, payload = _payload(inline=False)
    with pytest.raises(PayloadError, match="codebook is huffman 7 .*, the decoder's is"):
        Codec(Levels.uniform(4)).decode_mean([payload])


def test_payloads_with_inline_codebooks_may_differ():
    vector = torch.randn(100, generator=torch.Generator().manual_seed(2))
    first, second = Codec(Levels.uniform(8), "fixed", norm="linf"), Codec(Levels.exponential(3), "elias_delta")
    payloads = [first.encode(vector, Key(0, 0, 0)), second.encode(vector, Key(0, 1, 0))]
    mean = (first.decode_mean(payloads[:1]) + second.decode_mean(payloads[1:])) / 2
    assert torch.equal(Codec(Levels.uniform(2)).decode_mean(payloads), mean)


def test_the_key_travels_in_the_header():
    codec, payload = _payload()
    assert codec.parse(payload).key == Key(1, 2, 3)


def _hostile(sizes: bytes, norms: bytes, lengths: bytes, coded: bytes, numel: int, coder: int = 4) -> torch.Tensor:
    """A payload with inline levels (0, 1), the given sections and a right checksum."""
    tail = struct.pack("<f", 1.0) + bytes([2, 1, 2] if coder == 4 else [0, 0, 0]) + sizes + norms + lengths + coded
    fixed = struct.Struct("<4sHBBBBHQQIIIQQIIQ")
    size = fixed.size + len(tail) + 4
    head = (b"QGNX", VERSION, 1, 0, coder, 1, 0, size, numel, len(sizes) // 8, 0, 16384, 0, 0, 0, 0, 0)
    return _signed(fixed.pack(*head) + tail)


@pytest.mark.parametrize("coder", [0, 4])
def test_few_bytes_cannot_ask_for_much_memory(coder):
    """A million buckets of 16384 coordinates, 64 GB, of which 100 have norms."""
    numel, lengths = 10**6 * 16384, b"" if coder == 0 else bytes(200)
    payload = _hostile(struct.pack("<Q", numel), struct.pack("<f", 1.0) * 100, lengths, b"", numel, coder)
    with pytest.raises(PayloadError, match="norms need 1000000 items of 4 bytes, [46]00 bytes are left"):
        Codec(Levels.uniform(2)).decode_mean([payload])


def test_an_infinite_raw_value_is_refused():
    codec, payload = _payload()
    position = payload.numpy().tobytes().find(struct.pack("<Q", 95)) + 8  # the raw values follow the last size
    data = bytearray(payload.numpy().tobytes()[:-4])
    data[position : position + 4] = struct.pack("<f", float("inf"))
    with pytest.raises(PayloadError, match="raw holds an infinite number"):
        codec.decode_mean([_signed(bytes(data))])


def test_a_number_of_levels_that_is_not_the_decoders_is_refused():
    codec, payload = _payload(inline=False)
    data = bytearray(payload.numpy().tobytes()[:-4])
    data[9] = 200
    with pytest.raises(PayloadError, match="num_levels is 200"):
        codec.decode_mean([_signed(bytes(data))])


def test_what_a_peer_says_of_sizes_is_not_believed_where_they_are_known():
    """A few kB of buckets without code may ask for ten thousand times as much."""
    codec = Codec(Levels.uniform(4), bucket_size=16384)
    payload = codec.encode(torch.zeros(10**6), Key(0, 0, 0), sizes=(10**6 - 5, 5), inline=False)
    assert len(payload) < 10**3
    arrived = Arrived(codec, [], [payload, payload], [0, 1])
    assert arrived.common_sizes((10**6 - 5, 5)) == (10**6 - 5, 5)
    for known in ((10**6, 5), (10**6 - 5,), (0, 0)):
        with pytest.raises(PayloadError, match="sizes are .999995, 5., expected"):
            arrived.common_sizes(known)
