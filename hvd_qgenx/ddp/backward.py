"""What a backward brings: DDP's buckets, and of all parameters, in the model's order, their gradients."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvd_qgenx.codec import as_segment, check_gradient
from hvd_qgenx.exchange.allgather import spoil
from hvd_qgenx.exchange.plan import Flight


@dataclass
class Bucket:
    """One of DDP's buckets: its flat gradient, which the mean replaces, and the promise to DDP."""

    buffer: Tensor
    parameters: list[Tensor]
    promise: Any
    #: Parts that have not been decoded yet.
    missing: set[int] = field(default_factory=set)
    #: Two threads may find that a backward has failed.
    lock: Any = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, bucket: Any) -> Bucket:
        buffer = check_gradient(bucket.buffer())
        devices: Any = [buffer.device] if buffer.is_cuda else None
        return cls(buffer, bucket.parameters(), torch.futures.Future(devices=devices))

    def deliver(self, what: Tensor | BaseException) -> None:
        """Keeps the promise, unless it has been kept."""
        with self.lock:
            if not self.promise.done():
                self.promise.set_result(what)

    def gradients(self) -> Sequence[Tensor]:
        """Flat, one for each parameter: views of the buffer."""
        return self.buffer.split([p.numel() for p in self.parameters])


class Backward:
    """What a backward has brought so far: buckets, and of all parameters, in the model's order, their gradients."""

    def __init__(
        self,
        count: int,
        buckets: Sequence[Bucket] = (),
        is_streamed: bool = False,
        failure: BaseException | None = None,
    ):
        self.buckets = list(buckets)
        #: Whether parts are sent as they are there; decided once, since the last part's landing may make levels due.
        #: No more once it has failed.
        self.is_streamed = is_streamed
        #: Why it comes to nothing.
        self.failure = failure
        self.gradients: list[Tensor | None] = [None] * count
        #: What is encoded of a gradient, and decoded into: itself, if it is float32 on the CPU.
        self.segments: list[Tensor | None] = [None] * count
        self.flights: dict[int, Flight] = {}
        self.landed = 0
        self.broken = [False] * count

    def segment(self, index: int) -> Tensor:
        found = self.segments[index]
        if found is None:
            gradient = self.gradients[index]
            assert gradient is not None
            found = self.segments[index] = as_segment(gradient)
        return found

    def is_there(self, indices: Iterable[int]) -> bool:
        return all(self.gradients[index] is not None for index in indices)

    def give_back(self, indices: Iterable[int]) -> None:
        """Means that were not decoded into the bucket itself go there."""
        for index in indices:
            gradient, segment = self.gradients[index], self.segment(index)
            assert gradient is not None
            spoil([segment], (self.broken[index],))
            if segment.data_ptr() != gradient.data_ptr():
                gradient.copy_(segment.view(gradient.shape))
