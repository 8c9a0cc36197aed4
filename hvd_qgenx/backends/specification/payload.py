"""Payloads byte by byte: sections after a header, and every check of what arrives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hvd_qgenx.backends.specification.rounding import Buckets, integers
from hvd_qgenx.backends.specification.symbols import read_symbols, write_symbols
from hvd_qgenx.codebook import CODERS, Code, Codebook, fixed_width, huffman, make_code
from hvd_qgenx.layout import MAX_BUCKET_SIZE
from hvd_qgenx.levels import MAX_LEVELS, NORMS, Levels
from hvd_qgenx.payload import (
    CHECKSUM,
    FIELDS,
    FIXED,
    INLINE,
    MAGIC,
    VERSION,
    Header,
    PayloadError,
    check_payload,
    expect,
    read_fields,
    read_header,
)
from hvd_qgenx.words import MAX_WORD, CodeError


@dataclass(frozen=True)
class Quantized:
    """What is drawn of a vector: symbols int8[n] and norms float32[B] of its coded segments, and its raw ones.

    A segment that was not finite has NaN for all its norms, or coordinates.
    """

    symbols: Tensor
    norms: Tensor
    raw: Tensor


def pack(header: Header, codebook: Codebook, quantized: Quantized, buckets: Buckets) -> Tensor:
    """One payload, uint8[size]."""
    buckets, left = buckets.with_code(quantized.norms)
    coded, byte_lengths = write_symbols(codebook.code, quantized.symbols[left], buckets)
    sections = [np.asarray(header.layout.sizes, "<u8"), quantized.raw.numpy(), quantized.norms.numpy()]
    if not codebook.code.width:
        sections.append(byte_lengths.numpy().astype("<u2"))
    tail = b"".join(section.tobytes() for section in [*sections, coded.numpy()])
    inline = _pack_inline(codebook) if header.inline else b""
    body = _pack_fixed(header, FIXED.size + len(inline) + len(tail) + CHECKSUM.size) + inline + tail
    return torch.frombuffer(bytearray(body + CHECKSUM.pack(crc32c(body))), dtype=torch.uint8)


def _pack_fixed(header: Header, size: int) -> bytes:
    key, layout = header.key, header.layout
    values = {
        "magic": MAGIC, "version": VERSION, "flags": INLINE if header.inline else 0,
        "norm": NORMS.index(header.norm), "coder": CODERS.index(header.coder), "num_levels": header.num_levels,
        "reserved": 0, "size": size, "numel": layout.numel, "num_segments": len(layout.sizes),
        "min_numel": layout.min_numel, "bucket_size": layout.bucket_size,
        "seed": key.seed, "step": key.step, "rank": key.rank, "stream": key.stream,
        "codebook_hash": header.codebook_hash,
    }  # fmt: skip
    return FIXED.pack(*(values[name] for name in FIELDS))


def _pack_inline(codebook: Codebook) -> bytes:
    return np.asarray(codebook.levels.values[1:], "<f4").tobytes() + bytes(codebook.code.lengths)


@dataclass(frozen=True)
class Parsed:
    """A payload whose sizes have been checked: its sections, and the codebook if it brings one."""

    header: Header
    codebook: Codebook | None
    raw: Tensor
    norms: Tensor
    byte_lengths: Tensor
    coded: Tensor


def parse(payload: Tensor, numel: int | None = None) -> Parsed:
    """Checks a payload and finds its sections.

    Args:
        payload: uint8[size].
        numel: the coordinates that the caller expects.

    Raises:
        PayloadError: naming the field that does not fit.
    """
    data = _as_bytes(payload)
    fields = _parse_fixed(data)
    expect(numel is None or fields["numel"] == numel, f"numel is {fields['numel']}, expected {numel}")
    cursor = _Cursor(data, FIXED.size)
    # Only after the numel that the caller expects: nothing is made before that fits.
    codebook = _parse_inline(cursor, fields) if fields["flags"] & INLINE else None
    total = sum(cursor.take("sizes", "<u8", fields["num_segments"]).tolist())
    expect(total == fields["numel"], f"sizes add up to {total}, numel is {fields['numel']}")
    return _parse_sections(cursor, read_header(data), codebook)


def _as_bytes(payload: Tensor) -> memoryview:
    data = memoryview(check_payload(payload).numpy().data)
    least = FIXED.size + CHECKSUM.size
    expect(len(data) >= least, f"size is {len(data)} bytes, less than a header's {least}")
    return data


def _parse_fixed(data: memoryview) -> dict:
    fields = read_fields(data)
    expect(fields["magic"] == MAGIC, f"magic is {fields['magic']!r}, expected {MAGIC!r}")
    expect(fields["version"] == VERSION, f"version is {fields['version']}, this reader knows {VERSION}")
    expect(fields["size"] == len(data), f"size is {fields['size']}, but {len(data)} bytes are there")
    (checksum,) = CHECKSUM.unpack_from(data, len(data) - CHECKSUM.size)
    # Before the fields that follow: a damaged payload is called damaged, not by the first field that looks odd.
    expect(checksum == crc32c(data[: -CHECKSUM.size]), "checksum does not match the bytes")
    expect(fields["flags"] in (0, INLINE), f"flags are {fields['flags']}, only bit 0 is known")
    expect(fields["reserved"] == 0, f"reserved is {fields['reserved']}, not zero")
    expect(fields["norm"] < len(NORMS), f"norm is {fields['norm']}, unknown")
    expect(fields["coder"] < len(CODERS), f"coder is {fields['coder']}, unknown")
    expect(1 <= fields["num_levels"] <= MAX_LEVELS, f"num_levels is {fields['num_levels']}")
    expect(1 <= fields["bucket_size"] <= MAX_BUCKET_SIZE, f"bucket_size is {fields['bucket_size']}")
    return fields


def _parse_inline(cursor: _Cursor, fields: dict) -> Codebook:
    count = fields["num_levels"]
    values = cursor.take("levels", "<f4", count)
    coder = CODERS[fields["coder"]]
    lengths = tuple(cursor.take("code lengths", "u1", 2 * count + 1).tolist())
    try:
        levels = Levels((0.0, *values.tolist()))
        code = huffman(_check_word_lengths(lengths)) if coder == "huffman" else make_code(coder, count)
    except PayloadError:
        raise
    except ValueError as error:
        raise PayloadError(f"payload: codebook: {error}") from None
    expect(code.lengths == lengths, f"code lengths are not those of {coder}")
    return Codebook(coder, levels, code)


def _check_word_lengths(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a Huffman code: a zero in the middle stands for runs."""
    middle = len(lengths) // 2
    fit = all(1 <= length <= MAX_WORD or (place == middle and not length) for place, length in enumerate(lengths))
    expect(fit, f"code lengths are not between 1 and {MAX_WORD}")
    return lengths


