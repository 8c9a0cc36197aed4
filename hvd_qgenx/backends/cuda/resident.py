"""What is kept on a device from one call to the next, and how its kernels are laid out over buckets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hvd_qgenx.backends.cuda.device import Device
from hvd_qgenx.backends.cuda.jobs import BUCKET, MOST_WARPS, ROW_BYTES, TILE, WARPS, Book, tables_of
from hvd_qgenx.codebook import Codebook
from hvd_qgenx.layout import Layout

FEW_WORDS = TILE * 8 // 32 + 2  # of a bucket's code under few levels, at most


class Cut(NamedTuple):
    """A layout's buckets on a device; a long bucket has a block of several warps."""

    buckets: Tensor
    num_buckets: int
    warps: int

    @property
    def wide(self) -> bool:
        return self.warps > 1

    def grid(self) -> tuple[int, int]:
        """Blocks and threads of a kernel of buckets."""
        return (self.num_buckets, 32 * self.warps) if self.wide else grid(self.num_buckets)


def grid(buckets: int) -> tuple[int, int]:
    """One warp for every bucket."""
    return -(-buckets // WARPS), 32 * WARPS


class Resident:
    """Layouts and codebooks on a device. Arguments: the device."""

    def __init__(self, device: Device):
        self.device = device
        # Caches of this object's, so that they end with it.
        self.cut = lru_cache(maxsize=64)(self._cut)
        self._tables = lru_cache(maxsize=16)(self._uploaded_tables)

    def _cut(self, layout: Layout, where: torch.device) -> Cut:
        sizes = np.asarray(layout.sizes, np.int64)
        coded = np.where(sizes >= layout.min_numel, -(-sizes // layout.bucket_size), 0)
        segment = np.repeat(np.arange(len(sizes)), coded)
        first = np.repeat(np.cumsum(coded) - coded, coded)
        offset = (np.arange(len(segment)) - first) * layout.bucket_size
        buckets = np.empty(len(segment), BUCKET)
        buckets["position"] = (np.cumsum(sizes) - sizes)[segment] + offset
        buckets["offset"], buckets["segment"] = offset, segment
        buckets["count"] = np.minimum(sizes[segment] - offset, layout.bucket_size)
        buckets["number"], buckets["unused"] = np.arange(len(segment)) - first, 0
        longest = int(buckets["count"].max(initial=1))
        return Cut(self.device.upload(buckets, where), len(buckets), -(-longest // TILE))

    def _uploaded_tables(self, codebook: Codebook, where: torch.device) -> tuple[Tensor, ...]:
        tables = tables_of(codebook)
        return tuple(self.device.upload(array, where) for array in (tables.symbols, tables.values, tables.bins))

    def book(self, codebook: Codebook, where: torch.device) -> Book:
        """What kernels are told of a codebook, with its tables on the device."""
        book = Book.from_buffer_copy(tables_of(codebook).book)
        book.symbols, book.values, book.bins = map(Tensor.data_ptr, self._tables(codebook, where))
        return book

    def pointers(self, segments: Sequence[Tensor], where: torch.device) -> Tensor:
        """Where segments lie, as kernels read it."""
        return self.device.upload(np.asarray([segment.data_ptr() for segment in segments], np.int64), where)


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


def room(words: int, cut: Cut) -> int:
    """Bytes of shared memory of a block for rows of bytes and codes of ``words`` words: the kernels' ``room_of``."""
    rows, code = ROW_BYTES * cut.warps, 4 * ((words + 7) // 4 * 4)
    both = max(rows, code) if cut.wide else WARPS * (ROW_BYTES + code)
    return aligned(4 * (MOST_WARPS + 4)) + 8 * 16 + aligned(both)


def check_segments(segments: Sequence[Tensor], layout: Layout) -> None:
    if tuple(map(Tensor.numel, segments)) != layout.sizes:
        found = sum(map(Tensor.numel, segments))
        raise ValueError(f"segments must have the layout's {layout.numel} coordinates, got {found}")
    check_pointers(segments)


def check_pointers(segments: Sequence[Tensor]) -> None:
    """Kernels believe pointers: what they do not fit must stop here."""
    for segment in segments:
        if segment.dtype is not torch.float32 or not segment.is_contiguous():
            raise ValueError(f"the kernels need contiguous torch.float32 tensors, got {segment.dtype}")
    if len(devices := {segment.device for segment in segments if segment.numel()}) > 1:
        raise ValueError(f"segments must lie on one device, got {', '.join(sorted(map(str, devices)))}")
