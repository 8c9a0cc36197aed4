"""One mean of payloads, made on a device."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from hvd_qgenx.backends.cuda import host
from hvd_qgenx.backends.cuda.jobs import ADD, FINISH, TILE, WARPS, DecodeJob, tables_of
from hvd_qgenx.backends.cuda.resident import FEW_WORDS, Resident, aligned, room
from hvd_qgenx.layout import Layout, layout_of
from hvd_qgenx.payload import CHECKSUM, read_fields, read_sizes

_INFINITE = 0x7F800000  # as bits


class Decoding:
    """The payloads' sections on the device, and the kernels that add them."""

    def __init__(self, resident: Resident, codebook, payloads, targets, located: host.Located, where, factor: float):
        self.resident, self.device, self.where = resident, resident.device, where
        self.payloads, self.targets, self.located = payloads, targets, located
        self.fields = [read_fields(memoryview(payload.numpy().data)) for payload in payloads]
        self.books = [host.codebook_of(payload, codebook) for payload in payloads]
        self.divisor, self.factor = float(len(payloads)), factor
        self.there = (located.raws >= 0) | (located.buckets >= 0)
        self._pointers = resident.pointers(targets, where)
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
        cut = self.resident.cut(layout, self.where)
        if not cut.num_buckets:
            return
        sections = _Sections(self, first, end, todo)
        on_device = self._keep(sections.upload())
        tables, address = tables_of(self.books[first]), on_device.data_ptr()
        few = tables.few and not cut.wide
        job = DecodeJob(
            self.resident.book(self.books[first], self.where), cut.buckets.data_ptr(), self._pointers.data_ptr(),
            cut.num_buckets,
            address + sections.at("coded"), sections.num_words, sections.ends(on_device).data_ptr(),
            address + sections.at("lengths"), address + sections.at("norms"), address + sections.at("sources"),
            address + sections.at("todo"), self._wrong.data_ptr(), end - first, len(self.targets), layout.bucket_size,
            self.divisor, self.factor, _inverse(len(self.payloads)), cut.warps,
        )  # fmt: skip
        kernel = "decode_wide" if cut.wide else "decode_few" if few else "decode_any"
        most = self.books[first].code.most_bytes(min(layout.bucket_size, TILE * cut.warps))
        marks = 4 * (32 * cut.warps + 2) * (1 if cut.wide else WARPS)
        shared = 1024 + aligned(marks) + room(FEW_WORDS if few else -(-most // 4) + 3, cut)
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

    def __init__(self, decoding: Decoding, first: int, end: int, todo: np.ndarray):
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
        starts = np.cumsum([0, *map(aligned, sizes.values())]).tolist()
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
