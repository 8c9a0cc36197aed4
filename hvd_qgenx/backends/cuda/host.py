"""What the compiled core does for a device: it writes and checks all of a payload but the buckets."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, byref, c_double, c_float, c_int, c_uint8, c_uint32, c_uint64
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hvd_qgenx.backends import compiled as core
from hvd_qgenx.codebook import CODERS, Codebook, huffman, make_code
from hvd_qgenx.key import Key
from hvd_qgenx.layout import Layout
from hvd_qgenx.levels import Levels
from hvd_qgenx.payload import CHECKSUM, FIXED, INLINE, inline_bytes, read_fields


class Places(Structure):
    """Where a payload's sections begin, in bytes, and how many buckets it has."""

    _fields_ = [
        ("raw", c_uint64),
        ("norms", c_uint64),
        ("lengths", c_uint64),
        ("coded", c_uint64),
        ("buckets", c_uint64),
    ]


class Begun(NamedTuple):
    """A payload with header and raw segments; what raw segments say."""

    places: Places
    raw_squares: float
    spoiled: ctypes.Array


def begin(
    codebook: Codebook, norm: str, layout: Layout, key: Key, raw: Sequence[Tensor], out: Tensor, inline: bool
) -> Begun:
    """Writes header and raw segments; ``raw`` are on the CPU."""
    following = iter(raw)
    pointers = [next(following).data_ptr() if size < layout.min_numel else 0 for size in layout.sizes]
    places, squares, spoiled = Places(), c_double(), (c_uint8 * len(layout.sizes))()
    core._call(
        "qgenx_begin", byref(core._codebook(codebook)), byref(core._layout(layout)),
        byref(core._encoding(key, norm, inline)), core._integers(pointers), core._pointer(out, torch.uint8),
        c_uint64(len(out)), byref(places), byref(squares), spoiled, _path(),
    )  # fmt: skip
    return Begun(places, squares.value, spoiled)


def spoil(layout: Layout, norms: np.ndarray, spoiled: ctypes.Array | None) -> bool:
    """Makes the norms of segments with one that is not finite NaN; says whether there was any."""
    found = c_int()
    address = ctypes.c_void_p(norms.ctypes.data)
    core._call("qgenx_spoil", byref(core._layout(layout)), address, spoiled, byref(found))
    return bool(found.value)


def seal(out: Tensor, coded_end: int) -> int:
    """Writes size and checksum of a payload whose code ends there; its size comes back."""
    size = coded_end + CHECKSUM.size
    threads = c_int(torch.get_num_threads())
    core._library().qgenx_seal(core._pointer(out, torch.uint8), c_uint64(size), threads, _path())
    return size


def add_raw(payload: Tensor, start: int, total: np.ndarray, add: bool, divisor: float, factor: float) -> None:
    """Adds the raw coordinates that begin at this byte of a payload to float32 ones, or to zeros, and finishes."""
    core._library().qgenx_add_raw(
        ctypes.c_void_p(payload.data_ptr() + start), c_uint64(len(total)), ctypes.c_void_p(total.ctypes.data),
        c_int(add), c_float(divisor), c_float(factor),
    )  # fmt: skip


class Located(NamedTuple):
    """What payloads hold for a target, checked but for their code words.

    Attributes:
        places: of each payload.
        raws, buckets: int64[K, S], the first raw coordinate, or the first bucket, of each section; -1 where none.
        most: float64[S], more than any sum can come to; NaN where a payload says NaN.
    """

    places: ctypes.Array
    raws: np.ndarray
    buckets: np.ndarray
    most: np.ndarray


def locate(
    codebook: Codebook, payloads: Sequence[Tensor], lengths: Sequence[int],
    sections: Sequence[Sequence[int]] | None, factor: float,
) -> Located:  # fmt: skip
    """Checks payloads as ``decode_mean`` of the core does, with the same errors."""
    count, segments = len(payloads), len(lengths)
    chosen = None if sections is None else core._places(sections, segments)
    target = core._Target(core._integers(lengths), None, chosen and ctypes.addressof(chosen), segments)
    places = (Places * count)()
    raws, buckets = np.empty((count, segments), np.int64), np.empty((count, segments), np.int64)
    most = np.empty(segments)
    core._call(
        "qgenx_locate", byref(core._codebook(codebook)), core._integers([one.data_ptr() for one in payloads]),
        core._integers(list(map(len, payloads))), c_uint32(count), byref(target), c_float(count), c_float(factor),
        places, *(array.ctypes.data_as(ctypes.c_void_p) for array in (raws, buckets, most)), _path(),
    )  # fmt: skip
    return Located(places, raws, buckets, most)


def codebook_of(payload: Tensor, ours: Codebook) -> Codebook:
    """A checked payload's own codebook, or ours if it brings none."""
    data = memoryview(payload.numpy().data)
    fields = read_fields(data)
    if not fields["flags"] & INLINE:
        return ours
    s, coder = fields["num_levels"], CODERS[fields["coder"]]
    levels = Levels((0.0, *np.frombuffer(data, "<f4", s, FIXED.size).tolist()))
    lengths = tuple(data[FIXED.size + 4 * s : FIXED.size + inline_bytes(levels)])
    own = Codebook(coder, levels, huffman(lengths) if coder == "huffman" else make_code(coder, s))
    return ours if own == ours else own


def _path() -> c_int:
    return c_int(core._PATHS[core.best_path()])


__all__ = ["Begun", "Located", "Places", "begin", "codebook_of", "locate", "seal", "spoil"]
