"""Vectors on a device that has no kernels for them: coded by the core, in kept memory that the device itself copies to.

While one group of segments is coded, the next ones are on their way from the device, and the last means on their way
back. For that the groups are ``announced`` before the first is encoded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hvd_qgenx.backends.backend import Backend
from hvd_qgenx.backends.compiled import Compiled, best_path
from hvd_qgenx.backends.cuda.device import Device
from hvd_qgenx.backends.cuda.resident import check_pointers, check_segments
from hvd_qgenx.backends.failures import failures_of
from hvd_qgenx.payload import read_sizes

#: Groups under way from the device beside the one that is coded; and means under way to it beside that which is made.
AHEAD, BEHIND = 2, 1


class Slots:
    """Kept float32 memory, which copies take in turn. Arguments: the device, how many slots."""

    def __init__(self, device: Device, count: int):
        self._device = device
        self._memory: list[Tensor | None] = [None] * count
        self._waits: list[Callable[[], None] | None] = [None] * count
        self._next = 0

    def take(self, sizes: Sequence[int]) -> tuple[int, list[Tensor]]:
        """The next slot's number and a tensor of each size in it; waits until its last copy is done."""
        slot, numel = self._next, sum(sizes)
        self._next = (slot + 1) % len(self._memory)
        self.wait(slot)
        memory = self._memory[slot]
        if memory is None or memory.numel() < numel:
            memory = self._memory[slot] = self._device.pinned(4 * numel).view(torch.float32)
        return slot, list(memory[:numel].split(list(sizes)))

    def busy(self, slot: int, wait: Callable[[], None]) -> None:
        """A copy from or to this slot was started, which ``wait`` waits for."""
        self._waits[slot] = wait

    def wait(self, slot: int) -> None:
        wait, self._waits[slot] = self._waits[slot], None
        if wait is not None:
            wait()


class Staged(Backend):
    """Vectors on one kind of device. Arguments: the device."""

    def __init__(self, device: Device):
        self.device, self.name = device, f"{device.name}, staged"
        self._core = Compiled(best_path())
        self._coming: deque[Sequence[Tensor]] = deque()
        self._fetched: deque[tuple[Sequence[Tensor], int, list[Tensor]]] = deque()
        self._down, self._up = Slots(device, AHEAD + 1), Slots(device, BEHIND + 1)

    @contextmanager
    def announced(self, groups: Sequence[Sequence[Tensor]]) -> Iterator[None]:
        with failures_of(self.name, falls_back=False):
            self._coming.extend(groups)
            try:
                self._fetch_ahead()
                yield
            finally:
                # What was not encoded may be other values when it is.
                self._coming.clear()
                self._fetched.clear()

    def encode(self, codebook, norm, layout, key, segments, out, inline):
        check_segments(segments, layout)
        with failures_of(self.name, falls_back=False):
            return self._core.encode(codebook, norm, layout, key, self._on_the_cpu(segments), out, inline)

    def decode_mean(self, codebook, payloads, targets, sections=None, factor=1.0):
        check_pointers(targets)
        with failures_of(self.name, falls_back=False):
            slot, copies = self._up.take(list(map(Tensor.numel, targets)))
            broken = self._core.decode_mean(codebook, payloads, copies, sections, factor)
            there = _there(payloads, len(targets), sections)
            pairs = [
                (target.view(-1), copy) for target, copy, found in zip(targets, copies, there, strict=True) if found
            ]
            if pairs:
                self._up.busy(slot, self.device.copy_aside(pairs, pairs[0][0].device))
            return broken

    def parse(self, payload, numel=None):
        return self._core.parse(payload, numel)

    def statistics(self, norm, layout, segments, form):
        check_segments(segments, layout)
        with failures_of(self.name, falls_back=False):
            return self._core.statistics(norm, layout, self._on_the_cpu(segments), form)

    def squared_error(self, vector, decoded):
        with failures_of(self.name, falls_back=False):
            return self._core.squared_error(vector.cpu(), decoded.cpu())

    def _on_the_cpu(self, segments: Sequence[Tensor]) -> list[Tensor]:
        """Copies of segments; those that come next are started before these are waited for."""
        if not (self._fetched and _are_same(self._fetched[0][0], segments)):
            self._coming.clear()
            self._fetched.clear()
            self._fetch(segments)
        _, slot, copies = self._fetched.popleft()
        self._fetch_ahead()
        self._down.wait(slot)
        return copies

    def _fetch_ahead(self) -> None:
        while self._coming and len(self._fetched) < AHEAD:
            self._fetch(self._coming.popleft())

    def _fetch(self, segments: Sequence[Tensor]) -> None:
        slot, copies = self._down.take(list(map(Tensor.numel, segments)))
        pairs = [(copy, one.reshape(-1)) for copy, one in zip(copies, segments, strict=True) if one.numel()]
        if pairs:
            self._down.busy(slot, self.device.copy_aside(pairs, pairs[0][1].device))
        self._fetched.append((segments, slot, copies))


def _are_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    def places(segments: Sequence[Tensor]) -> list[tuple[int, int]]:
        return [(segment.data_ptr(), segment.numel()) for segment in segments]

    return places(first) == places(second)


def _there(payloads: Sequence[Tensor], count: int, sections: Sequence[Sequence[int]] | None) -> list[bool]:
    """For each target whether any checked payload has coordinates of it; others are left as they are."""
    there = [False] * count
    for number, payload in enumerate(payloads):
        sizes = read_sizes(memoryview(payload.numpy().data))
        places = range(count) if sections is None else sections[number]
        for target, section in enumerate(places):
            there[target] = there[target] or (section >= 0 and sizes[section] > 0)
    return there
