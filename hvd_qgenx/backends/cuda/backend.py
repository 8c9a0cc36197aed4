"""The five functions on a device: kernels do the buckets, the compiled core the rest, and payloads lie on the CPU.

A gradient never comes to the host: its norms, lengths and code do, each section to its place in the payload. Before the
first bucket of a received payload is read the host has checked all but the code words.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hvd_qgenx.backends.backend import Backend, Drawn, device_of
from hvd_qgenx.backends.compiled import Compiled, best_path
from hvd_qgenx.backends.cuda import host
from hvd_qgenx.backends.cuda.device import Device, DeviceError
from hvd_qgenx.backends.cuda.failures import failures_of
from hvd_qgenx.backends.cuda.jobs import (
    ADD,
    BUCKET,
    COPIES,
    FINISH,
    MOST_WARPS,
    ROW_BYTES,
    TILE,
    WARPS,
    Book,
    DecodeJob,
    EncodeJob,
    GatherJob,
    MeasureJob,
    tables_of,
)
from hvd_qgenx.codebook import Codebook
from hvd_qgenx.fitting import NUM_BINS
from hvd_qgenx.layout import Layout, layout_of
from hvd_qgenx.levels import MAX_LEVELS
from hvd_qgenx.payload import CHECKSUM, read_fields, read_sizes

_LARGEST = float(np.finfo(np.float32).max)
_INFINITE = 0x7F800000  # as bits
_BLOCK = 2**22  # coordinates of a squared error at once
_WEIGHT_BITS, _NO_WEIGHT = 20, -(2**15)
_TABLES_BYTES = 2 * 512 + 64 + 400 + 512 + 512  # the kernels' ``Tables``
_FEW_WORDS = TILE * 8 // 32 + 2  # of a bucket's code under few levels, at most


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
        return (self.num_buckets, 32 * self.warps) if self.wide else _grid(self.num_buckets)


def _grid(buckets: int) -> tuple[int, int]:
    """One warp for every bucket."""
    return -(-buckets // WARPS), 32 * WARPS


class Kernels(Backend):
    """Vectors on one kind of device. Arguments: the device."""

    def __init__(self, device: Device):
        self.device, self.name = device, device.name
        self._core = Compiled(best_path())
        # A cache of this object's, so that it ends with it.
        self._cut = lru_cache(maxsize=64)(self._cut)  # type: ignore[method-assign]
        self._tables = lru_cache(maxsize=16)(self._tables)  # type: ignore[method-assign]

    # ---- what is kept on a device ------------------------------------------------------------------------------------

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

    def _tables(self, codebook: Codebook, where: torch.device) -> tuple[Tensor, ...]:
        tables = tables_of(codebook)
        return tuple(self.device.upload(array, where) for array in (tables.symbols, tables.values, tables.bins))

    def _book(self, codebook: Codebook, where: torch.device) -> Book:
        book = Book.from_buffer_copy(tables_of(codebook).book)
        book.symbols, book.values, book.bins = map(Tensor.data_ptr, self._tables(codebook, where))
        return book

    # ---- encode ------------------------------------------------------------------------------------------------------

    def encode(self, codebook, norm, layout, key, segments, out, inline):
        with failures_of(self.name):
            return self._encode(codebook, norm, layout, key, segments, out, inline)
        with failures_of(self.name, falls_back=False):
            copies = [segment.cpu() for segment in segments]
            return self._core.encode(codebook, norm, layout, key, copies, out, inline)

    def _encode(self, codebook, norm, layout, key, segments, out, inline):
        check_segments(segments, layout)
        where = device_of(segments, out.device)
        coding = _Coding(self, codebook, norm, layout, key, segments, where)
        raw = [segment.reshape(-1) for segment in segments if segment.numel() < layout.min_numel]
        raw = torch.cat(raw).cpu().split(list(map(len, raw))) if raw else []
        begun = host.begin(codebook, norm, layout, key, raw, out, inline)
        if not coding.cut.num_buckets:
            return _drawn(coding, begun, host.seal(out, begun.places.coded))
        coding.start()
        self.device.wait(where)
        if host.spoil(layout, coding.norms, begun.spoiled):
            # Only now is it known that all buckets of a segment must be NaN: rare enough to code everything again.
            coding.start(again=True)
            self.device.wait(where)
        end = coding.deliver(begun.places, out)
        self.device.wait(where)
        return _drawn(coding, begun, host.seal(out, end))

    # ---- decode ------------------------------------------------------------------------------------------------------

    def decode_mean(self, codebook, payloads, targets, sections=None, factor=1.0):
        with failures_of(self.name):
            return self._decode_mean(codebook, payloads, targets, sections, factor)
        with failures_of(self.name, falls_back=False):
            copies = [target.cpu() for target in targets]
            broken = self._core.decode_mean(codebook, payloads, copies, sections, factor)
            for target, copy in zip(targets, copies, strict=True):
                target.copy_(copy)
            return broken

    def _decode_mean(self, codebook, payloads, targets, sections, factor):
        check_pointers(targets)
        lengths = list(map(Tensor.numel, targets))
        located = host.locate(codebook, payloads, lengths, sections, factor)
        where = device_of(targets, torch.device("cpu"))
        decoding = _Decoding(self, codebook, payloads, targets, located, where, factor)
        for first, end in decoding.groups():
            decoding.add(first, end)
        if decoding.refused():
            self._blame(codebook, payloads, targets, sections, factor)
        return tuple(map(_is_broken, located.most.tolist(), targets))

    def _blame(self, codebook, payloads, targets, sections, factor) -> None:
        """Raises what the core says of payloads that a kernel has refused."""
        copies = [torch.zeros(target.numel(), dtype=torch.float32, device="cpu") for target in targets]
        self._core.decode_mean(codebook, payloads, copies, sections, factor)
        raise DeviceError(f"{self.name} refuses a payload that the CPU can read: its memory or its kernels are damaged")

    def parse(self, payload, numel=None):
        return self._core.parse(payload, numel)

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def statistics(self, norm, layout, segments, form):
        with failures_of(self.name):
            return self._statistics(norm, layout, segments, form)
        with failures_of(self.name, falls_back=False):
            return self._core.statistics(norm, layout, [segment.cpu() for segment in segments], form)

    def _statistics(self, norm, layout, segments, form):
        check_segments(segments, layout)
        where = device_of(segments, torch.device("cpu"))
        cut, size = self._cut(layout, where), NUM_BINS if form == "histogram" else 3
        sums = torch.zeros(2, COPIES, size, dtype=torch.int64, device=where)
        if not cut.num_buckets:
            return _NO_WEIGHT, *sums.sum(dim=1).cpu()
        pointers = self._pointers(segments, where)
        norms = torch.empty(cut.num_buckets, dtype=torch.float32, device=where)
        job = MeasureJob(
            cut.buckets.data_ptr(), pointers.data_ptr(), cut.num_buckets, norms.data_ptr(), linf=norm == "linf"
        )
        self.device.launch("norms", job, where, *_grid(cut.num_buckets), 0)
        found = norms.cpu().numpy().copy()
        host.spoil(layout, found, None)
        exponent, weights = _weights(found)
        kept = self.device.upload(np.concatenate([found.view(np.uint32), weights]), where)
        job.norms, job.weights = kept.data_ptr(), kept.data_ptr() + 4 * cut.num_buckets
        job.weighted, job.plain = sums[0].data_ptr(), sums[1].data_ptr()
        shared = 4 * (NUM_BINS + 3) * WARPS if form == "histogram" else 0
        self.device.launch(
            "histogram" if form == "histogram" else "moments", job, where, *_grid(cut.num_buckets), shared
        )
        return exponent, *sums.sum(dim=1).cpu()

    def squared_error(self, vector, decoded):
        sums = torch.zeros(2, dtype=torch.float64, device=vector.device)
        for value, found in zip(vector.split(_BLOCK), decoded.split(_BLOCK), strict=True):
            finite = found.isfinite()
            value, found = value[finite].double(), found[finite].double()
            sums += torch.stack([(found - value).square().sum(), value.square().sum()])
        return tuple(sums.tolist())

    def _pointers(self, segments: Sequence[Tensor], where: torch.device) -> Tensor:
        return self.device.upload(np.asarray([segment.data_ptr() for segment in segments], np.int64), where)


class _Coding:
    """One encoding: what its kernels are told and what they tell.

    A report has, for each bucket, the norm, the length of the code and two sums; and how often each index was drawn.
    """

    def __init__(self, backend: Kernels, codebook, norm, layout: Layout, key, segments, where: torch.device):
        self.device, self.where = backend.device, where
        self.cut, self.tables = backend._cut(layout, where), tables_of(codebook)
        self.layout, self.num_levels = layout, codebook.levels.num_levels
        count = self.cut.num_buckets
        self._pointers = backend._pointers(segments, where)
        most = codebook.code.most_bytes(layout.bucket_size)
        self.stride = _aligned(most) // 4
        places = np.cumsum([0, 16 * count, 8 * COPIES * (MAX_LEVELS + 1), 4 * count, 2 * count])
        self._sums, self._counts, self._norms, self._lengths, self._size = map(int, places)
        self._report = torch.empty(self._size, dtype=torch.uint8, device=where)
        self._arrived = self.device.pinned(self._size)
        self._codes = torch.empty(count * self.stride, dtype=torch.int32, device=where)
        self._bytes = torch.empty(count * self.stride * 4, dtype=torch.uint8, device=where)
        address = self._report.data_ptr()
        self.job = EncodeJob(
            backend._book(codebook, where), self.cut.buckets.data_ptr(), self._pointers.data_ptr(), count,
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
        words = self.stride + 2 if wide or search == "any" else _FEW_WORDS
        self.device.launch(
            "encode_wide" if wide else f"encode_{search}", self.job, self.where, *self.cut.grid(),
            _TABLES_BYTES + _room(words, self.cut),
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
        self.device.launch("gather", job, self.where, *_grid(self.cut.num_buckets), 0)

    def deliver(self, places: host.Places, out: Tensor) -> int:
        """Norms, lengths and codes to their places in the payload; where the code ends comes back."""
        count, total = self.cut.num_buckets, int(self.lengths.sum(dtype=np.int64))
        end = places.coded + total
        out[places.coded : end].copy_(self._bytes[:total], non_blocking=True)
        out[places.norms : places.norms + 4 * count] = self._arrived[self._norms : self._lengths]
        if places.lengths:
            out[places.lengths : places.lengths + 2 * count] = self._arrived[self._lengths :]
        return end


def _drawn(coding: _Coding, begun: host.Begun, size: int) -> Drawn:
    """In the buckets' order, as the core adds; spoiled segments have no part in the sums."""
    if not coding.cut.num_buckets:
        counts = torch.zeros(coding.num_levels + 1, dtype=torch.int64, device="cpu")
        return Drawn(size, counts, 0.0, begun.raw_squares, tuple(map(bool, begun.spoiled)))
    sums = coding.sums[np.isfinite(coding.norms)]
    error = np.cumsum(np.concatenate([[0.0], sums[:, 0]]))[-1]
    squares = np.cumsum(np.concatenate([[begun.raw_squares], sums[:, 1]]))[-1]
    return Drawn(size, coding.counts, float(error), float(squares), tuple(map(bool, begun.spoiled)))