def _parse_sections(cursor: _Cursor, header: Header, codebook: Codebook | None) -> Parsed:
    num_buckets = header.layout.num_buckets
    raw = cursor.take("raw", "<f4", header.layout.raw_numel)
    norms = cursor.take("norms", "<f4", num_buckets)
    # Encoders say NaN of what is not finite; an infinity could turn a mean into NaN unseen.
    expect(not bool(np.isinf(raw).any()), "raw holds an infinite number")
    expect(not bool(np.any((norms < 0) | np.isinf(norms))), "norms hold a negative or infinite number")
    byte_lengths = _byte_lengths(cursor, header, torch.from_numpy(norms.copy()))
    coded = cursor.rest()
    total = int(byte_lengths.sum())
    expect(total == len(coded), f"lengths add up to {total} bytes, {len(coded)} are there")
    return Parsed(header, codebook, torch.from_numpy(raw.copy()), torch.from_numpy(norms.copy()), byte_lengths, coded)


def _byte_lengths(cursor: _Cursor, header: Header, norms: Tensor) -> Tensor:
    """int64[B], bytes of each bucket's code words; 0 where its norm, 0 or NaN, says all."""
    if header.coder == "fixed":
        elements = torch.where(norms > 0, integers(header.layout.bucket_lengths()), 0)
        return (elements * fixed_width(header.num_levels) + 7) // 8
    return torch.from_numpy(cursor.take("lengths", "<u2", header.layout.num_buckets).astype(np.int64))


def symbols_of(parsed: Parsed, code: Code, buckets: Buckets) -> Tensor:
    """Symbols int8[n] of the coded segments, 0 in buckets without code."""
    buckets, left = buckets.with_code(parsed.norms)
    symbols = torch.zeros(len(left), dtype=torch.int8, device="cpu")
    try:
        symbols[left] = read_symbols(code, parsed.coded, parsed.byte_lengths, buckets)
    except CodeError as error:
        raise PayloadError(f"payload: coded: {error}") from None
    return symbols


class _Cursor:
    """Takes sections one after another, never past the checksum."""

    def __init__(self, data: memoryview, position: int):
        self.data, self.position, self.end = data, position, len(data) - CHECKSUM.size

    def take(self, field: str, dtype: str, count: int) -> np.ndarray:
        item, left = np.dtype(dtype).itemsize, self.end - self.position
        # In Python's integers, which cannot wrap around.
        expect(item * count <= left, f"{field} need {count} items of {item} bytes, {left} bytes are left")
        section = np.frombuffer(self.data, dtype, count, self.position)
        self.position += item * count
        return section

    def rest(self) -> Tensor:
        return torch.from_numpy(np.frombuffer(self.data, np.uint8, self.end - self.position, self.position).copy())


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli) of bytes, as in RFC 3720."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _crc_entry(crc: int) -> int:
    for _ in range(8):
        crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc


_CRC_TABLE = [_crc_entry(byte) for byte in range(256)]
