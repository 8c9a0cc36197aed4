"""One encoding on a device."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from hvd_qgenx.backends.backend import Drawn
from hvd_qgenx.backends.cuda import host
from hvd_qgenx.backends.cuda.jobs import COPIES, EncodeJob, GatherJob, tables_of
from hvd_qgenx.backends.cuda.resident import FEW_WORDS, Resident, aligned, grid, room
from hvd_qgenx.layout import Layout
from hvd_qgenx.levels import MAX_LEVELS

_TABLES_BYTES = 2 * 512 + 64 + 400 + 512 + 512  # the kernels' ``Tables``


class Encoding:
    """What the kernels of one encoding are told and what they tell.

    A report has, for each bucket, the norm, the length of the code and two sums; and how often each index was drawn.
    """

    def __init__(self, resident: Resident, codebook, norm, layout: Layout, key, segments, where: torch.device):
        self.device, self.where = resident.device, where
        self.cut, self.tables = resident.cut(layout, where), tables_of(codebook)
        self.layout, self.num_levels = layout, codebook.levels.num_levels
        count = self.cut.num_buckets
        self._pointers = resident.pointers(segments, where)
        most = codebook.code.most_bytes(layout.bucket_size)
        self.stride = aligned(most) // 4
        places = np.cumsum([0, 16 * count, 8 * COPIES * (MAX_LEVELS + 1), 4 * count, 2 * count])
        self._sums, self._counts, self._norms, self._lengths, self._size = map(int, places)
        self._report = torch.empty(self._size, dtype=torch.uint8, device=where)
        self._arrived = self.device.pinned(self._size)
        self._codes = torch.empty(count * self.stride, dtype=torch.int32, device=where)
        self._bytes = torch.empty(count * self.stride * 4, dtype=torch.uint8, device=where)
        address = self._report.data_ptr()
        self.job = EncodeJob(
            resident.book(codebook, where), self.cut.buckets.data_ptr(), self._pointers.data_ptr(), count,
            address + self._norms, address + self._lengths, self._codes.data_ptr(), address + self._sums,
            address + self._counts,
            (ctypes.c_uint * 2)(*key.pair), self.stride, norm == "linf", 0, self.cut.warps,
        )  # fmt: skip

    @property
    def norms(self) -> np.ndarray:
        return self._arrived[self._norms : self._lengths].numpy().view(np.float32)

    def _told(self, start: int, end: int, dtype: type) -> np.ndarray:
        return self._arrived[start:end].numpy().view(dtype)

    @property
    def lengths(self) -> np.ndarray:
        return self._told(self._lengths, self._size, np.uint16)

    @property
    def counts(self) -> Tensor:
        found = self._told(self._counts, self._norms, np.int64).reshape(COPIES, -1).sum(axis=0)
        return torch.from_numpy(found[: self.num_levels + 1].copy())

    @property
    def sums(self) -> np.ndarray:
        return self._told(self._sums, self._counts, np.float64).reshape(-1, 2)

    def start(self, again: bool = False) -> None:
        """Encodes, moves the codes together and asks for the report."""
        self._report[self._counts : self._norms] = 0
        if again:
            self._report[self._norms : self._lengths].copy_(self._arrived[self._norms : self._lengths])
        self.job.norms_known = again
        wide, search = self.cut.wide, self.tables.search
        words = self.stride + 2 if wide or search == "any" else FEW_WORDS
        self.device.launch(
            "encode_wide" if wide else f"encode_{search}", self.job, self.where, *self.cut.grid(),
            _TABLES_BYTES + room(words, self.cut),
        )  # fmt: skip
        self._gather()
        self._arrived.copy_(self._report, non_blocking=True)

    def _gather(self) -> None:
        lengths = self._report[self._lengths :].view(torch.int16)
        self._ends = (lengths.long() & 0xFFFF).cumsum(0)
        job = GatherJob(
            self._codes.data_ptr(), self._ends.data_ptr(), lengths.data_ptr(), self._bytes.data_ptr(),
            self.cut.num_buckets, self.stride,
        )  # fmt: skip
        self.device.launch("gather", job, self.where, *grid(self.cut.num_buckets), 0)

    def deliver(self, places: host.Places, out: Tensor) -> int:
        """Norms, lengths and codes to their places in the payload; where the code ends comes back."""
        count, total = self.cut.num_buckets, int(self.lengths.sum(dtype=np.int64))
        end = places.coded + total
        out[places.coded : end].copy_(self._bytes[:total], non_blocking=True)
        out[places.norms : places.norms + 4 * count] = self._arrived[self._norms : self._lengths]
        if places.lengths:
            out[places.lengths : places.lengths + 2 * count] = self._arrived[self._lengths :]
        return end

    def drawn(self, begun: host.Begun, size: int) -> Drawn:
        """In the buckets' order, as the core adds; spoiled segments have no part in the sums."""
        if not self.cut.num_buckets:
            counts = torch.zeros(self.num_levels + 1, dtype=torch.int64, device="cpu")
            return Drawn(size, counts, 0.0, begun.raw_squares, tuple(map(bool, begun.spoiled)))
        sums = self.sums[np.isfinite(self.norms)]
        error = np.cumsum(np.concatenate([[0.0], sums[:, 0]]))[-1]
        squares = np.cumsum(np.concatenate([[begun.raw_squares], sums[:, 1]]))[-1]
        return Drawn(size, self.counts, float(error), float(squares), tuple(map(bool, begun.spoiled)))