class _Decoding:
    """One mean: its payloads' sections on the device, and the kernels that add them."""

    def __init__(self, backend: Kernels, codebook, payloads, targets, located: host.Located, where, factor: float):
        self.backend, self.device, self.where = backend, backend.device, where
        self.payloads, self.targets, self.located = payloads, targets, located
        self.fields = [read_fields(memoryview(payload.numpy().data)) for payload in payloads]
        self.books = [host.codebook_of(payload, codebook) for payload in payloads]
        self.divisor, self.factor = float(len(payloads)), factor
        self.there = (located.raws >= 0) | (located.buckets >= 0)
        self._pointers = backend._pointers(targets, where)
        self._wrong = torch.zeros(1, dtype=torch.int32, device=where)
        self._kept: list[Tensor] = []  # until kernels are done

    def groups(self) -> list[tuple[int, int]]:
        """Payloads, from and up to, that are cut alike and have one codebook."""
        cuts = [(fields["min_numel"], fields["bucket_size"]) for fields in self.fields]
        groups, start = [], 0
        for _, members in groupby(zip(cuts, self.books, strict=True)):
            end = start + len(list(members))
            groups.append((start, end))
            start = end
        return groups

    def add(self, first: int, end: int) -> None:
        """Adds a group of payloads to the targets."""
        todo = ADD * self.there[:first].any(axis=0) + FINISH * ~self.there[end:].any(axis=0)
        self._add_raw(first, end, todo)
        self._add_coded(first, end, todo.astype(np.uint8))

    def refused(self) -> bool:
        """Whether a kernel found bytes that are no code; waits for all of them."""
        pinned = self.device.pinned(4)
        pinned.copy_(self._wrong.view(torch.uint8), non_blocking=True)
        self.device.wait(self.where)
        self._kept.clear()
        return bool(pinned.any())

    # Raw segments are small by intent: their means are made on the host, in the core's order.

    def _add_raw(self, first: int, end: int, todo: np.ndarray) -> None:
        segments = np.flatnonzero((self.located.raws[first:end] >= 0).any(axis=0)).tolist()
        if not segments:
            return
        sums = [self._raw_sum(segment, first, end, int(todo[segment])) for segment in segments]
        flat = self._keep(self.device.upload(np.concatenate(sums), self.where)).view(torch.float32)
        for segment, total in zip(segments, flat.split(list(map(len, sums))), strict=True):
            self.targets[segment].view(-1).copy_(total)

    def _raw_sum(self, segment: int, first: int, end: int, todo: int) -> np.ndarray:
        target, add = self.targets[segment].view(-1), bool(todo & ADD)
        # A section that another payload has coded is on the device already; that happens between unlike settings alone.
        total = target.cpu().numpy().copy() if add else np.zeros(target.numel(), np.float32)
        found = [(payload, int(self.located.raws[payload, segment])) for payload in range(first, end)]
        found = [(payload, raw) for payload, raw in found if raw >= 0]
        for payload, raw in found:
            last = todo & FINISH and payload == found[-1][0]
            start = self.located.places[payload].raw + 4 * raw
            finish = (self.divisor, self.factor) if last else (1.0, 1.0)
            host.add_raw(self.payloads[payload], start, total, add or payload != found[0][0], *finish)
        return total

    def _add_coded(self, first: int, end: int, todo: np.ndarray) -> None:
        layout = self._layout(first)
        cut = self.backend._cut(layout, self.where)
        if not cut.num_buckets:
            return
        sections = _Sections(self, first, end, todo)
        on_device = self._keep(sections.upload())
        tables, address = tables_of(self.books[first]), on_device.data_ptr()
        few = tables.few and not cut.wide
        job = DecodeJob(
            self.backend._book(self.books[first], self.where), cut.buckets.data_ptr(), self._pointers.data_ptr(),
            cut.num_buckets,
            address + sections.at("coded"), sections.num_words, sections.ends(on_device).data_ptr(),
            address + sections.at("lengths"), address + sections.at("norms"), address + sections.at("sources"),
            address + sections.at("todo"), self._wrong.data_ptr(), end - first, len(self.targets), layout.bucket_size,
            self.divisor, self.factor, _inverse(len(self.payloads)), cut.warps,
        )  # fmt: skip
        kernel = "decode_wide" if cut.wide else "decode_few" if few else "decode_any"
        most = self.books[first].code.most_bytes(min(layout.bucket_size, TILE * cut.warps))
        marks = 4 * (32 * cut.warps + 2) * (1 if cut.wide else WARPS)
        shared = 1024 + _aligned(marks) + _room(_FEW_WORDS if few else -(-most // 4) + 3, cut)
        self.device.launch(kernel, job, self.where, *cut.grid(), shared)

    def _layout(self, payload: int) -> Layout:
        """The target, cut as that payload is."""
        fields = self.fields[payload]
        return layout_of(tuple(map(Tensor.numel, self.targets)), fields["min_numel"], fields["bucket_size"])

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        return tensor


class _Sections:
    """Sections of a group's payloads, one behind another, as they go to the device in one copy.

    Norms, first source buckets, what to do with each segment, lengths, code: each kind begins at 16 bytes.
    """

    def __init__(self, decoding: _Decoding, first: int, end: int, todo: np.ndarray):
        self.decoding, self.first, self.end = decoding, first, end
        self.places = decoding.located.places[first:end]
        counts = [place.buckets for place in self.places]
        self.count = sum(counts)
        buckets = decoding.located.buckets[first:end]
        before = np.cumsum([0, *counts[:-1]], dtype=np.int64)[:, None]
        self._arrays = {"sources": np.where(buckets >= 0, buckets + before, -1), "todo": todo}
        sizes = {
            "norms": 4 * self.count, "sources": self._arrays["sources"].nbytes, "todo": len(todo),
            "lengths": 2 * self.count, "coded": sum(self._coded(i).numel() for i in range(end - first)),
        }  # fmt: skip
        starts = np.cumsum([0, *map(_aligned, sizes.values())]).tolist()
        self._starts, self._size = dict(zip(sizes, starts, strict=False)), starts[-1]
        self.num_words = -(-sizes["coded"] // 4)

    def at(self, kind: str) -> int:
        return self._starts[kind]

    def upload(self) -> Tensor:
        device = self.decoding.device
        staging = device.pinned(self._size)
        for kind, array in self._arrays.items():
            staging[self.at(kind) : self.at(kind) + array.nbytes].numpy()[:] = array.reshape(-1).view(np.uint8)
        for kind, parts in (("norms", self._norms), ("lengths", self._lengths), ("coded", self._coded)):
            start = self.at(kind)
            for payload in range(self.end - self.first):
                part = parts(payload)
                staging[start : start + len(part)] = part
                start += len(part)
        return self.decoding._keep(staging).to(self.decoding.where, non_blocking=True, copy=True)

    def ends(self, on_device: Tensor) -> Tensor:
        """int64, where each source bucket's code ends."""
        lengths = on_device[self.at("lengths") :][: 2 * self.count].view(torch.int16)
        return self.decoding._keep((lengths.long() & 0xFFFF).cumsum(0))

    def _payload(self, number: int) -> tuple[Tensor, host.Places]:
        return self.decoding.payloads[self.first + number], self.places[number]

    def _norms(self, number: int) -> Tensor:
        payload, place = self._payload(number)
        return payload[place.norms : place.norms + 4 * place.buckets]

    def _lengths(self, number: int) -> Tensor:
        payload, place = self._payload(number)
        if place.lengths:
            return payload[place.lengths : place.lengths + 2 * place.buckets]
        # The fixed code's lengths do not travel: they are known from the sizes.
        fields = self.decoding.fields[self.first + number]
        sizes = read_sizes(memoryview(payload.numpy().data))
        counts = np.asarray(layout_of(sizes, fields["min_numel"], fields["bucket_size"]).bucket_lengths(), np.int64)
        width = self.decoding.books[self.first].code.width
        return torch.from_numpy(_fixed_bytes(counts, width, self._norms(number)).astype("<u2").view(np.uint8))

    def _coded(self, number: int) -> Tensor:
        payload, place = self._payload(number)
        return payload[place.coded : len(payload) - CHECKSUM.size]


def _inverse(count: int) -> float:
    """1 / count where a float32 times it rounds to the quotient in float32: the kernels' ``finished``. Else 0."""
    return 1 / count if count % 2 or count & (count - 1) == 0 else 0.0


def _fixed_bytes(counts: np.ndarray, width: int, norms: Tensor) -> np.ndarray:
    # A bucket whose norm says all has no code.
    bits = norms.clone().view(torch.int32).numpy()
    return (counts * width + 7) // 8 * ((bits > 0) & (bits <= _INFINITE))


def _is_broken(most: float, target: Tensor) -> bool:
    """Whether a mean is not finite; it is looked at only where that is possible at all."""
    if most < _LARGEST:
        return False
    return math.isnan(most) or not bool(target.isfinite().all())


def _weights(norms: np.ndarray) -> tuple[int, np.ndarray]:
    """What a bucket counts for, its squared norm in units of 2**exponent, as uint32; as the core has it."""
    squares = np.where(np.isfinite(norms), norms.astype(np.float64) ** 2, 0.0)
    heaviest = float(squares.max())
    exponent = math.frexp(heaviest)[1] - _WEIGHT_BITS if heaviest > 0 else _NO_WEIGHT
    return exponent, np.ldexp(squares, -exponent).astype(np.uint32) if heaviest > 0 else np.zeros(len(norms), np.uint32)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


def _room(words: int, cut: Cut) -> int:
    """Bytes of shared memory of a block for rows of bytes and codes of ``words`` words: the kernels' ``room_of``."""
    rows, code = ROW_BYTES * cut.warps, 4 * ((words + 7) // 4 * 4)
    both = max(rows, code) if cut.wide else WARPS * (ROW_BYTES + code)
    return _aligned(4 * (MOST_WARPS + 4)) + 8 * 16 + _aligned(both)


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
