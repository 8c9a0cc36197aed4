"""The bytes that travel: a header, sections, a checksum, as docs/wire_format.md describes them. Values only.

Everything is little-endian. What a payload says is read here as it stands; the backends' ``parse`` compares it with the
bytes that are there before anything is allocated, and raises PayloadError naming the field that does not fit.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from hvd_qgenx.codebook import CODERS, Codebook
from hvd_qgenx.key import Key
from hvd_qgenx.layout import Layout
from hvd_qgenx.levels import NORMS, Levels

MAGIC = b"QGNX"
VERSION = 4
INLINE = 1  # the flag of a payload that brings its codebook

#: The fields of a header, in the order of the bytes, and the format of each as in ``struct``.
FIELDS = {
    "magic": "4s", "version": "H", "flags": "B", "norm": "B", "coder": "B", "num_levels": "B", "reserved": "H",
    "size": "Q", "numel": "Q", "num_segments": "I", "min_numel": "I", "bucket_size": "I",
    "seed": "Q", "step": "Q", "rank": "I", "stream": "I", "codebook_hash": "Q",
}  # fmt: skip
FIXED = struct.Struct("<" + "".join(FIELDS.values()))
CHECKSUM = struct.Struct("<I")
_ENDS = list(accumulate(struct.calcsize("<" + form) for form in FIELDS.values()))
#: Where each field begins.
OFFSETS = dict(zip(FIELDS, [0, *_ENDS], strict=False))


class PayloadError(ValueError):
    """A payload that is damaged, of another version, or made with another codebook; the message names the field."""


@dataclass(frozen=True)
class Header:
    """What a payload says of itself. ``inline`` says that it brings levels and code lengths, of hash or not."""

    norm: str
    coder: str
    num_levels: int
    layout: Layout
    key: Key
    codebook_hash: int
    inline: bool = False


def expect(condition: bool, message: str) -> None:
    """Raises PayloadError unless the condition holds."""
    if not condition:
        raise PayloadError(f"payload: {message}")


def inline_bytes(levels: Levels) -> int:
    """Bytes of a codebook that travels with a payload: s float32 levels, 2 s + 1 code lengths."""
    return 6 * levels.num_levels + 1


@lru_cache(maxsize=64)
def bound(layout: Layout, codebook: Codebook, inline: bool) -> int:
    """Bytes of the largest payload."""
    coded = sum(
        codebook.code.most_bytes(min(layout.bucket_size, size)) * -(-size // layout.bucket_size)
        for size in layout.coded_sizes
    )
    own = inline_bytes(codebook.levels) if inline else 0
    # 6 bytes a bucket: its norm and the length of its code.
    sections = 8 * len(layout.sizes) + 4 * layout.raw_numel + 6 * layout.num_buckets + coded
    return FIXED.size + own + sections + CHECKSUM.size


def check_payload(payload: Tensor) -> Tensor:
    """``payload``, contiguous and on the CPU, if it is a 1-D uint8 tensor."""
    if not isinstance(payload, Tensor) or payload.dtype != torch.uint8 or payload.dim() != 1:
        raise ValueError("payload must be a 1-D uint8 tensor")
    return payload.detach().cpu().contiguous()


def read_fields(data: memoryview) -> dict:
    """The header's fields by name; ``data`` is long enough."""
    return dict(zip(FIELDS, FIXED.unpack_from(data), strict=True))


def read_sizes(data: memoryview) -> tuple[int, ...]:
    """The coordinates of each segment; raises ValueError or struct.error where the payload is too short for them."""
    fields = read_fields(data)
    # An inline codebook lies between the header and the sizes.
    start = FIXED.size + (6 * fields["num_levels"] + 1 if fields["flags"] & INLINE else 0)
    return tuple(np.frombuffer(data, "<u8", fields["num_segments"], start).tolist())


def peek(payload: Tensor) -> tuple[tuple[int, ...], int]:
    """The sizes and the codebook's hash of a payload as it says them; for decisions that ``decode_mean`` checks."""
    data = memoryview(payload.numpy().data)
    try:
        return read_sizes(data), read_fields(data)["codebook_hash"]
    except (ValueError, struct.error):
        raise PayloadError(f"payload: size is {len(data)} bytes, less than its header and sizes need") from None


def read_header(data: memoryview) -> Header:
    """The header of a payload whose sizes have been compared with its bytes."""
    fields = read_fields(data)
    inline = bool(fields["flags"] & INLINE)
    return Header(
        norm=NORMS[fields["norm"]],
        coder=CODERS[fields["coder"]],
        num_levels=fields["num_levels"],
        layout=Layout(read_sizes(data), fields["min_numel"], fields["bucket_size"]),
        key=Key(fields["seed"], fields["rank"], fields["step"], fields["stream"]),
        codebook_hash=fields["codebook_hash"],
        inline=inline,
    )


def check_codebook(header: Header, codebook: Codebook) -> None:
    """Raises PayloadError unless a payload without a codebook was made with this one."""
    ours = (codebook.coder, codebook.levels.num_levels, codebook.hash)
    theirs = f"{header.coder} {header.num_levels} {header.codebook_hash:016x}"
    same = (header.coder, header.num_levels, header.codebook_hash) == ours
    expect(same, f"codebook is {theirs}, the decoder's is {codebook}")
