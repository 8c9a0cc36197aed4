"""The bytes that travel: a header, sections, a checksum. docs/wire_format.md describes them.

Everything is little-endian. Nothing that a payload says is trusted: every size is checked against the bytes that are
there before anything is allocated, and whatever does not fit raises PayloadError naming the field.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hvd_qgenx.coders import CODERS, Codebook, codebook, fixed_width, huffman
from hvd_qgenx.levels import MAX_LEVELS, NORMS, Levels
from hvd_qgenx.quantize import Buckets, Key, Quantized
from hvd_qgenx.reference import bucket_lengths, crc32c
from hvd_qgenx.words import MAX_WORD, CodeError

MAGIC = b"QGNX"
VERSION = 3
MAX_BUCKET_SIZE = 16384  # at most 20 bits a symbol, so that a bucket's length in bytes fits 16 bits
ROUNDINGS = ("stochastic",)
_FIXED = struct.Struct("<4sHBBBBHQQIIIQQIIQ")
_CHECKSUM = struct.Struct("<I")
_INLINE = 1


class PayloadError(ValueError):
    """A payload that is damaged, of another version, or made with another codebook; the message names the field."""


@dataclass(frozen=True)
class Header:
    """What a payload says of itself, in the order of the bytes.

    ``sizes`` are the coordinates of each segment (a parameter); those below ``min_numel`` travel as float32.
    ``codebook`` is the hash of levels and code lengths; ``inline`` holds them if the payload carries them.
    """

    norm: str
    coder: str
    num_levels: int
    bucket_size: int
    min_numel: int
    sizes: tuple[int, ...]
    key: Key
    codebook: int
    inline: tuple[Levels, Codebook] | None = None

    @property
    def numel(self) -> int:
        return sum(self.sizes)

    @property
    def coded_sizes(self) -> list[int]:
        return [size for size in self.sizes if size >= self.min_numel]

    @property
    def raw_numel(self) -> int:
        return sum(size for size in self.sizes if size < self.min_numel)


def bound(sizes: tuple[int, ...], min_numel: int, bucket_size: int, words: Codebook, inline: int) -> int:
    """Bytes of the largest payload; ``inline`` are those of a codebook that travels with it."""
    coded = [size for size in sizes if size >= min_numel]
    raw = sum(sizes) - sum(coded)
    symbols = sum(words.most_bytes(min(bucket_size, size)) * -(-size // bucket_size) for size in coded)
    buckets = sum(-(-size // bucket_size) for size in coded)
    return _FIXED.size + inline + 8 * len(sizes) + 4 * raw + 6 * buckets + symbols + _CHECKSUM.size


def inline_bytes(levels: Levels) -> int:
    """Bytes of a codebook that travels with a payload: s float32 levels, 2 s + 1 code lengths."""
    return 6 * levels.num_levels + 1


def pack(header: Header, words: Codebook, raw: Tensor, quantized: Quantized, buckets: Buckets) -> Tensor:
    """One payload, uint8[size]."""
    coded, byte_lengths = words.encode(quantized.symbols, buckets)
    sections = [np.asarray(header.sizes, "<u8"), raw.numpy(), quantized.norms.numpy()]
    if not words.width:
        sections.append(byte_lengths.numpy().astype("<u2"))
    tail = b"".join(section.tobytes() for section in [*sections, coded.numpy()])
    inline = _pack_inline(*header.inline) if header.inline else b""
    body = _pack_fixed(header, _FIXED.size + len(inline) + len(tail) + _CHECKSUM.size) + inline + tail
    return torch.frombuffer(bytearray(body + _CHECKSUM.pack(crc32c(body))), dtype=torch.uint8)


def _pack_fixed(header: Header, size: int) -> bytes:
    key, flags = header.key, _INLINE if header.inline else 0
    norm, coder = NORMS.index(header.norm), CODERS.index(header.coder)
    return _FIXED.pack(
        MAGIC, VERSION, flags, norm, coder, header.num_levels, 0, size,
        header.numel, len(header.sizes), header.min_numel, header.bucket_size,
        key.seed, key.step, key.rank, key.stream, header.codebook,
    )  # fmt: skip


def _pack_inline(levels: Levels, words: Codebook) -> bytes:
    return np.asarray(levels.values[1:], "<f4").tobytes() + bytes(words.lengths)


@dataclass(frozen=True)
class Parsed:
    """A payload whose sizes have been checked: views of its sections."""

    header: Header
    raw: Tensor
    norms: Tensor
    byte_lengths: Tensor
    coded: Tensor


def parse(payload: Tensor, numel: int | None = None) -> Parsed:
    """Checks a payload and finds its sections.

    Args:
        payload: uint8[size], contiguous, on the CPU.
        numel: the coordinates that the caller expects.

    Raises:
        PayloadError: naming the field that does not fit.
    """
    data = _as_bytes(payload)
    fields = _parse_fixed(data)
    _expect(numel is None or fields["numel"] == numel, f"numel is {fields['numel']}, expected {numel}")
    cursor = _Cursor(data, _FIXED.size)
    inline = _parse_inline(cursor, fields) if fields["flags"] & _INLINE else None
    header = _header(fields, cursor.take("sizes", "<u8", fields["num_segments"]), inline)
    return _parse_sections(cursor, header)


def check_payload(payload: Tensor) -> Tensor:
    """``payload``, contiguous and on the CPU, if it is a 1-D uint8 tensor."""
    if not isinstance(payload, Tensor) or payload.dtype != torch.uint8 or payload.dim() != 1:
        raise ValueError("payload must be a 1-D uint8 tensor")
    return payload.detach().cpu().contiguous()


def codebook_of(payload: Tensor) -> int:
    """The hash of the codebook of a payload that has been checked."""
    return _fields(memoryview(payload.numpy()))["codebook"]


def read_sizes(payload: Tensor) -> tuple[int, ...]:
    """The coordinates of each segment of a payload that has been checked."""
    data = memoryview(payload.numpy())
    fields = _fields(data)
    inline = 6 * fields["num_levels"] + 1 if fields["flags"] & _INLINE else 0
    return tuple(np.frombuffer(data, "<u8", fields["num_segments"], _FIXED.size + inline).tolist())


def _as_bytes(payload: Tensor) -> memoryview:
    data = memoryview(check_payload(payload).numpy())
    least = _FIXED.size + _CHECKSUM.size
    _expect(len(data) >= least, f"size is {len(data)} bytes, less than a header's {least}")
    return data


_NAMES = (
    *("magic", "version", "flags", "norm", "coder", "num_levels", "reserved"),
    *("size", "numel", "num_segments", "min_numel", "bucket_size"),
    *("seed", "step", "rank", "stream", "codebook"),
)


def _fields(data: memoryview) -> dict:
    return dict(zip(_NAMES, _FIXED.unpack_from(data), strict=True))


def _parse_fixed(data: memoryview) -> dict:
    fields = _fields(data)
    _expect(fields["magic"] == MAGIC, f"magic is {fields['magic']!r}, expected {MAGIC!r}")
    _expect(fields["version"] == VERSION, f"version is {fields['version']}, this reader knows {VERSION}")
    _expect(fields["size"] == len(data), f"size is {fields['size']}, but {len(data)} bytes are there")
    (checksum,) = _CHECKSUM.unpack_from(data, len(data) - _CHECKSUM.size)
    _expect(checksum == crc32c(data[: -_CHECKSUM.size]), "checksum does not match the bytes")
    _expect(fields["flags"] in (0, _INLINE), f"flags are {fields['flags']}, only bit 0 is known")
    _expect(fields["reserved"] == 0, f"reserved is {fields['reserved']}, not zero")
    _expect(fields["norm"] < len(NORMS), f"norm is {fields['norm']}, unknown")
    _expect(fields["coder"] < len(CODERS), f"coder is {fields['coder']}, unknown")
    _expect(1 <= fields["num_levels"] <= MAX_LEVELS, f"num_levels is {fields['num_levels']}")
    _expect(1 <= fields["bucket_size"] <= MAX_BUCKET_SIZE, f"bucket_size is {fields['bucket_size']}")
    return fields


def _parse_inline(cursor: _Cursor, fields: dict) -> tuple[Levels, Codebook]:
    count = fields["num_levels"]
    values = cursor.take("levels", "<f4", count)
    coder = CODERS[fields["coder"]]
    lengths = cursor.take("code lengths", "u1", 2 * count + 1)
    try:
        levels = Levels((0.0, *values.tolist()))
        if coder == "huffman":
            words = huffman(_check_word_lengths(lengths.tolist()))
            _expect(words.lengths == tuple(lengths.tolist()), "code lengths are not those of huffman")
            return levels, words
        words = codebook(coder, count)
    except PayloadError:
        raise
    except ValueError as error:
        raise PayloadError(f"payload: codebook: {error}") from None
    _expect(words.lengths == tuple(lengths.tolist()), f"code lengths are not those of {coder}")
    return levels, words


def _check_word_lengths(lengths: list[int]) -> list[int]:
    """Those of a Huffman code: a zero in the middle stands for runs."""
    middle = len(lengths) // 2
    fit = all(1 <= length <= MAX_WORD or (place == middle and not length) for place, length in enumerate(lengths))
    _expect(fit, f"code lengths are not between 1 and {MAX_WORD}")
    return lengths


def _header(fields: dict, sizes: np.ndarray, inline: tuple[Levels, Codebook] | None) -> Header:
    total = sum(sizes.tolist())
    _expect(total == fields["numel"], f"sizes add up to {total}, numel is {fields['numel']}")
    return Header(
        norm=NORMS[fields["norm"]],
        coder=CODERS[fields["coder"]],
        num_levels=fields["num_levels"],
        bucket_size=fields["bucket_size"],
        min_numel=fields["min_numel"],
        sizes=tuple(sizes.tolist()),
        key=Key(fields["seed"], fields["rank"], fields["step"], fields["stream"]),
        codebook=fields["codebook"],
        inline=inline,
    )


def _parse_sections(cursor: _Cursor, header: Header) -> Parsed:
    num_buckets = sum(-(-size // header.bucket_size) for size in header.coded_sizes)
    raw = cursor.take("raw", "<f4", header.raw_numel)
    norms = cursor.take("norms", "<f4", num_buckets)
    _expect(not bool(np.isinf(raw).any()), "raw holds an infinite number")
    _expect(not bool(np.any((norms < 0) | np.isinf(norms))), "norms hold a negative or infinite number")
    byte_lengths = _byte_lengths(cursor, header, num_buckets)
    coded = cursor.rest()
    total = int(byte_lengths.sum())
    _expect(total == len(coded), f"lengths add up to {total} bytes, {len(coded)} are there")
    return Parsed(header, torch.from_numpy(raw.copy()), torch.from_numpy(norms.copy()), byte_lengths, coded)


def _byte_lengths(cursor: _Cursor, header: Header, num_buckets: int) -> Tensor:
    """int64[B], bytes of each bucket's code words."""
    lengths = bucket_lengths(header.coded_sizes, header.bucket_size)
    if header.coder == "fixed":
        byte_lengths = (lengths * fixed_width(header.num_levels) + 7) // 8
    else:
        byte_lengths = torch.from_numpy(cursor.take("lengths", "<u2", num_buckets).astype(np.int64))
    return byte_lengths


def decode_symbols(parsed: Parsed, words: Codebook, buckets: Buckets) -> Tensor:
    """Symbols int8[n] of the coded segments."""
    try:
        return words.decode(parsed.coded, parsed.byte_lengths, buckets)
    except CodeError as error:
        raise PayloadError(f"payload: coded: {error}") from None


class _Cursor:
    """Takes sections one after another, never past the checksum."""

    def __init__(self, data: memoryview, position: int):
        self.data, self.position, self.end = data, position, len(data) - _CHECKSUM.size

    def take(self, field: str, dtype: str, count: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize * count
        left, item = self.end - self.position, np.dtype(dtype).itemsize
        _expect(size <= left, f"{field} need {count} items of {item} bytes, {left} bytes are left")
        section = np.frombuffer(self.data, dtype, count, self.position)
        self.position += size
        return section

    def rest(self) -> Tensor:
        return torch.from_numpy(np.frombuffer(self.data, np.uint8, self.end - self.position, self.position).copy())


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise PayloadError(f"payload: {message}")
